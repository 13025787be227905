// Elements, addresses and numbers. Text goes in as text: nothing here, or anywhere on the page, parses markup.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function clean(query) {
  return Object.fromEntries(Object.entries(query).filter(([, value]) => value !== "" && value !== undefined && value !== null));
}

export function link(page, query = {}) {
  return `#/${page}?${new URLSearchParams(clean(query))}`;
}

export function here() {
  const [page, query] = location.hash.replace(/^#\/?/, "").split("?");
  return { page: page || "overview", query: Object.fromEntries(new URLSearchParams(query ?? "")) };
}

export const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)}\u00a0%`);

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3)) return value.toExponential(2);
  return value.toFixed(digits);
}

export const signed = (value) => (value > 0 ? "+" : "") + number(value);

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.round(seconds);
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  if (hours) return `${hours} h ${String(minutes).padStart(2, "0")} min`;
  return minutes ? `${minutes} min ${String(whole % 60).padStart(2, "0")} s` : `${whole} s`;
}

export function badge(text, kind = "") {
  return h("span", { class: `badge ${kind}` }, text);
}

export function verdict(row) {
  if (row.correct === 1) return badge("right", "good");
  if (row.correct === 0) return badge("wrong", "bad");
  return badge("no verdict", "none");
}

export function notes(texts) {
  if (!texts.length) return null;
  return h("details", { class: "notes" }, h("summary", {}, `${texts.length} ${texts.length === 1 ? "thing is" : "things are"} missing`),
    h("ul", {}, texts.map((text) => h("li", {}, text))));
}

/** That the rollouts of older steps are not read yet; nothing where all are. */
export function reading({ left, parts }) {
  if (!left) return null;
  return h("p", { class: "reading", role: "status" }, `Rollouts are being read, the newest steps first: ${parts - left} of ${parts} parts so far.`);
}

/** What the browser keeps for this page, in `store`; nothing where it keeps nothing. */
export function recall(store, name) {
  try {
    return window[store].getItem(name);
  } catch {
    return null;
  }
}

export function remember(store, name, value) {
  try {
    window[store].setItem(name, value);
  } catch {
    // storage is off, or full: the page goes on without
  }
}
