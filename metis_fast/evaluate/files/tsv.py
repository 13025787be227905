"""TSV files of VLMEvalKit: as many gigabytes as you like, one row of which may be a base64 image of tens of megabytes.

A file is read once from end to end, for its texts, its MD5 and the place of every row; an image is read from its place when it
is needed. An image cell may also be the index of another row, which has the image.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from metis_fast.data.row import MisfitError
from metis_fast.errors import DataError, one_line
from metis_fast.evaluate.files.images import images_of
from metis_fast.evaluate.files.table import IMAGE_COLUMNS, LONG, Row, first_with, misfit_in, show
from metis_fast.evaluate.question import Images

_LONGEST_CELL = 1 << 30  # characters; csv's own limit is 128 Ki
_REFERENCE = 64  # characters; VLMEvalKit takes what is no longer for the index of a row
_AGAIN = "the file is cut short or damaged; get it again"


class _Lines:
    """Lines of a file as text for `csv`, with the place of the next one; bytes pass through a digest."""

    def __init__(self, file: BinaryIO, path: Path, bar: tqdm | None = None) -> None:
        self._file, self._path, self._bar = file, path, bar
        self.place = file.tell()
        self.digest = hashlib.md5(usedforsecurity=False)
        self.last = b""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        if self._bar is not None:
            self.digest.update(line)
            self._bar.update(len(line))
        self.last = line[-1:]
        try:
            text = line.decode("utf-8-sig" if self.place == 0 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{self._path}: expected UTF-8 text, got other bytes after byte {self.place}; {_AGAIN}") from None
        self.place += len(line)
        return text


class TsvTable:
    """A TSV file. md5: of all bytes. unfinished: its last line has no end, so a part may be missing.

    Raises:
        DataError: it cannot be read, has no header, or a row with other than as many cells as columns.
    """

    def __init__(self, path: Path, progress: bool = False) -> None:
        self.path = path
        csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))  # of the process: raised, never lowered
        try:
            with path.open("rb") as file, self._bar(progress) as bar:
                lines = _Lines(file, path, bar)
                self._read(lines)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; give the path of a TSV file") from None
        except csv.Error as error:
            raise DataError(f"{path}, row {len(self._rows)}: {one_line(error)}; {_AGAIN}") from None
        self.md5 = lines.digest.hexdigest()
        self.unfinished = lines.last != b"\n"

    def _bar(self, progress: bool) -> tqdm:
        total, hidden = self.path.stat().st_size, None if progress else True  # None: only on a terminal
        return tqdm(total=total, desc=self.path.name, unit="B", unit_scale=True, disable=hidden, leave=False)

    def _read(self, lines: _Lines) -> None:
        # place, texts, image cell where it is a short one ("": it is an image, None: there is nothing)
        self._rows: list[tuple[int, dict[str, object], str | None]] = []
        self._by_index: dict[str, int] = {}
        self._by_image: dict[bytes, int] = {}
        self._repeats: dict[int, int] = {}  # row -> the first one with the same image
        reader = csv.reader(lines, delimiter="\t")
        self.columns = next(reader, [])
        if len(self.columns) < 2 or len(set(self.columns)) < len(self.columns):
            raise DataError(f"{self.path}: expected a header of different columns, got {show(self.columns)}; give a TSV file")
        self._image = next((name for name in ("image", *IMAGE_COLUMNS) if name in self.columns), None)
        place = lines.place
        for cells in reader:
            if cells:
                self._keep(place, cells)
            place = lines.place

    def _keep(self, place: int, cells: list[str]) -> None:
        number = len(self._rows)
        if len(cells) != len(self.columns):
            raise DataError(
                f"{self.path}, row {number}: expected {len(self.columns)} cells, one a column, got {len(cells)}; {_AGAIN}"
            )
        texts: dict[str, object] = dict(zip(self.columns, cells, strict=True))
        image = str(texts.pop(self._image)) if self._image else ""
        index = str(texts.get("index", number))
        if not index.strip():
            raise DataError(f"{self.path}, row {number}: expected an index, got none; number the rows")
        if index in self._by_index:
            raise DataError(
                f"{self.path}, row {number}: expected an index of its own, got {show(index)} as in row "
                f"{self._by_index[index]}; number the rows"
            )
        self._by_index[index] = number
        if len(image) > LONG and (first := first_with(image, number, self._by_image)) != number:
            self._repeats[number] = first
        self._rows.append((place, texts, "" if len(image) > LONG else image.strip() or None))

    def rows(self) -> Iterator[Row]:
        """All rows; their images are read when they are asked for."""
        for number, (_, texts, image) in enumerate(self._rows):
            owner = self._by_index.get(image, number) if image and len(image) <= _REFERENCE else number
            owner = self._repeats.get(owner, owner)
            picture = "" if image is None else str(self._rows[owner][1].get("index", owner))
            yield Row(self.path, number, texts, picture, lambda number=number: self._images(number))

    def _images(self, number: int) -> Images:
        image = self._rows[number][2]
        if self._image is None or image is None:
            return ()
        owner = self._by_index.get(image) if 0 < len(image) <= _REFERENCE else None
        with misfit_in(self.path, number):
            if owner is None or owner == number:
                cell = self._cell(number)
            elif (there := self._rows[owner][2]) is None or there in self._by_index:
                raise MisfitError(self._image, f"an image in row {owner}, which row {number} refers to", there)
            else:
                cell = self._cell(owner)
            if 0 < len(cell) <= _REFERENCE and not (self.path.parent / cell).is_file():
                raise MisfitError(self._image, "base64, the index of another row, or the path of a file", cell)
            return images_of(cell, self.path.parent, self._image)

    def _cell(self, number: int) -> str:
        """The image cell of a row, from the file."""
        place, texts, _ = self._rows[number]
        try:
            with self.path.open("rb") as file:
                file.seek(place)
                cells = next(csv.reader(_Lines(file, self.path), delimiter="\t"), [])
        except (OSError, csv.Error) as error:
            raise DataError(f"{self.path}, row {number}: cannot be read again ({one_line(error)}); keep the file") from None
        found: dict[str, object] = dict(zip(self.columns, cells, strict=False))
        assert self._image is not None
        cell = str(found.pop(self._image, ""))
        if len(cells) != len(self.columns) or found != texts:
            raise DataError(f"{self.path}, row {number}: changed since it was read first; start again")
        return cell
