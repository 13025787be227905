"""Where ranks of this machine join: takes connections, and lets in those that hold the run's key."""

from __future__ import annotations

import ipaddress
import queue
import socket
import struct
import threading
from collections.abc import Collection, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import NamedTuple, Protocol

from metis_fast.config import MegatronConfig
from metis_fast.errors import ConfigError
from metis_fast.train.megatron.peer import Peer, start
from metis_fast.train.megatron.wire import KEY, Channel, Hello, parse_address

_HANDSHAKE_S = 10
_START_S = 50.0  # until a rank on this machine connects: a cold interpreter on a busy machine, with room


class Arrival(NamedTuple):
    """What came of a connection. problem: why it is not let in."""

    channel: Channel | None
    hello: Hello | None
    problem: str


class Launch(Protocol):
    """How ranks come to be, and where they connect."""

    @property
    def where(self) -> str:
        """The place they join at, for people."""
        ...

    @property
    def store(self) -> str:
        """Address at which rank 0 opens torch's store."""
        ...

    @property
    def start_s(self) -> float:
        """Until a rank that was started has connected."""
        ...

    def start(self, number: int, key: str) -> Peer:
        """Start a rank."""
        ...

    def connections(self) -> Iterator[socket.socket]:
        """Those made since the last call; waits for nothing."""
        ...

    def shut(self) -> None:
        """No rank joins any more."""
        ...


class Here:
    """Ranks of this machine: started here, or by somebody else (`launch: join`). logs: folder for the output of the former,
    withheld: variables of the environment that they do not get.

    Raises:
        ConfigError: the layout's address is not one of this machine's own, or cannot be listened at.
    """

    store = "127.0.0.1"

    def __init__(self, layout: MegatronConfig, logs: Path, withheld: Collection[str] = ()) -> None:
        self._layout, self._logs, self._withheld = layout, logs, withheld
        self.start_s = min(_START_S, layout.timeout_s) if layout.launch == "local" else layout.timeout_s
        address = loopback(layout.listen)
        try:
            self._server = socket.create_server(address, backlog=layout.num_ranks)
        except OSError as error:
            raise ConfigError(
                f"cannot listen at train.megatron.listen={layout.listen} ({error.strerror or error}); give a free port (0: any)"
            ) from None
        self.where = "{}:{}".format(*self._server.getsockname())

    def start(self, number: int, key: str) -> Peer:
        """See `Launch`."""
        if self._layout.launch == "join":
            return Peer(number)
        return start(number, self._layout.num_ranks, self.where, key, self._logs, self._withheld)

    def connections(self) -> Iterator[socket.socket]:
        """See `Launch`."""
        if wait([self._server], 0):
            yield self._server.accept()[0]

    def shut(self) -> None:
        """See `Launch`."""
        self._server.close()


def loopback(listen: str) -> tuple[str, int]:
    """Host and port of an address that no other machine reaches.

    Raises:
        ConfigError: it is another one, or none.
    """
    host, port = parse_address(listen, "train.megatron.listen")
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)}
    except OSError:
        found = set()
    if not found or not all(ipaddress.ip_address(address).is_loopback for address in found):
        raise ConfigError(
            f"train.megatron.listen={listen}: ranks join on their own machine only, at a loopback address such as 127.0.0.1:0; "
            "for several machines set workers.launcher=ray"
        )
    return min(found), port


class Door:
    """Over what connects to a launch. key: the run's."""

    def __init__(self, launch: Launch, key: str) -> None:
        self._launch, self._key = launch, key.encode()
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()

    def arrivals(self) -> Iterator[Arrival]:
        """Those that have shown the key, or have not, since the last call; waits for nothing."""
        for sock in self._launch.connections():
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
