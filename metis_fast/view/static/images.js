// Images of a rollout, boxes of crops upon them, and a closer look.

import { h } from "./dom.js";
import { address } from "./source.js";

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** crops: [{box, size, turn}], in pixels of the image. */
function overlay(crops) {
  if (!crops.length) return null;
  const [width, height] = crops[0].size;
  const layer = svg("svg", { class: "boxes", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  for (const { box: [left, top, right, bottom] } of crops) {
    for (const name of ["under", "over"]) {
      layer.append(svg("rect", { class: name, x: left, y: top, width: right - left, height: bottom - top }));
    }
  }
  return layer;
}

function words(crops) {
  const turns = new Map(); // box -> turns that cut it out
  for (const { box, turn } of crops) turns.set(box.join(", "), [...(turns.get(box.join(", ")) ?? []), turn]);
  return [...turns].map(([box, own]) => `cut out in ${own.length > 1 ? "turns" : "turn"} ${own.join(", ")}: ${box}`).join("; ");
}

/** A picture that opens larger. caption: what it is. crops: boxes that were cut out of it. */
export function picture(run, sha, caption, crops = []) {
  const image = h("img", { src: address(run, sha, "thumb"), alt: crops.length ? `${caption}; ${words(crops)}` : caption, loading: "lazy" });
  const frame = h("span", { class: "framed" }, image, overlay(crops));
  const button = h("button", { type: "button", class: "picture", "data-sha": sha, onclick: () => zoom(run, sha, caption, crops) }, frame);
  image.addEventListener("error", () => {
    button.replaceWith(h("span", { class: "failed" }, `${caption}: this image is missing or cannot be shown`));
  });
  return h("figure", { class: "image" }, button, h("figcaption", {}, caption, crops.length ? h("span", { class: "cut" }, ` ${words(crops)}`) : null));
}

function zoom(run, sha, caption, crops) {
  const dialog = document.getElementById("zoom");
  const frame = document.getElementById("zoom-frame");
  const image = h("img", { src: address(run, sha, "full"), alt: caption });
  image.addEventListener("load", () => {
    document.getElementById("zoom-size").textContent = `${caption} · ${image.naturalWidth} × ${image.naturalHeight}`;
  });
  frame.replaceChildren(h("span", { class: "framed" }, image, overlay(crops)));
  scale("fit");
  dialog.showModal();
}

function scale(factor) {
  const framed = document.querySelector("#zoom-frame .framed");
  const image = framed?.querySelector("img");
  if (!image) return;
  framed.classList.toggle("fit", factor === "fit");
  image.style.width = factor === "fit" ? "" : `${factor * image.naturalWidth}px`;
}

export function setUpZoom() {
  const dialog = document.getElementById("zoom");
  for (const button of dialog.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => scale(button.dataset.zoom));
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}
