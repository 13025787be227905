"""The page as one file that needs no server: the same modules and answers, with a sample of the rollouts and their images.

Everything that comes from a run stands in it as gzip or pixels in base64, which no text of an agent can break out of. A content
security policy allows the page's own script and style, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from metis_fast.errors import ConfigError, DataError, one_line
from metis_fast.scratch import replaced
from metis_fast.view.answers import MOST_TOKENS, Answers, Json, as_json
from metis_fast.view.bundle import UPLOT, text_of, whole_script
from metis_fast.view.images import Images
from metis_fast.view.index import Snapshot
from metis_fast.view.run import Run
from metis_fast.view.sample import RULE, groups_in_turn

MB = 1_000_000
IMAGE_PX = 1024
"""Longest side of an image in the file."""
MOST_ROLLOUTS = 2000
"""More than anybody reads; making them takes ten CPU ms each."""
_MISSES = 4  # groups in a row that are too large for what is left
_TAG = 160  # bytes around a block, and of its name in the index
_LOADED = (
    '<link rel="icon" href="icon.svg">\n<link rel="stylesheet" href="vendor/uplot/uPlot.min.css">\n'
    '<link rel="stylesheet" href="style.css">\n<script type="module" src="main.js"></script>\n'
)


@dataclass(frozen=True, slots=True)
class Written:
    """What became of it. size: bytes. kept, stored: rollouts. notes: what is missing or left out, with the name of the run."""

    path: Path
    size: int
    kept: int
    stored: int
    notes: tuple[str, ...]


def _packed(tree: Json) -> str:
    return base64.b64encode(gzip.compress(as_json(tree).encode(), 6, mtime=0)).decode()


def _shell() -> str:
    """`index.html` with script, style and icon in it."""
    script = whole_script()
    style = text_of(f"{UPLOT}/uPlot.min.css") + text_of("style.css")
    icon = base64.b64encode(text_of("icon.svg").encode()).decode()
    page = text_of("index.html")
    assert _LOADED in page
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    made = f'<link rel="icon" href="data:image/svg+xml;base64,{icon}">\n<style>{style}</style>\n'
    made += f'<script type="module">{script}</script>\n'
    page = page.replace(_LOADED, made)
    meta = '<meta charset="utf-8">\n'
    return page.replace(meta, f'{meta}<meta http-equiv="Content-Security-Policy" content="{policy}">\n', 1)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@dataclass(slots=True)
class _Blocks:
    """Blocks of the file, by name, and where they are. left: bytes that may still be used."""

    out: BinaryIO
    left: int
    places: dict[str, int] = field(default_factory=dict)
    images: dict[str, Json] = field(default_factory=dict)
    num: int = 0

    def put(self, text: str) -> int:
        """Write one; return its number."""
        self.num += 1
        self.out.write(f'<script type="text/plain" id="block-{self.num}">{text}</script>\n'.encode())
        self.left -= len(text) + _TAG
        return self.num


@dataclass(slots=True)
class _Group:
    """A group ready to be written. blocks: name -> text. images: hash -> type and text."""

    rows: list[Json]
    blocks: dict[str, str]
    images: dict[str, tuple[str, str]]

    @property
    def size(self) -> int:
        texts = [*self.blocks.values(), *(text for _, text in self.images.values()), _packed({"rows": self.rows})]
        return sum(len(text) + _TAG for text in texts)


class _Writer:
    """Asks for everything that the page may ask for."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._answers = Answers(runs)
        self._runs = {run.name: run for run in runs}
        self._images: dict[str, tuple[str, str] | None] = {}

    def overview(self) -> Json:
        """Of all runs, with seeds as bands, and of each run alone."""
        ask, names = self._answers.overview, list(self._runs)
        whole = ask({})
        alone = {name: ask({"runs": name}) for name in names} if len(names) > 1 else {names[0]: whole}
        return {"all": whole, "bands": ask({"bands": "1"}) if len(names) > 1 else whole, "single": alone}

    def runs(self) -> Json:
        """Of the server."""
        return self._answers.runs({})

    def group(self, run: Run, snapshot: Snapshot, places: Sequence[int], known: dict[str, Json]) -> _Group:
        """known: images that are in the file already.

        Raises:
            DataError: a part of it can no longer be read.
        """
        rows = [snapshot.row(place) for place in places]
        step, uid = str(rows[0]["step"]), rows[0]["uid"]
        blocks: dict[str, str] = {}
        images: dict[str, tuple[str, str]] = {}
        texts: Json = {}
        for entry in rows:
            query = {"run": run.name, "part": entry["part"], "row": str(entry["row"])}
            place = (run.name, entry["part"], str(entry["row"]))
            # without the folder: the file may be read where it is not
            blocks["\t".join(("rollout", *place))] = _packed(self._answers.rollout(query) | {"folder": ""})
            tokens = self._tokens(query)
            blocks["\t".join(("tokens", *place))] = _packed(tokens)
            stored = run.index.rows.read(snapshot.parts[entry["part"]], entry["row"], tokens=False)
            texts["\t".join(place[1:])] = "\n".join((stored["text"] or "", stored["question"] or "", uid))
            for sha256 in dict.fromkeys(span[2] for span in tokens["spans"]):
                if sha256 not in known and (image := self._image(run.images, sha256)) is not None:
                    images[sha256] = image
        first = {"run": run.name, "part": rows[0]["part"], "row": str(rows[0]["row"])}
        blocks["\t".join(("group", run.name, step, uid))] = _packed(self._answers.group(first))
        blocks["\t".join(("texts", run.name, step, uid))] = _packed(texts)
        return _Group(rows, blocks, images)

    def _tokens(self, query: dict[str, str]) -> Json:
        """All of a rollout."""
        whole = self._answers.tokens(query)
        while len(whole["ids"]) < whole["total"]:
            more = self._answers.tokens({**query, "start": str(len(whole["ids"])), "count": str(MOST_TOKENS)})
            for name in ("ids", "texts", "sampled", "logp", "version"):
                whole[name] += more[name]
        return whole

    def _image(self, images: Images, sha256: str) -> tuple[str, str] | None:
        """Type and base64; None where it is missing or damaged, of which the page says so."""
        if sha256 not in self._images:
            try:
                kind, data = images.compact(sha256, IMAGE_PX)
                self._images[sha256] = (kind, base64.b64encode(data).decode())
            except DataError:
                self._images[sha256] = None
        return self._images[sha256]


