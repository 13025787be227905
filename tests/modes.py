"""Files that are closed to the tests, also where they run as root."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# linux/capability.h
LINUX_CAPABILITY_VERSION_3, EFFECTIVE = 0x20080522, 0
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2


@contextmanager
def modes_count() -> Iterator[None]:
    """For this thread, and those that it starts: root too is kept out of what has no mode for its owner."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    head, mine = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, mine) == 0
    all_of_them = mine[EFFECTIVE]
    mine[EFFECTIVE] = all_of_them & ~(CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH)
    assert libc.capset(head, mine) == 0
    try:
        yield
    finally:
        mine[EFFECTIVE] = all_of_them
        assert libc.capset(head, mine) == 0
