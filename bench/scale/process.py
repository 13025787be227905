"""What this process costs and holds: CPU, memory, bytes on its connections, and what of a group has come into it."""

from __future__ import annotations

import gc
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metis_fast.types import Group, ImageBlob, Rollout

_ARRAY = 1 << 12
"""Bytes of the largest array that counts as none of a rollout's."""
_INFO = struct.Struct("=120xQQ")  # tcp_info: bytes_acked, bytes_received
_INFO_BYTES = 192


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment. cpu_s: user and system, of all threads. bytes_in, bytes_out: of all TCP connections so far."""

    wall_s: float
    cpu_s: float
    bytes_in: int
    bytes_out: int


class Meter:
    """Of this process."""

    def __init__(self) -> None:
        self._connections: dict[str, tuple[int, int]] = {}

    def mark(self) -> Mark:
        """Now."""
        for entry in os.scandir("/proc/self/fd"):
            name = _socket(entry.path)
            counted = _counted(int(entry.name)) if name else None
            if counted is not None:
                self._connections[name] = counted
        into, out = (sum(counts) for counts in zip(*self._connections.values(), strict=True)) if self._connections else (0, 0)
        return Mark(time.perf_counter(), time.process_time(), into, out)


def _socket(path: str) -> str:
    try:
        name = os.readlink(path)
    except OSError:  # closed meanwhile
        return ""
    return name if name.startswith("socket:") else ""


def _counted(descriptor: int) -> tuple[int, int] | None:
    """Bytes into and out of a TCP connection."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as one:
            if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
                return None
            out, into = _INFO.unpack_from(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES))
            return into, out
    except OSError:
        return None


def memory() -> tuple[int, int]:
    """Bytes that are resident, and of these, those in memory shared with others (Ray's object store)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    resident, shared = (int(lines[name].split()[0]) << 10 for name in ("VmRSS", "RssShmem"))
    return resident, shared


def arrays() -> list[object]:
    """Those in this process that are large enough for a rollout's."""
    return [one for one in _referred() if type(one) is np.ndarray and one.nbytes > _ARRAY]


def found(known: Sequence[object]) -> list[str]:
    """What of a group is in this process. known: `arrays` before there was any."""
    gc.collect()
    before = {id(one) for one in known}
    kinds = {type(one) for one in gc.get_objects()} & {Group, Rollout, ImageBlob}
    new = [one.nbytes for one in arrays() if isinstance(one, np.ndarray) and id(one) not in before]
    return [*sorted(kind.__name__ for kind in kinds), *(f"an array of {size} bytes" for size in new)]


def _referred() -> list[object]:
    """What containers hold: arrays are not among the objects that the collector knows."""
    return gc.get_referents(*gc.get_objects())
