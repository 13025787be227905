"""The `image_search` tool: pages whose image looks like the prompt's, by a small hand-made descriptor.

No learnt model: the tool must run anywhere, give the same answer everywhere, and find near-copies (resized, re-encoded, lightly
changed), which is what the corpora of the recipe hold.
"""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from PIL import Image

from metis_fast import pixels
from metis_fast.config import ImageSearchConfig
from metis_fast.errors import InfrastructureError
from metis_fast.pixels import ImageError
from metis_fast.tools.corpus import check_corpus, derived_folder, page_text
from metis_fast.types import ImageBlob, Observation, Outcome, ToolName

_LAYOUT = "2"  # raise when the descriptor changes
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


def _decode(data: bytes | None) -> Image.Image | None:
    try:
        return pixels.decode(data or b"")
    except ImageError:
        return None


def _build(corpus: Path, folder: Path) -> None:
    rows = []
    for batch in pq.ParquetFile(corpus).iter_batches(batch_size=64, columns=["image"]):
        for data in batch.column(0).to_pylist():
            image = _decode(data)
            # An unreadable image keeps its row, and is like nothing.
            rows.append(np.zeros(DESCRIPTOR_SIZE, np.float32) if image is None else describe(image))
    np.save(folder / _FILE, np.stack(rows) if rows else np.zeros((0, DESCRIPTOR_SIZE), np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class _Index:
    descriptors: npt.NDArray[np.float32]  # [rows, 320]
    titles: list[str | None]
    links: list[str | None]
    file: pq.ParquetFile


class ImageSearch:
    """One per run; the descriptors are computed or loaded by the first search. Thread-safe."""

    def __init__(self, config: ImageSearchConfig) -> None:
        """Check the corpus.

        Raises:
            ToolSetupError: it is not set, missing, or lacks a column.
        """
        self._config = config
        self._corpus = check_corpus(ToolName.IMAGE_SEARCH, config.corpus, ("title", "link", "image"))
        self._lock = threading.Lock()
        self._index: _Index | None = None

    def _opened(self) -> _Index:
        if self._index is None:
            try:
                folder = derived_folder(self._corpus, "descriptors", _LAYOUT, lambda path: _build(self._corpus, path))
                names = pq.read_table(self._corpus, columns=["title", "link"])
                descriptors = np.load(folder / _FILE)
                file = pq.ParquetFile(self._corpus, memory_map=True)
            except (OSError, ValueError) as error:  # numpy raises ValueError for a damaged file
                raise InfrastructureError(f"cannot compute or read the descriptors beside {self._corpus}: {error}") from None
            self._index = _Index(descriptors, names["title"].to_pylist(), names["link"].to_pylist(), file)
        return self._index

    def open_index(self) -> None:
        """Compute or load the descriptors now. Raises as `search`."""
        with self._lock:
            self._opened()

    def search(self, image: ImageBlob) -> Observation:
        """The pages whose images look most like `image`: title, link if there is one, thumbnail.

        Raises:
            InfrastructureError: the descriptors cannot be computed or read.
        """
        query = _decode(image.data)
        if query is None:
            return Observation("image_search cannot read the image of the prompt.", outcome=Outcome.TOOL_ERROR)
        with self._lock:
            index = self._opened()
            likeness = index.descriptors @ describe(query)
            best = np.argsort(-likeness, kind="stable")[: self._config.max_results]
            texts, images = [], []
            for number, row in enumerate((int(row) for row in best if likeness[row] > 0), start=1):
                head = f"{number}. " if self._config.max_results > 1 else ""
                lines = [head + page_text(index.titles[row]), page_text(index.links[row])]
                found = _decode(_cell(index.file, row))
                if found is not None:
                    lines.append("<image>")
                    images.append(self._thumbnail(found))
                texts.append("\n".join(line for line in lines if line))
        return Observation("\n\n".join(texts) or "No results.", tuple(images))

    def _thumbnail(self, image: Image.Image) -> ImageBlob:
        small = image.copy()
        small.thumbnail((self._config.thumbnail_px, self._config.thumbnail_px))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        return ImageBlob.of(buffer.getvalue())


def _cell(file: pq.ParquetFile, row: int) -> bytes:
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < count:
            return file.read_row_group(group, columns=["image"]).column(0)[row].as_py()
        row -= count
    raise IndexError("row beyond the corpus")
