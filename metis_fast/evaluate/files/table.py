"""A published file as rows: their texts at hand, their images where they are."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from metis_fast.data.row import BadRow, MisfitError
from metis_fast.errors import DataError
from metis_fast.evaluate.question import Images

IMAGE_COLUMNS = ("decoded_image", "bytes", "image", "images", "image_path", "figure_path", "data_id")
"""Where published files have images, the first that is there counts: MathVista has a path in `image`, pixels in another one."""
LONG = 1024  # characters; longer cells of image columns are images, shorter ones paths or references
_SHOW = reprlib.Repr()
_SHOW.maxstring = 80


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of a file.

    number: from 0 in its file. cells: column -> value, images left out. picture: what names its image (a path, or the index of
    the row that has it), the same for rows that share it; "" where nothing does.
    """

    file: Path
    number: int
    cells: Mapping[str, object]
    picture: str
    load_images: Callable[[], Images]

    def value(self, *names: str) -> object:
        """Of the first of some columns that has a value; None where none has one."""
        return next((cell for name in names if not is_missing(cell := self.cells.get(name))), None)

    def text(self, *names: str) -> str:
        """As `value`, as text. Whole floats lose their point: pandas and Arrow make 3.0 of a 3 in a column with gaps.

        Raises:
            MisfitError: there is none.
        """
        value = self.value(*names)
        if value is None:
            raise MisfitError(names[0], "a value", None)
        return as_text(value)

    def text_or(self, default: str, *names: str) -> str:
        """As `text`, or a default."""
        value = self.value(*names)
        return default if value is None else as_text(value)

    def texts(self, *names: str) -> list[str]:
        """A list, stored as one or spelt as Python or JSON spell it; [] where there is none.

        Raises:
            MisfitError: it is something else.
        """
        value = self.value(*names)
        if isinstance(value, str):
            value = spelt(value)
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            raise MisfitError(names[0], "a list", self.value(*names))
        return [as_text(part) for part in value]

    def struct(self, *names: str) -> dict[str, object]:
        """A struct, stored as one or spelt as Python or JSON spell it; {} where there is none.

        Raises:
            MisfitError: it is something else.
        """
        value = self.value(*names)
        if isinstance(value, str):
            value = spelt(value)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise MisfitError(names[0], "a struct", self.value(*names))
        return {str(key): part for key, part in value.items()}


class Table(Protocol):
    """A file. `rows` are in the order of the file."""

    path: Path
    md5: str

    @property
    def columns(self) -> Sequence[str]:
        """Their names."""
        ...

    def rows(self) -> Iterator[Row]:
        """All rows. Raises DataError where the file cannot be read."""
        ...


def is_missing(value: object) -> bool:
    """Null, NaN or nothing but white space."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def as_text(value: object) -> str:
    """A cell as text; structs and lists as JSON."""
    match value:
        case str():
            return value
        case float() if value.is_integer():
            return str(int(value))
        case bytes():
            return value.decode(errors="replace")
        case list() | dict():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value)


def spelt(text: str) -> object:
    """The list or struct that a text spells; the text itself where it spells none."""
    if text.strip()[:1] not in ("[", "{"):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError):
            continue
    return text


def first_with(image: str, number: int, seen: dict[bytes, int]) -> int:
    """The first row that has this image, as base64: many files repeat it in each row that shows it. seen: so far."""
    return seen.setdefault(hashlib.sha256(image.encode(errors="surrogatepass")).digest(), number)


def show(value: object) -> str:
    """A value for an error, in a few words."""
    return _SHOW.repr(value)


@contextmanager
def misfit_in(file: Path, row: int) -> Iterator[None]:
    """A MisfitError inside becomes a DataError that says where: what is wrong with an image is found late."""
    try:
        yield
    except MisfitError as error:
        bad = BadRow(str(file), row, error.column, error.expected, error.got)
        raise DataError(f"{bad}; get the file again, or mend the row") from None
