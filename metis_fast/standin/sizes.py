"""Sizes of made pictures, as commands are given them."""

from __future__ import annotations

import re

from metis_fast.errors import ConfigError

_MOST_PIXELS = 64_000_000  # of what a camera takes; Pillow warns of more than 89 million
_MOST_ASPECT = 16  # crops and small variants have to stay within the 200 that a model takes


def picture_size(text: str, least: int = 32) -> tuple[int, int]:
    """(width, height) of `--pixels`, like 2048x1536. least: pixels of a side.

    Raises:
        ConfigError: it is something else, or a size at which no picture can be drawn and read back.
    """
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    low, high = sorted((width, height))
    if low < least or width * height > _MOST_PIXELS or high > _MOST_ASPECT * low:
        raise ConfigError(
            f"expected --pixels like 2048x1536: sides of at least {least}, at most {_MOST_PIXELS // 1_000_000} million in all, "
            f"no side over {_MOST_ASPECT} times the other; got {text!r}"
        )
    return width, height
