"""Conversations in the Metis-ColdStart Parquet schema, by index (docs/sft.md lists every accepted shape).

messages   JSON text of a list of {role, content}, such a list itself, or a struct of lists
images     list of base64 text (with or without `data:`), of bytes, of integers, or of {bytes, path}, or a struct of lists of
           these; in reading order
"""

from __future__ import annotations

import bisect
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metis_fast.arrow_types import is_bytes, is_json, is_map, is_string, item, read_json, stored
from metis_fast.data.columns import (
    Columns,
    Decoded,
    UnreadableError,
    advice_for,
    cell_values,
    holds_integers,
    is_images,
    refuse_unknown,
)
from metis_fast.data.cursor import Layout
from metis_fast.data.paths import expand, first
from metis_fast.data.row import BadRow, BadRowError, MisfitError, image_entries, image_of
from metis_fast.errors import DataError, one_line
from metis_fast.types import ImageBlob, Message

_LOG = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
"""Row groups kept in memory, by what they hold there; rows are mixed within as much."""

ROLES = ("system", "user", "assistant", "tool")
MARK = "<image>"
_STRUCTURED = ("tool_calls", "function_call", "reasoning_content", "reasoning")  # of other formats; they would be lost
_WEIGHTS = ("weight", "train", "loss", "loss_mask", "trainable")  # of other formats, which leave messages out of the loss
_BATCH_ROWS = 64  # a column of integers takes eight times its bytes until it is made one of bytes
_MOST_PATH = 4096  # longer text cannot be a path (PATH_MAX)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row. uid: "<file>:<row>". messages: their images, in reading order, are `images`; an assistant shows none."""

    uid: str
    messages: tuple[Message, ...]
    images: tuple[ImageBlob, ...]


class BadConversationError(BadRowError):
    """A row that does not fit the schema."""

    def __str__(self) -> str:
        return f"{self.bad_row}; mend the row, or set sft.on_bad_row=skip"


class LongConversationError(BadRowError):
    """A row that has too many tokens."""

    def __str__(self) -> str:
        return f"{self.bad_row}; raise sft.max_tokens and sft.tokens_per_micro_batch, or set sft.on_long_row=skip"


class ConversationFiles:
    """Rows of Parquet files, by index; file after file by name.

    Row groups are decoded on demand and the last used ones are kept, up to `cache_bytes` (at least one). No file stays open.
    """

    layout: Layout
    """What the shuffled order depends on."""

    def __init__(self, path: Path, cache_bytes: int = CACHE_BYTES) -> None:
        """Read the footers and check the schema of every file.

        path: a Parquet file, or a folder of them (see `expand`).

        Raises:
            DataError: no file, a damaged one, a column that is missing or of a type that cannot hold it, or no row.
        """
        self.paths = expand([path])
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[int, Decoded] = OrderedDict()
        self._groups: list[tuple[int, int]] = []  # file, row group in it
        sizes: list[tuple[int, int]] = []
        self._first_rows: list[int] = []
        num_rows = 0
        self._columns: list[Columns] = []
        for number, file in enumerate(self.paths):
            metadata, columns = _open(file)
            self._columns.append(columns)
            self._first_rows.append(num_rows)
            for group in range(metadata.num_row_groups):
                row_group = metadata.row_group(group)
                if row_group.num_rows:
                    self._groups.append((number, group))
                    sizes.append((row_group.num_rows, columns.num_bytes(row_group)))
                    num_rows += row_group.num_rows
        if not num_rows:
            raise DataError(f"no rows in {path}; give files that hold at least one conversation")
        self._starts = np.cumsum([0, *(rows for rows, _ in sizes)])[:-1].tolist()
        self._num_rows = num_rows
        self.layout = Layout(tuple(sizes), cache_bytes)
        largest = max(range(len(sizes)), key=lambda i: sizes[i][1])
        if sizes[largest][1] > cache_bytes:
            _LOG.warning(
                "%s: a row group of %d MiB is in memory at once; rewrite the file with smaller row groups (docs/data.md)",
                self.paths[self._groups[largest][0]],
                sizes[largest][1] >> 20,
            )

    def __len__(self) -> int:
        return self._num_rows

    @property
    def held_bytes(self) -> int:
        """Of the row groups in memory."""
        return sum(decoded.nbytes for decoded in self._cache.values())

    def forget(self) -> None:
        """Drop the row groups in memory."""
        self._cache.clear()

    def location(self, index: int) -> tuple[Path, int]:
        """The file that holds a row, and the row's number in it, from 0."""
        file = bisect.bisect_right(self._first_rows, index) - 1
        return self.paths[file], index - self._first_rows[file]

    def read(self, index: int) -> Conversation:
        """The conversation of row `index`; of its images, headers are read.

        Raises:
            BadConversationError: the row does not fit the schema.
            DataError: its row group cannot be decoded.
        """
        group = bisect.bisect_right(self._starts, index) - 1
        batch, row = self._decoded(group).place(index - self._starts[group])
        path, number = self.location(index)
        try:
            values = dict(cell_values(batch, row))
            return parse_conversation(values, f"{path.stem}:{number}", path.parent)
        except UnreadableError as error:
            misfit = MisfitError(error.column, "a value that Python can hold", error.reason)
            raise self.bad(index, misfit) from None
        except MisfitError as misfit:
            raise self.bad(index, misfit) from None

    def bad(self, index: int, misfit: MisfitError, kind: type[BadRowError] = BadConversationError) -> BadRowError:
        """The error of a row in which something does not fit."""
        path, number = self.location(index)
        return kind(BadRow(str(path), number, misfit.column, misfit.expected, misfit.got))

    def _decoded(self, group: int) -> Decoded:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        self._make_room(self.layout.groups[group][1])  # before decoding, so that the two never add up in memory
        file, number = self._groups[group]
        path, columns = self.paths[file], self._columns[file]
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
                batches = parquet.iter_batches(_BATCH_ROWS, [number], list(columns.names.values()))
                decoded = Decoded(tuple(map(columns.named, batches)))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot read row group {number}: {one_line(error)}; write the file anew") from None
        if decoded.num_rows != self.layout.groups[group][0]:
            raise DataError(f"{path}: changed while in use; start again")
        self._make_room(decoded.nbytes)  # it may be more than Parquet says: repeats are stored once
        self._cache[group] = decoded
        return decoded

    def _make_room(self, num_bytes: int) -> None:
        while self._cache and self.held_bytes > self._cache_bytes - num_bytes:
            self._cache.popitem(last=False)


