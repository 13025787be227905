"""What `metis-fast data check` finds in Parquet files before a run depends on them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from metis_fast.data.parquet import PromptFiles, RawRow
from metis_fast.data.row import BadRow, BadRowError
from metis_fast.errors import DataError
from metis_fast.pixels import size
from metis_fast.types import Ability, Prompt

_PIECE = 8  # rows that are sent to a process at once; at half a megabyte each, reading stays ahead of decoding
_SMALL, _FEW = 32 << 20, 256  # bytes, and prompts to count, that are done before other processes would have started

CountTokens = Callable[[Prompt], int]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What is in the files.

    rows: all rows, bad ones included; everything below `bad_rows` is over the usable ones only.
    abilities: usable rows by ability, all three present.
    images: images in usable rows; image_bytes: their encoded size; smallest, largest: (width, height) in pixels by area, None
        where there is no image. longest_prompt: its tokens; None where they were not counted.
    """

    rows: int
    bad_rows: tuple[BadRow, ...]
    abilities: Mapping[str, int]
    images: int
    image_bytes: int
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    longest_prompt: int | None

    @property
    def exit_code(self) -> int:
        """For the command line: 1 if any row is bad, else 0."""
        return 1 if self.bad_rows else 0


@dataclass(slots=True)
class _Found:
    """What some rows hold; the fields of `CheckReport`."""

    rows: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    abilities: Counter[str] = field(default_factory=Counter)
    images: int = 0
    image_bytes: int = 0
    sizes: set[tuple[int, int]] = field(default_factory=set)
    longest: int = 0

    def add(self, other: _Found) -> None:
        self.rows += other.rows
        self.bad_rows += other.bad_rows
        self.abilities += other.abilities
        self.images += other.images
        self.image_bytes += other.image_bytes
        self.sizes |= other.sizes
        self.longest = max(self.longest, other.longest)


@dataclass(frozen=True, slots=True)
class _Checker:
    """Checks rows, in this process or in another one. Rows that could not even be read pass through it."""

    count_tokens: CountTokens | None
    max_prompt_tokens: int

    def __call__(self, rows: Sequence[RawRow | BadRow]) -> _Found:
        found = _Found(rows=len(rows))
        for row in rows:
            try:
                if isinstance(row, BadRow):
                    raise BadRowError(row)
                prompt = row.decoded()
                if self.count_tokens is not None:
                    found.longest = max(found.longest, self._length(prompt, row, self.count_tokens))
            except BadRowError as error:
                found.bad_rows.append(error.bad_row)
                continue
            found.abilities[prompt.ability.value] += 1
            found.images += len(prompt.images)
            found.image_bytes += sum(len(image.data) for image in prompt.images)
            found.sizes.update(size(image.data) for image in prompt.images)
        return found

    def _length(self, prompt: Prompt, row: RawRow, count_tokens: CountTokens) -> int:
        try:
            length = count_tokens(prompt)
        except DataError as error:
            raise BadRowError(BadRow(str(row.path), row.row, "images", "images that the model can use", str(error))) from None
        if length > self.max_prompt_tokens:
            limit = f"at most rollout.max_prompt_tokens={self.max_prompt_tokens} tokens"
            raise BadRowError(BadRow(str(row.path), row.row, "prompt", limit, f"{length} tokens"))
        return length


_checker = _Checker(None, 0)  # of a process of the pool


def _open_process(open_counter: Callable[[], CountTokens] | None, max_prompt_tokens: int) -> None:
    global _checker
    _checker = _Checker(None if open_counter is None else open_counter(), max_prompt_tokens)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C is for this process, at the end of the block, and not for those that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_here(rows: Sequence[RawRow | BadRow]) -> _Found:
    return _checker(rows)


