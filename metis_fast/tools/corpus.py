"""Local corpora: Parquet whose columns are checked when a search tool opens, read as text and as images."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from metis_fast.arrow_types import is_bytes, is_string, item, stored
from metis_fast.errors import ToolSetupError, one_line
from metis_fast.image_source import read_image
from metis_fast.types import ToolName

_BATCH_ROWS = 64  # Arrow decodes at most 2 GiB of a nested column in one piece: 64 rows of 32 MiB


def _is_scalar(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal, types.is_date)
    return is_string(kind) or any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    kind = stored(kind)
    inside = item(kind)
    return _is_scalar(kind) if inside is None else _is_text(inside)


def _is_image(kind: pa.DataType) -> bool:
    kind = stored(kind)
    if not pa.types.is_struct(kind):
        return is_bytes(kind) or is_string(kind)
    fields = {field.name: stored(field.type) for field in kind}
    data, path = (fields.get(name, pa.null()) for name in ("bytes", "path"))
    return (
        (is_bytes(data) or is_string(data) or pa.types.is_null(data))
        and (is_string(path) or pa.types.is_null(path))
        and not (pa.types.is_null(data) and pa.types.is_null(path))
    )


TEXT: tuple[Callable[[pa.DataType], bool], str] = (_is_text, "text, numbers, dates or lists of them; write it as string")
IMAGE: tuple[Callable[[pa.DataType], bool], str] = (
    _is_image,
    "one image a row; write it as {bytes, path}, as encoded bytes, or as the path of a file",
)


def page_text(text: str) -> str:
    """A corpus cell as one line, in which nothing stands for an image."""
    return " ".join(text.split()).replace("<image>", "< image >")


def cell_text(value: object) -> str:
    """A cell of a text column: whole numbers without a decimal point, lists with a line for each item, null and NaN empty."""
    match value:
        case str():
            return value
        case None:
            return ""
        case list():
            return "\n".join(cell_text(item) for item in value)
        case float():
            return "" if math.isnan(value) else str(int(value)) if value.is_integer() else repr(value)
    return str(value)


def _path_columns(path: Path) -> list[str]:
    """What to read of a file's column `image` for the paths in it."""
    kind = stored(pq.read_schema(path).field("image").type)
    if pa.types.is_struct(kind):
        return ["image.path"] if kind.get_field_index("path") >= 0 else []
    return ["image"] if is_string(kind) else []


def _state(path: Path) -> str:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return "absent "
    return f"{status.st_size}:{status.st_mtime_ns} "


