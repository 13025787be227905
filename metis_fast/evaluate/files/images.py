"""Image cells of published files as encoded images."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from metis_fast.data.row import MisfitError
from metis_fast.evaluate.files.table import LONG, is_missing, show, spelt
from metis_fast.evaluate.question import Images
from metis_fast.image_source import NoImageError, read_image
from metis_fast.pixels import ImageError, size
from metis_fast.types import ImageBlob


def images_of(cell: object, folder: Path, column: str) -> Images:
    """The images of a cell: base64, bytes, a struct of them, a path, or a list of any of these; () where it is empty.

    folder: what relative paths start from. Of each image the header is read.

    Raises:
        MisfitError: there is something else, or no such file.
    """
    if is_missing(cell):
        return ()
    if isinstance(cell, str) and cell.startswith("["):
        cell = spelt(cell)
    entries = cell if isinstance(cell, list) and not all(isinstance(part, int) for part in cell) else [cell]
    return tuple(_one(entry, folder, column) for entry in entries)


def _one(entry: object, folder: Path, column: str) -> ImageBlob:
    try:
        data = _decoded(entry) if isinstance(entry, str) and len(entry) > LONG else read_image(entry, folder)
        size(data)
    except NoImageError as error:
        raise MisfitError(column, _with_advice(error), error.got) from None
    except ImageError as error:
        raise MisfitError(column, f"an image that can be opened ({error})", show(entry)) from None
    return ImageBlob.of(data)


def _decoded(text: str) -> bytes:
    """Base64 of megabytes: no other reading is tried, as of a path."""
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise NoImageError("an image as base64", f"{len(text)} characters: {error}") from None


def _with_advice(error: NoImageError) -> str:
    """A file that is not there lies, most often, in an archive that was not unpacked."""
    return f"{error.expected} (unpack the archive of images there)" if "image file" in error.expected else error.expected