def check_files(
    paths: Sequence[Path],
    progress: bool,
    open_counter: Callable[[], CountTokens] | None = None,
    max_prompt_tokens: int = 0,
    processes: int | None = None,
) -> CheckReport:
    """Read every row of the files (or folders of them), as training would; images are decoded whole.

    progress: show a bar on stderr, where that is a terminal. Where a row group cannot be decoded, its rows from the damage on
    are bad. open_counter: opens what counts the tokens of a prompt with the model to be trained (pickled, and called in every
    process); a row with more than max_prompt_tokens is bad, and so is one for which counting raises a DataError. processes:
    None is one a core, and this one alone where the files are small.

    Raises:
        DataError: a file is missing, is no Parquet file, or lacks a column (see `PromptFiles`); or a process died.
    """
    files = PromptFiles(paths)
    if processes is None:
        small = sum(group.num_bytes for group in files.row_groups) < _SMALL and (open_counter is None or len(files) < _FEW)
        processes = 1 if small else _num_cores()
    found = _Found()
    with tqdm(total=len(files), desc="checking", unit="row", disable=None if progress else True) as bar:
        for part in _check(files, open_counter, max_prompt_tokens, processes):
            found.add(part)
            bar.update(part.rows)
    return CheckReport(
        rows=len(files),
        bad_rows=tuple(found.bad_rows),
        abilities={ability.value: found.abilities[ability.value] for ability in Ability},
        images=found.images,
        image_bytes=found.image_bytes,
        smallest=min(found.sizes, key=_area, default=None),
        largest=max(found.sizes, key=_area, default=None),
        longest_prompt=found.longest or None,
    )


def _num_cores() -> int:
    """That this process may use; macOS says only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(
    files: PromptFiles, open_counter: Callable[[], CountTokens] | None, max_prompt_tokens: int, processes: int
) -> Iterator[_Found]:
    """What is found in piece after piece, in the order of the rows."""
    if processes == 1:
        yield from map(_Checker(None if open_counter is None else open_counter(), max_prompt_tokens), _pieces(files))
        return
    # spawned: a fork of a process with Arrow's threads may hang
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _open_process, (open_counter, max_prompt_tokens))
    waiting: deque[Future[_Found]] = deque()
    try:
        for rows in _pieces(files):
            with _without_interrupts():  # which processes that start now inherit
                waiting.append(pool.submit(_check_here, rows))
            if len(waiting) > 2 * processes:  # no more rows in memory than are about to be decoded
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
    except BrokenProcessPool:
        raise DataError(
            "a process that checks rows died, most likely of too little memory; give it more, or use one (--processes 1)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _pieces(files: PromptFiles) -> Iterator[list[RawRow | BadRow]]:
    for group in files.row_groups:
        piece: list[RawRow | BadRow] = []
        num = 0
        try:
            for row in files.raw_rows(group):
                num += 1
                piece.append(row)
                if len(piece) == _PIECE:
                    yield piece
                    piece = []
        except DataError as error:
            column = f"all, row group {group.group}"
            places = map(files.location, range(group.start + num, group.start + group.num_rows))
            piece += (BadRow(str(path), row, column, "data that decodes", str(error)) for path, row in places)
        if piece:
            yield piece


def render_text(report: CheckReport) -> str:
    """For people: one line for each bad row, then a summary."""
    usable = sum(report.abilities.values())
    lines = [f"bad row: {bad_row}" for bad_row in report.bad_rows]
    lines.append(f"rows       {report.rows} ({usable} usable, {len(report.bad_rows)} bad)")
    shares = (f"{name} {count} ({count / max(usable, 1):.0%})" for name, count in report.abilities.items())
    lines.append(f"abilities  {', '.join(shares)}")
    if report.smallest is None or report.largest is None:
        lines.append("images     none")
    else:
        small, large = ("x".join(map(str, size)) for size in (report.smallest, report.largest))
        lines.append(f"images     {report.images} ({report.image_bytes / 2**20:.1f} MiB), {small} to {large} pixels")
    if report.longest_prompt is not None:
        lines.append(f"prompts    up to {report.longest_prompt} tokens")
    return "\n".join(lines)


def render_json(report: CheckReport) -> str:
    """For programs: the fields of `CheckReport`, every bad row as {file, row, column, expected, got}."""
    return json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False)


def _area(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] * size[1], size[0]  # the width settles ties, so that the report does not depend on set order
