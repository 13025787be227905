// One rollout as a person reads it.

import { badge, h, link, number, recall, signed, verdict } from "./dom.js";
import { lastList, moves } from "./browser.js";
import { direction, push, steps } from "./group.js";
import { picture } from "./images.js";
import { ask } from "./source.js";
import { strip } from "./tokens.js";

const OPEN_CHARS = 600; // an observation that is longer begins folded
const MODES = ["logp", "acc", "tool", "version", "mask"];

function piece(one) {
  const name = { reason: "reason", tool_call: "call as written", answer: "answer", text: "" }[one.kind];
  return h("div", { class: `piece ${one.kind}` }, name ? h("span", { class: "tag" }, name) : null, h("pre", {}, one.text));
}

function call(turn) {
  if (!turn.call) return null;
  return h("div", { class: "piece call" }, h("span", { class: "tag" }, turn.call.name, " ", turn.outcome === "tool_error" ? badge("tool error", "bad") : null),
    turn.call.arguments.map((one) => [h("span", { class: "argument" }, one.name), h("pre", { class: "code" }, one.text)]),
    turn.call.arguments.length ? null : h("pre", { class: "code" }, turn.call.raw || "(no arguments)"));
}

function observation(run, turn, boxes) {
  if (!turn.observation.length) return turn.call ? h("p", { class: "quiet" }, "No observation.") : null;
  const length = turn.observation.reduce((sum, one) => sum + (one.text?.length ?? 0), 0);
  let place = -1;
  const content = turn.observation.map((one) => {
    if (one.image === undefined) return h("pre", {}, one.text);
    place += 1;
    const crop = turn.crops.find((found) => found.image === place);
    const caption = crop ? `image of turn ${turn.number + 1}, cut out at ${crop.box.join(", ")}` : `image of turn ${turn.number + 1}`;
    return picture(run, one.image, caption, boxes.get(one.image) ?? []);
  });
  const seconds = turn.tool_s ? ` · ${number(turn.tool_s, 2)} s` : "";
  const images = turn.images.length ? ` · ${turn.images.length} ${turn.images.length === 1 ? "image" : "images"}` : "";
  return h("details", { class: `observation ${turn.outcome}`, open: length <= OPEN_CHARS }, h("summary", {}, `Observation · ${length} characters${images}${seconds}`), content);
}

