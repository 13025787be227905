"""The Parquet parts of a run's rollouts, read by columns: nothing is locked, and a part that cannot be read is said."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from metis_fast import seal
from metis_fast.errors import DataError, one_line
from metis_fast.types import Outcome

TOKENS = ("tokens", "sampled", "logp", "weight_version")
_LEAVES = ("start", "stop", "outcome", "call.name")
_COLUMNS = (
    *("prompt_uid", "index", "ability", "kind", "question", "outcome", "verdict.correct", "score_outcome"),
    *("r_acc", "r_tool", "adv_acc", "adv_tool", "qualifies", "in_tool_denominator", "needs_gradient", "prompt_len"),
    *(f"turns.list.element.{leaf}" for leaf in _LEAVES),
)
_KEPT_ROW_GROUPS = 4


@dataclass(frozen=True, slots=True)
class Part:
    """One file. key: changes when it is written anew."""

    path: Path
    step: int
    key: tuple[int, int, int]

    @property
    def name(self) -> str:
        """In addresses."""
        return self.path.stem


def files_in(folder: Path, beginning: str, ending: str) -> list[Path]:
    """Of such names, in order; none where the folder is not there or may not be read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if name.startswith(beginning) and name.endswith(ending)]


def parts_of(folder: Path) -> list[Part]:
    """The parts of a folder, by step: step-000012.parquet, or step-000012.node-0.parquet and so on; maybe none."""
    found = []
    for path in files_in(folder, "step-", ".parquet"):
        number, _, node = path.stem.removeprefix("step-").partition(".")
        if not number.isdecimal() or (node and not node.startswith("node-")):
            continue
        try:
            status = path.stat()
        except OSError:  # a resumed run makes it again, or it is a link to nowhere
            continue
        if not S_ISREG(status.st_mode):  # a pipe would never end
            continue
        found.append(Part(path, int(number), (status.st_ino, status.st_size, status.st_mtime_ns)))
    return sorted(found, key=lambda part: (part.step, part.name))


