"""What the trainer and the warm server tell each other of sessions all the time: a file without a name, an entry a session.

The trainer writes whether a call runs; the server writes what the session uses. Each reads what the other last wrote, and
neither waits. Sessions do not have the file.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

_RUNS = struct.Struct("=Q")
_USAGE = struct.Struct("=5Q")
_ENTRY = 64  # bytes
_MOST = 1 << 14  # entries


@dataclass(frozen=True, slots=True)
class Usage:
    """Of all processes of a session together.

    cpu_ns: CPU time so far. delay_ns: how long it could have run and got no CPU, at most the time that has passed.
    memory: bytes, its files included. tasks: processes and threads. at_ns: when this was measured, of
    time.monotonic_ns(); 0: never.
    """

    cpu_ns: int = 0
    delay_ns: int = 0
    memory: int = 0
    tasks: int = 0
    at_ns: int = 0


def make_board() -> int:
    """The file's descriptor."""
    board = os.memfd_create("board", os.MFD_CLOEXEC)
    os.ftruncate(board, _ENTRY * _MOST)
    return board


class Board:
    """The entries, by the number of a session."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def set_running(self, number: int, running: bool) -> None:
        """The trainer's: whether a call of the session runs."""
        os.pwrite(self.fd, _RUNS.pack(running), number * _ENTRY)

    def is_running(self, number: int) -> bool:
        """What `set_running` said."""
        return bool(_RUNS.unpack(os.pread(self.fd, _RUNS.size, number * _ENTRY))[0])

    def report(self, number: int, usage: Usage) -> None:
        """The server's: what the session uses."""
        values = (usage.cpu_ns, usage.delay_ns, usage.memory, usage.tasks, usage.at_ns)
        os.pwrite(self.fd, _USAGE.pack(*values), number * _ENTRY + _RUNS.size)

    def usage(self, number: int) -> Usage:
        """What `report` said last."""
        return Usage(*_USAGE.unpack(os.pread(self.fd, _USAGE.size, number * _ENTRY + _RUNS.size)))

    def clear(self, number: int) -> None:
        """Make the entry ready for another session."""
        os.pwrite(self.fd, bytes(_ENTRY), number * _ENTRY)
