// The tokens of a rollout, coloured by what training makes of them.

import { h, number, signed } from "./dom.js";
import { push } from "./group.js";
import { address, ask } from "./source.js";

const COUNT = 2000;
const MODES = [["logp", "log-prob"], ["acc", "coefficient, accuracy"], ["tool", "coefficient, tool"], ["version", "weight version"], ["mask", "mask"]];
const WORST = 5; // nats at which the colour is full

// hues of Okabe and Ito's blue, vermilion and green, as red, green, blue
const BLUE = [0, 114, 178];
const RED = [213, 94, 0];
const GREEN = [0, 158, 115];
const VERSIONS = [BLUE, GREEN, [230, 159, 0], [204, 121, 167], [86, 180, 233], RED];

const tint = ([red, green, blue], strength) => `rgba(${red}, ${green}, ${blue}, ${(0.08 + 0.62 * strength).toFixed(3)})`;

function colour(mode, token, scale) {
  if (mode === "mask") return token.sampled ? tint(GREEN, 0.6) : "";
  if (!token.sampled) return "";
  if (mode === "logp") return tint(RED, Math.min(1, -token.logp / WORST));
  if (mode === "version") return tint(VERSIONS[token.version % VERSIONS.length], 0.6);
  const value = scale[mode];
  if (!value) return "";
  return tint(value > 0 ? BLUE : RED, Math.abs(value) / scale.most);
}

function legend(mode, scale, versions) {
  const swatch = (background, text) => {
    const box = h("i", {});
    box.style.background = background;
    return h("span", {}, box, text);
  };
  switch (mode) {
    case "logp": return [swatch(tint(RED, 0), "likely (0)"), swatch(tint(RED, 0.5), `${-WORST / 2}`), swatch(tint(RED, 1), `${-WORST} nats or less`), "not sampled: plain"];
    case "mask": return [swatch(tint(GREEN, 0.6), "sampled by the policy: carries loss"), "inserted: plain"];
    case "version": return versions.map((version) => swatch(tint(VERSIONS[version % VERSIONS.length], 0.6), `weights ${version}`));
    default: {
      const value = scale[mode];
      const name = mode === "acc" ? "w_acc A_acc / N_acc" : "w_tool A_tool / N_tool";
      if (!value) return ["This channel does not move this rollout: all its coefficients are 0."];
      return [swatch(tint(value > 0 ? BLUE : RED, Math.abs(value) / scale.most), `${signed(value)}: ${value > 0 ? "likelier" : "rarer"}`),
        scale.exact ? `${name} at ratio 1, N the mean of the step's mini-batches` : "weighted advantage; the step's N is not logged"];
    }
  }
}

/** A box that asks for its tokens when it is opened. */
export function strip(query, tree, mode) {
  const scale = push(tree.head, tree.weights);
  scale.most = Math.max(Math.abs(scale.acc), Math.abs(scale.tool)) || 1;
  const shown = h("div", { class: "strip", role: "group", "aria-label": "Tokens", tabindex: "0" });
  const key = h("p", { class: "key" });
  const detail = h("p", { class: "detail", "aria-live": "polite" }, "Point at a token, or move through them with the arrow keys.");
  const place = h("span", {});
  const chosen = h("select", { "aria-label": "Colour tokens by" }, MODES.map(([name, text]) => h("option", { value: name, selected: name === mode }, text)));
  const turns = [["0", "the prompt"], ...tree.talk.turns.map((turn) => [String(turn.start), `turn ${turn.number + 1}`])];
  const jump = h("select", { "aria-label": "Go to" }, turns.map(([start, name]) => h("option", { value: start }, name)));
  const earlier = h("button", { type: "button" }, "Earlier");
  const later = h("button", { type: "button" }, "Later");
  let page = null;
  let spans = [];
  let at = -1;

  const tell = (index) => {
    const { token, element } = spans[index];
    spans[at]?.element.classList.remove("at");
    at = index;
    element.classList.add("at");
    const facts = [`${token.index}`, JSON.stringify(token.text), `id ${token.id}`];
    if (token.image) facts.push(`image, ${token.num} tokens`);
    facts.push(token.sampled ? `log-prob ${number(token.logp)}` : token.index < page.prompt_len ? "prompt" : "inserted");
    if (token.sampled) facts.push(`weights ${token.version}`, `accuracy ${signed(scale.acc)}`, `tool ${signed(scale.tool)}`);
    detail.textContent = facts.join(" · ");
  };

  const paint = () => {
    for (const { token, element } of spans) element.style.backgroundColor = colour(chosen.value, token, scale);
    const versions = [...new Set(page.version.filter((one) => one >= 0))].sort((a, b) => a - b);
    key.replaceChildren(...legend(chosen.value, scale, versions));
  };

  const load = async (start) => {
    page = await ask("tokens", { run: query.run, part: query.part, row: query.row, start, count: COUNT });
    spans = [];
    at = -1;
    const pieces = [];
    for (let i = 0; i < page.ids.length; i += 1) {
      const index = page.start + i;
      const span = page.spans.find(([first, end]) => first <= index && index < end);
      const token = { index, id: page.ids[i], text: page.texts[i], sampled: page.sampled[i] === 1, logp: page.logp[i], version: page.version[i] };
      let element;
      if (span) {
        const num = Math.min(span[1], page.start + page.ids.length) - index;
        Object.assign(token, { image: true, num });
        element = h("span", { class: "token image" }, h("img", { src: address(query.run, span[2], "thumb"), alt: "" }), `image · ${num} tokens`);
        i += num - 1;
      } else {
        element = h("span", { class: token.sampled ? "token sampled" : "token" }, token.text.replaceAll("\n", "⏎"));
      }
      const which = spans.length;
      element.addEventListener("pointerenter", () => tell(which));
      element.addEventListener("click", () => tell(which));
      spans.push({ token, element });
      pieces.push(element);
      if (!span && token.text.includes("\n")) pieces.push(h("br"));
    }
    shown.replaceChildren(...pieces);
    place.textContent = `${page.start} to ${page.start + page.ids.length} of ${page.total}`;
    jump.value = turns.findLast(([first]) => Number(first) <= page.start)[0];
    earlier.disabled = page.start === 0;
    later.disabled = page.start + page.ids.length >= page.total;
    paint();
  };
  const report = (error) => { detail.textContent = error.message; };
  earlier.addEventListener("click", () => load(Math.max(0, page.start - COUNT)).catch(report));
  later.addEventListener("click", () => load(page.start + COUNT).catch(report));
  jump.addEventListener("change", () => load(Number(jump.value)).catch(report));
  chosen.addEventListener("change", paint);
  shown.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1 }[event.key];
    if (to === undefined || !spans[to]) return;
    event.preventDefault();
    tell(to);
  });
  const box = h("details", { class: "tokens", open: Boolean(mode) }, h("summary", {}, "Tokens"),
    tree.tokenizer ? null : h("p", { class: "quiet" }, "No tokenizer was found, so that tokens are shown by their numbers; --tokenizer FOLDER names one."),
    h("div", { class: "bar" }, h("label", {}, "Colour by ", chosen), h("label", {}, "Go to ", jump), place, earlier, later), key, detail, shown);
  box.addEventListener("toggle", () => { if (box.open && !page) load(0).catch(report); });
  if (box.open) load(0).catch(report);
  return box;
}

