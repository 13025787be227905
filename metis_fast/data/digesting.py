"""Digests of all rows of a set: row groups are decoded in threads, as many at a time as there are cores, up to eight."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

import pyarrow as pa

_THREADS = min(8, os.cpu_count() or 1)  # each holds a batch of a row group; neither decoding nor digesting needs Python's lock
_PIECE_ROWS = 8  # that a thread makes digests of at a time
_TICK_S = 0.2

T = TypeVar("T")
Batches = Callable[[T], Iterable[tuple[int, pa.RecordBatch]]]
Digest = Callable[[pa.RecordBatch, int], list[bytes]]


def digests(groups: Sequence[T], batches: Batches[T], digest: Digest, tick: Callable[[int], object]) -> list[bytes]:
    """Digests of all rows, in their order.

    groups: row groups. batches: decodes one, into batches with the number of their first row. digest: of the rows of a batch,
    with that number. tick: called, in this thread, with the number of rows done since it was called last, several times a
    second; what it raises goes on, once the threads have stopped.

    Raises:
        DataError: a row group cannot be decoded.
    """
    found: list[bytes] = []
    stop = Event()
    with ThreadPoolExecutor(_THREADS, "digest") as digesters, ThreadPoolExecutor(_THREADS, "decode") as decoders:
        try:
            for result in _in_order(groups, lambda group: decoders.submit(_group, batches(group), digest, digesters, stop)):
                while not result.done():
                    wait([result], timeout=_TICK_S)
                    tick(0)
                some = result.result()
                found += some
                tick(len(some))
        finally:
            stop.set()
    return found


def _in_order(groups: Sequence[T], submit: Callable[[T], Future[list[bytes]]]) -> Iterator[Future[list[bytes]]]:
    """Results in the order of the groups, of which a few more than can be decoded at a time are begun."""
    waiting = deque[Future[list[bytes]]]()
    for group in groups:
        waiting.append(submit(group))
        if len(waiting) > 2 * _THREADS:  # digests are small: it is the decoders that hold memory
            yield waiting.popleft()
    yield from waiting


def _group(
    batches: Iterable[tuple[int, pa.RecordBatch]], digest: Digest, digesters: ThreadPoolExecutor, stop: Event
) -> list[bytes]:
    found: list[bytes] = []
    for index, batch in batches:
        if stop.is_set():
            break
        pieces = range(0, batch.num_rows, _PIECE_ROWS)
        for made in [digesters.submit(digest, batch.slice(at, _PIECE_ROWS), index + at) for at in pieces]:
            found += made.result()  # before the next batch: more would add up in memory
    return found
