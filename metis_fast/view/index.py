"""What can be asked of the rollouts of a run: filters, pages, histograms, groups, shares of signal. Of 50,000 rollouts it holds
some ten MB; texts and tokens stay on disk."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from metis_fast.errors import DataError, one_line
from metis_fast.view.parts import Part, Rows, holds_text, parts_of, read_index

_CODED = ("part", "uid", "ability", "kind", "question", "outcome")
_RANGES = ("step", "calls", "adv_acc", "adv_tool", "r_acc", "r_tool", "tokens", "turns", "tool_errors")
"""Columns that a filter may bound, and a histogram may show."""
_CHOICES = ("ability", "kind", "outcome", "uid")
_ORDERS = ("newest", "oldest", "adv_acc", "adv_tool", "calls", "tokens")
_QUESTION = 240  # characters in a list
_BINS = 24
_SEARCHES = 4096  # masks of one part and one text, at a byte a rollout

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rollouts. at_least, at_most: column -> bound, inclusive. equal: ability, kind, outcome or uid -> value.
    correct: 1, 0, or -1 for those without a verdict. channel: that moves it: acc, tool, both, any or none. qualifies: in Q.
    text: somewhere in transcript, question or name of the prompt."""

    at_least: Mapping[str, float]
    at_most: Mapping[str, float]
    equal: Mapping[str, str]
    correct: int | None = None
    channel: str = ""
    qualifies: bool | None = None
    text: str = ""


def filter_of(query: Mapping[str, str]) -> Filter:
    """A filter as an address has it: step_min=3, ability=math, correct=0, channel=tool, q=1, text=...

    Raises:
        DataError: a value that is none.
    """
    at_least, at_most = (
        {name: _number(query, f"{name}_{end}") for name in _RANGES if query.get(f"{name}_{end}")} for end in ("min", "max")
    )
    correct, channel, qualifies = (query.get(name, "") for name in ("correct", "channel", "q"))
    if correct not in ("", "1", "0", "-1"):
        raise DataError(f"correct: expected 1, 0 or -1, got {correct[:40]!r}")
    if channel not in ("", "acc", "tool", "both", "any", "none"):
        raise DataError(f"channel: expected acc, tool, both, any or none, got {channel[:40]!r}")
    if qualifies not in ("", "1", "0"):
        raise DataError(f"q: expected 1 or 0, got {qualifies[:40]!r}")
    return Filter(
        at_least,
        at_most,
        # an empty value counts: rollouts whose prompt has no kind
        {name: query[name] for name in _CHOICES if name in query},
        int(correct) if correct else None,
        channel,
        None if not qualifies else qualifies == "1",
        query.get("text", "").strip(),
    )


def _number(query: Mapping[str, str], name: str) -> float:
    try:
        return float(query[name])
    except ValueError:
        raise DataError(f"{name}: expected a number, got {query[name][:40]!r}") from None


