"""Encoded images as RGB: the one way for trainer, engine, tools, search index and report.

Pillow's own `convert("RGB")` shows transparent figures on black, clips 16- and 32-bit grey to white and leaves photos on their
side. Here alpha lies on white, EXIF orientation is applied, wide types are scaled by their range, and of an animation the first
frame counts. Colour spaces (CMYK, LAB, YCbCr; ICC profiles) are what Pillow makes of them.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

# Of palettes, EXIF and sizes; what cannot be used raises. Not around each image: that changes the filters of other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

DECODE_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, ValueError, Image.DecompressionBombError, EOFError, struct.error, zlib.error),
    *(IndexError, KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError, NotImplementedError, RuntimeError),
)
"""What Pillow raises on damaged files, found with mutated ones of every format; nothing of ours runs where they are caught."""


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
    try:
        with Image.open(BytesIO(data)) as picture:
            return to_rgb(picture)
    except UnidentifiedImageError:  # its message has the address of an object
        raise ImageError("cannot identify image file") from None
    except DECODE_ERRORS as error:
        raise ImageError(_short(error)) from None


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
