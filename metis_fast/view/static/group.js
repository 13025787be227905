// The rollouts of one prompt in one step, side by side: rewards, both advantages, who is in Q, which channel moves whom.

import { badge, h, link, number, recall, signed, verdict } from "./dom.js";
import { moves } from "./browser.js";
import { ask } from "./source.js";

const COLUMNS = ["Rollout", "Answer", "Judged", "Calls", "r_acc", "r_tool", "A_acc", "Q", "A_tool", "Moved by", "Effect", "Tokens"];
const NUMBERS = ["r_acc", "r_tool", "A_acc", "A_tool", "Tokens"]; // right-aligned

/** What the tokens of a rollout are multiplied with in the gradient, at ratio 1: positive makes them likelier. */
export function push(row, weights) {
  const share = (weight, advantage, count, moved) => (moved ? (weight * advantage) / (count || 1) : 0);
  return {
    acc: share(weights.w_acc, row.adv_acc, weights.n_acc, row.moves_acc),
    tool: share(weights.w_tool, row.adv_tool, weights.n_tool, row.moves_tool),
    exact: Boolean(weights.n_acc),
  };
}

export function direction(row, weights) {
  const { acc, tool } = push(row, weights);
  const sum = acc + tool;
  if (!row.moves_acc && !row.moves_tool) return badge("stays", "none");
  const against = acc * tool < 0 ? " (channels disagree)" : "";
  return badge(`${sum > 0 ? "↑ likelier" : sum < 0 ? "↓ rarer" : "stays"}${against}`, sum > 0 ? "up" : sum < 0 ? "down" : "none");
}

function bar(value, most) {
  const fill = h("span", { class: value < 0 ? "minus" : "plus" });
  const size = most ? (50 * Math.abs(value)) / most : 0;
  fill.style.width = `${size}%`;
  fill.style.left = value < 0 ? `${50 - size}%` : "50%";
  return h("span", { class: "meter", "aria-hidden": "true" }, fill);
}

export function steps(run, list, step) {
  if (list.length < 2) return null;
  return h("details", { class: "steps" }, h("summary", {}, `The same prompt in ${list.length} steps`),
    h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "The same prompt over steps" }, h("table", {},
      h("thead", {}, h("tr", {}, ["step", "rollouts", "right", "with a call"].map((name) => h("th", {}, name)))),
      h("tbody", {}, list.map((one) => h("tr", { class: one.step === step ? "marked" : "" },
        h("td", {}, one.part === null ? `${one.step} (not in this file)` : h("a", { href: link("group", { run, part: one.part, row: one.row }) }, String(one.step))),
        h("td", {}, String(one.num)), h("td", {}, `${one.right} of ${one.judged}`), h("td", {}, `${one.called} of ${one.judged}`)))))));
}

export async function group(root, runs, query) {
  const tree = await ask("group", query);
  const { members, weights } = tree;
  const most = { acc: Math.max(...members.map((row) => Math.abs(row.adv_acc))), tool: Math.max(...members.map((row) => Math.abs(row.adv_tool))) };
  const inQ = members.filter((row) => row.qualifies).length;
  const withTool = members.some((row) => row.moves_tool);
  const unlike = new Set(members.filter((row) => row.qualifies).map((row) => row.r_tool)).size > 1;
  const cell = (name, kind, ...content) => h("td", { class: kind, "data-name": name }, content);
  const address = (row) => link("rollout", { run: query.run, part: row.part, row: row.row });
  const rows = members.map((row) => h("tr", { class: row.part === query.part && String(row.row) === query.row ? "marked" : "", "data-href": address(row) },
    h("th", { scope: "row" }, h("a", { href: address(row) }, `#${row.sample}`)),
    cell("answer", "", verdict(row), row.outcome === "answered" ? null : [" ", badge(row.outcome, "warn")]),
    cell("judged", "answer", h("bdi", {}, row.answer || "–"), row.reason ? h("small", {}, ` ${row.reason}`) : null),
    cell("calls", "", String(row.calls), row.tools.length ? h("small", {}, ` ${[...new Set(row.tools)].join(", ")}`) : null),
    cell("r_acc", "num", number(row.r_acc)), cell("r_tool", "num", number(row.r_tool)),
    cell("A_acc", "num", signed(row.adv_acc), bar(row.adv_acc, most.acc)),
    cell("Q", "", row.qualifies ? badge("in Q", "tool") : badge("no", "none")),
    cell("A_tool", "num", signed(row.adv_tool), bar(row.adv_tool, most.tool)),
    cell("moved by", "", moves(row)), cell("effect", "", direction(row, weights)), cell("tokens", "num", String(row.tokens))));
  root.append(
    h("h1", {}, `Group in step ${tree.step}`),
    h("p", { class: "asked" }, tree.question),
    h("p", {}, h("span", { class: "quiet" }, "Expected: "), h("bdi", {}, tree.answers.join(" | ") || "–"), h("span", { class: "quiet" }, " · ", h("bdi", {}, tree.uid), " · "),
      h("a", { href: link("rollouts", { run: query.run, step_min: tree.step, step_max: tree.step, text: tree.uid }) }, "as a list")),
    h("p", {}, `${inQ} of ${members.length} are in Q, the right ones. `,
      withTool ? "The tool channel compares their numbers of calls." : inQ < 2 ? "The tool channel needs two."
        : unlike ? "They differ in their numbers of calls, but this run has no tool channel (score.estimator)."
          : "All made as many calls, so the tool channel has nothing to compare."),
    h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Rollouts of the group" }, h("table", { class: "group listed" },
      h("thead", {}, h("tr", {}, COLUMNS.map((name) => h("th", { scope: "col", class: NUMBERS.includes(name) ? "num" : "" }, name)))),
      h("tbody", {}, rows))),
    h("p", { class: "quiet" }, `L = ${weights.w_acc} L_acc + ${weights.w_tool} L_tool. `,
      weights.n_acc ? `Divided by ${Math.round(weights.n_acc)} and ${Math.round(weights.n_tool ?? 0)} tokens (means of the step's ${weights.mini_batches} mini-batches); "effect" is for a ratio of 1.`
        : "The step's numbers of tokens are not logged: \"effect\" compares the weighted advantages alone."),
    steps(query.run, tree.steps, tree.step) ?? "");
  let marked = members.findIndex((row) => row.part === query.part && String(row.row) === query.row);
  const mark = (to) => {
    rows[marked]?.classList.remove("marked");
    marked = Math.min(Math.max(to, 0), rows.length - 1);
    rows[marked].classList.add("marked");
    rows[marked].querySelector("a").focus();
  };
  const keys = {
    j: () => mark(marked + 1),
    k: () => mark(marked - 1),
    Enter: () => { location.hash = rows[Math.max(0, marked)].dataset.href; },
    u: () => { location.hash = recall("sessionStorage", "back") ?? "#/rollouts"; },
  };
  return { keys };
}
