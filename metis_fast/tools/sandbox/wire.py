"""Frames between the trainer and a Python session.

A frame is a u32 length and a body; the body is a u32 length, a JSON header and the blobs that the header counts. Data only, so
that a session in the agent's hands can at worst send a wrong answer to its own rollout.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass

LENGTH = struct.Struct(">I")
MAX_IMAGES = 8  # a call; more would not fit into an observation's tokens
MAX_SIDE = 4096  # pixels; larger images are scaled down before they are sent
# Room for the eight largest images that a session sends, before compression pays; a forged length stops here.
MAX_FRAME = 256 << 20


class WireError(ValueError):
    """The other side sent something that is not a frame."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a session may use. memory_mb and cpu_s hold for each of its processes, scratch_mb for all together."""

    memory_mb: int
    scratch_mb: int
    cpu_s: int
    max_output_chars: int
    unsafe: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Limits:
        return Limits(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Call:
    """Trainer -> session. images: encoded prompt images, sent with the first call only."""

    code: str
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """Session -> trainer. parts: text and PNG images in the order in which they were written. ok: the code ran to its end."""

    ok: bool
    parts: tuple[str | bytes, ...] = ()


def _frame(header: object, blobs: Sequence[bytes]) -> bytes:
    # surrogates in the agent's text cannot be encoded otherwise; JSON escapes are plain ASCII
    head = json.dumps(header).encode("ascii")
    body = LENGTH.pack(len(head)) + head + b"".join(blobs)
    return LENGTH.pack(len(body)) + body


def _split(body: bytes) -> tuple[list[object], memoryview]:
    if len(body) < LENGTH.size:
        raise WireError("frame without a header")
    (size,) = LENGTH.unpack_from(body)
    view = memoryview(body)[LENGTH.size :]
    try:
        header = json.loads(bytes(view[:size]))
    except (ValueError, RecursionError):
        raise WireError("frame header is not JSON") from None
    if not isinstance(header, list) or len(header) != 2:
        raise WireError("frame header is not a pair")
    return header, view[size:]


def _take(view: memoryview, size: object) -> tuple[bytes, memoryview]:
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(view):
        raise WireError("blob is longer than its frame")
    return bytes(view[:size]), view[size:]


def encode_call(call: Call) -> bytes:
    """The frame of a call, length included."""
    return _frame([call.code, [len(image) for image in call.images]], call.images)


def decode_call(body: bytes) -> Call:
    """Inverse of `encode_call`, without the length."""
    (code, sizes), view = _split(body)
    if not isinstance(code, str) or not isinstance(sizes, list):
        raise WireError("not a call")
    images: list[bytes] = []
    for size in sizes:
        blob, view = _take(view, size)
        images.append(blob)
    return Call(code, tuple(images))


def encode_reply(reply: Reply) -> bytes:
    """The frame of a reply, length included."""
    blobs = [part for part in reply.parts if isinstance(part, bytes)]
    return _frame([reply.ok, [part if isinstance(part, str) else len(part) for part in reply.parts]], blobs)


def decode_reply(body: bytes) -> Reply:
    """Inverse of `encode_reply`, without the length.

    Raises:
        WireError: not a reply.
    """
    (ok, items), view = _split(body)
    if not isinstance(ok, bool) or not isinstance(items, list):
        raise WireError("not a reply")
    parts: list[str | bytes] = []
    for item in items:
        if isinstance(item, str):
            parts.append(item.encode("utf-8", "replace").decode("utf-8"))
        else:
            blob, view = _take(view, item)
            parts.append(blob)
    return Reply(ok, tuple(parts))
