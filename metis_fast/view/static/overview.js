// What became of the runs: before and after, what is sick, curves.

import { badge, duration, h, here, link, notes, number, percent, reading } from "./dom.js";
import { plot } from "./plot.js";
import { ask } from "./source.js";

function change(before, after, key) {
  return h("td", { class: "num" }, percent(before?.[key]), " → ", h("strong", {}, percent(after?.[key])));
}

const KINDS = ["all", "direct", "uncertain", "tool_needed"];

function rates(run, rows, label) {
  return h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `${label}, ${run.name}` }, h("table", { class: "headline" },
    h("caption", {}, label),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Prompts"), h("th", { scope: "col", class: "num" }, "Tool rate"), h("th", { scope: "col", class: "num" }, "Accuracy"))),
    h("tbody", {}, rows.map((row) => h("tr", { class: row.indent ? "inner" : "" }, h("th", { scope: "row" }, row.name),
      change(row.before, row.after, "tool_rate"), change(row.before, row.after, "accuracy"))))));
}

function headline(run) {
  if (!run.before_after.length) return h("p", { class: "quiet" }, "No evaluation yet.");
  const label = run.ended ? "Held out, before → after" : "Held out, first → last evaluation so far";
  const kinds = run.before_after.filter((row) => !row.indent && KINDS.includes(row.name));
  const others = run.before_after.filter((row) => !kinds.includes(row));
  return [kinds.length ? rates(run, kinds, label) : null,
    others.length ? h("details", { class: "settings", open: !kinds.length }, h("summary", {}, "By ability"), rates(run, others, label)) : null];
}

/** Several runs in one table: what they are now. With bands each variant is one line: its mean, and from the least to the most. */
function comparison(runs, bands) {
  if (runs.length < 2) return "";
  const lines = new Map();
  for (const run of runs) {
    const name = bands ? run.variant : run.name;
    lines.set(name, [...(lines.get(name) ?? []), run]);
  }
  const kinds = KINDS.filter((kind) => runs.some((run) => run.before_after.some((row) => !row.indent && row.name === kind)));
  const after = (own, kind, key) => {
    const values = own.map((run) => run.before_after.find((row) => !row.indent && row.name === kind)?.after?.[key]).filter((value) => typeof value === "number");
    const mean = percent(values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
    return values.length < 2 ? mean : `${mean} (${percent(Math.min(...values))} to ${percent(Math.max(...values))})`;
  };
  const each = (name) => (own) => [...new Set(own.map((run) => run[name] ?? "–"))].join(", ");
  const columns = [...(bands ? [] : [["variant", each("variant")]]), [bands ? "seeds" : "seed", each("seed")], ["steps", each("steps")],
    ...kinds.map((kind) => [`tool rate, ${kind}`, (own) => after(own, kind, "tool_rate")]),
    ...kinds.map((kind) => [`accuracy, ${kind}`, (own) => after(own, kind, "accuracy")])];
  return h("div", { class: "card scroll", tabindex: "0", role: "group", "aria-label": "Comparison of runs" }, h("table", { class: "listed" },
    h("caption", {}, "Held out, at the last evaluation"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, bands ? "variant" : "run"), columns.map(([name]) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, [...lines].map(([line, own]) => h("tr", {}, h("th", { scope: "row" }, bands ? line : h("a", { href: link("overview", { runs: line }) }, line)),
      columns.map(([name, of]) => h("td", { "data-name": name }, of(own))))))));
}

function advisories(run) {
  if (!run.advisories.length) return h("p", { class: "healthy" }, badge("nothing sick", "good"), " No advisory holds at the last step.");
  return h("ul", { class: "advisories" }, run.advisories.map((one) => h("li", { class: one.sick ? "sick" : "watch" },
    h("h4", {}, badge(one.sick ? "sick" : "note", one.sick ? "bad" : "warn"), " ", one.title),
    h("p", {}, "Since ", h("a", { href: link("rollouts", { run: run.name, step_min: one.step, step_max: one.step }) }, `step ${one.step}`), ". ", one.why),
    h("p", {}, h("strong", {}, "Try: "), one.attempt))));
}

function saved(flops) {
  const total = Object.values(flops).reduce((sum, value) => sum + value, 0);
  if (!total) return "–";
  return `${percent(1 - (flops.run ?? 0) / total)} of ${number(total)}`;
}

function facts(run) {
  const pairs = [
    ["Steps", run.planned ? `${run.steps} of ${run.planned}` : String(run.steps)],
    ["Time", duration(run.seconds)],
    ["Seed", run.seed ?? "–"],
    ["Rollouts stored", String(run.stored)],
    ["FLOPs avoided", saved(run.flops)],
    ["Tool errors", String(run.tool_errors)],
  ];
  return h("dl", { class: "facts" }, pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
}

function outcomes(run) {
  return h("p", { class: "outcomes" }, Object.entries(run.outcomes).map(([name, count]) => [
    h("a", { href: link("rollouts", { run: run.name, outcome: name }) }, `${name} ${count}`), " "]));
}

/** Results of benchmarks beside the published ones. */
function benchmarks(run) {
  const table = run.benchmarks;
  if (!table) return null;
  const cell = (one) => {
    if (typeof one?.value !== "number") return h("td", { class: "num" }, "–");
    const error = typeof one.error !== "number" ? "" : ` ± ${one.error.toFixed(1)}`;
    return h("td", { class: "num" }, one.value.toFixed(1), error, one.notes.length ? h("sup", {}, one.notes.join(",")) : null);
  };
  return h("details", { class: "settings benchmarks", open: true }, h("summary", {}, "Benchmarks, in per cent"),
    h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `Benchmarks of ${run.name}` }, h("table", {},
      h("thead", {}, h("tr", {}, ["benchmark", "of"].map((name) => h("th", { scope: "col" }, name)), h("th", { scope: "col", class: "num" }, "%"))),
      table.lines.map((line) => h("tbody", {}, table.columns.filter((column) => column in line.cells).map((column, index, own) => h("tr", {},
        index ? null : h("th", { scope: "rowgroup", rowspan: own.length }, line.title, h("br", {}), h("small", {}, line.figure)),
        h("td", {}, column), cell(line.cells[column]))))))),
    h("ol", { class: "quiet" }, table.notes.map((note) => h("li", {}, note))));
}

