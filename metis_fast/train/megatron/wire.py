"""What the run and its ranks say to each other, over one TCP connection a rank. Needs neither torch nor megatron to start.

A message is its kind, the number of the call that it is about, and a pickled value or nothing. Pickles are trusted: both ends
have shown that they hold the run's key (`METIS_RANK_KEY`) before the first one is read.
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
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from metis_fast.errors import ConfigError

if TYPE_CHECKING:
    import torch

KEY = "METIS_RANK_KEY"
"""Environment variable with the secret that a run and its ranks share."""
PARENT = "METIS_RANK_PARENT"
"""Environment variable with the process id of the run that started a rank on its own machine."""

_HEAD = struct.Struct("!BQ")  # kind, number of the call


class Kind(IntEnum):
    """Of a message; the first seven are the run's."""

    WELCOME = 0  # Welcome
    REFUSED = 1  # why
    CALL = 2  # rank 0's has a `Call`, which it passes on to the others
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


@dataclass(frozen=True, slots=True)
class Call:
    """A method of the worker to run; "" builds the worker. streams: the method is a generator."""

    method: str
    arguments: tuple[Any, ...]
    streams: bool


class Message(NamedTuple):
    """As it came. body: still pickled."""

    kind: Kind
    number: int
    body: memoryview

    def value(self) -> Any:
        """What it carries."""
        return pickle.loads(self.body) if self.body else None


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

    store_port: where torch.distributed meets, at the address at which the run listens. worker: "module:Class".
    """

    num_ranks: int
    worker: str
    store_port: int
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

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """For `multiprocessing.connection.wait`."""
        return self._connection.fileno()

    def send(self, kind: Kind, number: int = 0, value: object = None) -> None:
        """Send a message. Tensors travel as their bytes, and arrive on the CPU."""
        message = io.BytesIO()
        message.write(_HEAD.pack(kind, number))
        if value is not None:
            _dump(value, message)
        with self._sending:
            self._connection.send_bytes(message.getbuffer())

    def receive(self) -> Message:
        """The next message.

        Raises:
            EOFError, OSError: the other end is gone.
        """
        data = self._connection.recv_bytes()
        kind, number = _HEAD.unpack_from(data)
        return Message(Kind(kind), number, memoryview(data)[_HEAD.size :])

    def close(self) -> None:
        """The other end reads EOF."""
        self._connection.close()


def _dump(value: object, file: io.BytesIO) -> None:
    pickler = pickle.Pickler(file, protocol=5)
    torch = sys.modules.get("torch")  # a rank says hello before it imports torch, and only pongs while it does
    if torch is not None:
        # torch's own way through a `Connection` is shared memory, which does not reach another machine
        pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: _reduce_tensor}
    pickler.dump(value)


def _reduce_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = pickle.PickleBuffer(flat.view(torch.uint8).numpy().data)  # pickled as a bytearray, without a copy before
    return _rebuild_tensor, (data, tensor.dtype, tuple(tensor.shape))


def _rebuild_tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)


def watch_peer(connection: Connection, stall_s: float = 0.0) -> None:
    """Let the kernel notice a machine that is gone; with `stall_s`, let a half-read or half-sent message fail too."""
    # a duplicate of the descriptor: options belong to what both refer to
    with socket.socket(fileno=os.dup(connection.fileno())) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
        if stall_s:
            limit = struct.pack("ll", int(stall_s), int(stall_s % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def parse_address(text: str, name: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT".

    Raises:
        ConfigError: it is something else; `name` says whose.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{name} must be HOST:PORT, for example node-1:29400, got {text!r}")
    return host, int(port)
