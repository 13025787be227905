"""The C library, and the system calls for which Python has no function."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """The result of a call.

    Raises:
        OSError: it is negative; `what` says which call it was.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(name: str, number: int, *arguments: int | bytes | None) -> int:
    """A system call by its number. Raises as `check` does."""
    passed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return check(libc.syscall(ctypes.c_long(number), *passed), name)


def prctl(option: int, value: int, more: int | bytes = 0) -> int:
    """prctl(2) with one or two values. Raises as `check` does."""
    third = ctypes.c_ulong(more) if isinstance(more, int) else more
    zeros = (ctypes.c_ulong(0),) * 2
    return check(libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), third, *zeros), f"prctl {option}")
