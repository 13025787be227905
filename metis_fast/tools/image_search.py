"""The `image_search` tool over a local corpus: pages whose image looks like the prompt's, by a small hand-made descriptor.

No learnt model: the tool must run anywhere, give the same answer everywhere, and find near-copies (resized, re-encoded, lightly
changed), which is what the corpora of the recipe hold.
"""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from metis_fast import pixels
from metis_fast.config import ImageSearchConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.image_source import read_image
from metis_fast.pixels import ImageError
from metis_fast.tools.corpus import IMAGE, TEXT, Corpus, page_text
from metis_fast.tools.derived import derived_folder
from metis_fast.tools.results import ImageSearchResult, Refused, SeenPage
from metis_fast.types import ImageBlob, ToolName

_LAYOUT = "3"  # raise when the descriptor changes
_LOG = logging.getLogger(__name__)
_FILE = "descriptors.npy"
_SIDE = 64  # pixels of the grey image that gradients are taken from
_CELLS, _BINS = 4, 8
DESCRIPTOR_SIZE = 8 * 8 * 3 + _CELLS * _CELLS * _BINS


def describe(image: Image.Image) -> npt.NDArray[np.float32]:
    """Descriptor [320] float32 of unit length; the cosine of two of them is how alike the images look.

    Half of it is the layout of colours: the image as 8 x 8 x 3, minus its mean colour. Half is the layout of edges: gradients
    of the 64 x 64 grey image, by direction (8) in each of 4 x 4 cells, weighted by strength (Dalal and Triggs 2005).
    """
    rgb = pixels.to_rgb(image)
    colours = np.asarray(rgb.resize((8, 8), Image.Resampling.BOX), np.float32).reshape(64, 3)
    grey = np.asarray(rgb.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    direction = ((np.arctan2(down, right) + np.pi) / (2 * np.pi) * _BINS).astype(int) % _BINS
    cell = np.arange(_SIDE) * _CELLS // _SIDE
    place = (cell[:, None] * _CELLS + cell[None, :]) * _BINS + direction
    edges = np.bincount(place.ravel(), strength.ravel(), _CELLS * _CELLS * _BINS).astype(np.float64)
    halves = [_unit((colours - colours.mean(axis=0)).ravel()), _unit(edges)]
    return _unit(np.concatenate(halves)).astype(np.float32)


def _unit(vector: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    length = float(np.linalg.norm(vector))
    return vector / length if length > 1e-6 else np.zeros_like(vector)  # a plain image has neither layout


def _build(corpus: Corpus, folder: Path) -> None:
    rows: list[npt.NDArray[np.float32]] = []
    bad: list[str] = []
    for path, row, cell in corpus.images():
        try:
            rows.append(describe(pixels.decode(read_image(cell, path.parent))))
        except ImageError as error:
            rows.append(np.zeros(DESCRIPTOR_SIZE, np.float32))  # keeps its row, and is like nothing
            bad.append(f"{path}, row {row}: {error}")
    if len(bad) == len(rows):
        raise ToolSetupError(f"the corpus of {corpus.tool} has no image that can be read; {bad[0]}; write it anew")
    if bad:
        _LOG.warning(
            "image_search: %d of %d images cannot be read and are never found; the first: %s", len(bad), len(rows), bad[0]
        )
    np.save(folder / _FILE, np.stack(rows))


class ImageSearch:
    """One per run. Thread-safe."""

    def __init__(self, config: ImageSearchConfig) -> None:
        """Check the corpus; compute the descriptors of its images, or load those that are there.

        Raises:
            ToolSetupError: the corpus is not set, missing or damaged, lacks a column or has one of another type, holds no image
                that can be read, or its descriptors can be written nowhere.
        """
        self._config = config
        corpus = Corpus.open(ToolName.IMAGE_SEARCH, config.corpus, {"title": TEXT, "link": TEXT, "image": IMAGE})
        key = hashlib.sha256(f"{_LAYOUT}:{corpus.content_hash()}:{corpus.image_files()}".encode()).hexdigest()
        folder = derived_folder(corpus.path, "descriptors", key, lambda path: _build(corpus, path))
        try:
            self._descriptors: npt.NDArray[np.float32] = np.load(folder / _FILE)  # [rows, 320]
        except (OSError, ValueError) as error:
            raise ToolSetupError(f"cannot read the descriptors in {folder}: {error}; delete it") from None
        self._corpus = corpus
        self._names = list(corpus.texts("title", "link"))

    def search(self, image: ImageBlob) -> ImageSearchResult | Refused:
        """The pages whose images look most like `image`, with thumbnails. Refused: it cannot be read.

        Raises:
            InfrastructureError: the corpus can no longer be read.
        """
        try:
            query = pixels.decode(image.data)
        except ImageError:
            return Refused("image_search cannot read the image of the prompt.")
        likeness = self._descriptors @ describe(query)
        best = np.argsort(-likeness, kind="stable")[: self._config.max_results]
        pages = []
        for row in (int(row) for row in best if likeness[row] > 0):
            title, link = map(page_text, self._names[row])
            pages.append(SeenPage(title, link, self._thumbnail(row)))
        return ImageSearchResult(tuple(pages))

    def _thumbnail(self, row: int) -> ImageBlob:
        try:
            small = pixels.decode(self._corpus.image(row))
        except (ImageError, OSError, pa.ArrowException) as error:
            message = " ".join(str(error).split())
            raise InfrastructureError(f"the corpus of image_search, {self._corpus.path}, changed in use: {message}") from None
        small.thumbnail((self._config.thumbnail_px, self._config.thumbnail_px))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        return ImageBlob.of(buffer.getvalue())
