"""An endless stream of prompts, epoch after epoch, whose place can be saved and restored exactly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from metis_fast import pixels
from metis_fast.data.parquet import Layout, PromptFiles
from metis_fast.data.row import BadRowError
from metis_fast.errors import CheckpointError, DataError
from metis_fast.types import ImageBlob, Prompt

_LOG = logging.getLogger(__name__)
_AHEAD = 16  # rows whose images are looked at together, where all of them are read


@dataclass(frozen=True, slots=True)
class CursorState:
    """The place of a `RowCursor`; `dataclasses.asdict` makes it JSON, `CursorState(**tree)` reads it back.

    epoch: from 0. position: rows of that epoch already visited, bad ones included.
    skipped: bad rows skipped since the start of the run; a row counts again in every epoch.
    seed, shuffle, fingerprint: what the order depends on (`Layout.fingerprint`).
    """

    epoch: int
    position: int
    skipped: int
    seed: int
    shuffle: bool
    fingerprint: str


def epoch_order(layout: Layout, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Shuffled row indices [rows] of one epoch; a pure function of its arguments, the same on every machine and numpy.

    Row groups are shuffled and cut into windows that fit `layout.cache_bytes`; rows are shuffled within a window. So every row
    group is decoded once an epoch, and a set that fits the cache as a whole is permuted uniformly, whatever its row groups.
    """
    num_rows = [rows for rows, _ in layout.groups]
    window_of_group = np.zeros(len(num_rows), np.int64)
    window, num_bytes = 0, 0
    for group in np.argsort(_raw(seed, (epoch, 1), len(num_rows)), kind="stable"):
        size = layout.groups[group][1]
        if num_bytes and num_bytes + size > layout.cache_bytes:
            window, num_bytes = window + 1, 0
        window_of_group[group] = window
        num_bytes += size
    return np.lexsort((_raw(seed, (epoch,), sum(num_rows)), np.repeat(window_of_group, num_rows)))


def _raw(seed: int, stream: tuple[int, ...], num: int) -> npt.NDArray[np.uint64]:
    # Raw output of a bit generator and SeedSequence never change between numpy versions (NEP 19); Generator methods may.
    return np.random.PCG64(np.random.SeedSequence(seed % 2**64, spawn_key=stream)).random_raw(num)


CheckImages = Callable[[Sequence[ImageBlob]], Mapping[str, str]]
"""What is wrong with images, by SHA-256; those that can be used may be missing."""


def decode_all(images: Sequence[ImageBlob]) -> dict[str, str]:
    """`CheckImages` that only decodes."""
    return {image.sha256: pixels.problem(image.data) for image in images}


T = TypeVar("T")
Look = Callable[[Sequence[int]], Sequence[T | BadRowError]]
"""What stands in rows that are wanted together, or what is wrong with each."""


def prompts(files: PromptFiles, check: CheckImages = decode_all) -> Look[Prompt]:
    """Reads rows as prompts, their images looked at together by `check`."""

    def look(rows: Sequence[int]) -> list[Prompt | BadRowError]:
        found: list[Prompt | BadRowError] = []
        for row in rows:
            try:
                found.append(files.read(row))
            except BadRowError as error:
                found.append(error)
        problems = check([image for prompt in found if isinstance(prompt, Prompt) for image in prompt.images])
        return [
            (isinstance(prompt, Prompt) and files.unusable(row, prompt, problems)) or prompt
            for row, prompt in zip(rows, found, strict=True)
        ]

    return look


def read_once(
    look: Look[T], num_rows: int, on_bad_row: Literal["stop", "skip"], together: int = _AHEAD
) -> Iterator[tuple[int, T]]:
    """Every usable row with its number, in the order of the files. together: rows that are looked at so.

    Raises:
        BadRowError: a bad row, with on_bad_row="stop".
        DataError: a file cannot be read any more.
    """
    for start in range(0, num_rows, together):
        rows = range(start, min(start + together, num_rows))
        for row, found in zip(rows, look(rows), strict=True):
            if not isinstance(found, BadRowError):
                yield row, found
                continue
            if on_bad_row == "stop":
                raise found
            _LOG.warning("skipped bad row: %s", found.bad_row)


