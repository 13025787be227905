"""What a run and its workers say to each other, over one TCP connection a worker.

A message is its kind, the number of the call that it is about, and a pickled value or nothing; arrays follow the pickle as
they lie in memory. Pickles are trusted: both ends have shown that they hold the run's key before the first is read.
"""

from __future__ import annotations

import asyncio
import hmac
import pickle
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

KEY = "METIS_WORKER_KEY"
"""Environment variable with the secret that a run and its workers share."""

_HEAD = struct.Struct("!BQQI")  # kind, number of the call, bytes of the pickle, number of buffers after it
_NONCE = 32
_HELLO = b"metis-fast worker 1\n"


class Kind(IntEnum):
    """Of a message; those up to STOP are the run's."""

    WELCOME = 0  # Welcome
    REFUSED = 1  # why
    CALL = 2  # Call
    CANCEL = 3
    PING = 4
    STOP = 5
    HELLO = 6  # Hello
    PONG = 7
    READY = 8
    DONE = 9  # what the method returned
    FAILED = 10  # the exception that it raised, if both ends know it, else its text


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker that wants to join. name: its place in the run."""

    name: str
    version: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a worker serves. service: "module:Class"; it is made with `arguments`."""

    service: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A method of the service to run."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """As it came."""

    kind: Kind
    number: int
    value: Any


class WireError(ConnectionError):
    """The other end is gone, or is no end of ours."""


def encode(kind: Kind, number: int = 0, value: object = None) -> list[bytes | memoryview]:
    """A message as the parts to write one after the other; they stay valid as long as `value` is not changed."""
    buffers: list[pickle.PickleBuffer] = []
    body = b"" if value is None else pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [buffer.raw() for buffer in buffers]
    head = _HEAD.pack(kind, number, len(body), len(parts)) + struct.pack(f"!{len(parts)}Q", *map(len, parts))
    return [head + body, *parts]


async def receive(reader: asyncio.StreamReader) -> Message:
    """The next message.

    Raises:
        WireError: the other end is gone.
    """
    try:
        kind, number, size, num_buffers = _HEAD.unpack(await reader.readexactly(_HEAD.size))
        sizes: Sequence[int] = struct.unpack(f"!{num_buffers}Q", await reader.readexactly(8 * num_buffers))
        body = await reader.readexactly(size)
        buffers = [await reader.readexactly(size) for size in sizes]
    except (asyncio.IncompleteReadError, OSError) as error:
        raise WireError(f"connection lost ({type(error).__name__})") from None
    return Message(Kind(kind), number, pickle.loads(body, buffers=buffers) if body else None)


def _proof(key: bytes, who: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(key, b"|".join((who, *nonces)), "sha256")


async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> None:
    """The run's side of the handshake; neither end reveals the key.

    Raises:
        WireError: the other end does not hold it.
    """
    own = secrets.token_bytes(_NONCE)
    writer.write(_HELLO + own)
    try:
        answer = await reader.readexactly(_NONCE * 2)
    except (asyncio.IncompleteReadError, OSError):
        raise WireError("hung up during the handshake") from None
    other, proof = answer[:_NONCE], answer[_NONCE:]
    if not hmac.compare_digest(proof, _proof(key, b"worker", own, other)):
        raise WireError("a connection with another key was refused")
    writer.write(_proof(key, b"run", other, own))


async def apply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> None:
    """The worker's side of the handshake.

    Raises:
        WireError: the other end is no run, or one with another key.
    """
    own = secrets.token_bytes(_NONCE)
    try:
        hello = await reader.readexactly(len(_HELLO) + _NONCE)
        if hello[: len(_HELLO)] != _HELLO:
            raise WireError("what listens there is no metis-fast run of this version")
        other = hello[len(_HELLO) :]
        writer.write(own + _proof(key, b"worker", other, own))
        proof = await reader.readexactly(_NONCE)
    except (asyncio.IncompleteReadError, OSError):
        raise WireError(f"refused: the run has another key in {KEY}") from None
    if not hmac.compare_digest(proof, _proof(key, b"run", own, other)):
        raise WireError("the other end does not hold the key")
