"""Frames between the trainer and a Python session.

A frame is a u32 length and a body; the body is a u32 length, a JSON header and the blobs that the header counts. Data only, so
that a session in the agent's hands can at worst send a wrong answer to its own rollout.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Literal, TypeGuard

LENGTH = struct.Struct(">I")
START = 2 * LENGTH.size
READY = b"ready "  # server -> trainer, once, before its layers in JSON
WATCH = b"watch"  # trainer -> server: a call takes longer than most
SESSION_LOST = 70  # exit status of a session that cannot answer
MAX_IMAGES = 8  # a call; more would not fit into an observation's tokens
MAX_SIDE = 4096  # pixels; larger images are scaled down before they are sent
_SLACK = 1 << 16  # bytes of a frame beside text and pixels
_BYTES_A_CHARACTER = 12  # of JSON, at most: a pair of surrogates, escaped


class WireError(ValueError):
    """The other side sent something that is not a frame."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a session may use. memory_mb and cpu_s hold for each of its processes, session_memory_mb and scratch_mb for all
    together.

    max_output_chars: of stdout, of stderr, and of both together. max_image_pixels: of an image that is shown; larger ones are
    scaled down. max_shown_mb: of all images of a call, as PNG. max_tasks: processes and
    threads.
    """

    memory_mb: int
    session_memory_mb: int
    scratch_mb: int
    cpu_s: int
    max_output_chars: int
    max_image_pixels: int
    max_shown_mb: int
    max_tasks: int
    unsafe: bool

    @property
    def header_bytes(self) -> int:
        """Of the longest header that a session can have to send."""
        return 3 * _BYTES_A_CHARACTER * self.max_output_chars + _SLACK

    @property
    def image_bytes(self) -> int:
        """Of the longest image that a session can have to send: pixels of three bytes that cannot be compressed."""
        return 3 * self.max_image_pixels + (self.max_image_pixels >> 6) + _SLACK

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Limits:
        return Limits(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Layers:
    """What keeps sessions in. landlock: its version in the kernel, 0 for none. limits: what watches over a whole session."""

    namespaces: bool
    seccomp: bool
    landlock: int
    limits: Literal["cgroup", "watchdog"]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Layers:
        return Layers(**json.loads(text))

    def __str__(self) -> str:
        names = [name for name, there in (("namespaces", self.namespaces), ("seccomp", self.seccomp)) if there]
        names += [f"landlock {self.landlock}"] if self.landlock else []
        return ", ".join([*names, self.limits])


class EndedBy(StrEnum):
    """Who ended a session, as far as the server can tell."""

    ITSELF = "itself"  # it exited, or a fault of its own code killed it
    TRAINER = "trainer"
    CPU = "cpu"  # it had used up its CPU time
    MEMORY = "memory"  # its processes together took more than they may
    TASKS = "tasks"  # there were too many of them
    OTHERS = "others"  # the machine was out of memory, or somebody killed it


@dataclass(frozen=True, slots=True)
class Call:
    """Trainer -> session. number: counts a session's calls, from 1. images: encoded prompt images, with the first call only.

    sizes: (width, height) that they are given there, one for each; empty: their own.
    """

    number: int
    code: str
    images: tuple[bytes, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Shown:
    """Session -> trainer, at once when the code shows an image. call: number of the call."""

    call: int
    png: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """Session -> trainer, the end of a call. parts: text, and numbers of images that were sent before, in the order written.

    call: its number; 0 says that the session is ready. ok: the code ran to its end. stdout, stderr: each by itself.
    """

    call: int
    ok: bool
    parts: tuple[str | int, ...] = ()
    stdout: str = ""
    stderr: str = ""


def _frame(header: object, blobs: Sequence[bytes]) -> bytes:
    # surrogates in the agent's text cannot be encoded otherwise; JSON escapes are plain ASCII
    head = json.dumps(header).encode("ascii")
    body = LENGTH.pack(len(head)) + head + b"".join(blobs)
    return LENGTH.pack(len(body)) + body


def lengths(start: bytes) -> tuple[int, int]:
    """Bytes of the header and of what follows it, from the first `START` bytes of a frame.

    Raises:
        WireError: they are none.
    """
    size, header = (LENGTH.unpack_from(start, at)[0] for at in (0, LENGTH.size))
    if size < LENGTH.size or header > size - LENGTH.size:
        raise WireError("frame without a header")
    return header, size - LENGTH.size - header


def _split(body: bytes) -> tuple[list[object], memoryview]:
    if len(body) < LENGTH.size:
        raise WireError("frame without a header")
    (size,) = LENGTH.unpack_from(body)
    view = memoryview(body)[LENGTH.size :]
    try:
        header = json.loads(bytes(view[:size]))
    except (ValueError, RecursionError):
        raise WireError("frame header is not JSON") from None
    if not isinstance(header, list):
        raise WireError("frame header is not a list")
    return header, view[size:]


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # without half pairs of surrogates


def _take(view: memoryview, size: object) -> tuple[bytes, memoryview]:
    if not _is_number(size) or not 0 <= size <= len(view):
        raise WireError("blob is longer than its frame")
    return bytes(view[:size]), view[size:]


def encode_call(call: Call) -> bytes:
    """The frame of a call, length included."""
    return _frame([call.number, call.code, [len(image) for image in call.images], call.sizes], call.images)


def decode_call(body: bytes) -> Call:
    """Inverse of `encode_call`, without the length."""
    header, view = _split(body)
    match header:
        case [int() as number, str() as code, list() as lengths, list() as sizes]:
            images: list[bytes] = []
            for length in lengths:
                blob, view = _take(view, length)
                images.append(blob)
            return Call(number, code, tuple(images), tuple((int(width), int(height)) for width, height in sizes))
    raise WireError("not a call")


def encode_message(message: Reply | Shown) -> bytes:
    """The frame of what a session says, length included."""
    if isinstance(message, Shown):
        return _frame([message.call, len(message.png)], [message.png])
    return _frame([message.call, message.ok, message.parts, message.stdout, message.stderr], [])


def decode_message(body: bytes) -> Reply | Shown:
    """Inverse of `encode_message`, without the length.

    Raises:
        WireError: neither a reply nor an image.
    """
    header, view = _split(body)
    match header:
        case [int() as call, bool() as ok, list() as items, str() as stdout, str() as stderr] if all(
            isinstance(item, str) or _is_number(item) for item in items
        ):
            texts = tuple(_clean(item) if isinstance(item, str) else item for item in items)
            return Reply(call, ok, texts, _clean(stdout), _clean(stderr))
        case [int() as call, size]:
            return Shown(call, _take(view, size)[0])
    raise WireError("neither a reply nor an image")
