"""The images of a run's rollouts by content hash, decoded and encoded afresh before anything of them reaches a browser."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from pathlib import Path
from stat import S_ISREG

import pyarrow as pa
from PIL import Image

from metis_fast import pixels, seal
from metis_fast.errors import DataError, one_line
from metis_fast.pixels import ImageError
from metis_fast.types import ImageBlob
from metis_fast.view.parts import files_in

THUMB_PX = 480
FULL_PX = 2048
"""Longest sides of the two sizes that are served."""
_FEW_COLOURS = 256  # drawings, which JPEG blurs and PNG packs
_JPEG_QUALITY = 85
_KEPT = 6  # decoded images in memory: 10 MB each, with the largest that models read


class Images:
    """The `images` folder beside a run's parts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._seen = dict[str, tuple[int, int, int]]()  # file -> what changes when it is restored from a copy
        self._where: dict[str, tuple[pa.ChunkedArray, int]] = {}
        self._damaged: dict[str, str] = {}
        self._decoded: OrderedDict[str, Image.Image] = OrderedDict()

    def _refresh(self) -> None:
        for path in files_in(self._folder, "", ".arrow"):
            try:
                status = path.stat()
                key = (status.st_ino, status.st_size, status.st_mtime_ns)
                if self._seen.get(path.name) == key or not S_ISREG(status.st_mode):
                    continue
                self._seen[path.name] = key
                self._damaged.pop(path.name, None)
                seal.check_seal(path)  # Arrow ends the process at some damage in its metadata
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
                hashes, data = table["sha256"].to_pylist(), table["data"]
            except (OSError, pa.ArrowException, KeyError, ValueError) as error:
                self._damaged[path.name] = one_line(error)
                continue
            self._where.update((sha256, (data, row)) for row, sha256 in enumerate(hashes))

    def blob(self, sha256: str) -> ImageBlob:
        """The stored bytes.

        Raises:
            DataError: the image is missing or damaged.
        """
        with self._lock:
            if sha256 not in self._where:
                self._refresh()
            found = self._where.get(sha256)
            damaged = [*self._damaged.values()]
        if found is None:
            raise DataError(f"image {sha256[:64]} is missing in {self._folder}{': ' + damaged[0] if damaged else ''}")
        blob = ImageBlob.of(found[0][found[1]].as_py())
        if blob.sha256 != sha256:
            raise DataError(f"image {sha256[:64]} is damaged in {self._folder}")
        return blob

    def picture(self, sha256: str) -> Image.Image:
        """The decoded image, which is not to be changed: the rollouts of a group share it.

        Raises:
            DataError: it is missing, damaged, or no image.
        """
        with self._lock:
            found = self._decoded.get(sha256)
        if found is None:
            try:
                found = pixels.decode(self.blob(sha256).data)
            except ImageError as error:
                raise DataError(f"image {sha256[:64]} cannot be shown: {error}") from None
        with self._lock:
            self._decoded[sha256] = found
            self._decoded.move_to_end(sha256)
            while len(self._decoded) > _KEPT:
                self._decoded.popitem(last=False)
        return found

    def _fresh(self, sha256: str, longest: int) -> Image.Image:
        """Its pixels alone, with sides of at most `longest`."""
        picture = self.picture(sha256).copy()
        picture.thumbnail((longest, longest))
        return Image.frombytes("RGB", picture.size, picture.tobytes())

    def png(self, sha256: str, longest: int) -> bytes:
        """The image as a PNG with sides of at most `longest` pixels: pixels only, nothing else that its file holds.

        Raises:
            DataError: it is missing, damaged, or no image.
        """
        out = io.BytesIO()
        self._fresh(sha256, longest).save(out, "PNG", compress_level=3)
        return out.getvalue()

    def compact(self, sha256: str, longest: int) -> tuple[str, bytes]:
        """Media type and bytes of the image with sides of at most `longest` pixels, encoded afresh.

        Few colours become a PNG, others a JPEG.

        Raises:
            DataError: it is missing, damaged, or no image.
        """
        fresh, out = self._fresh(sha256, longest), io.BytesIO()
        if fresh.getcolors(_FEW_COLOURS) is not None:
            fresh.save(out, "PNG")
            return "image/png", out.getvalue()
        fresh.save(out, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return "image/jpeg", out.getvalue()
