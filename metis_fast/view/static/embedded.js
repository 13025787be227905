// What the server's routes answer, from the answers that stand in a file. kept: its index; read: a block by its name, or null.

const BINS = 24;
const WHOLE = ["step", "calls", "tokens", "turns", "tool_errors"];
const RANGES = [...WHOLE, "adv_acc", "adv_tool", "r_acc", "r_tool"];
const NEAR = 1e-9;

/** The name of a block of a whole group. */
const group = (kind, query, row) => [kind, query.run, row.step, row.uid].join("\t");

/** Whether a filter wants a row, its text left aside. */
function wanted(row, query) {
  for (const name of RANGES) {
    if (query[`${name}_min`] && row[name] < Number(query[`${name}_min`]) - NEAR) return false;
    if (query[`${name}_max`] && row[name] > Number(query[`${name}_max`]) + NEAR) return false;
  }
  if (["ability", "kind", "outcome", "uid"].some((name) => name in query && row[name] !== query[name])) return false;
  if (query.correct && row.correct !== Number(query.correct)) return false;
  if (query.q && row.qualifies !== (query.q === "1")) return false;
  const { moves_acc: acc, moves_tool: tool } = row;
  return { acc, tool, both: acc && tool, any: acc || tool, none: !(acc || tool) }[query.channel] ?? true;
}

/** Bars as the server makes them: one a value, or 24 of one width. */
export function histogram(name, rows) {
  const values = rows.map((row) => row[name]).sort((a, b) => a - b);
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  if (counts.size <= BINS) return [...counts].map(([value, num]) => ({ low: value, high: value, num }));
  const first = values[0];
  const width = (values.at(-1) - first) / BINS;
  const bars = Array.from({ length: BINS }, (_, i) => ({ low: first + i * width, high: i === BINS - 1 ? values.at(-1) : first + (i + 1) * width, num: 0 }));
  for (const value of values) {
    let place = Math.min(BINS - 1, Math.floor((value - first) / width));
    if (value < bars[place].low) place -= 1;
    else if (place < BINS - 1 && value >= bars[place + 1].low) place += 1;
    bars[place].num += 1;
  }
  if (WHOLE.includes(name)) {
    bars.forEach((bar, i) => Object.assign(bar, { low: Math.ceil(bar.low), high: i < BINS - 1 ? Math.ceil(bar.high) - 1 : bar.high }));
  }
  return bars;
}

async function rollouts(kept, read, query) {
  const { rows, stored, choices, notes } = kept.lists[query.run];
  let found = rows.filter((row) => wanted(row, query));
  const text = (query.text ?? "").trim().toLowerCase();
  if (text) {
    const names = [...new Set(found.map((row) => group("texts", query, row)))];
    const holding = new Set();
    for (const texts of await Promise.all(names.map(read))) {
      for (const [place, own] of Object.entries(texts)) if (own.toLowerCase().includes(text)) holding.add(place);
    }
    found = found.filter((row) => holding.has(`${row.part}\t${row.row}`));
  }
  const order = query.sort || "newest";
  const column = order === "newest" ? "step" : order;
  if (order !== "oldest") found.sort((a, b) => b[column] - a[column]);
  const offset = Number(query.offset || 0);
  return {
    total: found.length, all: rows.length, stored, offset, choices, notes, rule: kept.rule,
    rows: found.slice(offset, offset + Number(query.limit || 50)),
    hist: histogram(query.hist || "calls", found),
  };
}

/** A run alone, all, or some: of some, seeds are one line only where all runs of a variant are among them. */
function overview(kept, query) {
  const every = kept.overview.all.runs.map((run) => run.name);
  const names = query.runs ? query.runs.split(",").filter(Boolean) : every;
  const unknown = names.find((name) => !every.includes(name));
  if (unknown !== undefined) throw new Error(`runs: expected some of ${every.join(", ")}, got ${unknown}`);
  const bands = query.bands === "1";
  if (names.length === 1) return kept.overview.single[names[0]];
  const whole = bands ? kept.overview.bands : kept.overview.all;
  if (names.length === every.length) return whole;
  const runs = kept.overview.all.runs.filter((run) => names.includes(run.name));
  const variants = new Map(); // of all runs
  for (const run of kept.overview.all.runs) variants.set(run.variant, [...(variants.get(run.variant) ?? []), run.name]);
  const complete = [...variants].filter(([, own]) => own.every((name) => names.includes(name))).map(([variant]) => variant);
  const single = runs.filter((run) => !complete.includes(run.variant)).map((run) => run.name);
  const pictures = kept.overview.all.pictures.map((picture) => {
    const banded = bands ? kept.overview.bands.pictures.find((one) => one.name === picture.name) : null;
    const lines = banded ? banded.lines.filter((line) => complete.includes(line.label)) : [];
    return { ...picture, lines: [...lines, ...picture.lines.filter((line) => (banded ? single : names).includes(line.label))] };
  });
  return { runs, pictures: pictures.filter((picture) => picture.lines.length) };
}

function find(kept, query) {
  const row = kept.lists[query.run].rows.find((one) => one.part === query.part && one.row === Number(query.row || 0));
  if (!row) throw new Error(`Rollout ${query.part}/${query.row} is not in this file, which holds a sample; metis-fast view shows all.`);
  return row;
}

/** Steps that have the prompt; those whose group is not here have no place. */
function steps(kept, query, row, list) {
  return list.map((one) => (group("group", query, { ...row, step: one.step }) in kept.blocks ? one : { ...one, part: null, row: null }));
}

export async function answer(kept, read, path, query) {
  if (path === "runs") return kept.runs;
  if (path === "overview") return overview(kept, query);
  if (!Object.hasOwn(kept.lists, query.run ?? "")) throw new Error(`run: expected one of ${Object.keys(kept.lists).join(", ")}, got ${query.run}`);
  if (path === "rollouts") return rollouts(kept, read, query);
  const row = find(kept, query);
  if (path === "group") {
    const tree = await read(group("group", query, row));
    return { ...tree, steps: steps(kept, query, row, tree.steps) };
  }
  const tree = await read([path, query.run, row.part, row.row].join("\t"));
  if (path === "rollout") return { ...tree, steps: steps(kept, query, row, tree.steps) };
  const start = Math.min(Number(query.start || 0), tree.total);
  const cut = (values) => values.slice(start, start + Number(query.count || tree.total));
  const columns = ["ids", "texts", "sampled", "logp", "version"].map((name) => [name, cut(tree[name])]);
  return { ...tree, ...Object.fromEntries(columns), start };
}
