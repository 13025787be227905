"""JSON files of benchmarks: a list of rows (some have megabytes of base64 in each), or one row a line.

Read as `tsv` reads: once from end to end for texts and places, and again, in part, for images.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from metis_fast.errors import DataError, one_line
from metis_fast.evaluate.files.images import images_of
from metis_fast.evaluate.files.table import IMAGE_COLUMNS, LONG, Row, first_with, misfit_in
from metis_fast.evaluate.question import Images

_CHUNK = 1 << 20
_HEAD = 256  # in which the list has to begin
_START = re.compile(r'\ufeff?\s*(?:\{\s*"(?:questions|data)"\s*:\s*)?\[\s*')  # SEED-Bench's list stands under "questions"
_BETWEEN = re.compile(r"\s*,?\s*")
_AGAIN = "the file is cut short or damaged; get it again"


class JsonTable:
    """A `.json` file with a list of rows, or a `.jsonl` file. md5: of all bytes.

    Raises:
        DataError: it cannot be read, or holds something else.
    """

    def __init__(self, path: Path, progress: bool = False) -> None:
        self.path = path
        self._rows: list[tuple[int, int, dict[str, object], str]] = []  # place, bytes, texts, image where it is a short text
        self._by_image: dict[bytes, int] = {}
        self._first: dict[int, int] = {}  # row with an image in it -> the first one with the same
        digest = hashlib.md5(usedforsecurity=False)
        try:
            total, hidden = path.stat().st_size, None if progress else True  # None: only on a terminal
            with path.open("rb") as file, tqdm(
                total=total, desc=path.name, unit="B", unit_scale=True, disable=hidden, leave=False
            ) as bar:  # fmt: skip
                found = self._lines(file) if path.suffix == ".jsonl" else self._list(file)
                for place, length, row in found:
                    self._keep(place, length, row)
                    bar.update(place + length - bar.n)
                file.seek(0)
                for chunk in iter(lambda: file.read(_CHUNK), b""):
                    digest.update(chunk)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; give the path of a JSON file") from None
        except UnicodeDecodeError:
            raise DataError(f"{path}: expected UTF-8 text, got other bytes; {_AGAIN}") from None
        self.md5 = digest.hexdigest()
        self.columns = list(dict.fromkeys(name for _, _, texts, _ in self._rows for name in texts))
        if self._rows and self._image(self._rows[0][2]) is None and self._inline:
            self.columns.append(self._inline)

    _inline: str = ""

    def _lines(self, file: BinaryIO) -> Iterator[tuple[int, int, object]]:
        place = 0
        for line in file:
            if line.strip():
                try:
                    yield place, len(line), json.loads(line)
                except (ValueError, RecursionError) as error:  # also a number of thousands of digits
                    raise self._damaged(error) from None
            place += len(line)

    def _list(self, file: BinaryIO) -> Iterator[tuple[int, int, object]]:
        """Values one by one: a buffer holds one of them, and what was read behind it."""
        decode, parse = codecs.getincrementaldecoder("utf-8")().decode, json.JSONDecoder().raw_decode
        text = decode(file.read(_HEAD))
        start = _START.match(text)
        if start is None:
            raise DataError(f"{self.path}: expected a list of rows, got {text[:40]!r}; give another file")
        at, ended, want = start.end(), False, 0
        place = len(text[:at].encode())
        while True:
            text = text[at:]
            if text.startswith("]"):
                if start[0].lstrip("\ufeff").startswith("[") and (text[1:].strip() or file.read(_CHUNK).strip()):
                    raise DataError(f"{self.path}: expected nothing behind the list of rows, got more; give one list a file")
                return
            try:
                value, at = parse(text)
            except json.JSONDecodeError as error:
                # twice as much before the next try, so that a long value is not parsed over and over
                want = max(_CHUNK, len(text))
                chunk = file.read(want)
                if not chunk and ended:
                    raise self._damaged(error) from None
                ended = not chunk
                text, at = text + decode(chunk, final=ended), 0
                continue
            except (ValueError, RecursionError) as error:
                raise self._damaged(error) from None
            length = len(text[:at].encode())
            yield place, length, value
            while (gap := _BETWEEN.match(text, at)) is not None:
                at = gap.end()
                if at < len(text) or not (chunk := file.read(_CHUNK)):  # white space and a comma may go on
                    break
                text += decode(chunk)
            place += len(text[:at].encode())

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self.path}, row {len(self._rows)}: {one_line(error)}; {_AGAIN}")

    def _image(self, row: dict[str, object]) -> str | None:
        return next((name for name in IMAGE_COLUMNS if name in row), None)

    def _keep(self, place: int, length: int, row: object) -> None:
        if not isinstance(row, dict):
            raise DataError(
                f"{self.path}, row {len(self._rows)}: expected an object, got {type(row).__name__}; give a file of rows"
            )
        texts = dict(row)
        image = ""
        if (name := self._image(row)) is not None:
            cell = row[name]
            if isinstance(cell, str) and len(cell) <= LONG:
                image = cell
            else:
                self._inline = name
                del texts[name]
                if isinstance(cell, str):
                    self._first[len(self._rows)] = first_with(cell, len(self._rows), self._by_image)
        self._rows.append((place, length, texts, image))

    def rows(self) -> Iterator[Row]:
        """All rows; their images are read when they are asked for."""
        for number, (_, _, texts, image) in enumerate(self._rows):
            owner = self._first.get(number, number)
            picture = image or str(self._rows[owner][2].get("index", owner))
            yield Row(self.path, number, texts, picture, lambda number=number: self._images(number))

    def _images(self, number: int) -> Images:
        place, length, _, image = self._rows[number]
        with misfit_in(self.path, number):
            if image:
                return images_of(image, self.path.parent, "image")
            try:
                with self.path.open("rb") as file:
                    file.seek(place)
                    row = json.loads(file.read(length))
            except (OSError, ValueError) as error:
                raise DataError(f"{self.path}, row {number}: cannot be read again ({one_line(error)}); keep the file") from None
            name = self._image(row)
            return images_of(row[name], self.path.parent, name) if name else ()
