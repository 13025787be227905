"""The columns of the Metis-RL schema in a Parquet file: which are read, of which types, and what is said where they lack.

Bytes that are stored as lists of integers become bytes here, where a table is read: as Python lists they would take seven times
as long, and as Arrow's eight times the memory.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metis_fast.arrow_types import (
    as_list,
    is_bytes,
    is_integers,
    is_json,
    is_map,
    is_string,
    item,
    plain,
    stored,
    unknown_extension,
)
from metis_fast.errors import DataError, one_line

_REQUIRED = ("data_source", "prompt", "reward_model")
_LFS = b"version https://git-lfs"
_MAKE = "docs/data.md shows how to make a file"
_FOREIGN: tuple[tuple[Collection[str], str], ...] = (
    (
        ("messages",),
        "whole conversations, as Metis-ColdStart has them, are for `metis-fast sft`; its --check reads them all (docs/sft.md); "
        "training by reward needs prompts with truths",
    ),
    (
        ("question", "answer"),
        "these are questions with answers, as GSM8K has them: make `prompt` of `question`, and `reward_model.ground_truth` of "
        "what stands behind #### in `answer` (docs/data.md, Other data sets)",
    ),
    (
        ("problem", "answer"),
        "make `prompt` of `problem`, and `reward_model.ground_truth` of `answer` (docs/data.md, Other data sets)",
    ),
    (
        ("conversations",),
        "these are conversations: make `prompt` of what stands before the answer, and `reward_model.ground_truth` of the "
        "answer (docs/data.md, Other data sets)",
    ),
)
"""Columns by which other public forms are known, and what to do with them."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns to read of a file. names: as the schema has them -> as the file has them, which may be `image` for `images`.

    integers: whether bytes of images are lists of integers.
    """

    names: Mapping[str, str]
    integers: bool

    def named(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Read columns under the names of the schema, with bytes as bytes.

        A batch in which an integer is no byte stays as it is: its rows say so one by one.
        """
        own = {there: here for here, there in self.names.items()}
        names = [own[name] for name in batch.schema.names]
        columns = list(batch.columns)
        if self.integers:
            at = names.index("images")
            with suppress(_NoBytesError):
                columns[at] = _with_bytes(columns[at])
        return pa.RecordBatch.from_arrays(columns, names)

    def num_bytes(self, group: pq.RowGroupMetaData) -> int:
        """Uncompressed Parquet size of a row group's columns; of images as integers, their number."""
        return sum(
            chunk.num_values if self._is_integers(chunk) else chunk.total_uncompressed_size for chunk in self._chunks(group)
        )

    def decoded_bytes(self, group: pq.RowGroupMetaData) -> int:
        """What Arrow makes of a row group while it is decoded, as far as Parquet tells."""
        width = {"INT32": 4, "INT64": 8}
        levels = 4  # of two bytes each: where the value stands in its lists
        return sum(
            chunk.num_values * (width.get(chunk.physical_type, 8) + levels)
            if self._is_integers(chunk)
            else chunk.total_uncompressed_size
            for chunk in self._chunks(group)
        )

    def _chunks(self, group: pq.RowGroupMetaData) -> Iterator[pq.ColumnChunkMetaData]:
        chunks = (group.column(index) for index in range(group.num_columns))
        return (chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in self.names.values())

    def _is_integers(self, chunk: pq.ColumnChunkMetaData) -> bool:
        name, _, inside = chunk.path_in_schema.partition(".")
        is_number = chunk.physical_type in ("INT32", "INT64")
        return self.integers and name == self.names["images"] and is_number and bool(inside)


class Decoded:
    """A row group in memory, in batches: their types may differ, where one has integers that are no bytes.

    num_rows: of all batches. nbytes: what they hold.
    """

    def __init__(self, batches: tuple[pa.RecordBatch, ...]) -> None:
        self._batches = batches
        self._ends = list(accumulate(batch.num_rows for batch in batches))
        self.num_rows = self._ends[-1] if batches else 0
        self.nbytes = sum(batch.nbytes for batch in batches)

    def place(self, row: int) -> tuple[pa.RecordBatch, int]:
        """The batch that holds a row, and its number there."""
        at = bisect.bisect_right(self._ends, row)
        return self._batches[at], row - (self._ends[at - 1] if at else 0)


