"""Reads a request for a chat completion. What it asks for and cannot get is refused by its name; fields that nobody here knows
are ignored, since clients send many."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from metis_fast.config import ServeConfig
from metis_fast.errors import one_line
from metis_fast.image_source import NoImageError, read_image
from metis_fast.serve.refusal import Fault, Refusal, Refused, wrong
from metis_fast.types import ImageBlob, Message

MAX_CHOICES = 16
_MAX_STOPS = 4  # OpenAI's
_SEED_BITS = 63
_COLDEST = 1e-3  # below, float32 divides by 0 sooner or later; the likeliest token is drawn there anyway
_LEAST_TOP_P = 1e-6  # below, 0 tokens are left in float32
_MOST_TOP_K = 1 << 20  # more than any vocabulary has
_SYSTEM = ("system", "developer")
_IMAGE = "<image>"


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


class _Fields(BaseModel):
    """What is read beside the messages. Null is as good as nothing."""

    model_config = ConfigDict(extra="ignore", strict=True)
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << _SEED_BITS), lt=1 << _SEED_BITS)] | None = None
    stop: str | list[str] | None = None
    raw: bool | None = None
    tool_choice: Literal["none", "auto"] | None = None


_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}
"""Fields that would change the answer and are not supported, with the values at which they change nothing."""
_INSTEAD = {
    "tools": "the agent has tools of its own, which the server runs (tool_choice: none does without)",
    "functions": "the agent has tools of its own, which the server runs (tool_choice: none does without)",
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that can be answered.

    system: of the client's system messages. messages: the others, from the user's first to the user's last. images: of the
    messages, in their order; places: where each stood, for messages. temperature, top_p, top_k: None: as the settings say.
    max_tokens: that the agent may write, over all its messages; None: as the settings say. seed: None: none was asked for.
    """

    model: str | None
    system: str
    messages: tuple[Message, ...]
    images: tuple[ImageBlob, ...]
    places: tuple[str, ...]
    stream: bool
    include_usage: bool
    n: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    max_tokens: int | None
    seed: int | None
    stop: tuple[str, ...]
    raw: bool | None
    use_tools: bool