function facts(tree) {
  const { head, talk, weights } = tree;
  const { acc, tool } = push(head, weights);
  const pairs = [
    ["r_acc", number(head.r_acc)], ["r_tool", number(head.r_tool)], ["A_acc", signed(head.adv_acc)], ["A_tool", signed(head.adv_tool)],
    ["in Q", head.qualifies ? "yes" : "no"], ["moved by", moves(head)], ["effect", direction(head, weights)],
    ["coefficients", `${signed(acc)} accuracy, ${signed(tool)} tool`],
    ["calls", `${head.calls}, ${head.tool_errors} with an error`], ["sampled tokens", String(head.tokens)],
    ["judge", talk.verdict?.judge || talk.judge_style || "–"],
  ];
  return h("dl", { class: "facts" }, pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

// A folder as a shell takes it; the page in one file may have left its runs far behind.
const inShell = (folder) => !folder ? "RUN" : /^[\w./-]+$/.test(folder) ? folder : `'${folder.replaceAll("'", "'\\''")}'`;

function judged(talk, folder) {
  const said = talk.verdict;
  return h("div", { class: "judged" },
    h("p", {}, h("span", { class: "quiet" }, "Expected: "), h("bdi", {}, talk.answers.join(" | ") || "–"), h("span", { class: "quiet" }, " · Judged: "), h("bdi", {}, said ? said.answer || "(no answer)" : "–")),
    said?.reason ? h("p", { class: "quiet" }, "Reason: ", h("bdi", {}, said.reason)) : null,
    talk.no_verdict ? h("p", { class: "failed" }, "The judge failed: ", h("bdi", {}, talk.no_verdict)) : null,
    talk.error ? h("p", { class: "failed" }, "Broken off: ", h("bdi", {}, talk.error)) : null,
    said && !said.format_ok ? h("p", {}, badge("tags are not balanced", "warn")) : null,
    h("p", { class: "quiet" }, "Judge again: ", h("code", {}, `metis-fast judge rescore ${inShell(folder)}`)));
}

function members(tree, query) {
  return h("nav", { class: "members", "aria-label": "Rollouts of the group" }, h("a", { href: link("group", query) }, "Side by side"),
    tree.group.map((row) => h("a", {
      href: link("rollout", { run: query.run, part: row.part, row: row.row }),
      class: row.correct === 1 ? "good" : row.correct === 0 ? "bad" : "none",
      "aria-current": row.part === query.part && String(row.row) === query.row ? "page" : null,
      "aria-label": `rollout ${row.sample}, ${row.correct === 1 ? "right" : row.correct === 0 ? "wrong" : "no verdict"}, ${row.calls} calls`,
      title: `A_acc ${signed(row.adv_acc)}, A_tool ${signed(row.adv_tool)}, ${row.calls} calls`,
    }, `#${row.sample}`)));
}

export async function rollout(root, runs, query) {
  const own = { run: query.run, part: query.part, row: query.row };
  const tree = await ask("rollout", own);
  const { head, talk } = tree;
  const boxes = new Map(); // source image -> boxes that were cut out of it
  for (const turn of talk.turns) {
    for (const crop of turn.crops) boxes.set(crop.source, [...(boxes.get(crop.source) ?? []), { ...crop, turn: turn.number + 1 }]);
  }
  root.append(
    h("h1", {}, `Rollout #${head.sample} in step ${head.step}`),
    h("p", { class: "badges" }, verdict(head), " ", badge(head.outcome, head.outcome === "answered" ? "none" : "warn"), " ",
      [talk.ability, talk.kind].filter(Boolean).map((word) => [badge(word), " "]), h("small", {}, talk.uid)),
    members(tree, own),
    facts(tree),
    talk.problems.length ? h("ul", { class: "failed" }, talk.problems.map((text) => h("li", {}, text))) : "",
    h("article", { class: "talk", "aria-label": "Conversation" },
      h("section", { class: "user", "aria-label": "Question" }, h("span", { class: "who" }, "user"),
        talk.images.map((sha, index) => picture(query.run, sha, `image_${index + 1}`, boxes.get(sha) ?? [])), h("pre", {}, talk.question)),
      talk.turns.map((turn) => h("section", { class: "agent", id: `turn-${turn.number + 1}`, "aria-label": `Turn ${turn.number + 1}` },
        h("span", { class: "who" }, `turn ${turn.number + 1} · ${turn.stop - turn.start} tokens`),
        turn.pieces.map(piece), call(turn), observation(query.run, turn, boxes)))),
    judged(talk, tree.folder),
    strip(own, tree, MODES.includes(query.tokens) ? query.tokens : ""),
    steps(query.run, tree.steps, head.step) ?? "");
  const list = lastList();
  const at = list.indexOf(link("rollout", own));
  const go = (address) => { if (address) location.hash = address; };
  const mates = tree.group.map((row) => link("rollout", { run: query.run, part: row.part, row: row.row }));
  const mate = mates.indexOf(link("rollout", own));
  const keys = {
    j: () => go(at >= 0 ? list[at + 1] : mates[mate + 1]),
    k: () => go(at >= 0 ? list[at - 1] : mates[mate - 1]),
    "[": () => go(mates[mate - 1]),
    "]": () => go(mates[mate + 1]),
    g: () => go(link("group", own)),
    u: () => go(recall("sessionStorage", "back") ?? link("rollouts", { run: query.run })),
  };
  return { keys };
}