def _in_turn(snapshots: dict[str, Snapshot]) -> Iterator[tuple[str, list[int]]]:
    """A group of each run after the other."""
    turns = ([(name, group) for group in groups_in_turn(snapshot)] for name, snapshot in snapshots.items())
    for some in zip_longest(*turns):
        yield from (one for one in some if one is not None)


def write_file(runs: Sequence[Run], out: Path, limit: int, progress: Callable[[int], None] = lambda kept: None) -> Written:
    """Write the page of `runs` to `out`, with as many rollouts as fit into `limit` bytes.

    progress: called with the number of rollouts that are in it, after each group.

    Raises:
        ConfigError: the page without any rollout is larger than the limit, or `out` is a folder.
    """
    if out.is_dir():
        raise ConfigError(f"--out {out}: expected a file, got a folder; name the file to write, such as {out}/runs.html")
    if out.exists() and not out.is_file():
        raise ConfigError(f"--out {out}: expected a file, got a device or a pipe; name the file to write, such as runs.html")
    writer, shell = _Writer(runs), _shell()
    snapshots = {run.name: run.index.snapshot() for run in runs}
    head, _, tail = shell.partition("</body>")
    index: Json = {"runs": writer.runs(), "overview": writer.overview()}
    stored = sum(snapshot.size for snapshot in snapshots.values())
    rows: dict[str, list[Json]] = {name: [] for name in snapshots}
    notes = {name: list(snapshot.notes) for name, snapshot in snapshots.items()}
    base = len(head.encode()) + len(tail) + len(_packed(index)) + 4096
    if base > limit:
        raise ConfigError(f"--limit: expected at least {base / MB:.1f} MB for the page and its curves, got {limit / MB:g}")
    by_name = {run.name: run for run in runs}
    Path(os.path.realpath(out)).parent.mkdir(parents=True, exist_ok=True)
    with replaced(out) as scratch, scratch.open("wb") as file:  # two may write at once: the last one stays
        file.write(head.encode())
        blocks, misses = _Blocks(file, limit - base), 0
        for name, places in _in_turn(snapshots):
            if sum(map(len, rows.values())) + len(places) > MOST_ROLLOUTS:
                break
            try:
                group = writer.group(by_name[name], snapshots[name], places, blocks.images)
            except DataError as error:  # the part was damaged, or a resumed run made it anew
                notes[name].append(f"a group is left out: {one_line(error)[:240]}")
                continue
            if group.size > blocks.left:
                misses += 1
                if misses == _MISSES:
                    break
                continue
            misses = 0
            blocks.left -= len(_packed({"rows": group.rows}))
            for sha256, (kind, text) in group.images.items():
                blocks.images[sha256] = {"type": kind, "block": blocks.put(text)}
            for block, text in group.blocks.items():
                blocks.places[block] = blocks.put(text)
            rows[name] += group.rows
            progress(sum(map(len, rows.values())))
        kept = sum(map(len, rows.values()))
        index |= {
            "rule": _rule(kept, stored, limit),
            "lists": {name: _list(own, snapshots[name], notes[name]) for name, own in rows.items()},
            "blocks": blocks.places,
            "images": blocks.images,
        }
        file.write(f'<script type="text/plain" id="embedded">{_packed(index)}</script>\n</body>{tail}'.encode())
    whole: Json = index["overview"]["all"]
    said = {run["name"]: [*dict.fromkeys([*run["notes"], *notes[run["name"]]])] for run in whole["runs"]}
    return Written(
        out, out.stat().st_size, kept, stored, tuple(f"{name}: {note}" for name, own in said.items() for note in own)
    )


def _rule(kept: int, stored: int, limit: int) -> str:
    pixels = f"Images have sides of at most {IMAGE_PX} pixels."
    if kept == stored:
        return f"This file holds all {stored} stored rollouts. {pixels}"
    return (
        f"This file holds {kept} of {stored} stored rollouts: at most {MOST_ROLLOUTS}, and what fits into {limit / MB:g} MB. "
        f"{RULE} {pixels} metis-fast view shows all."
    )


def _list(rows: list[Json], snapshot: Snapshot, notes: list[str]) -> Json:
    return {
        "rows": sorted(rows, key=lambda row: (row["step"], row["part"], row["row"])),
        "stored": snapshot.size,
        "choices": {name: sorted({row[name] for row in rows}) for name in ("ability", "kind", "outcome")},
        "notes": notes,
    }
