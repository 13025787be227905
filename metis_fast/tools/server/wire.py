"""What crosses between a tool server and its clients: JSON, in which an image is its SHA-256.

Everything is ASCII, in the spelling of Python's `json`: texts of the agent's and of web pages may hold half pairs of
surrogates, arguments may hold NaN, and both arrive as they were sent.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from functools import partial
from typing import Any, get_args

from metis_fast.tools.protocol import NO_EXTRA
from metis_fast.tools.result_tree import TreeError, from_tree, hints_of, to_tree, value_of
from metis_fast.tools.results import ContentResult, PythonResult, ToolResult
from metis_fast.types import ImageBlob, Observation, Outcome

Result = ToolResult | Observation

PROTOCOL = 2
"""Goes up when a client and a server of different numbers would misunderstand each other."""
MAX_REQUEST_BYTES = 16 << 20
"""Of a call or of the opening of a session; far more than an agent can write."""
MAX_ANSWER_BYTES = 512 << 20
"""Room for the images of one call; a client reads no further."""
WAIT_S = 20.0
"""Longest time that a reply is waited for; then the client asks again. A server that is gone is found out within it."""


class Fault(StrEnum):
    """Why a request was not done. None of them is the agent's: what the agent does wrong is a result."""

    REQUEST = "request"  # no request of this protocol
    UNAUTHORIZED = "unauthorized"
    NO_SESSION = "no session"  # it ended, or the server was started again
    IMAGES = "images"  # the server lacks some of them
    TOOLS = "tools"  # those of the server are not the ones that the client knows
    ORDER = "order"  # the number of a call is neither the last one nor the next one, or stands for something else
    TOO_LARGE = "too large"
    BUSY = "busy"  # no room for a session or a call; it may be asked for again
    DEFECT = "defect"  # of the server
    TOOL = "tool"  # an InfrastructureError of the tool
    DRAINING = "draining"  # the server is about to end
    DEADLINE = "deadline"  # of a call


STATUS: Mapping[Fault, int] = {
    Fault.REQUEST: 400,
    Fault.UNAUTHORIZED: 401,
    Fault.NO_SESSION: 404,
    Fault.IMAGES: 409,
    Fault.ORDER: 409,
    Fault.TOOLS: 412,
    Fault.TOO_LARGE: 413,
    Fault.BUSY: 429,
    Fault.DEFECT: 500,
    Fault.TOOL: 502,
    Fault.DRAINING: 503,
    Fault.DEADLINE: 504,
}
"""HTTP status of each."""


WireError = TreeError
"""The other side sent what is not in this protocol."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Body of a reply with a status from 400 on. missing: hashes of the images that the server lacks."""

    fault: Fault
    text: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Opening:
    """Asks for a session. images: hashes, in order. extra, seen: see `Toolbox.session`.

    key: any text of the client's. Asked for again with the same one, the session is the same; empty: always a new one.
    offer: `offer_of` the tools that the client was told of, which the server then must have; empty: whatever it has.
    """

    images: tuple[str, ...] = ()
    extra: Mapping[str, object] = field(default_factory=lambda: NO_EXTRA)
    seen: tuple[tuple[int, int], ...] = ()
    key: str = ""
    offer: str = ""