def open_columns(path: Path) -> tuple[pq.FileMetaData, Columns]:
    """Footer of a file, and the columns to read.

    Raises:
        DataError: it is missing, no Parquet file, or lacks a column, or has one that cannot hold what it should.
    """
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of a Parquet file or of a folder of them") from None
    except (OSError, pa.ArrowException, ValueError) as error:  # the last one: a name that is not UTF-8, its own or a column's
        raise DataError(f"{path}: not a Parquet file that can be read ({one_line(error)}); {advice_for(path)}") from None
    names: dict[str, str] = {}
    for name, (fits, expected) in _TYPES.items():
        there = "image" if name == "images" and name not in schema.names and "image" in schema.names else name
        if schema.names.count(there) > 1:
            raise DataError(f"{path}: expected one column {there!r}, got several; rename all but one")
        if there not in schema.names:
            if name in _REQUIRED:
                raise DataError(f"{path}: expected a column {name!r}, got {', '.join(schema.names)}; {_hint(schema.names)}")
            continue
        field = schema.field(there)
        if name != "extra_info":
            refuse_unknown(path, field, expected)
        if not fits(stored(field.type)):
            raise DataError(f"{path}: expected column {there!r} to be {expected}, got {field.type}; see docs/data.md")
        names[name] = there
    return metadata, Columns(names, "images" in names and holds_integers(schema.field(names["images"]).type))


def refuse_unknown(path: Path, field: pa.Field, expected: str) -> None:
    """Raises: DataError: a column is of an extension type that nobody here knows. expected: what it should be."""
    if extension := unknown_extension(field):
        raise DataError(
            f"{path}: expected column {field.name!r} to be {expected}, got the extension type {extension!r}, which only its "
            f"author can read; write the column without it (pyarrow: table[{field.name!r}].combine_chunks().storage)"
        )


def advice_for(path: Path) -> str:
    """What to do about a file that is no Parquet file."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(_LFS))
    except OSError:
        begin = b""
    if begin == _LFS:
        return "it only points to one in Git LFS: fetch that with `git lfs pull`, or download the file itself"
    if path.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".arrow", ".zip"):
        return f"convert it first: {_MAKE}"
    return "write it anew, or download it again"


def _hint(names: Collection[str]) -> str:
    return next((advice for columns, advice in _FOREIGN if set(columns) <= set(names)), _MAKE)


class UnreadableError(Exception):
    """Python cannot hold a value. column: where. reason: what it says, in one line."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(column, reason)
        self.column, self.reason = column, reason


def cell_values(batch: pa.RecordBatch | pa.Table, row: int) -> Iterator[tuple[str, object]]:
    """Column -> plain Python value of a row.

    Raises:
        UnreadableError: a value that Python cannot hold: text that is not UTF-8, a date out of range, JSON that is none.
    """
    for field in batch.schema:
        cell = batch.column(field.name)[row]
        try:
            yield field.name, _together(field.name, plain(cell.as_py(), field.type))
        except (ValueError, OverflowError, pa.ArrowException) as error:
            if field.name != "extra_info" or not isinstance(cell, pa.StructScalar):
                raise UnreadableError(field.name, one_line(error)) from None
            yield field.name, _readable(cell)


def _together(name: str, value: Any) -> Any:
    """Messages and images as lists of structs, where a writer made structs of lists of them (`Sequence` of `datasets`)."""
    if name in ("prompt", "messages", "images") and isinstance(value, dict):
        lists = {key: entry for key, entry in value.items() if isinstance(entry, list)}
        if lists and len({len(entry) for entry in lists.values()}) == 1:
            return [dict(zip(lists, entries, strict=True)) for entries in zip(*lists.values(), strict=True)]
    return value