# -- files and schema -------------------------------------------------------------------------------------------------------


def holds_conversations(path: Path) -> bool:
    """Whether files are in this schema, by the columns of the first; if not, they are stored rollouts.

    Raises:
        DataError: there is no file, it cannot be read, or it is neither.
    """
    file = first(path)
    names = _schema(file)[1].names
    if "messages" in names:
        return True
    if {"tokens", "sampled"} <= set(names):
        return False
    hint = "docs/sft.md shows how to make a file"
    if {"prompt", "reward_model"} <= set(names):
        hint = "prompts with truths are for `metis-fast train`: a cold start needs whole conversations (docs/sft.md)"
    raise DataError(
        f"{file}: expected a column 'messages', of conversations, or the rollouts of a run, got {', '.join(names)}; {hint}"
    )


def _schema(path: Path) -> tuple[pq.FileMetaData, pa.Schema]:
    """Footer of a file."""
    try:
        with pq.ParquetFile(path) as file:
            return file.metadata, file.schema_arrow
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of a Parquet file or of a folder of them") from None
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({one_line(error)}); {advice_for(path)}") from None


def _open(path: Path) -> tuple[pq.FileMetaData, Columns]:
    """Footer of a file, and the columns to read."""
    metadata, schema = _schema(path)
    for name in ("messages", "images"):
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: expected one column {name!r}, got several; rename all but one")
    if "messages" not in schema.names:
        raise DataError(f"{path}: expected a column 'messages', got {', '.join(schema.names)}; see docs/sft.md")
    names: dict[str, str] = {}
    for name, (fits, expected) in _TYPES.items():
        if name in schema.names:
            field = schema.field(name)
            refuse_unknown(path, field, expected)
            if not fits(stored(field.type)):
                raise DataError(f"{path}: expected column {name!r} to be {expected}, got {field.type}; see docs/sft.md")
            names[name] = name
    return metadata, Columns(names, "images" in names and holds_integers(schema.field("images").type))


def _is_messages(kind: pa.DataType) -> bool:
    if is_string(kind) or is_bytes(kind):
        return True
    message = item(kind)
    if message is None:
        message = kind  # a struct of lists
    elif is_json(kind.value_type) or is_map(message):
        return True
    return pa.types.is_struct(message) and all(message.get_field_index(name) >= 0 for name in ("role", "content"))


_TYPES: Mapping[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "messages": (_is_messages, "JSON text or a list of {role, content}"),
    "images": (is_images, "a list of base64 text, bytes, integers or {bytes, path}"),
}


