"""What a process that computes on the CPU asks of its host: threads, and memory that is kept."""

from __future__ import annotations

import ctypes

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT_BYTES, _OLD_MOST = 1 << 30, 32 << 20


def prepare(threads: int) -> None:
    """Set torch's threads (0: its own choice), and have malloc keep up to 1 GiB of what was freed, and blocks below that size.

    By itself glibc hands blocks above 32 MiB back to the kernel when they are freed, and much of what a backward pass leaves at
    the end of the heap; the next pass faults it in again page by page: 6 to 20 % of an SFT step of the demo. Other C libraries
    have no such setting; nothing happens there.
    """
    if threads:
        torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    # 1 where it took; older glibc (before about 2.35) takes no more than 32 MiB for blocks. Neither alone: each of them ends
    # glibc's own adaptation of both.
    if any(libc.mallopt(ctypes.c_int(_MMAP_THRESHOLD), ctypes.c_int(size)) == 1 for size in (_KEPT_BYTES, _OLD_MOST)):
        libc.mallopt(ctypes.c_int(_TRIM_THRESHOLD), ctypes.c_int(_KEPT_BYTES))
