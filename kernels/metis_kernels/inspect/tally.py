"""Bytes, dot FLOPs and exponentials of interpreted launches, counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from metis_kernels.inspect.interpreter import Access, Observer, Program, observed


@dataclass(slots=True)
class Counts:
    """What kernels asked for.

    launches: of a kernel.
    load_bytes, store_bytes: of lanes that are not masked off, before any cache: an element loaded by two programs counts
        twice. Tensor descriptors included.
    atomic_bytes: of the elements that atomics touch, counted once though they are read and written.
    dot_flops: 2 M N K a `tl.dot`, with the padding of its tiles.
    exps: lanes of exp and exp2, one MUFU.EX2 each on a GPU.
    """

    launches: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    atomic_bytes: int = 0
    dot_flops: int = 0
    exps: int = 0


@dataclass(slots=True)
class Tally:
    """total: over all launches; kernels: by name of the kernel."""

    total: Counts = field(default_factory=Counts)
    kernels: dict[str, Counts] = field(default_factory=dict)


@contextlib.contextmanager
def tally() -> Iterator[Tally]:
    """Count what the interpreted kernels launched inside ask for. bfloat16 is honest inside.

    Raises:
        ValueError: kernels are not interpreted in this process.
    """
    counter = _Counter()
    with observed(counter):
        yield counter.tally


class _Counter(Observer):
    def __init__(self) -> None:
        self.tally = Tally()
        self._current: tuple[Counts, ...] = ()

    def launch(self, kernel: str, arguments: Sequence[object]) -> None:
        self._current = self.tally.total, self.tally.kernels.setdefault(kernel, Counts())
        for counts in self._current:
            counts.launches += 1

    def access(self, kind: Access, program: Program, addresses: NDArray[np.uint64], num_bytes: int) -> None:
        for counts in self._current:
            if kind == "load":
                counts.load_bytes += addresses.size * num_bytes
            elif kind == "store":
                counts.store_bytes += addresses.size * num_bytes
            else:
                counts.atomic_bytes += addresses.size * num_bytes

    def dot(self, flops: int) -> None:
        for counts in self._current:
            counts.dot_flops += flops

    def exponential(self, count: int) -> None:
        for counts in self._current:
            counts.exps += count