@contextmanager
def _opened(part: Part) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(part.path, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(f"{part.path.name} cannot be read: {one_line(error)[:200]}") from None


def _leaf(column: pa.Array, *names: str) -> pa.Array:
    for name in names:
        column = column.field(name)
    return column


def _sums(lists: pa.ListArray, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """[rows]: of the values of each list. lists: with as many values, none of them null."""
    ends = np.concatenate([[0], np.cumsum(values)])
    offsets = lists.offsets.to_numpy()
    return (ends[offsets[1:]] - ends[offsets[:-1]]).astype(np.int32)


def read_index(part: Part) -> pa.Table:
    """A row for each rollout, in the order of the part, without tokens and texts.

    step, part (name), row, uid, sample (index in its group), ability, kind, question, outcome (JUDGE_ERROR where the judge
    failed), correct (1, 0, or -1 without a verdict), r_acc, r_tool, adv_acc, adv_tool, qualifies, moves_acc, moves_tool (the
    channel has a gradient for it), calls, tool_errors, turns, tokens (sampled).

    Raises:
        DataError: the part is damaged, or lacks a column that has to be there.
    """
    seal.check_seal(part.path)
    with _opened(part) as file:
        have = set(file.schema_arrow.names)
        missing = sorted({name.partition(".")[0] for name in _COLUMNS} - have)
        if missing:
            raise DataError(f"{part.path.name} lacks the columns {', '.join(missing)}; it is no part of a run of this version")
        table = file.read(columns=list(_COLUMNS)).combine_chunks()
    try:
        return _index(part, table)
    except (pa.ArrowException, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(f"{part.path.name} has columns of another form: {one_line(repr(error))[:160]}") from None


def _index(part: Part, table: pa.Table) -> pa.Table:
    size = table.num_rows

    def column(name: str) -> pa.Array:
        chunked = table[name]
        return chunked.chunk(0) if chunked.num_chunks else pa.array([], chunked.type)

    def flag(name: str) -> npt.NDArray[np.bool_]:
        return pc.fill_null(column(name).cast(pa.bool_()), False).to_numpy(zero_copy_only=False)

    def number(name: str) -> npt.NDArray[np.float64]:
        return pc.fill_null(column(name), 0.0).to_numpy(zero_copy_only=False).astype(np.float64)

    def text(name: str) -> npt.NDArray[np.object_]:
        return pc.fill_null(column(name), "").to_numpy(zero_copy_only=False)

    verdict, turns = column("verdict"), column("turns")
    right = pc.fill_null(_leaf(verdict, "correct"), False).to_numpy(zero_copy_only=False)
    correct = np.where(verdict.is_valid().to_numpy(zero_copy_only=False), right, -1).astype(np.int8)
    outcome = np.where(text("score_outcome") == Outcome.JUDGE_ERROR.value, Outcome.JUDGE_ERROR.value, text("outcome"))
    flat = turns.values
    called = _leaf(flat, "call").is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
    wrong = pc.fill_null(_leaf(flat, "outcome"), "").to_numpy(zero_copy_only=False) == Outcome.TOOL_ERROR.value
    length = _leaf(flat, "stop").to_numpy(zero_copy_only=False) - _leaf(flat, "start").to_numpy(zero_copy_only=False)
    adv_acc, adv_tool, gradient = number("adv_acc"), number("adv_tool"), flag("needs_gradient")

    def codes(values: pa.Array) -> pa.Array:
        return pc.fill_null(values.cast(pa.string()), "").dictionary_encode()

    return pa.table(
        {
            "step": pa.array(np.full(size, part.step, np.int32)),
            "part": codes(pa.array([part.name] * size, pa.string())),
            "row": pa.array(np.arange(size, dtype=np.int32)),
            "uid": codes(column("prompt_uid")),
            "sample": pc.fill_null(column("index"), 0).cast(pa.int32()),
            "ability": codes(column("ability")),
            "kind": codes(column("kind")),
            "question": codes(column("question")),
            "outcome": codes(pa.array(outcome, pa.string())),
            "correct": correct,
            "r_acc": number("r_acc"),
            "r_tool": number("r_tool"),
            "adv_acc": adv_acc,
            "adv_tool": adv_tool,
            "qualifies": flag("qualifies"),
            "moves_acc": gradient & (adv_acc != 0),  # exactly 0 is what the writer gives where there is no signal
            "moves_tool": flag("in_tool_denominator") & (adv_tool != 0),
            "calls": _sums(turns, called),
            "tool_errors": _sums(turns, np.asarray(wrong, np.int64)),
            "turns": pc.fill_null(turns.value_lengths(), 0).cast(pa.int32()),
            "tokens": _sums(turns, length.astype(np.int64)),
        }
    )


def holds_text(part: Part, text: str) -> npt.NDArray[np.bool_]:
    """[rows]: whether transcript, question or name of the prompt has the text, in upper or lower case.

    Raises:
        DataError: the part is damaged.
    """
    options = pc.MatchSubstringOptions(text, ignore_case=True)
    with _opened(part) as file:
        masks = []
        for batch in file.iter_batches(256, columns=["text", "question", "prompt_uid"]):
            columns = [pc.fill_null(column, "") for column in batch.columns]
            found = [pc.call_function("match_substring", [column], options) for column in columns]
            masks.append(np.any([one.to_numpy(zero_copy_only=False) for one in found], axis=0))
        return np.concatenate(masks) if masks else np.zeros(0, bool)


class Rows:
    """Single rows of parts; the row groups that were last asked for stay in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes: dict[Part, list[int]] = {}  # of its row groups
        self._kept: OrderedDict[tuple[Part, int, bool], pa.Table] = OrderedDict()

    def read(self, part: Part, row: int, tokens: bool) -> dict[str, Any]:
        """All columns of a row but those a token; with `tokens`, only those, as arrays.

        Raises:
            DataError: there is no such row, or the part is damaged.
        """
        with self._lock:
            if part not in self._sizes:
                with _opened(part) as file:
                    metadata = file.metadata
                    self._sizes[part] = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            group, first = _row_group(self._sizes[part], row)
            key = (part, group, tokens)
            table = self._kept.get(key)
            if table is None:
                with _opened(part) as file:
                    names = [name for name in file.schema_arrow.names if (name in TOKENS) == tokens]
                    table = self._kept[key] = file.read_row_group(group, columns=names)
            self._kept.move_to_end(key)
            while len(self._kept) > _KEPT_ROW_GROUPS:
                self._kept.popitem(last=False)
        one = table.slice(row - first, 1)
        if not tokens:
            return one.to_pylist()[0]
        return {name: one[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in one.column_names}


def _row_group(sizes: list[int], row: int) -> tuple[int, int]:
    """The row group that has a row, and its first row."""
    first = 0
    for group, size in enumerate(sizes):
        if first <= row < first + size:
            return group, first
        first += size
    raise DataError(f"row {row}: expected one of 0 to {first - 1}")
