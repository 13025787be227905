"""An endless stream of prompts, epoch after epoch, whose place can be saved and restored exactly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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
    """The place of a `PromptCursor`; `dataclasses.asdict` makes it JSON, `CursorState(**tree)` reads it back.

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


def _read(files: PromptFiles, rows: Sequence[int], check: CheckImages) -> Iterator[tuple[int, Prompt | BadRowError]]:
    """Some rows, their images looked at together."""
    found: list[tuple[int, Prompt | BadRowError]] = []
    for row in rows:
        try:
            found.append((row, files.read(row)))
        except BadRowError as error:
            found.append((row, error))
    problems = check([image for _, prompt in found if isinstance(prompt, Prompt) for image in prompt.images])
    for row, prompt in found:
        yield row, (isinstance(prompt, Prompt) and files.unusable(row, prompt, problems)) or prompt


def read_once(files: PromptFiles, on_bad_row: Literal["stop", "skip"], check: CheckImages = decode_all) -> Iterator[Prompt]:
    """Every usable prompt, in the order of the files.

    check: of their images, some rows ahead.

    Raises:
        BadRowError: a bad row, with on_bad_row="stop".
        DataError: a file cannot be read any more.
    """
    for start in range(0, len(files), _AHEAD):
        for _, prompt in _read(files, range(start, min(start + _AHEAD, len(files))), check):
            if isinstance(prompt, Prompt):
                yield prompt
                continue
            if on_bad_row == "stop":
                raise prompt
            _LOG.warning("skipped bad row: %s", prompt.bad_row)


class PromptCursor:
    """Prompts of every epoch in order: each usable row exactly once an epoch, epochs follow one another without a gap.

    A batch may span the border of two epochs, and may then hold a row twice.
    """

    def __init__(
        self,
        files: PromptFiles,
        seed: int,
        shuffle: bool = True,
        on_bad_row: Literal["stop", "skip"] = "stop",
        check: CheckImages = decode_all,
    ) -> None:
        """seed, shuffle: see `epoch_order`; without shuffling, rows come in the order of the files. check: of the images of
        rows that are drawn together; a row with one that cannot be used is a bad one."""
        self._files, self._seed, self._shuffle, self._on_bad_row, self._check = files, seed, shuffle, on_bad_row, check
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

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts. If it raises, the cursor stays where it was.

        Raises:
            BadRowError: a bad row, with on_bad_row="stop".
            DataError: a file cannot be read any more, or an epoch had no usable row.
        """
        return [prompt for _, prompt in self.draw(n)]

    def read(self, row: int) -> Prompt:
        """A prompt that `draw` gave before, by its row; the cursor stays where it is.

        Raises:
            DataError: a file cannot be read any more.
        """
        return self._files.read(row)

    def draw(self, n: int) -> list[tuple[int, Prompt]]:
        """As `next`, each with its row, by which it is found again (`read`)."""
        epoch, position, skipped = self._epoch, self._position, self._skipped
        order, prompts = self._order_of(epoch), list[tuple[int, Prompt]]()
        usable = position > 0  # a place inside an epoch is always one behind a usable row
        while len(prompts) < n:
            rows = [int(row) for row in order[position : position + n - len(prompts)]]
            for row, prompt in _read(self._files, rows, self._check):
                if isinstance(prompt, Prompt):
                    prompts.append((row, prompt))
                    usable = True
                    continue
                if self._on_bad_row == "stop":
                    raise prompt
                skipped += 1
                self._log_once(row, prompt)
            position += len(rows)
            if position == len(order):
                if not usable:
                    raise DataError(f"no usable row among {len(order)}; run `metis-fast data check` on the files")
                epoch, position, usable = epoch + 1, 0, False
                order = self._order_of(epoch)
        self._epoch, self._position, self._skipped = epoch, position, skipped
        return prompts

    async def begin(self, n: int) -> list[tuple[int, Prompt]]:
        """As `draw`, in a thread: rows are read and their images decoded."""
        return await asyncio.to_thread(self.draw, n)

    def state(self) -> CursorState:
        """Where the stream stands; `restore` continues with the prompt that `next` would have given."""
        return CursorState(
            self._epoch, self._position, self._skipped, self._seed, self._shuffle, self._files.layout.fingerprint
        )

    def restore(self, state: CursorState) -> None:
        """Go to a saved place.

        Raises:
            CheckpointError: the state belongs to other files, another seed or another `shuffle`; the cursor stays where it was.
        """
        for what, saved, here in (
            ("files", state.fingerprint, self._files.layout.fingerprint),
            ("run.seed", state.seed, self._seed),
            ("data.shuffle", state.shuffle, self._shuffle),
        ):
            if saved != here:
                raise CheckpointError(
                    f"the data order of the checkpoint cannot be continued: it has {what} = {saved}, now {what} = {here}; "
                    "restore what changed, or start a new run"
                )
        if state.epoch < 0 or state.skipped < 0 or not 0 <= state.position < len(self._files):
            raise CheckpointError(f"the checkpoint holds an impossible data position {state}; use an older checkpoint")
        self._epoch, self._position, self._skipped = state.epoch, state.position, state.skipped

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(self._files.layout, self._seed, epoch) if self._shuffle else np.arange(len(self._files))
            self._order = epoch, order
        return self._order[1]

    def _log_once(self, index: int, error: BadRowError) -> None:
        if index not in self._logged:
            self._logged.add(index)
            _LOG.warning("skipped bad row: %s", error.bad_row)
