"""Pictures of every mode and orientation that users bring, encoded; all are 64 x 48 pixels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))  # [48, 64], from black on the left to white on the right


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def a_drawing() -> Image.Image:
    """Opaque dark strokes on nothing: black if alpha is thrown away."""
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[10:20, 10:50] = (20, 30, 40, 255)
    pixels[30:40, 10:50] = (200, 30, 40, 128)
    return Image.fromarray(pixels, "RGBA")


def with_palette() -> Image.Image:
    """Index 0 is transparent."""
    image = Image.new("P", (64, 48), 0)
    image.putpalette([0, 0, 0, 20, 30, 40])
    image.paste(1, (10, 10, 50, 20))
    image.info["transparency"] = 0
    return image


TRANSPARENT = {
    "RGBA PNG": encoded(a_drawing()),
    "LA PNG": encoded(a_drawing().convert("LA")),
    "palette PNG": encoded(with_palette(), transparency=0),
    "GIF": encoded(with_palette(), "GIF", transparency=0),
    "WebP": encoded(a_drawing(), "WEBP", lossless=True),
    "RGBA TIFF": encoded(a_drawing(), "TIFF"),
    "RGB PNG with a transparent colour": encoded(a_drawing().convert("RGB"), transparency=(0, 0, 0)),
    "grey PNG with a transparent grey": encoded(a_drawing().convert("L"), transparency=0),
}


WIDE = {
    "16-bit grey PNG": encoded(Image.fromarray(np.uint16(65535 * RAMP))),
    "16-bit grey TIFF": encoded(Image.fromarray(np.uint16(65535 * RAMP)), "TIFF"),
    "big-endian 16-bit grey TIFF": encoded(
        Image.frombytes("I;16B", (64, 48), np.uint16(65535 * RAMP).astype(">u2").tobytes()), "TIFF"
    ),
    "32-bit grey TIFF, 16 bits used": encoded(Image.fromarray(np.int32(65535 * RAMP)), "TIFF"),
    "32-bit grey TIFF": encoded(Image.fromarray(np.int32(2**30 * RAMP)), "TIFF"),
    "32-bit grey TIFF below 0": encoded(Image.fromarray(np.int32(2000 * RAMP - 1000)), "TIFF"),
    "float TIFF from 0 to 1": encoded(Image.fromarray(np.float32(RAMP)), "TIFF"),
    "float TIFF from 0 to 255": encoded(Image.fromarray(np.float32(255 * RAMP)), "TIFF"),
    "float TIFF of heights": encoded(Image.fromarray(np.float32(9000 * RAMP - 400)), "TIFF"),
    "8-bit grey PNG": encoded(Image.fromarray(np.uint8(255 * RAMP))),
}


UPRIGHT = Image.fromarray(np.uint8(255 * np.stack([RAMP, RAMP[::-1] * 0, np.linspace(0, 1, 48)[:, None] + 0 * RAMP], -1)))
_UNDONE_BY = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes each orientation, inverted


def turned(orientation: int, kind: str) -> bytes:
    """UPRIGHT as a camera stores it that was held in one of the eight ways of EXIF."""
    stored = UPRIGHT.transpose(Image.Transpose(_UNDONE_BY[orientation])) if orientation > 1 else UPRIGHT
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))


_COLOURS = Image.fromarray(np.uint8(255 * np.stack([RAMP, RAMP[:, ::-1], RAMP], -1)))
MODES = {
    mode: encoded(_COLOURS.convert(mode), "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "RGB")
}
