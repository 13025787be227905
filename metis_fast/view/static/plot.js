// A picture of the overview: uPlot lines, bands or stacks that take their ink from the page, with the numbers below for readers
// that see no canvas.

import uPlot from "./vendor/uplot/uPlot.esm.js";
import { h, number, percent } from "./dom.js";

// Okabe and Ito's colours, which people with colour-blindness tell apart, without the two that vanish on white or on black
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#999999"];
const HEIGHT = 190;
const ROWS = 200; // of the table of numbers

const shown = new Set();
const LATEST_MS = 100;
const waiting = []; // pictures below what is seen, drawn when there is time

/** A busy machine may never call a page idle: then each picture waits no longer than LATEST_MS. */
function whenIdle(act) {
  if (window.requestIdleCallback) requestIdleCallback(act, { timeout: LATEST_MS });
  else setTimeout(act, 20);
}

function drawNext() {
  const draw = waiting.shift();
  if (waiting.length) whenIdle(drawNext); // first, so that one picture's error is that picture's only
  draw?.();
}

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function faint(colour, alpha) {
  const value = parseInt(colour.slice(1), 16);
  return `rgba(${value >> 16}, ${(value >> 8) & 255}, ${value & 255}, ${alpha})`;
}

/** All lines on the steps that any of them has; null where a line has none. */
function table(picture) {
  const steps = [...new Set(picture.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, index) => [step, index]));
  const spread = (line, values) => {
    const row = new Array(steps.length).fill(null);
    line.steps.forEach((step, index) => { row[place.get(step)] = values[index]; });
    return row;
  };
  return { steps, spread };
}

function format(picture) {
  return picture.form === "rate" || picture.form === "share" ? percent : number;
}

function build(picture, width) {
  const { steps, spread } = table(picture);
  const ink = style("--ink-2");
  const grid = style("--line");
  const stacked = picture.form === "stack";
  const text = format(picture);
  const data = [steps];
  // without a pointer upon it: the last step
  const series = [{ label: "step", value: (plot, value, which, at) => String(at === null || at === undefined ? steps.at(-1) ?? "" : value) }];
  const bands = [];
  let below = new Array(steps.length).fill(0);
  picture.lines.forEach((line, index) => {
    const colour = COLOURS[index % COLOURS.length];
    const dash = index >= COLOURS.length ? [5, 3] : undefined;
    const values = spread(line, line.values);
    const top = stacked ? values.map((value, i) => (value ?? 0) + below[i]) : values;
    if (stacked) below = top;
    data.push(top);
    series.push({
      label: line.runs ? `${line.label} (${line.runs})` : line.label,
      stroke: colour,
      width: stacked ? 1 : 2,
      dash,
      spanGaps: true,
      points: { show: !stacked && line.steps.length < 40, size: 5 },
      value: (plot, value, which, at) => text(values[at ?? values.length - 1]),
    });
    if (stacked) bands.push({ series: [data.length - 1, Math.max(0, data.length - 2)], fill: faint(colour, 0.6) });
    if (line.low) {
      data.push(spread(line, line.high), spread(line, line.low));
      const edge = { class: "unnamed", stroke: faint(colour, 0.35), width: 0.5, spanGaps: true, points: { show: false } };
      series.push({ ...edge, label: `${line.label}, most` }, { ...edge, label: `${line.label}, least` });
      bands.push({ series: [data.length - 2, data.length - 1], fill: faint(colour, 0.16) });
    }
  });
  if (stacked) { // the lowest one has the axis below it, which is no series
    data.splice(1, 0, new Array(steps.length).fill(0));
    series.splice(1, 0, { label: "axis", class: "unnamed", stroke: "transparent", width: 0, points: { show: false } });
    for (const band of bands) band.series = [band.series[0] + 1, band.series[1] + 1];
  }
  const range = {
    rate: () => [0, 1],
    share: (plot, low, high) => [0, Math.max(0.01, high * 1.05)],
    stack: (plot, low, high) => [0, (high || 1) * 1.03],
    number: (plot, low, high) => { // uPlot's own range of nothing but zeros is 0 to 100
      const room = low === high ? Math.abs(low) || 1 : 0;
      return uPlot.rangeNum(low - room, high + room, 0.1, true);
    },
  }[picture.form];
  const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "12px system-ui" };
  return [{
    width, height: HEIGHT, series, bands,
    scales: { x: { time: false }, y: picture.form === "log" ? { distr: 3 } : range ? { range } : {} },
    axes: [
      { ...axis, grid: { show: false }, size: 26, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000] },
      { ...axis, size: 54, values: (plot, values) => values.map((value) => (value === null ? null : axisText(picture, value))) },
    ],
    cursor: { sync: { key: "steps" }, drag: { x: true, y: false }, points: { size: 7 } },
    legend: { live: true },
    padding: [8, 16, 0, 0], // half of the last step's number
  }, data];
}

function axisText(picture, value) {
  if (picture.form === "rate" || picture.form === "share") return `${+(100 * value).toPrecision(3)} %`;
  if (Math.abs(value) >= 1e5) return (+value.toPrecision(3)).toExponential();
  return String(+value.toPrecision(3));
}

function numbers(picture) {
  const details = h("details", { class: "numbers" }, h("summary", {}, "Numbers"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    const { steps, spread } = table(picture);
    const columns = picture.lines.map((line) => spread(line, line.values));
    const every = Math.ceil(steps.length / ROWS);
    details.append(h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": picture.title }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", {}, "step"), picture.lines.map((line) => h("th", {}, line.label)))),
      h("tbody", {}, steps.map((step, i) => (i % every ? null
        : h("tr", {}, h("td", {}, String(step)), columns.map((column) => h("td", {}, format(picture)(column[i])))))))))); 
  });
  return details;
}

/** A figure; it draws itself once it has a width. */
export function plot(picture) {
  const frame = h("div", { class: "frame" });
  const last = picture.lines.map((line) => `${line.label} ${format(picture)(line.values.at(-1))}`).join(", ");
  const figure = h("figure", { class: "plot", id: `plot-${picture.name}` },
    h("figcaption", {}, h("h3", {}, picture.title), h("p", {}, picture.note)), frame, numbers(picture));
  let drawn = null;
  const draw = () => {
    const width = frame.clientWidth;
    if (!width || !frame.isConnected) return;
    drawn?.destroy();
    drawn = new uPlot(...build(picture, width), frame);
    const canvas = frame.querySelector("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${picture.title}, last: ${last}`);
  };
  let width = 0;
  const watch = new ResizeObserver(() => {
    if (frame.clientWidth === width) return;
    width = frame.clientWidth;
    if (frame.getBoundingClientRect().top < innerHeight) draw();
    else if (waiting.push(draw) === 1) whenIdle(drawNext);
  });
  watch.observe(frame);
  shown.add({ draw, frame });
  return figure;
}

/** After the page has changed its colours. */
export function redraw() {
  for (const one of shown) one.frame.isConnected ? one.draw() : shown.delete(one);
}

/** Pictures that have left the page are forgotten. */
export function forget() {
  for (const one of shown) if (!one.frame.isConnected) shown.delete(one);
}
