"""Where an image that a tool returned was cut out of another one: boxes that the code names, each checked by its pixels.

The code only hints. A box counts if the pixels inside of it, brought to the size of what came back, are those that came back; a
box that is computed, or a crop that was drawn upon, is not found, and nothing is drawn for it.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]

_LITERAL = re.compile(r"\.crop\(\s*[(\[]\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*[)\]]\s*\)")
_MOST = 16  # boxes of one call that are looked at
_MOST_PIXELS = 1 << 24
_SIDE = 64  # pixels that are compared where sizes differ
_NEAR = 6.0  # of 255, mean difference: what resizing and JPEG leave
_SPREAD = 4.0  # of 255: a box with less has nothing by which it could be told from another one


@dataclass(frozen=True, slots=True)
class Crop:
    """source: place of the image it was cut from. box: left, top, right, bottom in its pixels. size: of that image."""

    source: int
    box: Box
    size: tuple[int, int]


def boxes_in(code: str) -> list[Box]:
    """The boxes of `.crop((x0, y0, x1, y1))`, in order, each once: literals, and names that were given one."""
    try:
        with warnings.catch_warnings():  # what an agent writes may have wrong escapes
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        found: Iterator[Sequence[float]] = (
            tuple(_number(part) for part in match.groups()) for match in _LITERAL.finditer(code)
        )
    else:
        found = _crops(tree)
    boxes = (tuple(round(side) for side in box) for box in found)
    return list(dict.fromkeys(box for box in boxes if len(box) == 4))[:_MOST]  # pyright: ignore[reportReturnType]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _crops(tree: ast.Module) -> Iterator[Sequence[float]]:
    names: dict[str, Sequence[float]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            box = _box(node.value, {})
            if box is not None:
                names[node.targets[0].id] = box
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "crop":
            given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "box")]
            box = _box(given[0], names) if len(given) == 1 else None
            if box is not None:
                yield box


def _box(node: ast.expr, names: Mapping[str, Sequence[float]]) -> Sequence[float] | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Tuple | ast.List) or len(node.elts) != 4:
        return None
    try:
        values = ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        return None
    plain = all(type(value) in (int, float) and abs(value) < 1e6 for value in values)
    return tuple(values) if plain else None


def find_crop(code: str, shown: Image.Image, sources: Sequence[Image.Image]) -> Crop | None:
    """Where `shown` was cut out; None where no box of the code has its pixels. sources: RGB, the likeliest first."""
    for box in boxes_in(code):
        for place, source in enumerate(sources):
            inside = (max(0, box[0]), max(0, box[1]), min(source.width, box[2]), min(source.height, box[3]))
            if inside != box or box[0] >= box[2] or box[1] >= box[3] or box == (0, 0, *source.size):
                continue  # Pillow fills what lies outside with black
            if _same(source.crop(box), shown):
                return Crop(place, box, source.size)
    return None


def _same(cut: Image.Image, shown: Image.Image) -> bool:
    if max(cut.width * cut.height, shown.width * shown.height) > _MOST_PIXELS:
        return False
    ratio = (cut.width / cut.height) / (shown.width / shown.height)
    if not 0.9 < ratio < 1.1:
        return False
    least = (min(_SIDE, cut.width, shown.width), min(_SIDE, cut.height, shown.height))
    size = cut.size if cut.size == shown.size else least
    first, second = (np.asarray(_resized(picture, size), dtype=np.int16) for picture in (cut, shown))
    if float(first.std(axis=(0, 1)).max()) < _SPREAD:
        return False
    return float(np.abs(first - second).mean()) <= _NEAR


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BOX)
