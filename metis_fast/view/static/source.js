// Where answers and images come from: the server of `metis-fast view`, or the page itself where `metis-fast report --out` wrote it.

import { clean } from "./dom.js";
import { answer } from "./embedded.js";

const index = document.getElementById("embedded");

export const fromServer = index === null;

/** The JSON of a block, gzip in base64. */
async function unpack(element) {
  const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const kept = fromServer ? null : await unpack(index);

/** The block of a name, or null. */
function read(name) {
  const number = kept.blocks[name];
  return number === undefined ? null : unpack(document.getElementById(`block-${number}`));
}

/** empty: parts of the query that count though they may be empty. */
export async function ask(path, query = {}, empty = {}) {
  const whole = { ...clean(query), ...empty };
  if (!fromServer) return answer(kept, read, path, whole);
  const response = await fetch(`api/${path}?${new URLSearchParams(whole)}`);
  if (response.status === 401) throw new Error("The token is not known here: open the address that metis-fast view printed.");
  const tree = await response.json();
  if (!response.ok) throw new Error(tree.error ?? `status ${response.status}`);
  return tree;
}

/** The address of an image. size: thumb or full; a file holds one size. */
export function address(run, sha, size) {
  if (fromServer) return `api/image?${new URLSearchParams({ run, sha, size })}`;
  const image = kept.images[sha];
  return image ? `data:${image.type};base64,${document.getElementById(`block-${image.block}`).textContent}` : "data:,";
}