def content_hash(files: Sequence[Path]) -> str:
    """SHA-256 over the hashes of files: equal for equal bytes, whatever their names and times. Raises OSError."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def files_of(path: Path) -> list[Path]:
    """What the path of a corpus stands for: a file, or every `*.parquet` in a folder, sorted by name.

    Raises:
        OSError: it cannot be looked at.
    """
    return sorted(file for file in path.iterdir() if file.match("*.parquet")) if path.is_dir() else [path]


@dataclass(frozen=True, slots=True)
class Corpus:
    """The pages of a search tool: rows of Parquet files, in the order of their names.

    path: the file, or the folder of the files. files: each with its number of rows.
    """

    tool: ToolName
    path: Path
    files: tuple[tuple[Path, int], ...]

    @staticmethod
    def open(tool: ToolName, path: Path | None, columns: Mapping[str, tuple[Callable[[pa.DataType], bool], str]]) -> Corpus:
        """Read the footers and check the schema of every file.

        path: a Parquet file, or a folder that stands for every `*.parquet` in it, sorted by name.
        columns: name -> TEXT or IMAGE.

        Raises:
            ToolSetupError: it is not set, missing, damaged or empty, or a column is not there or of another type.
        """
        if path is None:
            other = "tools.text_search.provider" if tool is ToolName.TEXT_SEARCH else "tools.image_search.cache"
            raise ToolSetupError(
                f"{tool} has no corpus; set tools.{tool}.corpus, or {other}, or remove {tool} from tools.enabled"
            )
        path = path.absolute()
        found = _found(tool, path)
        if not found:
            raise ToolSetupError(f"the corpus of {tool}, {path}, is a folder without *.parquet files; set tools.{tool}.corpus")
        corpus = Corpus(tool, path, tuple((file, _check_file(tool, file, columns)) for file in found))
        if len(corpus) == 0:
            raise ToolSetupError(f"the corpus of {tool}, {path}, has no rows; set tools.{tool}.corpus to one that has pages")
        return corpus

    def __len__(self) -> int:
        return sum(num_rows for _, num_rows in self.files)

    def content_hash(self) -> str:
        """SHA-256 over the hashes of the files: equal for equal bytes, whatever their names and times.

        Raises:
            ToolSetupError: a file cannot be read.
        """
        try:
            return content_hash([path for path, _ in self.files])
        except OSError as error:
            raise self._unreadable(Path(error.filename or self.path), error) from None

    def texts(self, *names: str) -> Iterator[tuple[str, ...]]:
        """The cells of text columns, row after row.

        Raises:
            ToolSetupError: a file is damaged, or a cell has no meaning in Python (text that is not UTF-8).
        """
        for path, _ in self.files:
            for start, batch in self._batches(path, names):
                columns = [self._values(path, start, name, batch.column(name)) for name in names]
                yield from zip(*([cell_text(value) for value in column] for column in columns), strict=True)

    def images(self) -> Iterator[tuple[Path, int, object]]:
        """File, row in it and cell of the column `image`, row after row; `read_image` reads a cell.

        Raises:
            ToolSetupError: as `texts`.
        """
        for path, _ in self.files:
            for start, batch in self._batches(path, ("image",)):
                for row, value in enumerate(self._values(path, start, "image", batch.column(0)), start):
                    yield path, row, value

    def image_files(self) -> str:
        """SHA-256 over the size and time of every file that the column `image` names: it changes when one is mended.

        Raises:
            ToolSetupError: as `texts`.
        """
        whole = hashlib.sha256()
        for path, column in ((file, column) for file, _ in self.files for column in _path_columns(file)):
            for start, batch in self._batches(path, (column,)):
                for cell in self._values(path, start, column, batch.column(0)):
                    match cell:
                        case {"path": str(name)} | str(name) if name:
                            whole.update(_state(path.parent / name).encode())
        return whole.hexdigest()

    def image(self, index: int) -> bytes:
        """The encoded image of a row, counted over all files.

        Raises:
            ImageError: it is not there.
            OSError, ArrowException: its file changed, or can no longer be read.
        """
        for path, num_rows in self.files:
            if index < num_rows:
                return read_image(_cell(path, index), path.parent)
            index -= num_rows
        raise IndexError("row beyond the corpus")

    def _batches(self, path: Path, names: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Rows of a file, with the number of the first one."""
        start = 0
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=list(names)):
                    yield start, batch
                    start += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(path, error) from None

    def _values(self, path: Path, start: int, name: str, column: pa.Array) -> list[object]:
        try:
            return column.to_pylist()
        except (ValueError, OverflowError):  # text that is not UTF-8, a date out of range
            for row, value in enumerate(column, start):
                try:
                    value.as_py()
                except (ValueError, OverflowError) as error:
                    place = f"{path}, row {row}, column {name!r}"
                    raise ToolSetupError(
                        f"the corpus of {self.tool}, {place}: {one_line(error)}; mend the row (text is UTF-8)"
                    ) from None
            raise

    def _unreadable(self, path: Path, error: Exception) -> ToolSetupError:
        return ToolSetupError(f"cannot read the corpus of {self.tool}, {path}: {one_line(error)}; write the file anew")


def _found(tool: ToolName, path: Path) -> list[Path]:
    """Its files, all of them there."""
    file = path
    try:
        found = files_of(path)
        for file in found:
            file.stat()
    except FileNotFoundError:
        how = f"is a link to {os.readlink(file)}, which is not there" if file.is_symlink() else "is not there"
        raise ToolSetupError(f"the corpus of {tool}, {file}, {how}; set tools.{tool}.corpus") from None
    except OSError as error:
        raise ToolSetupError(
            f"cannot read the corpus of {tool}, {file}: {error.strerror or one_line(error)}; set tools.{tool}.corpus"
        ) from None
    return found


def _check_file(tool: ToolName, path: Path, columns: Mapping[str, tuple[Callable[[pa.DataType], bool], str]]) -> int:
    """Number of rows."""
    where = f"the corpus of {tool}, {path},"
    if not path.is_file():  # opening a pipe would wait
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise ToolSetupError(f"{where} is {what}; it needs a Parquet file: move it away, or set tools.{tool}.corpus")
    try:
        with pq.ParquetFile(path) as file:
            schema, names, num_rows = file.schema_arrow, file.schema_arrow.names, file.metadata.num_rows
    except OSError as error:
        raise ToolSetupError(f"cannot read the corpus of {tool}, {path}: {one_line(error)}; set tools.{tool}.corpus") from None
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the second: a damaged name of a column
        raise ToolSetupError(f"{where} is not a Parquet file ({one_line(error)}); set tools.{tool}.corpus") from None
    for name, (fits, expected) in columns.items():
        if name not in names:
            got = ", ".join(names) or "no columns"
            raise ToolSetupError(f"{where} has no column {name!r}; it needs {', '.join(columns)}, and has {got}")
        if names.count(name) > 1:
            raise ToolSetupError(f"{where} has several columns {name!r}; rename all but one")
        if not fits(schema.field(name).type):
            raise ToolSetupError(f"{where} has a column {name!r} of type {schema.field(name).type}; it needs {expected}")
    return num_rows


def _cell(path: Path, row: int) -> object:
    with pq.ParquetFile(path, memory_map=True) as file:
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if row >= num_rows:
                row -= num_rows
                continue
            for batch in file.iter_batches(_BATCH_ROWS, [group], ["image"]):
                if row < batch.num_rows:
                    return batch.column(0)[row].as_py()
                row -= batch.num_rows
    raise OSError(f"{path} has fewer rows than when it was opened")