# -- a row ------------------------------------------------------------------------------------------------------------------


def parse_conversation(values: Mapping[str, Any], uid: str, folder: Path) -> Conversation:
    """One row. values: column -> plain Python value; `images` may be missing. folder: what relative image paths start from.

    Raises:
        MisfitError: the row does not fit the schema.
    """
    messages = tuple(_messages(values["messages"]))
    entries = image_entries(values.get("images"))
    marks = sum(len(message.around_images) - 1 for message in messages)
    if marks != len(entries):
        said = sum(message.content.count(MARK) for message in messages if message.role == "assistant")
        more = f"; {said} more in assistant messages, which show no image, are text" if said else ""
        raise MisfitError("images", f"{marks} images, one for each `{MARK}` in the messages{more}", _Count(len(entries)))
    images = tuple(_image(entry, f"images[{number}]", folder) for number, entry in enumerate(entries))
    return Conversation(uid, messages, images)


class _Count(int):
    """Printed as "3 images"."""

    def __repr__(self) -> str:
        return f"{int(self)} image{'s' * (self != 1)}"


def _messages(value: Any) -> Iterator[Message]:
    if isinstance(value, str | bytes):
        try:
            value = read_json(value.decode() if isinstance(value, bytes) else value)
        except ValueError as error:
            raise MisfitError("messages", f"a list of messages as JSON ({one_line(error)[:80]})", value) from None
    if not isinstance(value, list) or not value:
        raise MisfitError("messages", "a list of messages", value)
    for number, entry in enumerate(value):
        yield _message(entry, f"messages[{number}]")
    if all(entry["role"] != "assistant" for entry in value):
        raise MisfitError("messages", "at least one assistant message", [entry["role"] for entry in value])


def _message(entry: Any, column: str) -> Message:
    if not isinstance(entry, dict):
        raise MisfitError(column, "{role, content}", entry)
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise MisfitError(f"{column}.role", ", ".join(ROLES), role)
    for name in _STRUCTURED:
        if entry.get(name):
            raise MisfitError(f"{column}.{name}", "nothing: calls and reasons stand as text in `content`", entry[name])
    for name in _WEIGHTS:
        if entry.get(name, 1) in (0, "0", "false", "False"):  # False, too
            raise MisfitError(f"{column}.{name}", "nothing: every assistant message counts in the loss", entry[name])
    if role == "assistant":
        text = content if isinstance(content, str) else _text_of(content, f"{column}.content")
        if not text.strip():
            raise MisfitError(f"{column}.content", "text: the assistant says something", text)
        message = Message(role, text, (text,))  # the model writes no image, so that a mark in it is text
    elif isinstance(content, str):
        message = Message(role, content)
    else:
        texts = _around_images(content, f"{column}.content")
        message = Message(role, MARK.join(texts), tuple(texts))
    if _SURROGATE.search(message.content):  # JSON can spell half of a character
        raise MisfitError(f"{column}.content", "text in UTF-8", "half of a surrogate pair")
    return message


def _around_images(parts: Any, column: str) -> list[str]:
    """Texts before, between and behind the images of a content that is a list of parts."""
    if not isinstance(parts, list):
        raise MisfitError(column, "text or a list of parts", parts)
    texts = [""]
    for number, part in enumerate(parts):
        match part:
            case {"type": "text", "text": str(text)} | str(text):
                texts[-1] += text
            case {"type": "image" | "image_url"}:
                texts.append("")
            case _:
                raise MisfitError(f"{column}[{number}]", "{type: text, text: ...} or {type: image}", part)
    # beside image parts a mark is text; without any it shows an image, as it does in plain text
    return texts if len(texts) > 1 else texts[0].split(MARK)


def _text_of(parts: Any, column: str) -> str:
    if not isinstance(parts, list):
        raise MisfitError(column, "text or a list of parts", parts)
    texts: list[str] = []
    for number, part in enumerate(parts):
        match part:
            case {"type": "text", "text": str(text)} | str(text):
                texts.append(text)
            case _:
                raise MisfitError(f"{column}[{number}]", "{type: text, text: ...}: an assistant shows no image", part)
    return "".join(texts)


def _image(entry: Any, column: str, folder: Path) -> ImageBlob:
    if isinstance(entry, str) and (len(entry) > _MOST_PATH or entry[:5].lower() == "data:"):
        entry = {"bytes": entry}
    return image_of(entry, column, folder)
