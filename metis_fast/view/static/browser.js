// The list of rollouts: filters, a histogram that filters, pages, and a mark that the keys move.

import { badge, h, link, notes, number, reading, recall, remember, signed, verdict } from "./dom.js";
import { ask } from "./source.js";

const LIMIT = 50;
const narrow = matchMedia("(max-width: 60rem)");
narrow.addEventListener("change", () => {
  for (const panel of document.querySelectorAll("details.panel")) panel.open = !narrow.matches;
});
const COLUMNS = [["calls", "calls"], ["adv_acc", "A_acc"], ["adv_tool", "A_tool"], ["r_acc", "r_acc"], ["r_tool", "r_tool"],
  ["tokens", "sampled tokens"], ["turns", "turns"], ["tool_errors", "tool errors"], ["step", "step"]];
const SORTS = [["newest", "newest first"], ["oldest", "oldest first"], ["adv_acc", "largest A_acc"], ["adv_tool", "largest A_tool"],
  ["calls", "most calls"], ["tokens", "longest"]];
const ANY = ["", "any"];
const NO_FILTERS = ["run", "sort", "hist", "offset"]; // of an address

function options(pairs, value) {
  return pairs.map(([name, text]) => h("option", { value: name, selected: name === (value ?? "") }, text));
}

function select(name, label, pairs, query) {
  return h("label", {}, h("span", {}, label), h("select", { name }, options(pairs, query[name])));
}

function range(name, label, query, step = "any") {
  const input = (end, text) => h("input", { name: `${name}_${end}`, type: "number", step, value: query[`${name}_${end}`] ?? "", "aria-label": `${label}, ${text}`, placeholder: end });
  return h("div", { class: "range", role: "group", "aria-label": label }, h("span", {}, label), input("min", "at least"), input("max", "at most"));
}

/** Words of the data, which may be empty: "" in a select means any. */
function words(list) {
  return [ANY, ...list.map((word) => [word === "" ? "\u2205" : word, word === "" ? "(none)" : word])];
}

function filters(runs, tree, query, go) {
  const form = h("form", { class: "filters", role: "search", onsubmit: (event) => { event.preventDefault(); go(read(form)); }, onchange: () => go(read(form)) },
    runs.length > 1 ? h("div", { class: "wide" }, select("run", "Run", runs.map((run) => [run.name, run.name]), query)) : null,
    h("label", { class: "wide" }, h("span", {}, "Text"), h("input", { name: "text", type: "search", value: query.text ?? "", placeholder: "in transcript or question" })),
    range("step", "Step", query, "1"),
    select("ability", "Ability", words(tree.choices.ability), query),
    select("kind", "Kind", words(tree.choices.kind), query),
    select("outcome", "Outcome", words(tree.choices.outcome), query),
    select("correct", "Answer", [ANY, ["1", "right"], ["0", "wrong"], ["-1", "no verdict"]], query),
    range("calls", "Calls", query, "1"),
    select("channel", "Moved by", [ANY, ["acc", "accuracy"], ["tool", "tool"], ["both", "both channels"], ["any", "either"], ["none", "nothing"]], query),
    select("q", "In Q", [ANY, ["1", "yes"], ["0", "no"]], query),
    range("adv_acc", "A_acc", query),
    range("adv_tool", "A_tool", query),
    select("sort", "Order", SORTS, query),
    h("button", { type: "reset", onclick: (event) => { event.preventDefault(); go({ run: query.run }); } }, "Clear"));
  return form;
}

function read(form) {
  const found = Object.fromEntries(new FormData(form));
  if (found.sort === "newest") delete found.sort;
  return found;
}

/** What the address says, as the server takes it: an empty word is a filter there, and none here. */
function asked(query) {
  const found = { ...query };
  const empty = {};
  for (const name of ["ability", "kind", "outcome"]) {
    if (found[name] === "\u2205") { empty[name] = ""; delete found[name]; }
  }
  return [found, empty];
}

function histogram(tree, query, go) {
  const name = query.hist || "calls";
  const most = Math.max(1, ...tree.hist.map((bar) => bar.num));
  const chosen = h("select", { "aria-label": "Histogram of", onchange: (event) => go({ ...query, hist: event.target.value }) }, options(COLUMNS, name));
  const bars = tree.hist.map((bar) => {
    const text = bar.low === bar.high ? number(bar.low) : `${number(bar.low)} to ${number(bar.high)}`;
    const fill = h("span", { class: "fill" });
    fill.style.height = `${(100 * bar.num) / most}%`;
    return h("button", { type: "button", title: `${text}: ${bar.num}`, "aria-label": `${name} ${text}: ${bar.num} rollouts`,
      onclick: () => go({ ...query, [`${name}_min`]: String(bar.low), [`${name}_max`]: String(bar.high) }) }, fill);
  });
  const ends = tree.hist.length ? [number(tree.hist[0].low), number(tree.hist.at(-1).high)] : ["", ""];
  return h("div", { class: "histogram" }, h("label", {}, "Histogram of ", chosen), h("div", { class: "bars" }, bars),
    h("div", { class: "ends" }, h("span", {}, ends[0]), h("span", {}, ends[1])));
}

