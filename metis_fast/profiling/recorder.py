"""Keeps spans, and memory beside them, with the time at which they were."""

from __future__ import annotations

import contextvars
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from metis_fast.spans import Lane

SAMPLE_NS = 50_000_000
"""Between two looks at the memory, which take 0.1 ms."""
_PAGE = os.sysconf("SC_PAGE_SIZE")

_around: contextvars.ContextVar[Recorded | None] = contextvars.ContextVar("span", default=None)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A span. began_ns, ended_ns: of `time.perf_counter_ns`; 0: it has not ended. parent: number of the span of the same lane
    that it was begun in, -1 without one."""

    number: int
    lane: Lane
    name: str
    began_ns: int
    ended_ns: int
    parent: int


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Bytes at a time. resident: of this process; children: of the processes below it; allocated: by torch on the GPUs;
    reserved: what its allocator holds there for that."""

    at_ns: int
    resident: int
    children: int
    allocated: int
    reserved: int


class Recorder:
    """A `Listener` that keeps everything. spans: those that have ended. steps: number, began_ns, ended_ns."""

    lanes = frozenset(Lane)

    def __init__(self) -> None:
        self.spans: list[Recorded] = []
        self.memory: list[MemorySample] = []
        self.steps: list[tuple[int, int, int]] = []
        self._numbers = itertools.count()
        # one clock for all: that of the traces of torch, and of other processes of this machine
        self.epoch_ns = time.time_ns() - time.perf_counter_ns()

    def began(self, lane: Lane, name: str) -> tuple[Recorded, contextvars.Token[Recorded | None]]:
        """See `Listener`."""
        outer = _around.get()
        parent = outer.number if outer is not None and outer.lane is lane else -1
        one = Recorded(next(self._numbers), lane, name, time.perf_counter_ns(), 0, parent)
        return one, _around.set(one)

    def ended(self, handle: object) -> None:
        """See `Listener`."""
        assert isinstance(handle, tuple)
        one, token = handle
        ended_ns = time.perf_counter_ns()
        self.spans.append(Recorded(one.number, one.lane, one.name, one.began_ns, ended_ns, one.parent))
        _around.reset(token)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Look at the memory meanwhile, from a thread."""
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(SAMPLE_NS / 1e9):
                self.memory.append(sample_memory())

        thread = threading.Thread(target=sample, name="memory", daemon=True)
        self.memory.append(sample_memory())
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def sample_memory() -> MemorySample:
    """What is in use now. Where the system has no /proc, what it tells of no process is 0."""
    now, own = time.perf_counter_ns(), os.getpid()
    allocated = reserved = 0
    if torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        allocated = sum(torch.cuda.memory_allocated(device) for device in devices)
        reserved = sum(torch.cuda.memory_reserved(device) for device in devices)
    return MemorySample(now, _resident(own), sum(map(_resident, _below(own))), allocated, reserved)


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_bytes().split()[1]) * _PAGE
    except (OSError, IndexError):  # it has ended, or this is no Linux
        return 0


def _below(process: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{process}/task"):
            found += map(int, Path(f"/proc/{process}/task/{task}/children").read_bytes().split())
    except OSError:
        return found
    return found + [deeper for child in found for deeper in _below(child)]
