"""The Metis-RL Parquet schema: writing it, and reading rows of it as `Prompt`s (docs/data.md lists every accepted shape)."""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metis_fast.arrow_types import is_bytes, is_string, item, stored
from metis_fast.data.content import DataRecord, row_digest
from metis_fast.data.row import BadRow, BadRowError, MisfitError, misfit_image, parse_prompt
from metis_fast.errors import DataError, one_line
from metis_fast.pixels import problem
from metis_fast.types import Prompt

_LOG = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
"""Decoded row groups kept in memory, by their uncompressed Parquet size: about 2,000 rows of half a megabyte each, enough to
mix what is shuffled and small beside a model."""

_REQUIRED = ("data_source", "prompt", "ability", "reward_model")
_BATCH_ROWS = 64  # Arrow decodes at most 2 GiB of a nested column in one piece: 64 rows of 32 MiB
_DIGESTERS = 4  # threads: decoding, in one, takes more than a third of the time of all
_PIECE_ROWS = 8  # that a thread makes digests of at a time


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group: rows start to start + num_rows of a `PromptFiles`, group `group` of its file number `file`.

    num_bytes: uncompressed Parquet size of the columns that are read.
    """

    file: int
    group: int
    start: int
    num_rows: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as plain Python values, or with what keeps Python from holding one. Can be pickled.

    row: counted from 0 in its file. values: column -> value.
    """

    uid: str
    path: Path
    row: int
    values: Mapping[str, object]
    bad: BadRow | None = None

    def prompt(self) -> Prompt:
        """The row, parsed. Its images may be damaged behind their headers: see `decoded`.

        Raises:
            BadRowError: it does not fit the schema.
        """
        if self.bad is not None:
            raise BadRowError(self.bad)
        try:
            return parse_prompt(self.values, self.uid, self.path.parent)
        except MisfitError as misfit:
            raise _bad(self.path, self.row, misfit) from None

    def decoded(self) -> Prompt:
        """As `prompt`; its images are decoded whole, to see that they can be.

        Raises:
            BadRowError: it does not fit the schema, or an image cannot be decoded.
        """
        prompt = self.prompt()
        misfit = misfit_image(prompt, {image.sha256: problem(image.data) for image in prompt.images})
        if misfit is not None:
            raise _bad(self.path, self.row, misfit)
        return prompt


