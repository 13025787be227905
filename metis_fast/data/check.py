"""What `metis-fast data check` finds in Parquet files before a run depends on them."""

from __future__ import annotations

import math
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from metis_fast.data.offers import KNOWN_TOOLS, asks_for_answer, offered_tools
from metis_fast.data.parquet import PromptFiles, RawRow
from metis_fast.data.report import CheckReport
from metis_fast.data.row import BadRow, BadRowError
from metis_fast.errors import DataError
from metis_fast.pixels import size
from metis_fast.types import Prompt

_PIECE = 8  # rows that are sent to a process at once; at half a megabyte each, reading stays ahead of decoding
_MEGAPIXELS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16)
_TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_SMALL, _FEW = 32 << 20, 256  # bytes, and prompts to count, that are done before other processes would have started

_LISTED = "extra_info.tools"

CountTokens = Callable[[Prompt], int]


@dataclass(slots=True)
class _Found:
    """What some rows hold; the fields of `CheckReport`. first: the first row of which something is to be warned."""

    rows: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    abilities: Counter[str] = field(default_factory=Counter)
    styles: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    tools: Counter[str] = field(default_factory=Counter)
    listed: Counter[str] = field(default_factory=Counter)
    image_bytes: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    over_limit: int = 0
    never_asking: int = 0
    first: dict[str, str] = field(default_factory=dict)

    def add(self, other: _Found) -> None:
        self.rows += other.rows
        self.bad_rows += other.bad_rows
        for mine, more in zip(self._counters(), other._counters(), strict=True):
            mine.update(more)
        self.image_bytes += other.image_bytes
        self.over_limit += other.over_limit
        self.never_asking += other.never_asking
        self.first = other.first | self.first

    def _counters(self) -> tuple[Counter[Any], ...]:
        return self.abilities, self.styles, self.sources, self.tools, self.listed, self.sizes, self.tokens

    def see(self, prompt: Prompt) -> None:
        """A row that can be used."""
        self.abilities[prompt.ability] += 1
        self.styles[prompt.judge_style] += 1
        self.sources[prompt.data_source] += 1
        self.image_bytes += sum(len(image.data) for image in prompt.images)
        self.sizes.update(size(image.data) for image in prompt.images)
        for tool in offered_tools(prompt):
            self.tools[tool] += 1
            self.first.setdefault(tool, prompt.uid)
        for tool in dict.fromkeys(prompt.tools or ()):
            self.listed[tool] += 1
            self.first.setdefault(f"{_LISTED}.{tool}", prompt.uid)
        if not asks_for_answer(prompt):
            self.never_asking += 1
            self.first.setdefault("", prompt.uid)


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
                    found.tokens[self._length(prompt, row, self.count_tokens, found)] += 1
            except BadRowError as error:
                found.bad_rows.append(error.bad_row)
                continue
            found.see(prompt)
        return found

    def _length(self, prompt: Prompt, row: RawRow, count_tokens: CountTokens, found: _Found) -> int:
        try:
            length = count_tokens(prompt)
        except DataError as error:
            raise BadRowError(BadRow(str(row.path), row.row, "images", "images that the model can use", str(error))) from None
        if length > self.max_prompt_tokens:
            found.over_limit += 1
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
    any_style: bool = False,
    known: Collection[str] = KNOWN_TOOLS,
) -> CheckReport:
    """Read every row of the files (or folders of them), as training would; images are decoded whole.

    progress: show a bar on stderr, where that is a terminal. Where a row group cannot be decoded, its rows from the damage on
    are bad. open_counter: opens what counts the tokens of a prompt with the model to be trained (pickled, and called in every
    process); a row with more than max_prompt_tokens is bad, and so is one for which counting raises a DataError. processes:
    None is one a core, and this one alone where the files are small. any_style: see `PromptFiles`.
    known: names of the tools that will answer.

    Raises:
        DataError: a file is missing, is no Parquet file, or lacks a column (see `PromptFiles`); or a process died.
    """
    files = PromptFiles(paths, any_style=any_style)
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
        abilities=dict(sorted(found.abilities.items())),
        images=found.sizes.total(),
        image_bytes=found.image_bytes,
        smallest=min(found.sizes, key=_area, default=None),
        largest=max(found.sizes, key=_area, default=None),
        longest_prompt=max(found.tokens, default=None),
        styles=dict(sorted(found.styles.items())),
        sources=dict(sorted(found.sources.items())),
        image_sizes=_steps(_megapixels(found.sizes), _MEGAPIXELS, " MP"),
        tokens=None if open_counter is None else _steps(found.tokens, _TOKENS),
        over_limit=None if open_counter is None else found.over_limit,
        tools=dict(sorted(found.tools.items())),
        unknown_tools={name: num for name, num in sorted(found.tools.items()) if name not in known},
        unknown_listed={name: num for name, num in sorted(found.listed.items()) if name not in known},
        never_asking=found.never_asking,
        warnings=tuple(_warnings(found, known)),
    )


def _warnings(found: _Found, known: Collection[str]) -> Iterator[str]:
    if found.never_asking:
        yield (
            f"{found.never_asking} rows (first {found.first['']}) never ask for <answer> in their prompt, and what does not "
            "stand in <answer> is wrong; say so in the system message"
        )
    names = ", ".join(sorted(known))
    for name, num in sorted(found.tools.items()):
        if name not in known:
            yield f"{num} rows (first {found.first[name]}) offer the tool {name!r}, which nobody answers; known are {names}"
    for name, num in sorted(found.listed.items()):
        if name not in known:
            first = found.first[f"{_LISTED}.{name}"]
            yield f"{num} rows (first {first}) list the tool {name!r} in {_LISTED}, which nobody answers; known are {names}"


def _megapixels(sizes: Mapping[tuple[int, int], int]) -> Counter[float]:
    found = Counter[float]()
    for (width, height), num in sizes.items():
        found[width * height / 1e6] += num
    return found


def _steps(counts: Mapping[int, int] | Mapping[float, int], steps: Sequence[float], unit: str = "") -> dict[str, int]:
    """Numbers counted by the first of some steps that is no less; steps with nothing are left out."""
    found = Counter[float]()
    for value, num in counts.items():
        found[next((step for step in steps if value <= step), math.inf)] += num
    return {
        f"to {step:g}{unit}" if step < math.inf else f"over {steps[-1]:g}{unit}": num for step, num in sorted(found.items())
    }


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
            got = str(error).removeprefix(f"{files.location(group.start)[0]}: ")
            places = map(files.location, range(group.start + num, group.start + group.num_rows))
            piece += (BadRow(str(path), row, column, "data that decodes", got) for path, row in places)
        if piece:
            yield piece


def _area(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] * size[1], size[0]  # the width settles ties, so that the report does not depend on set order
