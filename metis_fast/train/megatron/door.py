"""Where ranks join: takes connections, and lets in those that hold the run's key."""

from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from typing import NamedTuple

from metis_fast.config import MegatronConfig
from metis_fast.errors import ConfigError
from metis_fast.train.megatron.wire import KEY, Channel, Hello, parse_address
from metis_fast.workers.launch import Launcher

_HANDSHAKE_S = 10


class Arrival(NamedTuple):
    """What came of a connection. problem: why it is not let in."""

    channel: Channel | None
    hello: Hello | None
    problem: str


def listen(layout: MegatronConfig, launcher: Launcher | None) -> socket.socket:
    """At the layout's address; by default, where the launcher's machines find it.

    Raises:
        ConfigError: it cannot be listened at.
    """
    host, port = parse_address(layout.listen, "train.megatron.listen")
    if launcher is not None and layout.listen == MegatronConfig().listen:
        host = launcher.host
    try:
        return socket.create_server((host, port), backlog=layout.num_ranks)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at train.megatron.listen={layout.listen} ({error.strerror or error}); give an address of this "
            "machine and a free port (0: any)"
        ) from None


class Door:
    """Over a socket that `listen`s. key: the run's."""

    def __init__(self, server: socket.socket, key: str) -> None:
        self._server, self._key = server, key.encode()
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()

    def arrivals(self) -> Iterator[Arrival]:
        """Those that have shown the key, or have not, since the last call; waits for nothing."""
        if wait([self._server], 0):
            sock = self._server.accept()[0]
            threading.Thread(target=_shake_hands, args=(sock, self._key, self._arrivals), daemon=True).start()
        while not self._arrivals.empty():
            yield self._arrivals.get()


def _shake_hands(sock: socket.socket, key: bytes, arrivals: queue.SimpleQueue[Arrival]) -> None:
    """In a thread of its own, since whoever connected may say nothing."""
    limit = struct.pack("ll", _HANDSHAKE_S, 0)  # the kernel's: Python's makes the descriptor one that does not block
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    with Connection(sock.detach()) as connection:
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            channel = Channel(connection, _HANDSHAKE_S)
            hello = channel.receive().value()
        except AuthenticationError:
            arrivals.put(Arrival(None, None, f"a process with another {KEY} was turned away"))
        except (EOFError, OSError):
            arrivals.put(Arrival(None, None, "a connection that is not a rank's was turned away"))
        else:
            arrivals.put(Arrival(channel, hello, ""))