class RowCursor(Generic[T]):
    """Rows of every epoch in order: each usable one exactly once an epoch, epochs follow one another without a gap.

    A batch may span the border of two epochs, and may then hold a row twice.
    """

    def __init__(
        self,
        layout: Layout,
        seed: int,
        look: Look[T],
        shuffle: bool = True,
        on_bad_row: Literal["stop", "skip"] = "stop",
        advice: str = "run `metis-fast data check` on the files",
    ) -> None:
        """seed, shuffle: see `epoch_order`; without shuffling, rows come in the order of the files. look: at rows that are
        drawn together. advice: what to do where no row can be used."""
        self._layout, self._seed, self._shuffle, self._on_bad_row, self._look = layout, seed, shuffle, on_bad_row, look
        self._advice = advice
        self._num_rows = sum(rows for rows, _ in layout.groups)
        self._epoch = self._position = self._skipped = 0
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None
        self._logged: set[int] = set()

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, from 0."""
        return self._epoch

    @property
    def skipped(self) -> int:
        """Bad rows skipped since the start of the run; a row counts again in every epoch."""
        return self._skipped

    def next(self, n: int) -> list[T]:
        """The next `n` rows. If it raises, the cursor stays where it was.

        Raises:
            BadRowError: a bad row, with on_bad_row="stop".
            DataError: a file cannot be read any more, or an epoch had no usable row.
        """
        return [prompt for _, prompt in self.draw(n)]

    def read(self, row: int) -> T:
        """A row that `draw` gave before; the cursor stays where it is.

        Raises:
            DataError: a file cannot be read any more, or the row is a bad one by now.
        """
        (found,) = self._look([row])
        if isinstance(found, BadRowError):
            raise found
        return found

    def draw(self, n: int) -> list[tuple[int, T]]:
        """As `next`, each with its number, by which it is found again (`read`)."""
        epoch, position, skipped = self._epoch, self._position, self._skipped
        order, usable_rows = self._order_of(epoch), list[tuple[int, T]]()
        usable = position > 0  # a place inside an epoch is always one behind a usable row
        while len(usable_rows) < n:
            rows = [int(row) for row in order[position : position + n - len(usable_rows)]]
            for row, found in zip(rows, self._look(rows), strict=True):
                if not isinstance(found, BadRowError):
                    usable_rows.append((row, found))
                    usable = True
                    continue
                if self._on_bad_row == "stop":
                    raise found
                skipped += 1
                self._log_once(row, found)
            position += len(rows)
            if position == len(order):
                if not usable:
                    raise DataError(f"no usable row among {len(order)}; {self._advice}")
                epoch, position, usable = epoch + 1, 0, False
                order = self._order_of(epoch)
        self._epoch, self._position, self._skipped = epoch, position, skipped
        return usable_rows

    async def begin(self, n: int) -> list[tuple[int, T]]:
        """As `draw`, in a thread: rows are read and their images decoded."""
        return await asyncio.to_thread(self.draw, n)

    def state(self) -> CursorState:
        """Where the stream stands; `restore` continues with the prompt that `next` would have given."""
        return CursorState(self._epoch, self._position, self._skipped, self._seed, self._shuffle, self._layout.fingerprint)

    def restore(self, state: CursorState) -> None:
        """Go to a saved place.

        Raises:
            CheckpointError: the state belongs to other files, another seed or another `shuffle`; the cursor stays where it was.
        """
        for what, saved, here in (
            ("files", state.fingerprint, self._layout.fingerprint),
            ("run.seed", state.seed, self._seed),
            ("data.shuffle", state.shuffle, self._shuffle),
        ):
            if saved != here:
                raise CheckpointError(
                    f"the data order of the checkpoint cannot be continued: it has {what} = {saved}, now {what} = {here}; "
                    "restore what changed, or start a new run"
                )
        if state.epoch < 0 or state.skipped < 0 or not 0 <= state.position < self._num_rows:
            raise CheckpointError(f"the checkpoint holds an impossible data position {state}; use an older checkpoint")
        self._epoch, self._position, self._skipped = state.epoch, state.position, state.skipped

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(self._layout, self._seed, epoch) if self._shuffle else np.arange(self._num_rows)
            self._order = epoch, order
        return self._order[1]

    def _log_once(self, index: int, error: BadRowError) -> None:
        if index not in self._logged:
            self._logged.add(index)
            _LOG.warning("skipped bad row: %s", error.bad_row)


def prompt_cursor(
    files: PromptFiles,
    seed: int,
    shuffle: bool = True,
    on_bad_row: Literal["stop", "skip"] = "stop",
    check: CheckImages = decode_all,
) -> RowCursor[Prompt]:
    """Over prompts that are read here. A row with an image that `check` finds unusable is a bad one."""
    return RowCursor(files.layout, seed, prompts(files, check), shuffle, on_bad_row)
