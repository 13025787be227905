"""The pictures of the demo set: 2 x 2 panels, each a colour times a fabric, whose weave only a crop shows.

A policy sees every image on a budget of 64 x 64 pixels. The full image (128 x 128) is halved by the image processor, a crop of
one panel (64 x 64) is not. Every weave alternates at the pixel frequency along at least one axis, which the bicubic filter of
the processor takes out exactly; its ends are shaped so that this also holds there, and a plain frame keeps it clear of the
ringing between two colours. So the halved image of a weave equals that of plain cloth, level for level.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

IMAGE_PX = 128
PANEL_PX = IMAGE_PX // 2
PANELS = ("top left", "top right", "bottom left", "bottom right")
PANEL_BOXES = ((0, 0, 64, 64), (64, 0, 128, 64), (0, 64, 64, 128), (64, 64, 128, 128))  # left, upper, right, lower

# Channels stay within 96 .. 160, so that the weave, the jitter and the filter's overshoot never clip at 0 or 255: a clipped
# weave has another mean and would show in the halved image.
# Muted colours and strong weaves: where colour is most of what differs between crops, the tiny vision tower learns fabrics
# late or never (bench/NOTES.md).
COLORS = {
    "red": (160, 96, 96),
    "green": (96, 148, 104),
    "blue": (96, 104, 160),
    "yellow": (160, 156, 96),
    "purple": (132, 96, 148),
    "orange": (160, 124, 96),
    "cyan": (96, 152, 156),
    "white": (160, 160, 160),
}
MAX_JITTER = 4  # grey levels, one draw a panel: two images are almost never equal, and PNGs stay small

PLAIN = "plain"
FABRICS = ("linen", "denim", "canvas", "satin", "velvet", "cotton", "suede", "tweed", "mesh")

_FRAME_PX = 8  # the processor's filter reaches 4 pixels; 4 of colour border plus 4 of weave end do not meet
_WEAVE_PX = PANEL_PX - 2 * _FRAME_PX
# Grey levels; a multiple of 9, so that bent ends are whole. With those of `mesh` it is 81; the colours leave 91 free.
_AMPLITUDE = 54
# What happens across the alternating axis, with a period of 8: Walsh functions, so that the fabrics are orthogonal on every
# aligned 8 x 8 patch of a crop.
_ACROSS = ((1, 1, 1, 1, 1, 1, 1, 1), (1, 1, 1, 1, -1, -1, -1, -1), (1, 1, -1, -1, 1, 1, -1, -1), (1, 1, -1, -1, -1, -1, 1, 1))


def _halving_filter(num_pixels: int) -> npt.NDArray[np.float64]:
    """[num_pixels / 2, num_pixels]: the antialiased bicubic filter (Keys, a = -0.5) of Pillow and torchvision at scale 2."""
    centre = 2.0 * np.arange(num_pixels // 2)[:, None] + 1.0
    x = np.abs((np.arange(num_pixels)[None, :] + 0.5 - centre) / 2.0)
    weight = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0.0))
    return weight / weight.sum(axis=1, keepdims=True)


@cache
def _invisible_profile() -> npt.NDArray[np.float64]:
    """[48] grey levels: an alternation of +-54 whose ends (0, -18, 54, -66, ...) are bent until the filter takes it out.

    The nearest sequence to the plain alternation in the null space of the filter, rounded; what the rounding leaves is
    below half a level, so it rounds away.
    """
    seen = _halving_filter(IMAGE_PX)[:, _FRAME_PX : _FRAME_PX + _WEAVE_PX]
    alternation = np.where(np.arange(_WEAVE_PX) % 2 == 0, _AMPLITUDE, -_AMPLITUDE)
    return np.rint(alternation - np.linalg.pinv(seen) @ (seen @ alternation))


@cache
def _weave(fabric: str) -> npt.NDArray[np.int16]:
    """[64, 64] grey levels to add to the colour of a panel."""
    out = np.zeros((PANEL_PX, PANEL_PX), np.int16)
    if fabric == PLAIN:
        return out
    profile, index = _invisible_profile(), FABRICS.index(fabric)
    if index == 2 * len(_ACROSS):
        woven = np.outer(profile, profile) / _AMPLITUDE
    else:
        across = np.tile(_ACROSS[index // 2], _WEAVE_PX // 8)
        woven = np.outer(profile, across) if index % 2 == 0 else np.outer(across, profile)
    out[_FRAME_PX:-_FRAME_PX, _FRAME_PX:-_FRAME_PX] = np.rint(woven)
    return out


def render(colors: Sequence[str], fabrics: Sequence[str], jitter: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Draw four panels, in the order of `PANELS`.

    jitter: grey levels added to each panel, at most `MAX_JITTER` either way. Returns [128, 128, 3].
    """
    image = np.zeros((IMAGE_PX, IMAGE_PX, 3), np.int16)
    for (left, upper, right, lower), color, fabric, light in zip(PANEL_BOXES, colors, fabrics, jitter, strict=True):
        image[upper:lower, left:right] = np.array(COLORS[color], np.int16) + light + _weave(fabric)[:, :, None]
    return image.astype(np.uint8)  # within 0 .. 255 by the choice of colours


def png(image: npt.NDArray[np.uint8], size_px: int = IMAGE_PX) -> bytes:
    """Encode [H, W, 3] as PNG, scaled to a square of `size_px`."""
    picture, out = Image.fromarray(image), io.BytesIO()
    if picture.size != (size_px, size_px):
        picture = picture.resize((size_px, size_px), Image.Resampling.BICUBIC)
    picture.save(out, format="PNG", compress_level=9)
    return out.getvalue()