class Snapshot:
    """All rollouts as of one moment. notes: parts that are left out. left: parts that are not read yet, of older steps."""

    def __init__(self, parts: Sequence[Part], tables: Sequence[pa.Table], notes: Sequence[str], left: int = 0) -> None:
        self.parts = {part.name: part for part in parts}
        self.notes, self.left = tuple(notes), left
        self._table = pa.concat_tables(tables).unify_dictionaries().combine_chunks() if tables else None
        self.size = self._table.num_rows if self._table is not None else 0

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Column -> [rows]; codes of `words` where they are texts."""
        if self._table is None:
            return {}
        found: dict[str, np.ndarray] = {}
        for name in self._table.column_names:
            chunk = self._table[name].combine_chunks()
            chunk = chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk
            found[name] = (chunk.indices if name in _CODED else chunk).to_numpy(zero_copy_only=False)
        return found

    @cached_property
    def words(self) -> dict[str, list[str]]:
        """Coded column -> texts."""
        if self._table is None:
            return {name: [] for name in _CODED}
        found = {}
        for name in _CODED:
            chunk = self._table[name].combine_chunks()
            chunk = chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk
            found[name] = chunk.dictionary.to_pylist()
        return found

    def find(self, part: str, row: int) -> int:
        """The place of a row of a part.

        Raises:
            DataError: there is none.
        """
        code = self.words["part"].index(part) if part in self.words["part"] else -1
        if code >= 0:
            found = np.flatnonzero((self.columns["part"] == code) & (self.columns["row"] == row))
            if len(found):
                return int(found[0])
        raise DataError(f"there is no rollout {part[:80]}/{row}: the run may have been resumed before that step")

    def row(self, place: int) -> dict[str, Any]:
        """A rollout as lists show it."""
        entry: dict[str, Any] = {}
        for name, values in self.columns.items():
            value = values[place].item()
            entry[name] = self.words[name][value] if name in _CODED else value
        entry["question"] = entry["question"][:_QUESTION]
        return entry

    def group(self, place: int) -> list[int]:
        """The rollouts of the same prompt in the same step, by their index."""
        columns = self.columns
        same = (columns["uid"] == columns["uid"][place]) & (columns["step"] == columns["step"][place])
        return sorted(
            np.flatnonzero(same).tolist(), key=lambda i: (columns["sample"][i], columns["part"][i], columns["row"][i])
        )

    def steps_of(self, place: int) -> list[dict[str, Any]]:
        """Each step that had the prompt: number of rollouts, right ones, ones with a call, and the first one of them."""
        columns = self.columns
        same = np.flatnonzero(columns["uid"] == columns["uid"][place])
        found = []
        for step in np.unique(columns["step"][same]):
            own = same[columns["step"][same] == step]
            judged = own[columns["correct"][own] >= 0]
            found.append(
                {
                    "step": int(step),
                    "num": len(own),
                    "judged": len(judged),
                    "right": int((columns["correct"][judged] == 1).sum()),
                    "called": int((columns["calls"][judged] > 0).sum()),
                    "part": self.words["part"][columns["part"][own[0]]],
                    "row": int(columns["row"][own[0]]),
                }
            )
        return found

    def mask(self, wanted: Filter) -> Mask:
        """[rows]: those that a filter wants, its text left aside."""
        columns, keep = self.columns, np.ones(self.size, bool)
        if not self.size:
            return keep
        for name, bound in wanted.at_least.items():
            keep &= columns[name] >= bound - 1e-9
        for name, bound in wanted.at_most.items():
            keep &= columns[name] <= bound + 1e-9
        for name, value in wanted.equal.items():
            words = self.words[name]
            keep &= columns[name] == (words.index(value) if value in words else -1)
        if wanted.correct is not None:
            keep &= columns["correct"] == wanted.correct
        if wanted.qualifies is not None:
            keep &= columns["qualifies"] == wanted.qualifies
        acc, tool = columns["moves_acc"], columns["moves_tool"]
        match wanted.channel:
            case "acc":
                keep &= acc
            case "tool":
                keep &= tool
            case "both":
                keep &= acc & tool
            case "any":
                keep &= acc | tool
            case "none":
                keep &= ~(acc | tool)
        return keep

    def ordered(self, places: npt.NDArray[np.int64], order: str) -> npt.NDArray[np.int64]:
        """newest, oldest: by step; else the largest of a column first. Groups stay together within a step.

        Raises:
            DataError: no such order.
        """
        if order not in _ORDERS:
            raise DataError(f"sort: expected one of {', '.join(_ORDERS)}, got {order[:40]!r}")
        columns = self.columns
        if order == "oldest" or not self.size:
            return places
        key = columns["step" if order == "newest" else order][places]
        return places[np.argsort(-key, kind="stable")]

    def histogram(self, name: str, places: npt.NDArray[np.int64]) -> list[dict[str, float]]:
        """Bars: least and greatest value, and how many rollouts.

        Raises:
            DataError: no such column.
        """
        if name not in _RANGES:
            raise DataError(f"hist: expected one of {', '.join(_RANGES)}, got {name[:40]!r}")
        values = self.columns[name][places] if self.size else np.zeros(0)
        values = values[np.isfinite(values)]
        if not len(values):
            return []
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) <= _BINS:
            pairs = zip(distinct.tolist(), counts.tolist(), strict=True)
            return [{"low": float(value), "high": float(value), "num": num} for value, num in pairs]
        counts, edges = np.histogram(values, _BINS)
        whole = np.issubdtype(values.dtype, np.integer)
        bars = []
        for index, num in enumerate(counts.tolist()):
            low, high = float(edges[index]), float(edges[index + 1])
            if whole:  # so that neighbours share no value
                low, high = float(np.ceil(low)), float(np.ceil(high) - 1 if index < len(counts) - 1 else high)
            bars.append({"low": low, "high": high, "num": num})
        return bars

    def choices(self) -> dict[str, list[str]]:
        """What filters may choose from."""
        return {name: sorted(self.words[name]) for name in ("ability", "kind", "outcome")}

    @cached_property
    def signal(self) -> list[dict[str, float]]:
        """Of each step: the share of rollouts, and of sampled tokens, that a channel moves; of those with a verdict."""
        if not self.size:
            return []
        columns = self.columns
        found = []
        for step in np.unique(columns["step"]).tolist():
            own = (columns["step"] == step) & (columns["correct"] >= 0)
            tokens = columns["tokens"][own].astype(np.float64)
            entry = {"step": float(step), "num": float(own.sum())}
            for channel in ("acc", "tool"):
                moved = columns[f"moves_{channel}"][own]
                entry[f"{channel}_rollouts"] = float(moved.mean()) if len(moved) else 0.0
                entry[f"{channel}_tokens"] = float(tokens[moved].sum() / max(1.0, tokens.sum()))
            found.append(entry)
        return found


class Index:
    """The rollouts of a folder, read as they come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._tables: dict[Part, pa.Table | str] = {}  # or why it cannot be read
        self._snapshot = Snapshot([], [], [])
        self._shown: list[Part] = []  # of the snapshot, those that cannot be read included
        self._searched: OrderedDict[tuple[Part, str], Mask] = OrderedDict()
        self.rows = Rows()

    def snapshot(self, within_s: float | None = None) -> Snapshot:
        """As of now; parts that were there before are not read again.

        within_s: seconds after which the parts that are still unread are left to the next call; the newest are read first, at
        least one. None: all are read.
        """
        deadline = None if within_s is None else time.monotonic() + within_s
        parts = parts_of(self._folder)
        for part in reversed(parts):
            with self._lock:  # of one part only: others may ask meanwhile
                is_new = part not in self._tables
                if is_new:
                    self._tables[part] = _table(part)
            if is_new and deadline is not None and time.monotonic() > deadline:
                break
        with self._lock:
            self._tables = {part: self._tables[part] for part in parts if part in self._tables}
            left = len(parts) - len(self._tables)
            if self._shown != list(self._tables) or self._snapshot.left != left:
                self._shown = list(self._tables)
                good = {part: table for part, table in self._tables.items() if isinstance(table, pa.Table)}
                notes = [text for text in self._tables.values() if isinstance(text, str)]
                self._snapshot = Snapshot(list(good), list(good.values()), notes, left)
            return self._snapshot

    def select(self, wanted: Filter, within_s: float | None = None) -> tuple[Snapshot, npt.NDArray[np.int64]]:
        """The rollouts that a filter wants, oldest first. within_s: see `snapshot`."""
        snapshot = self.snapshot(within_s)
        keep = snapshot.mask(wanted)
        if wanted.text and snapshot.size:
            codes, columns = snapshot.words["part"], snapshot.columns
            for code in np.unique(columns["part"][keep]).tolist():
                places = np.flatnonzero(columns["part"] == code)
                keep[places] &= self._search(snapshot.parts[codes[code]], wanted.text, len(places))[columns["row"][places]]
        return snapshot, np.flatnonzero(keep)

    def _search(self, part: Part, text: str, size: int) -> Mask:
        key = (part, text.lower())
        with self._lock:
            found = self._searched.get(key)
        if found is None:
            try:
                found = holds_text(part, text)
            except DataError:  # it is gone, or written anew just now
                found = np.zeros(size, bool)
            if len(found) != size:
                found = np.zeros(size, bool)
            with self._lock:
                self._searched[key] = found
                while len(self._searched) > _SEARCHES:
                    self._searched.popitem(last=False)
        return found


def _table(part: Part) -> pa.Table | str:
    try:
        return read_index(part)
    except (DataError, OSError) as error:
        return f"{part.path.name} is left out: {one_line(error)[:240]}"