def _readable(struct: pa.StructScalar) -> dict[str, object]:
    """The fields that Python can hold."""
    values: dict[str, object] = {}
    for name in struct:
        with suppress(ValueError, OverflowError, pa.ArrowException):
            values[name] = plain(struct[name].as_py(), struct[name].type)
    return values


class _NoBytesError(Exception):
    """A list of integers holds one that is no byte, or a null."""


def _with_bytes(array: pa.Array) -> pa.Array:
    """The same with every list of integers as bytes; only what stands in a field `bytes`, or in no field, is one."""
    kind = array.type
    if is_integers(kind):
        return _bytes_of(as_list(array))
    if pa.types.is_struct(kind):
        fields = [_with_bytes(array.field(i)) if kind[i].name == "bytes" else array.field(i) for i in range(kind.num_fields)]
        return pa.StructArray.from_arrays(fields, [field.name for field in kind], mask=array.is_null())
    if item(kind) is None:
        return array
    array = as_list(array)
    begin, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
    values = _with_bytes(array.values.slice(begin, end - begin))
    offsets = pa.array(array.offsets.to_numpy() - begin)
    return type(array).from_arrays(offsets, values, mask=array.is_null() if array.null_count else None)


def _bytes_of(array: pa.ListArray | pa.LargeListArray) -> pa.LargeBinaryArray:
    begin, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
    integers = array.values.slice(begin, end - begin)
    if integers.null_count:
        raise _NoBytesError
    if pa.types.is_int8(integers.type):
        data = integers.view(pa.uint8())  # as Java has bytes: -1 is 255
    else:
        try:
            data = integers.cast(pa.uint8())
        except pa.ArrowInvalid:
            raise _NoBytesError from None
    offsets = (array.offsets.to_numpy() - begin).astype(np.int64)
    valid = array.is_valid().buffers()[1] if array.null_count else None
    held = pa.py_buffer(data.to_numpy())  # from its own beginning, wherever a slice begins
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(array), [valid, pa.py_buffer(offsets), held])


def _has_fields(kind: pa.DataType, names: Collection[str]) -> bool:
    return pa.types.is_struct(kind) and all(kind.get_field_index(name) >= 0 for name in names)


def _is_prompt(kind: pa.DataType) -> bool:
    message = item(kind)
    if message is None:
        return is_string(kind) or (
            _has_fields(kind, ("role", "content")) and all(item(field.type) is not None for field in kind)
        )
    return is_json(kind.value_type) or is_map(message) or _has_fields(message, ("role", "content"))


def is_images(kind: pa.DataType) -> bool:
    """Whether a column can hold images: a list of them, one, or a struct of lists."""
    return _is_image(kind) or _is_image(item(kind) or kind)


def _is_image(kind: pa.DataType) -> bool:
    """Of one image, or of a struct of lists of them."""
    image = _has_fields(kind, ("bytes",)) or _has_fields(kind, ("path",))
    return image or is_bytes(kind) or is_string(kind) or is_integers(kind) or pa.types.is_null(kind)


def holds_integers(kind: pa.DataType) -> bool:
    """Whether bytes of a column's images are lists of integers."""
    kind = stored(kind)
    if is_integers(kind):
        return True
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_integers(field.type) for field in kind)
    inside = item(kind)
    return inside is not None and holds_integers(inside)


def _is_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or is_map(kind) or is_string(kind)


_TYPES: Mapping[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "data_source": (is_string, "text"),
    "prompt": (_is_prompt, "a list of {role, content}, or that as JSON text"),
    "images": (is_images, "a list of {bytes, path}"),
    "ability": (is_string, "text"),
    "reward_model": (
        lambda kind: _is_struct(kind) and (not pa.types.is_struct(kind) or _has_fields(kind, ("ground_truth",))),
        "a struct {ground_truth, style}, or that as JSON text",
    ),
    "extra_info": (lambda kind: _is_struct(kind) or pa.types.is_null(kind), "a struct, or that as JSON text"),
}
