"""Image cells of published files as encoded images."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from metis_fast.data.row import MisfitError, image_of
from metis_fast.errors import DataError
from metis_fast.evaluate.files.table import LONG, is_missing, spelt
from metis_fast.evaluate.question import Images, Question
from metis_fast.image_source import NoImageError, read_image
from metis_fast.machine import num_cores
from metis_fast.pixels import problem
from metis_fast.types import ImageBlob

_URL_SAFE = str.maketrans("-_", "+/")
_MOST_THREADS = 4  # each holds a decoded image, which at 8K takes 100 MiB


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
    except NoImageError as error:
        raise MisfitError(column, _with_advice(error), error.got) from None
    return image_of(data, column, folder)


def _decoded(text: str) -> bytes:
    """Base64 of megabytes: no other reading is tried, as of a path."""
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text.strip(), validate=True)
    except ValueError:  # line breaks, or the other alphabet; one that lacks padding is cut
        plain = "".join(text.split()).translate(_URL_SAFE)
    try:
        return base64.b64decode(plain, validate=True)
    except ValueError as error:
        raise NoImageError("an image as base64", f"{len(text)} characters: {error}") from None


def _with_advice(error: NoImageError) -> str:
    """A file that is not there lies, most often, in an archive that was not unpacked."""
    return f"{error.expected} (unpack the archive of images there)" if "image file" in error.expected else error.expected


def decoded(loaded: Iterable[tuple[Question, Images]]) -> Iterator[tuple[Question, Images, DataError | None]]:
    """Passes on questions and their images, in order, with what is wrong with these behind their headers.

    They are decoded in a few threads, and an image once, however often it comes.
    """
    known: dict[str, Future[str]] = {}
    waiting: deque[tuple[Question, Images]] = deque()

    def first() -> tuple[Question, Images, DataError | None]:
        question, images = waiting.popleft()
        damage = next((text for image in images if (text := known[image.sha256].result())), "")
        return question, images, _damaged(question, damage) if damage else None

    num = min(num_cores(), _MOST_THREADS)
    with ThreadPoolExecutor(num) as threads:
        for question, images in loaded:
            for image in images:
                if image.sha256 not in known:
                    known[image.sha256] = threads.submit(problem, image.data)
            waiting.append((question, images))
            if len(waiting) > num:
                yield first()
        while waiting:
            yield first()


def _damaged(question: Question, damage: str) -> DataError:
    return DataError(
        f"question {question.index}: expected an image that can be decoded, got one that cannot ({damage}); get the file "
        "again, or mend the row"
    )