def _bad(path: Path, row: int, misfit: MisfitError) -> BadRowError:
    return BadRowError(BadRow(str(path), row, misfit.column, misfit.expected, misfit.got))


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows and bytes of every row group, in the order of the files, and how many bytes of them are mixed at a time."""

    groups: tuple[tuple[int, int], ...]
    cache_bytes: int

    @property
    def fingerprint(self) -> str:
        """One short line; equal lines mean equal orders. A set that fits the cache is mixed as a whole, whatever its groups."""
        rows = sum(rows for rows, _ in self.groups)
        if sum(size for _, size in self.groups) <= self.cache_bytes:
            return f"{rows} rows"
        digest = hashlib.sha256(json.dumps([self.cache_bytes, self.groups]).encode()).hexdigest()
        return f"{rows} rows in {len(self.groups)} groups, sha256 {digest[:16]}"


class PromptFiles:
    """Rows of Parquet files as prompts, by index; file after file in the order given.

    Row groups are decoded on demand and the last used ones are kept, up to `cache_bytes` (at least one). No file stays open.
    """

    row_groups: tuple[RowGroup, ...]
    cache_bytes: int
    layout: Layout
    """What the shuffled order depends on."""

    def __init__(self, paths: Sequence[Path], cache_bytes: int = CACHE_BYTES) -> None:
        """Read the footers and check the schema of every file.

        paths: Parquet files, or folders that stand for every `*.parquet` in them, sorted by name.

        Raises:
            DataError: no file, a missing or damaged one, one given twice, a required column that is missing or of a type
                that cannot hold it, or not a single row.
        """
        self.cache_bytes = cache_bytes
        self._paths = _expand(paths)
        self._columns: list[list[str]] = []
        self._cache: OrderedDict[RowGroup, pa.Table] = OrderedDict()
        self._first_rows: list[int] = []
        row_groups: list[RowGroup] = []
        num_rows = 0
        for number, path in enumerate(self._paths):
            self._first_rows.append(num_rows)
            metadata, columns = _open(path)
            self._columns.append(columns)
            for group in range(metadata.num_row_groups):
                size, rows = _read_bytes(metadata.row_group(group), columns), metadata.row_group(group).num_rows
                if rows:
                    row_groups.append(RowGroup(number, group, num_rows, rows, size))
                num_rows += rows
        if not row_groups:
            raise DataError(f"no rows in {', '.join(map(str, self._paths))}; give files that hold at least one prompt")
        self.row_groups = tuple(row_groups)
        self._starts = [row_group.start for row_group in row_groups]
        self._num_rows = num_rows
        self.layout = Layout(tuple((group.num_rows, group.num_bytes) for group in row_groups), cache_bytes)
        stops = [*self._first_rows[1:], num_rows]
        sizes = [stop - start for start, stop in zip(self._first_rows, stops, strict=True)]
        self._name(tuple(zip(_unique_names(self._paths), sizes, strict=True)))
        self._stamps = tuple((status.st_size, status.st_mtime_ns) for status in map(Path.stat, self._paths))
        largest = max(row_groups, key=lambda row_group: row_group.num_bytes)
        if largest.num_bytes > cache_bytes:
            _LOG.warning(
                "%s: a row group of %d MiB is in memory at once; rewrite the file with smaller row groups (docs/data.md)",
                self._paths[largest.file],
                largest.num_bytes >> 20,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without what was decoded: another process decodes what it needs."""
        return {**self.__dict__, "_cache": OrderedDict()}

    def __len__(self) -> int:
        return self._num_rows

    def location(self, index: int) -> tuple[Path, int]:
        """The file that holds a row, and the row's number in it, from 0."""
        file = self.row_groups[self._group_of(index)].file
        return self._paths[file], index - self._first_rows[file]

    def read(self, index: int) -> Prompt:
        """The prompt of row `index`. Cheap if its row group is among the last used ones; otherwise that is decoded.

        Raises:
            BadRowError: the row does not fit the schema.
            DataError: its row group cannot be decoded.
            IndexError: no such row.
        """
        row_group = self.row_groups[self._group_of(index)]
        return self._raw(self._table(row_group), index - row_group.start, index).prompt()

    def unusable(self, index: int, prompt: Prompt, problems: Mapping[str, str]) -> BadRowError | None:
        """The error of row `index` if one of its images has something in `problems`, by SHA-256."""
        misfit = misfit_image(prompt, problems)
        return None if misfit is None else _bad(*self.location(index), misfit)

    def raw_rows(self, row_group: RowGroup) -> Iterator[RawRow]:
        """The rows of a row group, not parsed yet; they stream past the cache.

        Raises:
            DataError: the row group cannot be decoded (from where the damage is).
        """
        for index, batch in self._numbered(row_group):
            for row in range(batch.num_rows):
                yield self._raw(batch, row, index + row)

    def _numbered(self, row_group: RowGroup) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches with the number of their first row."""
        index = row_group.start
        for batch in self._batches(row_group):
            yield index, batch
            index += batch.num_rows

    def _raw(self, table: pa.Table | pa.RecordBatch, row: int, index: int) -> RawRow:
        path, number = self.location(index)
        values: dict[str, object] = {}
        for field in table.schema:
            cell = table.column(field.name)[row]
            try:
                values[field.name] = _shortest(cell.as_py(), field.type) if _has_short_floats(field.type) else cell.as_py()
            except (ValueError, OverflowError, pa.ArrowException) as error:  # text that is not UTF-8, a date out of range
                if field.name == "extra_info" and isinstance(cell, pa.StructScalar):
                    values[field.name] = _readable(cell)
                    continue
                bad = BadRow(str(path), number, field.name, "a value that Python can hold", one_line(error))
                return RawRow(self._uid(index), path, number, {}, bad)
        return RawRow(self._uid(index), path, number, values)

    def styles(self) -> set[str]:
        """Every `reward_model.style` of the files, read from that column alone; bad rows are left for `read` to report."""
        found: set[str] = set()
        for path in self._paths:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=["reward_model"]):
                    for cell in batch.column(0):
                        with suppress(ValueError, OverflowError, pa.ArrowException):
                            row = cell.as_py()
                            if isinstance(row, dict) and isinstance(row.get("style"), str):
                                found.add(row["style"])
        return found

    def record(self, known: DataRecord | None = None, tick: Callable[[int], object] = lambda rows: None) -> DataRecord:
        """Digests of all rows, with names and layout. Reads all files, but no image that rows only point to.

        known: of an earlier run; where size and time of every file are still those, its digests are taken and nothing is read.
        tick: called with the number of rows read since it was called last; what it raises goes on.

        Raises:
            DataError: a row group cannot be decoded.
        """
        if known is not None and known.stamps == self._stamps and known.num_rows == len(self):
            rows = known.rows
        else:
            digests = list[bytes]()
            for some in self._digests():
                digests += some
                tick(len(some))
            rows = b"".join(digests)
        return DataRecord(self._names, self.layout.groups, self.layout.cache_bytes, self._stamps, rows, rows)

    def _digests(self) -> Iterator[list[bytes]]:
        """Of all rows in their order, some at a time. Threads make them, while what follows is decoded: neither needs Python's
        lock for a large image."""
        with ThreadPoolExecutor(_DIGESTERS, "digest") as pool:
            waiting = deque[Future[list[bytes]]]()
            for row_group in self.row_groups:
                for index, batch in self._numbered(row_group):
                    for at in range(0, batch.num_rows, _PIECE_ROWS):
                        waiting.append(pool.submit(self._digests_of, batch.slice(at, _PIECE_ROWS), index + at))
                    while len(waiting) > _BATCH_ROWS // _PIECE_ROWS:  # those of this batch: more would add up in memory
                        yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _digests_of(self, batch: pa.RecordBatch, index: int) -> list[bytes]:
        rows = (self._raw(batch, row, index + row) for row in range(batch.num_rows))
        return [row_digest(row.values if row.bad is None else {row.bad.column: row.bad.got}) for row in rows]

    def go_on(self, record: DataRecord) -> None:
        """Name rows, and order epochs, as the run did that this is a record of, whatever its files are called now."""
        self._name(record.names)
        self.layout = Layout(record.groups, record.cache_bytes)

    def _uid(self, index: int) -> str:
        file = bisect.bisect_right(self._named_from, index) - 1
        return f"{self._names[file][0]}:{index - self._named_from[file]}"

    def _name(self, names: tuple[tuple[str, int], ...]) -> None:
        """names: (name, rows), one behind another over all rows."""
        self._names = tuple((name, rows) for name, rows in names if rows)
        self._named_from = [0, *accumulate(rows for _, rows in self._names)][:-1]

    def _batches(self, row_group: RowGroup) -> Iterator[pa.RecordBatch]:
        path, columns = self._paths[row_group.file], self._columns[row_group.file]
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                yield from file.iter_batches(_BATCH_ROWS, [row_group.group], columns)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: cannot read row group {row_group.group}: {one_line(error)}; write the file anew"
            ) from None

    def _group_of(self, index: int) -> int:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row {index} of {self._num_rows}")
        return bisect.bisect_right(self._starts, index) - 1

    def _table(self, row_group: RowGroup) -> pa.Table:
        if row_group in self._cache:
            self._cache.move_to_end(row_group)
            return self._cache[row_group]
        room = self.cache_bytes - row_group.num_bytes
        while self._cache and sum(cached.num_bytes for cached in self._cache) > room:
            self._cache.popitem(last=False)  # before decoding, so that the two never add up in memory
        table = pa.Table.from_batches(self._batches(row_group))
        if table.num_rows != row_group.num_rows:
            raise DataError(f"{self._paths[row_group.file]}: changed while in use; start again")
        self._cache[row_group] = table
        return table


def _expand(paths: Sequence[Path]) -> list[Path]:
    """Folders replaced by their Parquet files. Symlinks are kept: their names, not their targets', are what a user knows."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path}: expected *.parquet files in this folder, found none; give another folder or a file")
        files.extend(found)
    if not files:
        raise DataError("no data files given; name at least one Parquet file (data.train=[FILE])")
    for path, times in Counter(Path(os.path.abspath(path)) for path in files).items():
        if times > 1:
            raise DataError(f"{path}: given {times} times; name each file once")
    return files