def read_request(body: bytes, config: ServeConfig) -> ChatRequest:
    """Decode and check a request; of images, that they are ones is not looked at yet.

    Raises:
        Refused: it cannot be answered; the message names the field.
    """
    try:
        tree = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise wrong(None, f"expected a JSON object, got something else: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise wrong(None, f"expected a JSON object, got {_shown(tree)}")
    for name, neutral in _NEUTRAL.items():
        value = tree.get(name)
        if value is not None and value not in neutral:
            raise wrong(name, f"{_INSTEAD.get(name, 'not supported here')}; leave it out", "unsupported_value")
    fields = _fields(tree)
    system, messages, images, places = _conversation(tree.get("messages"), config)
    limits = [limit for limit in (fields.max_tokens, fields.max_completion_tokens) if limit is not None]
    return ChatRequest(
        model=fields.model,
        system=system,
        messages=messages,
        images=images,
        places=places,
        stream=bool(fields.stream),
        include_usage=fields.stream_options is not None and bool(fields.stream_options.include_usage),
        n=fields.n or 1,
        temperature=0.0 if fields.temperature is not None and fields.temperature < _COLDEST else fields.temperature,
        top_p=fields.top_p if fields.top_p is None else max(fields.top_p, _LEAST_TOP_P),
        top_k=fields.top_k if fields.top_k is None or 0 <= fields.top_k <= _MOST_TOP_K else 0,
        max_tokens=min(limits, default=None),
        seed=fields.seed,
        stop=_stops(fields.stop),
        raw=fields.raw,
        use_tools=fields.tool_choice != "none",
    )


def _fields(tree: Mapping[str, object]) -> _Fields:
    try:
        return _Fields.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        message = one_line(first["msg"])
        raise wrong(name, f"{message[0].lower()}{message[1:]}, got {_shown(tree.get(name))}") from None


def _stops(given: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > _MAX_STOPS or not all(stops):
        raise wrong("stop", f"expected at most {_MAX_STOPS} strings, none of them empty, got {_shown(list(stops))}")
    return stops


def _conversation(
    given: object, config: ServeConfig
) -> tuple[str, tuple[Message, ...], tuple[ImageBlob, ...], tuple[str, ...]]:
    """System text, messages, and their images with the places at which they stand."""
    if not isinstance(given, list) or not given:
        raise wrong("messages", f"expected a list of messages, got {_shown(given)}")
    system: list[str] = []
    messages: list[Message] = []
    images: list[ImageBlob] = []
    places: list[str] = []
    for number, message in enumerate(given):
        place = f"messages[{number}]"
        role = _role(message, place)
        parts = list(_parts(message.get("content"), f"{place}.content"))
        if role in _SYSTEM:
            if messages:
                raise wrong(f"{place}.role", f"expected system messages first, got one behind {messages[-1].role}'s")
            system.append(_text_only(parts, role))
            continue
        if role == "assistant":
            parts = [(place, _text_only(parts, role))]
        texts = [""]
        for at, part in parts:
            if isinstance(part, str):
                texts[-1] += part
                continue
            if len(images) == config.max_images:
                raise wrong(at, f"expected at most {config.max_images} images in a request (serve.max_images), got more")
            images.append(_image(part, at, config))
            places.append(at)
            texts.append("")
        messages.append(Message(role, _IMAGE.join(texts), tuple(texts)))
    if not messages or messages[-1].role != "user":
        raise wrong("messages", "expected a last message of the user's, which is answered, got none")
    return "\n\n".join(text for text in system if text), tuple(messages), tuple(images), tuple(places)


def _role(message: object, place: str) -> str:
    if not isinstance(message, dict):
        raise wrong(place, f"expected an object with role and content, got {_shown(message)}")
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise wrong(place, "the server runs the agent's tools itself; send texts of the assistant's and the user's only")
    if role not in (*_SYSTEM, "user", "assistant"):
        raise wrong(f"{place}.role", f"expected system, user or assistant, got {_shown(role)}")
    return role


def _parts(content: object, place: str) -> Iterator[tuple[str, str | Mapping[str, Any]]]:
    """Texts, and image parts as they came, each with its place."""
    if isinstance(content, str):
        yield place, content
        return
    if not isinstance(content, list):
        raise wrong(place, f"expected text, or a list of parts, got {_shown(content)}")
    for number, part in enumerate(content):
        at = f"{place}[{number}]"
        match part:
            case {"type": "text", "text": str(text)}:
                yield at, text
            case {"type": "image_url", "image_url": {"url": str()} | str()}:
                yield at, part
            case {"type": "text" | "image_url" as kind}:
                form = "{type: text, text: ...}" if kind == "text" else "{type: image_url, image_url: {url: data:...}}"
                raise wrong(at, f"expected {form}, got {_shown(part)}")
            case {"type": kind}:
                raise wrong(f"{at}.type", f"expected text or image_url, got {_shown(kind)}")
            case _:
                raise wrong(at, f"expected an object with a type, got {_shown(part)}")


def _text_only(parts: Sequence[tuple[str, str | Mapping[str, Any]]], role: str) -> str:
    for place, part in parts:
        if not isinstance(part, str):
            raise wrong(place, f"expected text in a message of the {role}'s, got an image; send images as the user")
    return "".join(part for _, part in parts if isinstance(part, str))


def _image(part: Mapping[str, Any], place: str, config: ServeConfig) -> ImageBlob:
    given = part["image_url"]
    url = given if isinstance(given, str) else given["url"]
    at = f"{place}.image_url"
    if url[:5].lower() != "data:":
        raise wrong(
            at,
            f"expected the image itself, as a data URL (data:image/png;base64,...), got {_shown(url)}; this server fetches "
            "nothing",
        )
    try:
        data = read_image(url, Path())
    except NoImageError as error:
        raise wrong(at, str(error)) from None
    if len(data) > config.max_image_mb << 20:
        raise Refused(
            Refusal(
                Fault.REQUEST,
                f"{at}: expected an image of at most {config.max_image_mb} MiB (serve.max_image_mb), got {len(data)} bytes",
                at,
                status=413,
            )
        )
    return ImageBlob.of(data)


def _shown(value: object) -> str:
    return one_line(_SHOW.repr(value))


_SHOW = reprlib.Repr()
_SHOW.maxstring = _SHOW.maxother = 80
