"""The Metis-RL Parquet schema: writing it, and reading rows of it as `Prompt`s (docs/data.md lists every accepted shape)."""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metis_fast.data.columns import Columns, Decoded, UnreadableError, cell_values, open_columns
from metis_fast.data.content import DataRecord, row_digest
from metis_fast.data.digesting import digests
from metis_fast.data.paths import expand, unique_names
from metis_fast.data.row import BadRow, BadRowError, MisfitError, misfit_image, parse_prompt, struct_of
from metis_fast.errors import DataError, one_line
from metis_fast.pixels import problem
from metis_fast.types import Prompt

_LOG = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
"""Decoded row groups kept in memory: about 2,000 rows of half a megabyte each, enough to mix what is shuffled and small beside
a model."""

_BATCH_ROWS, _BATCH_BYTES = 64, 32 << 20  # that are decoded in one piece: large ones cost more, and memory
_BUFFER = 1 << 20  # bytes that are read of a file at once: else Arrow reads all of a row group first


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group: rows start to start + num_rows of a `PromptFiles`, group `group` of its file number `file`.

    num_bytes: uncompressed Parquet size of the columns that are read; of bytes as integers, their number. batch_rows: how many
    are decoded at a time.
    """

    file: int
    group: int
    start: int
    num_rows: int
    num_bytes: int
    batch_rows: int = _BATCH_ROWS


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as plain Python values, or with what keeps Python from holding one. Can be pickled.

    row: counted from 0 in its file. values: column -> value. any_style: see `PromptFiles`.
    """

    uid: str
    path: Path
    row: int
    values: Mapping[str, object]
    bad: BadRow | None = None
    any_style: bool = False

    def prompt(self) -> Prompt:
        """The row, parsed. Its images may be damaged behind their headers: see `decoded`.

        Raises:
            BadRowError: it does not fit the schema.
        """
        if self.bad is not None:
            raise BadRowError(self.bad)
        try:
            return parse_prompt(self.values, self.uid, self.path.parent, self.any_style)
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


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Raises: DataError: in place of what Arrow and the system say of a damaged or missing file. what: is read of it."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot read {what}: {one_line(error)}; write the file anew") from None


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

    def __init__(self, paths: Sequence[Path], cache_bytes: int = CACHE_BYTES, any_style: bool = False) -> None:
        """Read the footers and check the schema of every file.

        paths: Parquet files, or folders that stand for every `*.parquet` in them (see `data.paths.expand`). any_style: rows may
        name judges that nobody knows, since one judges them all (`score.judge`).

        Raises:
            DataError: no file, a missing or damaged one, one given twice, a required column that is missing or of a type
                that cannot hold it, or not a single row.
        """
        self.cache_bytes, self._any_style = cache_bytes, any_style
        self._paths = expand(paths)
        self._columns: list[Columns] = []
        self._cache: OrderedDict[RowGroup, Decoded] = OrderedDict()
        self._first_rows: list[int] = []
        row_groups: list[RowGroup] = []
        num_rows = 0
        for number, path in enumerate(self._paths):
            self._first_rows.append(num_rows)
            metadata, columns = open_columns(path)
            self._columns.append(columns)
            for group in range(metadata.num_row_groups):
                found = metadata.row_group(group)
                rows = found.num_rows
                if rows:
                    fits = _BATCH_BYTES * rows // max(1, columns.decoded_bytes(found))
                    batch = min(max(1, fits), _BATCH_ROWS)
                    row_groups.append(RowGroup(number, group, num_rows, rows, columns.num_bytes(found), batch))
                num_rows += rows
        if not row_groups:
            raise DataError(f"no rows in {', '.join(map(str, self._paths))}; give files that hold at least one prompt")
        self.row_groups = tuple(row_groups)
        self._starts = [row_group.start for row_group in row_groups]
        self._num_rows = num_rows
        self.layout = Layout(tuple((group.num_rows, group.num_bytes) for group in row_groups), cache_bytes)
        stops = [*self._first_rows[1:], num_rows]
        sizes = [stop - start for start, stop in zip(self._first_rows, stops, strict=True)]
        self._name(tuple(zip(unique_names(self._paths), sizes, strict=True)))
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
        return self._raw(*self._decoded(row_group).place(index - row_group.start), index).prompt()

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

    def _raw(self, batch: pa.RecordBatch, row: int, index: int) -> RawRow:
        path, number = self.location(index)
        try:
            return RawRow(self._uid(index), path, number, dict(cell_values(batch, row)), any_style=self._any_style)
        except UnreadableError as error:
            bad = BadRow(str(path), number, error.column, "a value that Python can hold", error.reason)
            return RawRow(self._uid(index), path, number, {}, bad)

    def styles(self) -> set[str]:
        """Every judge style of the files, read from their column `reward_model` alone; rows without one count as "rule". Bad
        rows are left for `read` to report.

        Raises:
            DataError: the column cannot be decoded.
        """
        found: set[str] = set()
        for path in self._paths:
            with _readable(path, "column reward_model"), pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=["reward_model"]):
                    for row in range(batch.num_rows):
                        with suppress(MisfitError, UnreadableError):
                            values = dict(cell_values(batch, row))
                            fields = struct_of(values["reward_model"], "reward_model")
                            style = fields.get("style")
                            if fields and isinstance(style, str | None):
                                found.add(style or "rule")  # as `parse_prompt` has it
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
            rows = b"".join(digests(self.row_groups, self._numbered, self._digests_of, tick))
        return DataRecord(self._names, self.layout.groups, self.layout.cache_bytes, self._stamps, rows, rows)

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
        with (
            _readable(path, f"row group {row_group.group}"),
            pq.ParquetFile(path, page_checksum_verification=True, buffer_size=_BUFFER) as file,
        ):
            for batch in file.iter_batches(row_group.batch_rows, [row_group.group], list(columns.names.values())):
                yield columns.named(batch)

    def _group_of(self, index: int) -> int:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row {index} of {self._num_rows}")
        return bisect.bisect_right(self._starts, index) - 1

    def _decoded(self, row_group: RowGroup) -> Decoded:
        if row_group in self._cache:
            self._cache.move_to_end(row_group)
            return self._cache[row_group]
        self._forget(self.cache_bytes - row_group.num_bytes)  # before decoding, so that the two never add up in memory
        decoded = Decoded(tuple(self._batches(row_group)))
        self._forget(self.cache_bytes - decoded.nbytes)  # what it holds may be more than Parquet says: repeats are stored once
        if decoded.num_rows != row_group.num_rows:
            raise DataError(f"{self._paths[row_group.file]}: changed while in use; start again")
        self._cache[row_group] = decoded
        return decoded

    def _forget(self, room: int) -> None:
        """The row groups that were not used for longest, until the others fit."""
        while self._cache and sum(decoded.nbytes for decoded in self._cache.values()) > room:
            self._cache.popitem(last=False)
