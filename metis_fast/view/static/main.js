// Which page is shown, the keys, the colours, and whether something is new.

import { h, here, link, recall, remember } from "./dom.js";
import { browser } from "./browser.js";
import { group } from "./group.js";
import { overview } from "./overview.js";
import { forget, redraw } from "./plot.js";
import { rollout } from "./rollout.js";
import { setUpZoom } from "./images.js";
import { ask, fromServer } from "./source.js";

const POLL_MS = 4000;
const BUSY_MS = 1000;
const PAGES = { overview, rollouts: browser, rollout, group };
const root = document.getElementById("content");
const live = document.getElementById("live");
let runs = [];
let stamp = "";
let keys = {};
let turn = 0;

function failed(error) {
  keys = {};
  document.title = "Not here";
  root.replaceChildren(h("h1", {}, "Not here"), h("p", { class: "failed", role: "alert" }, error.message),
    h("p", {}, h("a", { href: "#/overview" }, "To the overview")));
}

/** Whether the reader is at something of the page, which would be gone if it were shown anew. */
const occupied = () => root.contains(document.activeElement) && document.activeElement !== root;

/** rest: of what is shown already, now with the rollouts that had not been read. */
async function show(rest = false) {
  const mine = ++turn;
  const { page, query } = here();
  for (const [name, id] of [["overview", "to-overview"], ["rollouts", "to-rollouts"]]) {
    const current = page === name || (name === "rollouts" && page !== "overview");
    if (current) document.getElementById(id).setAttribute("aria-current", "page");
    else document.getElementById(id).removeAttribute("aria-current");
  }
  root.setAttribute("aria-busy", "true");
  // what is slow must not overwrite what was asked for after it
  const place = h("div", {});
  let left = 0;
  try {
    const open = PAGES[page];
    if (!open) throw new Error(`There is no page ${page}.`);
    // side by side: the server has to be asked for both
    const known = runs.length ? Promise.resolve(runs) : look().then(() => runs);
    known.catch(() => {}); // said below, or by what asks first
    const made = await open(place, known, query, rest);
    await known;
    while (rest && mine === turn && occupied()) await new Promise((done) => { setTimeout(done, BUSY_MS); });
    if (mine !== turn) return;
    keys = made?.keys ?? {};
    left = made?.left ?? 0;
    const again = root.dataset.hash === location.hash;
    const scroll = again ? window.scrollY : 0;
    const before = again ? [...root.querySelectorAll("details")].map((one) => one.open) : [];
    root.replaceChildren(...place.childNodes);
    const after = [...root.querySelectorAll("details")];
    if (after.length === before.length) after.forEach((one, index) => { one.open = before[index]; });
    forget();
    window.scrollTo(0, scroll);
    document.title = root.querySelector("h1")?.textContent ?? "Runs";
  } catch (error) {
    if (mine === turn) failed(error);
  } finally {
    if (mine === turn) {
      root.dataset.hash = location.hash;
      if (left) setTimeout(() => { if (mine === turn) show(true); });
      else root.removeAttribute("aria-busy");
    }
  }
}

async function look() {
  const tree = await ask("runs");
  runs = tree.runs;
  const now = runs.map((run) => run.stamp).join(" ");
  const fresh = stamp && stamp !== now;
  stamp = now;
  const going = runs.filter((run) => !run.ended);
  live.textContent = going.length ? `${going.map((run) => `${run.name}: step ${run.last ?? "–"}`).slice(0, 2).join(", ")}` : "";
  return fresh;
}

async function poll() {
  if (!document.hidden) {
    try {
      if (await look() && here().page === "overview") await show();
    } catch {
      live.textContent = "The server does not answer.";
    }
  }
  setTimeout(poll, POLL_MS);
}

function setUpTheme() {
  const button = document.getElementById("theme");
  const choices = ["auto", "light", "dark"];
  const apply = (choice) => {
    document.documentElement.dataset.theme = choice;
    button.textContent = `Theme: ${choice}`;
    redraw();
  };
  let choice = recall("localStorage", "theme");
  if (!choices.includes(choice)) choice = "auto";
  apply(choice);
  button.addEventListener("click", () => {
    choice = choices[(choices.indexOf(choice) + 1) % choices.length];
    remember("localStorage", "theme", choice);
    apply(choice);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

function setUpKeys() {
  const help = document.getElementById("help");
  document.getElementById("keys").addEventListener("click", () => help.showModal());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target.closest("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "Enter" && event.target.closest("a, button, summary")) return;
    const own = { "?": () => help.showModal(), o: () => { location.hash = "#/overview"; }, ...keys };
    if (event.key === "/" && !keys["/"]) own["/"] = () => { location.hash = link("rollouts", { run: here().query.run }); };
    const act = own[event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
}

setUpTheme();
setUpKeys();
setUpZoom();
window.addEventListener("hashchange", () => show());
await show();
if (fromServer) setTimeout(poll, POLL_MS);