@dataclass(frozen=True, slots=True)
class Calling:
    """Asks for a call.

    number: counts the session's calls, from 1. Asked for again with the same one, the call runs once and has one answer.
    deadline_s: seconds that it may take, its turn included. wait_s: seconds after which the client rather asks again.
    """

    number: int
    name: str
    arguments: Mapping[str, object]
    deadline_s: float
    wait_s: float = WAIT_S


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a call. fresh: images of the result that the client does not have; each goes to it once."""

    result: Result
    fresh: tuple[ImageBlob, ...] = ()


# -- results --------------------------------------------------------------------------------------------------------------

_KINDS: Mapping[str, type[Result]] = {kind.__name__: kind for kind in (*get_args(ToolResult), Observation)}


def encode_answer(answer: Answer) -> bytes:
    """JSON: kind and fields of the result, and the fresh images in base64 by their hash."""
    blobs = {image.sha256: base64.b64encode(image.data).decode() for image in answer.fresh}
    return to_json({"kind": type(answer.result).__name__, "result": to_tree(answer.result), "images": blobs})


def decode_answer(body: bytes, known: Mapping[str, ImageBlob]) -> Answer:
    """Inverse of `encode_answer`. known: images that the client has.

    Raises:
        WireError: it is no answer, or an image is not the one that its hash says.
    """
    match from_json(body):
        case {"kind": str() as kind, "result": dict() as value, "images": dict() as blobs} if kind in _KINDS:
            fresh = tuple(_blob(sha256, text) for sha256, text in blobs.items())
            images = {**known, **{image.sha256: image for image in fresh}}
            result = from_tree(_KINDS[kind], value, partial(_sent, images))
            if not _is_possible(result):
                raise WireError(f"a {kind} that no tool gives: an image that it lacks, or an outcome of no call")
            return Answer(result, fresh)
    raise WireError("not an answer")


def _sent(images: Mapping[str, ImageBlob], sha256: str) -> ImageBlob:
    if sha256 not in images:
        raise WireError(f"a result shows the image {sha256[:64]!r}, which was not sent")
    return images[sha256]


def _is_possible(result: Result) -> bool:
    match result:
        case PythonResult() | ContentResult():
            return all(isinstance(part, str) or 0 <= part < len(result.images) for part in result.parts)
        case Observation():
            return result.outcome in (Outcome.TOOL_RESULT, Outcome.TOOL_ERROR)
    return True


def _blob(sha256: str, text: object) -> ImageBlob:
    try:
        image = ImageBlob.of(base64.b64decode(text if isinstance(text, str) else "?", validate=True))
    except binascii.Error:
        raise WireError("an image is not in base64") from None
    if image.sha256 != sha256:
        raise WireError("an image is not the one that its hash says")
    return image


# -- requests and failures ------------------------------------------------------------------------------------------------


def to_json(value: object) -> bytes:
    """ASCII.

    Raises:
        TypeError, ValueError, RecursionError: it has no JSON.
    """
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def from_json(body: bytes) -> object:
    """Inverse of `to_json`.

    Raises:
        WireError: no JSON.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise WireError("no JSON") from None


def encode_failure(failure: Failure) -> bytes:
    """JSON of its fields."""
    return to_json(asdict(failure))


def decode_failure(body: bytes) -> Failure | None:
    """None: the reply is not a tool server's."""
    try:
        value = from_json(body)
        return from_tree(Failure, value, partial(_sent, {})) if isinstance(value, dict) else None
    except WireError:
        return None


def offer_of(told: bytes) -> str:
    """What a server offers, in short. told: its answer to `GET /tools`."""
    return hashlib.sha256(told).hexdigest()


def encode_opening(opening: Opening) -> bytes:
    """JSON of its fields. Raises as `to_json`."""
    tree = {one.name: getattr(opening, one.name) for one in fields(opening)}
    return to_json(tree | {"extra": dict(opening.extra)})


def decode_opening(body: bytes) -> Opening:
    """Inverse of `encode_opening`; what is left out is empty.

    Raises:
        WireError: something else.
    """
    value = _object(body, Opening)
    extra = value.pop("extra", {})
    if not isinstance(extra, dict):
        raise WireError("`extra` is no object")
    opening = Opening(extra=extra, **_typed(Opening, value))
    if opening.seen and len(opening.seen) != len(opening.images):
        raise WireError(f"`seen` has {len(opening.seen)} sizes for {len(opening.images)} images")
    return opening


def encode_calling(calling: Calling) -> bytes:
    """JSON of its fields. Raises as `to_json`."""
    return to_json({one.name: getattr(calling, one.name) for one in fields(calling)})


def decode_calling(body: bytes) -> Calling:
    """Inverse of `encode_calling`.

    Raises:
        WireError: something else, or a time that is not positive.
    """
    value = _object(body, Calling)
    arguments = value.pop("arguments", None)
    if not isinstance(arguments, dict):
        raise WireError("`arguments` is no object")
    hints = hints_of(Calling)
    try:
        calling = Calling(
            arguments=arguments, **{name: value_of(hints[name], part, partial(_sent, {})) for name, part in value.items()}
        )
    except TypeError:
        raise WireError("a call needs number, name, arguments and deadline_s") from None
    for seconds in (calling.deadline_s, calling.wait_s):
        if not (math.isfinite(seconds) and seconds > 0):
            raise WireError(f"expected a positive number of seconds, got {seconds}")
    return calling


def _typed(kind: type, value: Mapping[str, object]) -> dict[str, Any]:
    hints = hints_of(kind)
    return {name: value_of(hints[name], part, partial(_sent, {})) for name, part in value.items()}


def _object(body: bytes, kind: type) -> dict[str, Any]:
    value = from_json(body)
    if not isinstance(value, dict) or value.keys() - hints_of(kind).keys():
        raise WireError(f"expected an object with {', '.join(hints_of(kind))}")
    return value
