"""One row of the Metis-RL schema: from the plain Python values of its columns to a `Prompt`, or to what is wrong with it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from metis_fast.arrow_types import read_json
from metis_fast.errors import DataError, one_line
from metis_fast.image_source import NoImageError, is_integers, read_image
from metis_fast.judge_styles import STYLES, known_style
from metis_fast.pixels import ImageError, size
from metis_fast.types import ImageBlob, JsonScalar, Message, Prompt

_ROLES = ("system", "user", "assistant")
NO_ABILITY = "none"  # of rows that say nothing of it
_MAX_ASPECT = 200  # Qwen3-VL's image processor refuses longer strips

_SHOW = reprlib.Repr()
_SHOW.maxstring = _SHOW.maxother = 80


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that does not fit the schema; `str` is one line.

    row: counted from 0 in its file. column: with the place inside it, for example `prompt[1].role`.
    """

    file: str
    row: int
    column: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}, column {self.column}: expected {self.expected}, got {self.got}"


class BadRowError(DataError):
    """Raised by `PromptFiles.read`; `bad_row` says what is wrong."""

    def __init__(self, bad_row: BadRow) -> None:
        super().__init__(bad_row)
        self.bad_row = bad_row

    def __str__(self) -> str:
        return f"{self.bad_row}; mend the row, or set data.on_bad_row=skip"


class MisfitError(Exception):
    """Part of a row does not fit; `PromptFiles.read` adds where the row is and raises a `BadRowError`."""

    def __init__(self, column: str, expected: str, got: object) -> None:
        super().__init__(column)
        self.column, self.expected = column, expected
        self.got = "null" if got is None else _SHOW.repr(got)


def parse_prompt(row: Mapping[str, Any], uid: str, folder: Path, any_style: bool = False) -> Prompt:
    """One row as a prompt. Of its images the headers are read; `misfit_image` says what is found behind them.

    row: column -> plain Python value as Arrow makes it; `images` and `extra_info` may be missing.
    folder: what relative image paths start from. any_style: a judge's style that nobody knows is no fault: none is asked for.

    Raises:
        MisfitError: the row does not fit the schema.
    """
    messages = _messages(row["prompt"])
    images = _images(row.get("images"), folder)
    marks = sum(len(message.around_images) - 1 for message in messages)
    if marks != len(images):
        what = "image part" if any(message.texts for message in messages) else "`<image>`"
        raise MisfitError("images", f"{marks} images, one for each {what} in the prompt", len(images))
    if not isinstance(row["data_source"], str):
        raise MisfitError("data_source", "text", row["data_source"])
    ability = row.get("ability")
    if not isinstance(ability, str | None):
        raise MisfitError("ability", "text", ability)
    reward_model = struct_of(row["reward_model"], "reward_model")
    answers = tuple(_answers(reward_model.get("ground_truth")))
    if not answers:
        raise MisfitError("reward_model.ground_truth", "at least one answer", reward_model.get("ground_truth"))
    style = reward_model.get("style")
    if not isinstance(style, str | None) or (style and not any_style and known_style(style) is None):
        raise MisfitError("reward_model.style", ", ".join(STYLES), style)
    info = struct_of(row.get("extra_info"), "extra_info")
    extra = dict(_flatten(info))
    for answer in answers:
        _check_text(answer, "reward_model.ground_truth")
    for name, value in extra.items():
        _check_text(name, "extra_info")
        _check_text(value, f"extra_info.{name}")
    question = extra.pop("question", None)
    if isinstance(question, str) and "<image>" in question:
        question = question.replace("<image>", "").strip()
    if not isinstance(question, str) or not question.strip():
        last = [message for message in messages if message.role == "user"][-1]
        question = "".join(last.around_images).strip()
    return Prompt(
        uid=uid,
        data_source=row["data_source"],
        messages=messages,
        images=images,
        ability=(ability or "").strip() or NO_ABILITY,
        answers=answers,
        judge_style=style or "rule",
        question=question,
        extra=extra,
        tools=_tools(info.get("tools")),
    )


def struct_of(value: Any, column: str) -> Mapping[str, Any]:
    """The fields of a struct, or of one as JSON text; of null, none.

    Raises:
        MisfitError: it is neither.
    """
    fields = value
    if isinstance(value, str):
        try:
            fields = read_json(value) if value.strip() else None
        except ValueError:
            raise MisfitError(column, "a struct, or that as JSON text", value) from None
    if not isinstance(fields, dict | None):
        raise MisfitError(column, "a struct, or that as JSON text", value)
    return fields or {}