export function moves(row) {
  if (row.moves_acc && row.moves_tool) return badge("both", "both");
  if (row.moves_acc) return badge("accuracy", "acc");
  if (row.moves_tool) return badge("tool", "tool");
  return badge("nothing", "none");
}

function line(row, run) {
  const address = link("rollout", { run, part: row.part, row: row.row });
  const cell = (name, ...content) => h("td", { "data-name": name }, content);
  return h("tr", { "data-href": address, "data-group": link("group", { run, part: row.part, row: row.row }) },
    cell("step", String(row.step)),
    h("td", { class: "question" }, h("a", { href: address }, row.question || row.uid), h("small", {}, ` ${row.uid} #${row.sample}`)),
    cell("kind", [row.ability, row.kind].filter(Boolean).join(" · ")),
    cell("answer", verdict(row), row.outcome === "answered" ? null : [" ", badge(row.outcome, "warn")]),
    cell("calls", String(row.calls)), cell("tokens", String(row.tokens)),
    cell("A_acc", signed(row.adv_acc)), cell("A_tool", signed(row.adv_tool)), cell("moved by", moves(row)));
}

/** The list that was shown last, for the keys of a rollout's page: addresses in order. */
export function lastList() {
  try {
    const kept = JSON.parse(recall("sessionStorage", "list"));
    return Array.isArray(kept) ? kept : [];
  } catch {
    return []; // of another page at this address
  }
}

export async function browser(root, known, given, rest) {
  const query = { ...given, run: given.run || (await known)[0].name };
  const [plain, empty] = asked(query);
  const [runs, tree] = await Promise.all([known, ask("rollouts", { ...plain, limit: LIMIT, wait: rest ? 1 : "" }, empty)]);
  const go = (next) => {
    const target = link("rollouts", { hist: query.hist, ...next, offset: next.offset ?? "" });
    if (target === location.hash) return;
    location.hash = target;
  };
  const offset = Number(query.offset || 0);
  const page = (to) => { if (to >= 0 && to < tree.total) go({ ...query, offset: to ? String(to) : "" }); };
  const rows = tree.rows.map((row) => line(row, query.run));
  remember("sessionStorage", "list", JSON.stringify(rows.map((row) => row.dataset.href)));
  remember("sessionStorage", "back", location.hash);
  const form = filters(runs, tree, query, go);
  const filtered = Object.keys(query).filter((name) => query[name] && !NO_FILTERS.includes(name)).length;
  const panel = h("details", { class: "panel", open: !narrow.matches }, h("summary", {}, filtered ? `Filters (${filtered} set)` : "Filters"), form, histogram(tree, query, go));
  const pages = h("div", { class: "pages" },
    h("span", { role: "status" }, tree.total ? `${offset + 1} to ${Math.min(offset + LIMIT, tree.total)} of ${tree.total}` : "None", ` (${(tree.stored ?? tree.all) === tree.all ? "" : `${tree.all} in this file, `}${tree.stored ?? tree.all} stored)`),
    h("button", { type: "button", disabled: offset === 0, onclick: () => page(Math.max(0, offset - LIMIT)) }, "Previous"),
    h("button", { type: "button", disabled: offset + LIMIT >= tree.total, onclick: () => page(offset + LIMIT) }, "Next"));
  root.append(
    h("h1", {}, "Rollouts"),
    tree.rule ? h("details", { class: "rule", open: !narrow.matches }, h("summary", {}, "What this file holds"), h("p", { class: "quiet" }, tree.rule)) : "",
    tree.gone ? h("p", { class: "failed", role: "alert" }, tree.gone) : "",
    reading(tree) ?? "",
    notes(tree.notes) ?? "",
    h("div", { class: "browser" },
      panel,
      h("div", { class: "list" }, pages,
        rows.length
          ? h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Rollouts" }, h("table", { class: "rollouts listed" },
            h("thead", {}, h("tr", {}, ["Step", "Question", "Kind", "Answer", "Calls", "Tokens", "A_acc", "A_tool", "Moved by"].map((name) => h("th", { scope: "col" }, name)))),
            h("tbody", {}, rows)))
          : h("p", { class: "quiet" }, tree.all ? "No rollout is like that." : tree.gone ? "" : "No rollouts are stored (log.rollouts)."))));
  let marked = -1;
  const mark = (to) => {
    if (!rows.length) return;
    rows[marked]?.classList.remove("marked");
    marked = Math.min(Math.max(to, 0), rows.length - 1);
    rows[marked].classList.add("marked");
    rows[marked].querySelector("a").focus({ preventScroll: true });
    rows[marked].scrollIntoView({ block: "nearest" });
  };
  const keys = {
    j: () => mark(marked + 1),
    k: () => mark(marked - 1),
    Enter: () => { if (marked >= 0) location.hash = rows[marked].dataset.href; },
    g: () => { if (marked >= 0) location.hash = rows[marked].dataset.group; },
    n: () => page(offset + LIMIT),
    p: () => page(offset - LIMIT),
    "/": () => { form.closest("details").open = true; form.elements.text.focus(); },
  };
  return { keys, left: tree.left };
}
