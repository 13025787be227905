"""Encoded images as RGB: the one way for trainer, engine, tools, search index and report.

Pillow's own `convert("RGB")` shows transparent figures on black, clips 16- and 32-bit grey to white and leaves photos on their
side. Here alpha lies on white, EXIF orientation is applied, wide types are scaled by their range, and of an animation the first
frame counts. Colour spaces (CMYK, LAB, YCbCr; ICC profiles) are what Pillow makes of them.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Of palettes, EXIF and sizes; what cannot be used raises. Not around each image: that changes the filters of other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

DECODE_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, ValueError, Image.DecompressionBombError, EOFError, struct.error, zlib.error),
    *(IndexError, KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError, NotImplementedError, RuntimeError),
)
"""What Pillow raises on damaged files, found with mutated ones of every format; nothing of ours runs where they are caught."""


_PNG = b"\x89PNG\r\n\x1a\n"
_ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations


class ImageError(ValueError):
    """An image that cannot be used; the message says why, in one line."""


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."


def decode(data: bytes) -> Image.Image:
    """The image as RGB, decoded whole.

    Raises:
        ImageError: it is damaged, cut short, or no image.
    """
    with _opened(data) as picture:
        stated = _upright_size(picture, data)
        rgb = to_rgb(picture)
    if rgb.size != stated:
        raise ImageError(f"its header says {stated[0]} x {stated[1]} pixels, and there are {rgb.width} x {rgb.height}")
    return rgb


def problem(data: bytes) -> str:
    """What `decode` says against an image, or ""."""
    try:
        decode(data)
    except ImageError as error:
        return str(error)
    return ""


def size(data: bytes) -> tuple[int, int]:
    """Width and height that `decode` gives, from the header alone: a tenth of a millisecond for an image of any size.

    Raises:
        ImageError: it is no image. One that is damaged further on is found by `decode` only.
    """
    with _opened(data) as picture:
        return _upright_size(picture, data)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(BytesIO(data)) as picture:
            yield picture
    except UnidentifiedImageError:  # its message has the address of an object
        raise ImageError("cannot identify image file") from None
    except DECODE_ERRORS as error:
        raise ImageError(_short(error)) from None


def _upright_size(picture: Image.Image, data: bytes) -> tuple[int, int]:
    """Of an image that was opened and not decoded; its EXIF orientation applied, as `_upright` does."""
    if picture.format == "TIFF":  # Pillow turns it while it is decoded, and says so before
        return picture.size
    if picture.format == "PNG" and "exif" not in picture.info and (found := _late_exif(data)):
        picture.info["exif"] = found
    try:
        # not a PNG's own, which decodes it first, to find what stands behind the pixels
        turned = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1) in _ON_ITS_SIDE
    except DECODE_ERRORS:
        turned = False
    width, height = picture.size
    return (height, width) if turned else (width, height)


def _late_exif(data: bytes) -> bytes:
    """The eXIf chunk of a PNG, wherever it stands; b"" where there is none."""
    at = len(_PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind == b"eXIf":
            return b"Exif\x00\x00" + data[at + 8 : at + 8 + length]
        at += 12 + length
    return b""


def to_rgb(picture: Image.Image) -> Image.Image:
    """An image of Pillow's, of any mode, as RGB. It may be the same object.

    Raises:
        Exception: one of DECODE_ERRORS, if it was not decoded before and cannot be.
    """
    picture.load()
    picture = _upright(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(_eight_bits(np.asarray(picture)))
    if picture.mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except DECODE_ERRORS:  # damaged EXIF says nothing about the pixels
        return picture


def _eight_bits(grey: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """[height, width] of a wide type as uint8: 16 bits by their type; integers as 8 or 16 bits and floats as 0 to 1 or 255 if
    they fit, else from the least to the greatest value. What is no number is black."""
    if grey.dtype.itemsize == 2:
        return (grey.astype(np.uint16) >> 8).astype(np.uint8)
    with np.errstate(invalid="ignore"):  # of signalling NaN
        values = grey.astype(np.float64)
    finite = np.isfinite(values)
    values[~finite] = 0.0
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    whole = np.issubdtype(grey.dtype, np.integer)
    steps = (255.0, 65535.0) if whole else (1.0, 255.0)
    top = next((step for step in steps if low >= 0 and high <= step), None)
    if top is None:
        values, top = values - low, (high - low) or 1.0  # all the same: black
    values[~finite] = 0.0
    return np.rint(np.clip(values * (255.0 / top), 0, 255)).astype(np.uint8)