def misfit_image(prompt: Prompt, problems: Mapping[str, str]) -> MisfitError | None:
    """What is wrong with the first image of a row that has something in `problems`, by SHA-256."""
    for number, image in enumerate(prompt.images):
        if problem := problems.get(image.sha256):
            return MisfitError(f"images[{number}]", "an image that Pillow can decode", f"{len(image.data)} bytes: {problem}")
    return None


def _messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        try:
            value = read_json(value)
        except ValueError:
            raise MisfitError("prompt", "a list of messages as JSON", value) from None
    if not isinstance(value, list):
        raise MisfitError("prompt", "a list of messages", value)
    messages = []
    for number, entry in enumerate(value):
        role, content = (entry.get("role"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if role not in _ROLES:
            raise MisfitError(f"prompt[{number}].role", ", ".join(_ROLES), role)
        column = f"prompt[{number}].content"
        message = Message(role, content) if isinstance(content, str) else _of_parts(role, content, column)
        _check_text(message.content, column)
        messages.append(message)
    if all(message.role != "user" for message in messages):
        raise MisfitError("prompt", "at least one user message", value)
    return tuple(messages)


def _check_text(value: object, column: str) -> None:
    """Raises: MisfitError: text with half of a character, which JSON can spell and nothing can store."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise MisfitError(column, "text in UTF-8", one_line(error)) from None


def _of_parts(role: str, parts: Any, column: str) -> Message:
    """A message whose content is a list of parts: only image parts stand for images."""
    if not isinstance(parts, list):
        raise MisfitError(column, "text or a list of parts", parts)
    texts = [""]
    for number, part in enumerate(parts):
        match part:
            case {"type": "text", "text": str(text)}:
                texts[-1] += text
            case {"type": "image"}:
                texts.append("")
            case _:
                raise MisfitError(f"{column}[{number}]", "{type: text, text: ...} or {type: image}", part)
    spelt_out = any("<image>" in text for text in texts)
    return Message(role, "<image>".join(texts), tuple(texts) if spelt_out else ())


def _images(value: Any, folder: Path) -> tuple[ImageBlob, ...]:
    return tuple(image_of(entry, f"images[{number}]", folder) for number, entry in enumerate(image_entries(value)))


def image_entries(value: Any) -> list[Any]:
    """The images of a row, whether they are a list, a single one, none, or any of these as JSON text.

    Raises:
        MisfitError: text that begins like JSON and is none.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = read_json(value)
        except ValueError as error:
            raise MisfitError("images", f"images as JSON ({one_line(error)[:80]})", value) from None
    if isinstance(value, dict) and not value.get("bytes") and not value.get("path"):
        return []  # a column of single structs has this for rows without an image
    if value is None:
        return []
    return value if isinstance(value, list) and not is_integers(value) else [value]


def image_of(entry: Any, column: str, folder: Path) -> ImageBlob:
    """An image of a row, looked at up to its header. Raises MisfitError: it is none that the model takes."""
    try:
        data = read_image(entry, folder)
    except NoImageError as error:
        raise MisfitError(column, error.expected, error.got) from None
    try:
        width, height = size(data)
    except ImageError as error:
        raise MisfitError(column, "an image that Pillow can decode", f"{len(data)} bytes: {one_line(error)}") from None
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise MisfitError(column, f"an aspect ratio of at most {_MAX_ASPECT}", f"{width}x{height}")
    return ImageBlob.of(data)


def _answers(value: Any) -> Iterator[str]:
    """Accepted answers, with null and blank ones left out. Text stays as it is, even if it looks like JSON."""
    match value:
        case None:
            return
        case str():
            if value.strip():
                yield value
        case float():
            if math.isfinite(value):  # Parquet writers turn null among numbers into NaN, and integers beside them into floats
                yield str(int(value)) if value.is_integer() else repr(value)
        case bool() | int() | Decimal():
            yield str(value)
        case list():
            for entry in value:
                yield from _answers(entry)
        case dict():
            filled = {key: entry for key, entry in value.items() if entry is not None}
            named = [key for key in ("target", "value") if key in filled]
            if not named and len(filled) > 1:
                raise MisfitError("reward_model.ground_truth", "one field, or `target` or `value` among several", value)
            for key in (named or list(filled))[:1]:
                yield from _answers(filled[key])
        case _:
            raise MisfitError("reward_model.ground_truth", "text, number, bool, or a list or struct of them", value)


def _tools(value: Any) -> tuple[str, ...] | None:
    """Names of tools; None where there is no list of names, but something of another meaning or nothing."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return None
    return tuple(value)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, JsonScalar]]:
    """Scalars of nested structs under dotted keys; nulls, NaN and everything that is no JSON scalar left out."""
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _flatten(entry, f"{prefix}{key}.")
        elif isinstance(entry, str | bool | int) or (isinstance(entry, float) and math.isfinite(entry)):
            yield prefix + key, entry
