"""Parquet files of the Hugging Face hub, whose images stand in one column, as bytes or as base64.

Texts are read at once without that column. Images stream: a row group may hold gigabytes of them, and of it only the page that
is being decoded is in memory. (Some writers put up to 1,024 rows into a page; then a TSV of the same rows takes far less.) They
are fast in the order of the file; a step back begins the row group again.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from metis_fast.arrow_types import is_bytes, is_plain, is_string, item, plain, stored
from metis_fast.errors import DataError, one_line
from metis_fast.evaluate.files.images import images_of
from metis_fast.evaluate.files.table import IMAGE_COLUMNS, LONG, Row, misfit_in
from metis_fast.evaluate.question import Images

_KEPT = 4  # cells read last; four questions about a chart follow each other
_CHUNK = 1 << 20
_BATCH = 256  # rows of texts
_AGAIN = "the file is cut short or damaged; get it again"


class ParquetTable:
    """A Parquet file. md5: of all bytes.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, path: Path, progress: bool = False) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK)
            self.md5 = _digest(path, progress)
            schema = self._file.schema_arrow
            self.columns: list[str] = list(schema.names)
            self._image = self._image_column(schema)
            self._texts = self._read_texts(schema)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; give the path of a Parquet file") from None
        except (OSError, pa.ArrowException, ValueError) as error:  # the last one: names or JSON that are none
            raise DataError(f"{path}: not a Parquet file that can be read ({one_line(error)}); {_AGAIN}") from None
        groups = range(self._file.metadata.num_row_groups)
        self._starts = [0, *accumulate(self._file.metadata.row_group(group).num_rows for group in groups)]
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, object] = OrderedDict()
        self._next, self._batches = -1, iter(())  # the row that comes next, and where from

    def _bytes_a_value(self, name: str) -> float:
        metadata, size, values = self._file.metadata, 0, 0
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                if chunk.path_in_schema.partition(".")[0] == name:
                    size, values = size + chunk.total_uncompressed_size, values + chunk.num_values
        return size / max(values, 1)

    def _image_column(self, schema: pa.Schema) -> str | None:
        """Pixels go before paths."""
        there = [name for name in IMAGE_COLUMNS if name in schema.names]
        return next((name for name in there if self._is_heavy(schema.field(name))), next(iter(there), None))

    def _is_heavy(self, field: pa.Field) -> bool:
        kind = stored(field.type)
        kind = item(kind) or kind
        if pa.types.is_struct(kind):
            return any(is_bytes(stored(kind.field(i).type)) for i in range(kind.num_fields))
        return is_bytes(kind) or (is_string(kind) and self._bytes_a_value(field.name) > LONG)

    def _read_texts(self, schema: pa.Schema) -> list[dict[str, object]]:
        light = [field.name for field in schema if not self._is_heavy(field)]
        paths = [f"{field.name}.path" for field in schema if field.name == self._image and _has_path(field)]
        rows: list[dict[str, object]] = []
        for batch in self._file.iter_batches(_BATCH, columns=[*light, *paths]):
            rows += plain_rows(batch)
        return rows

    def rows(self) -> Iterator[Row]:
        """All rows; their images are read when they are asked for."""
        for number, texts in enumerate(self._texts):
            cells = dict(texts)
            image = cells.pop(self._image, None) if self._image else None
            path = image.get("path") if isinstance(image, dict) else image
            picture = path if isinstance(path, str) and path else str(cells.get("index", number))
            if isinstance(image, str):
                cells[self._image or ""] = image
            yield Row(self.path, number, cells, picture, lambda number=number: self._images(number))

    def _images(self, number: int) -> Images:
        if self._image is None:
            return ()
        with misfit_in(self.path, number):
            return images_of(self._cell(number), self.path.parent, self._image)

    def _cell(self, number: int) -> object:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            group = bisect_right(self._starts, number) - 1
            start = self._starts[group]
            if not start <= self._next <= number:
                self._next = start
                self._batches = self._file.iter_batches(1, row_groups=[group], columns=[self._image])
            try:
                while self._next < number:
                    next(self._batches)
                    self._next += 1
                (row,) = plain_rows(next(self._batches))
            except (OSError, pa.ArrowException, StopIteration) as error:
                self._next = -1
                raise DataError(f"{self.path}, row {number}: cannot be read ({one_line(error)}); {_AGAIN}") from None
            self._next += 1
            if self._next == self._starts[group + 1]:
                self._next = -1
            self._kept[number] = row[self._image or ""]
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return self._kept[number]


def plain_rows(batch: pa.RecordBatch) -> list[dict[str, object]]:
    """Rows as plain Python values."""
    columns = [column.to_pylist() for column in batch.columns]
    kinds = [(field.name, field.type, is_plain(field.type)) for field in batch.schema]
    return [
        {name: cell if easy else plain(cell, kind) for (name, kind, easy), cell in zip(kinds, row, strict=True)}
        for row in zip(*columns, strict=True)
    ]


def _has_path(field: pa.Field) -> bool:
    kind = stored(field.type)
    return pa.types.is_struct(kind) and any(kind.field(i).name == "path" for i in range(kind.num_fields))


def _digest(path: Path, progress: bool) -> str:
    digest, hidden = hashlib.md5(usedforsecurity=False), None if progress else True  # None: only on a terminal
    with path.open("rb") as file, tqdm(
        total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, disable=hidden, leave=False
    ) as bar:  # fmt: skip
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
