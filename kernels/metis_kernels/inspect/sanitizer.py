"""Out-of-bounds lanes and double stores of interpreted kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from metis_kernels.inspect.interpreter import Access, ObservedError, Observer, Program, observed


class OutOfBoundsError(ObservedError):
    """Lanes that are not masked off lie outside every tensor of the launch."""


class DoubleStoreError(ObservedError):
    """Two programs of one launch write one address, at least one of them with a plain store: which one wins is chance."""


@contextlib.contextmanager
def sanitize() -> Iterator[None]:
    """Inside, every launch of an interpreted kernel is checked, and bfloat16 is honest.

    Loads, stores and atomics, through pointers or tensor descriptors, may touch only elements between the first and the
    last of a tensor argument; no address may be stored to by two programs of a launch. Atomics may meet atomics. What a
    view skips over between its rows counts as inside.

    Raises (from the launch):
        OutOfBoundsError, DoubleStoreError: they name kernel, program and number of lanes; the access does not happen.
        ValueError: kernels are not interpreted in this process.
    """
    with observed(_Sanitizer()):
        yield


_NOBODY, _ATOMIC = -1, -2


@dataclass(slots=True, eq=False)
class _Region:
    """Memory of one tensor argument: bytes [start, stop), and who wrote each of them: a program's number, or as above."""

    start: int
    stop: int
    writers: NDArray[np.int32]


class _Sanitizer(Observer):
    def __init__(self) -> None:
        self._kernel = ""
        self._regions: list[_Region] = []
        self._programs: list[Program] = []

    def launch(self, kernel: str, arguments: Sequence[object]) -> None:
        self._kernel = kernel
        self._programs = []
        self._regions = [
            _Region(start, stop, np.full(stop - start, _NOBODY, np.int32)) for start, stop in _merge(_extents(arguments))
        ]

    def access(self, kind: Access, program: Program, addresses: NDArray[np.uint64], num_bytes: int) -> None:
        unseen = np.ones(addresses.shape, bool)
        for region in self._regions:
            inside = (addresses >= region.start) & (addresses + np.uint64(num_bytes) <= region.stop)
            unseen &= ~inside
            if kind != "load" and inside.any():
                self._write(kind, program, region, addresses[inside], num_bytes)
        if unseen.any():
            raise OutOfBoundsError(
                f"{self._kernel}, program {program}: {kind} of {num_bytes} bytes out of bounds in {unseen.sum()} of "
                f"{addresses.size} active lanes, first at {self._nearest(int(addresses[unseen][0]))}"
            )

    def _write(self, kind: Access, program: Program, region: _Region, addresses: NDArray[np.uint64], num_bytes: int) -> None:
        if not self._programs or self._programs[-1] != program:
            self._programs.append(program)
        me = _ATOMIC if kind == "atomic" else len(self._programs) - 1
        offsets = ((addresses - np.uint64(region.start)).astype(np.int64)[:, None] + np.arange(num_bytes)).ravel()
        writers = region.writers[offsets]
        foreign = (writers != _NOBODY) & (writers != me)
        if foreign.any():
            other = int(writers[foreign][0])
            whom = "an atomic of some program" if other == _ATOMIC else f"program {self._programs[other]}"
            lanes = np.count_nonzero(foreign.reshape(-1, num_bytes).any(axis=1))
            raise DoubleStoreError(
                f"{self._kernel}, program {program}: {kind} to {lanes} lanes that {whom} has written in the same launch"
            )
        region.writers[offsets] = me

    def _nearest(self, address: int) -> str:
        if not self._regions:
            return "an address of a launch without tensors"
        region = min(self._regions, key=lambda region: max(region.start - address, address - region.stop))
        if address < region.start:
            return f"{region.start - address} bytes before a tensor of {region.stop - region.start} bytes"
        return f"byte {address - region.start} of a tensor of {region.stop - region.start} bytes"


def _extents(arguments: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Addresses [start, stop) from the first to the last element of each tensor among the arguments."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _extents(argument)
        elif isinstance(argument, (TensorDescriptor, TensorWrapper)):
            yield from _extents([argument.base])
        elif hasattr(argument, "data_ptr"):
            last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
            start = argument.data_ptr()
            if argument.numel():
                yield start, start + (last + 1) * argument.element_size()


def _merge(extents: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """Overlapping ones (one tensor given twice, views of one buffer) become one, so that writers are known by address.

    Neighbours stay apart: a step from one allocation into the next is out of bounds.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(extents):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