def _has_short_floats(kind: pa.DataType) -> bool:
    kind = stored(kind)
    if pa.types.is_struct(kind):
        return any(_has_short_floats(field.type) for field in kind)
    inside = item(kind)
    return pa.types.is_float16(kind) or pa.types.is_float32(kind) if inside is None else _has_short_floats(inside)


def _shortest(value: Any, kind: pa.DataType) -> Any:
    """A value in which floats of 16 and 32 bits are what their writer meant: 0.1, not 0.10000000149011612."""
    kind = stored(kind)
    inside = item(kind)
    if isinstance(value, dict) and pa.types.is_struct(kind):
        return {field.name: _shortest(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and inside is not None:
        return [_shortest(entry, inside) for entry in value]
    if isinstance(value, float) and (pa.types.is_float16(kind) or pa.types.is_float32(kind)):
        return float(str((np.float16 if pa.types.is_float16(kind) else np.float32)(value)))
    return value


def _readable(struct: pa.StructScalar) -> dict[str, object]:
    """The fields that Python can hold."""
    values: dict[str, object] = {}
    for name in struct:
        with suppress(ValueError, OverflowError, pa.ArrowException):
            values[name] = struct[name].as_py()
    return values


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """The stem of each file, with as many parent folders as it takes to tell files apart."""
    full = [Path(os.path.abspath(path)) for path in paths]
    stems = [path.with_suffix("").parts for path in full]
    if len(set(stems)) < len(stems):  # a.parquet beside a.pq
        stems = [path.parts for path in full]
    depths = [1] * len(stems)
    while True:
        tails = [stem[-depth:] for stem, depth in zip(stems, depths, strict=True)]
        times = Counter(tails)
        if max(times.values()) == 1:
            return ["/".join(tail) for tail in tails]
        depths = [depth + (times[tail] > 1) for depth, tail in zip(depths, tails, strict=True)]


def _open(path: Path) -> tuple[pq.FileMetaData, list[str]]:
    """Footer of a file, and the names of the columns to read."""
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of a Parquet file or of a folder of them") from None
    except (OSError, pa.ArrowException, ValueError) as error:  # the last one: a name that is not UTF-8, its own or a column's
        raise DataError(f"{path}: not a Parquet file that can be read ({one_line(error)}); write it anew") from None
    for name, (fits, expected) in _COLUMN_TYPES.items():
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: expected one column {name!r}, got several; rename all but one")
        if name not in schema.names:
            if name in _REQUIRED:
                raise DataError(f"{path}: expected a column {name!r}, got {', '.join(schema.names)}; see docs/data.md")
        elif not fits(stored(schema.field(name).type)):
            raise DataError(
                f"{path}: expected column {name!r} to be {expected}, got {schema.field(name).type}; see docs/data.md"
            )
    return metadata, [name for name in _COLUMN_TYPES if name in schema.names]


def _read_bytes(metadata: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    chunks = (metadata.column(index) for index in range(metadata.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns)


def _has_fields(kind: pa.DataType, names: Sequence[str]) -> bool:
    return pa.types.is_struct(kind) and all(kind.get_field_index(name) >= 0 for name in names)


def _is_prompt(kind: pa.DataType) -> bool:
    message = item(kind)
    return is_string(kind) or (message is not None and _has_fields(message, ("role", "content")))


def _is_images(kind: pa.DataType) -> bool:
    entry = item(kind) or kind
    image = _has_fields(entry, ("bytes",)) or _has_fields(entry, ("path",))
    return image or is_bytes(entry) or is_string(entry) or pa.types.is_null(entry)


_COLUMN_TYPES: Mapping[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "data_source": (is_string, "text"),
    "prompt": (_is_prompt, "a list of {role, content}, or that as JSON text"),
    "images": (_is_images, "a list of {bytes, path}"),
    "ability": (is_string, "text"),
    "reward_model": (lambda kind: _has_fields(kind, ("ground_truth",)), "a struct {ground_truth, style}"),
    "extra_info": (lambda kind: pa.types.is_struct(kind) or pa.types.is_null(kind), "a struct"),
}
