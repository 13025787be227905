"""What the run and its ranks say to each other, over one stream a rank. Needs neither torch nor megatron to start.

A message is its kind, the number of the call that it is about, and a pickled value or nothing; arrays and tensors follow the
pickle as they lie in memory. Pickles are trusted: both ends have shown that they hold the run's key (`METIS_RANK_KEY`) before
the first one is read. Plain sockets after that: multiprocessing's `Connection` reads large messages at a quarter of the speed.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from metis_fast.errors import ConfigError

if TYPE_CHECKING:
    import torch

KEY = "METIS_RANK_KEY"
"""Environment variable with the secret that a run and its ranks share."""

_HEAD = struct.Struct("!BQQI")  # kind, number of the call, bytes of the pickle, number of buffers after it


class Kind(IntEnum):
    """Of a message; the first seven are the run's, and the last one both sides'."""

    WELCOME = 0  # Welcome
    REFUSED = 1  # why
    CALL = 2  # rank 0's has a `Call`, packed, which it passes on to the others
    MORE = 3  # room for one more item
    ABORT = 4
    PING = 5
    STOP = 6
    HELLO = 7  # Hello
    PONG = 8
    ITEM = 9  # of a generator
    DONE = 10  # what the method returned
    FAILED = 11  # the MetisError that it raised
    ABORTED = 12
    DIED = 13  # Died
    STORE = 14  # host and port of torch's store: rank 0 opens it, and the run tells all


@dataclass(frozen=True, slots=True)
class Call:
    """A method of the worker to run; "" builds the worker. streams: the method is a generator."""

    method: str
    arguments: tuple[Any, ...]
    streams: bool


class Message(NamedTuple):
    """As it came. body, buffers: still pickled."""

    kind: Kind
    number: int
    body: bytearray
    buffers: list[bytearray]

    def value(self) -> Any:
        """What it carries."""
        return pickle.loads(self.body, buffers=self.buffers) if self.body else None


@dataclass(frozen=True, slots=True)
class Hello:
    """A rank that wants to join."""

    rank: int
    version: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a rank needs to become part of the group.

    worker: "module:Class". store: address at which rank 0 opens torch's store.
    """

    num_ranks: int
    worker: str
    store: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Died:
    """An exception that is no `MetisError`, told before the rank exits.

    error: its last line. echo: whether it may come from another rank's death (a collective operation that broke).
    """

    error: str
    echo: bool


class Channel:
    """One end of a connection. Any thread may send; one receives."""

    def __init__(self, connection: Connection, stall_s: float | None = None) -> None:
        """Takes over an authenticated connection. stall_s: longest pause of the other end amid a message; None: any."""
        self._sock = socket.socket(fileno=os.dup(connection.fileno()))
        connection.close()
        self._sending = threading.Lock()
        if self._sock.family != socket.AF_UNIX:  # the run's end of a tunnel
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.settimeout(stall_s)

    def fileno(self) -> int:
        """For `multiprocessing.connection.wait`."""
        return self._sock.fileno()

    def send(self, kind: Kind, number: int = 0, value: object = None) -> None:
        """Send a message. Tensors arrive on the CPU.

        Raises:
            OSError: the other end is gone; TimeoutError: it does not read.
        """
        buffers: list[pickle.PickleBuffer] = []
        body = b"" if value is None else _dump(value, buffers.append)
        parts = [buffer.raw() for buffer in buffers]
        head = _HEAD.pack(kind, number, len(body), len(parts)) + struct.pack(f"!{len(parts)}Q", *map(len, parts))
        with self._sending:
            for part in (memoryview(head + body), *parts):
                while part:
                    part = part[self._sock.send(part) :]

    def receive(self) -> Message:
        """The next message.

        Raises:
            EOFError, OSError: the other end is gone; TimeoutError: it has stopped amid a message.
        """
        kind, number, size, num_buffers = _HEAD.unpack(self._read(_HEAD.size))
        sizes = struct.unpack(f"!{num_buffers}Q", self._read(8 * num_buffers))
        body = self._read(size)
        return Message(Kind(kind), number, body, [self._read(size) for size in sizes])

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            num = self._sock.recv_into(rest)
            if not num:
                raise EOFError
            rest = rest[num:]
        return data

    def limit(self, stall_s: float) -> None:
        """Set `stall_s` anew."""
        self._sock.settimeout(stall_s)

    def close(self) -> None:
        """The other end reads EOF."""
        self._sock.close()


def pack(value: object) -> pickle.PickleBuffer:
    """A value as bytes that can be passed on without being read; `unpack` reads them."""
    return pickle.PickleBuffer(_dump(value, None))


def unpack(data: bytearray) -> Any:
    """What was packed."""
    return pickle.loads(data)


def _dump(value: object, aside: Callable[[pickle.PickleBuffer], None] | None) -> bytes:
    """aside: takes the large buffers; None leaves them where they are.

    A `PickleBuffer` is never made of a memoryview here: in a reference cycle, such as that of an exception whose frames hold
    them, collecting the two crashes Python before 3.12.7 (python/cpython#77894).
    """
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5, buffer_callback=aside)
    torch = sys.modules.get("torch")  # a rank says hello before it imports torch, and only pongs while it does
    if torch is not None:
        # torch's own way through multiprocessing is shared memory, which does not go through a tunnel to another machine
        pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: _reduce_tensor}
    pickler.dump(value)
    return file.getvalue()  # no copy


def _reduce_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = pickle.PickleBuffer(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return _rebuild_tensor, (data, tensor.dtype, tuple(tensor.shape))


def _rebuild_tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)


def parse_address(text: str, name: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT".

    Raises:
        ConfigError: it is something else; `name` says whose.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{name} must be HOST:PORT, for example node-1:29400, got {text!r}")
    return host, int(port)
