"""Threads and memory of a process that computes on the CPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# Page faults of ten passes that allocate, fill and free 4 x 40 MiB (40,960 pages of 4 KiB), after ten that settle the heap.
_FAULTS = """
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 2 MiB would hide most faults
from metis_fast import host
if {prepared}:
    host.prepare(1)
def work():
    return [torch.full((10 << 20,), 1.0) for _ in range(4)]
for _ in range(10):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc only")
def test_freed_memory_is_used_again_without_page_faults():
    faults, threads = {}, {}
    for prepared in (False, True):
        out = subprocess.run(
            [sys.executable, "-c", _FAULTS.format(prepared=prepared)], capture_output=True, text=True, check=True
        ).stdout
        faults[prepared], threads[prepared] = map(int, out.split())
    assert faults[True] < 1000
    assert faults[False] > 10_000  # what is mended is still broken
    assert threads[True] == 1