function settings(run) {
  if (!run.settings.length) return null;
  return h("details", { class: "settings" }, h("summary", {}, `${run.settings.length} settings differ from the defaults`),
    h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `Settings of ${run.name}` }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", {}, "setting"), h("th", {}, "here"), h("th", {}, "default"))),
      h("tbody", {}, run.settings.map((one) => h("tr", {}, h("th", { scope: "row" }, one.name), h("td", {}, one.value), h("td", {}, one.default)))))));
}

function card(run, several) {
  if (run.gone) {
    return h("section", { class: "card run", "aria-label": run.name }, h("h2", {}, run.name), h("p", { class: "failed", role: "alert" }, run.gone));
  }
  return h("section", { class: "card run", "aria-label": run.name },
    h("h2", {}, run.name, " ", badge(run.ended ? "ended" : "not ended", run.ended ? "none" : "warn"), several ? h("small", {}, ` ${run.variant}`) : null),
    facts(run), notes(run.notes), advisories(run), headline(run), benchmarks(run), outcomes(run), settings(run));
}

function chooser(runs, chosen, bands) {
  if (runs.length < 2) return null;
  const go = () => {
    const names = [...box.querySelectorAll("input[name=run]:checked")].map((input) => input.value);
    location.hash = link("overview", { runs: names.length === runs.length ? "" : names.join(","), bands: box.querySelector("[name=bands]").checked ? "1" : "" });
  };
  const box = h("fieldset", { class: "chooser", onchange: go }, h("legend", {}, "Runs"),
    runs.map((run) => h("label", {}, h("input", { type: "checkbox", name: "run", value: run.name, checked: chosen.includes(run.name) }), run.name)),
    h("label", { class: "bands" }, h("input", { type: "checkbox", name: "bands", checked: bands }), "seeds as bands (mean, least, most)"));
  return box;
}

export async function overview(root, known, query, rest) {
  const [runs, tree] = await Promise.all([known, ask("overview", { runs: query.runs, bands: query.bands, wait: rest ? 1 : "" })]);
  const chosen = tree.runs.map((run) => run.name);
  root.replaceChildren(
    h("h1", {}, "Overview"),
    reading(tree) ?? "",
    chooser(runs, chosen, query.bands === "1") ?? "",
    comparison(tree.runs, query.bands === "1"),
    h("div", { class: "cards" }, tree.runs.map((run) => card(run, tree.runs.length > 1))),
    tree.runs.every((run) => run.gone) ? "" : h("h2", {}, "Curves"),
    tree.pictures.length ? h("div", { class: "plots" }, tree.pictures.map(plot))
      : tree.runs.some((run) => !run.gone) ? h("p", { class: "quiet" }, "No step yet.") : "",
  );
  return { left: tree.left };
}
