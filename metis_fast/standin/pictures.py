"""Pictures of simple things (shapes, bars, shares, a sign, a table), each with questions that a look at it answers.

They are drawn at real sizes and have structure, not noise: so they cost what photos and charts cost to decode and to encode.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont

COLORS = {
    "red": (200, 40, 40),
    "green": (30, 140, 60),
    "blue": (40, 70, 200),
    "orange": (230, 130, 20),
    "purple": (130, 50, 160),
    "black": (20, 20, 20),
}
_SHAPES = ("circle", "square", "triangle")
_NAMES = ("Varno", "Kestil", "Ombrek", "Talvine", "Quorra", "Nedrim", "Selkov", "Ivaldo")
_TRADES = ("Bakery", "Clockworks", "Ferries", "Press", "Glassworks", "Looms")
_UPRIGHT_BY = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}  # how a camera held so stores what is upright
_SMALLEST = 64  # pixels of a side that still show something

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Question:
    """What a picture answers. box: (left, upper, right, lower) in pixels, of what has to be looked at."""

    ability: str
    text: str
    answer: str
    box: Box


@dataclass(frozen=True, slots=True)
class Picture:
    """image: RGBA, upright, transparent in its margin. subject: what it shows, in a few words."""

    image: Image.Image
    subject: str
    questions: tuple[Question, ...]


def draw(kind: str, size: tuple[int, int], rng: random.Random) -> Picture:
    """A picture of one of KINDS. size: (width, height) in pixels, at least 64 each."""
    width, height = (max(_SMALLEST, side) for side in size)
    image = _paper(width, height)
    subject, questions = KINDS[kind](ImageDraw.Draw(image), width, height, rng)
    return Picture(image, subject, tuple(questions))


def as_png(image: Image.Image) -> bytes:
    """Eight bits, colour type 6: with its transparent margin."""
    return _encoded(image, "PNG", compress_level=3)


def as_jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    """As a camera has it. orientation: of EXIF: 1 is upright, 6 and 3 are stored on their side and upside down."""
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if orientation != 1:
        flat = flat.transpose(_UPRIGHT_BY[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Stand-in"
    exif[ExifTags.Base.Orientation] = orientation
    return _encoded(flat, "JPEG", quality=90, exif=exif)


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def _paper(width: int, height: int) -> Image.Image:
    """Light paper with a faint weave and a shade from corner to corner; a transparent margin."""
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    shade = 236 + 10 * (x / width + y / height) / 2 + 3 * np.sin(x / 7) * np.sin(y / 11)
    pixels = np.empty((height, width, 4), np.uint8)
    pixels[..., :3] = shade[..., None]
    pixels[..., 3] = 255
    margin = max(1, min(width, height) // 100)
    for edge in (np.s_[:margin], np.s_[-margin:], np.s_[:, :margin], np.s_[:, -margin:]):
        pixels[edge][..., 3] = 0
    return Image.fromarray(pixels)


def _write(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: float, color: str = "black") -> Box:
    """Text centred at a place; where it stands, with some room around it."""
    font = ImageFont.load_default(max(8.0, size))
    draw.text(at, text, fill=COLORS[color], font=font, anchor="mm")
    left, upper, right, lower = draw.textbbox(at, text, font=font, anchor="mm")
    room = size / 2
    return max(0, int(left - room)), max(0, int(upper - room)), int(right + room), int(lower + room)


def _clip(box: Box, width: int, height: int) -> Box:
    return max(0, box[0]), max(0, box[1]), min(width, box[2]), min(height, box[3])


def _shape(draw: ImageDraw.ImageDraw, shape: str, box: Box, color: str) -> None:
    left, upper, right, lower = box
    if shape == "circle":
        draw.ellipse(box, fill=COLORS[color])
    elif shape == "square":
        draw.rectangle(box, fill=COLORS[color])
    else:
        draw.polygon([(left, lower), (right, lower), ((left + right) // 2, upper)], fill=COLORS[color])


Drawn = tuple[str, Sequence[Question]]


def _shapes(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> Drawn:
    columns, rows = 4, 3
    things = [(rng.choice(_SHAPES), rng.choice(list(COLORS))) for _ in range(columns * rows)]
    cell_w, cell_h = width // columns, height // rows
    boxes: list[Box] = []
    for place, (shape, color) in enumerate(things):
        left, upper = (place % columns) * cell_w + cell_w // 4, (place // columns) * cell_h + cell_h // 4
        side = min(cell_w, cell_h) // 2
        boxes.append((left, upper, left + side, upper + side))
        _shape(draw, shape, boxes[-1], color)
    shape, color = rng.choice(things)
    whole = (0, 0, width, height)
    corner, (last_shape, last_color) = boxes[-1], things[-1]
    return "coloured shapes", [
        Question("perception", f"How many {color} {shape}s are there?", str(things.count((shape, color))), whole),
        Question("perception", "What stands in the bottom right corner?", f"a {last_color} {last_shape}", corner),
        Question(
            "general",
            "Are there more circles than squares? Answer yes or no.",
            "yes" if _num(things, "circle") > _num(things, "square") else "no",
            whole,
        ),
    ]


def _num(things: Sequence[tuple[str, str]], shape: str) -> int:
    return sum(one == shape for one, _ in things)


def _bars(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> Drawn:
    values = rng.sample(range(10, 100), 5)
    names = "ABCDE"
    step, base, text = width // 6, height * 7 // 8, min(width, height) / 24
    boxes: list[Box] = []
    for place, value in enumerate(values):
        left, top = step // 2 + place * step, base - int(value / 100 * height * 0.7)
        color = list(COLORS)[place]
        draw.rectangle((left, top, left + step * 2 // 3, base), fill=COLORS[color])
        label = _write(draw, (left + step / 3, top - text), str(value), text)
        _write(draw, (left + step / 3, base + text), names[place], text)
        boxes.append(_clip((left, label[1], left + step * 2 // 3, base + int(2 * text)), width, height))
    first, second = sorted(rng.sample(range(5), 2))
    pair = (boxes[first][0], min(boxes[first][1], boxes[second][1]), boxes[second][2], boxes[first][3])
    highest = max(range(5), key=values.__getitem__)
    share = Fraction(values[first], values[first] + values[second])
    question = f"What is the sum of the values of {names[first]} and {names[second]}?"
    of_both = f"Which share of {names[first]} and {names[second]} together is {names[first]}? Answer as a reduced fraction."
    return "a bar chart", [
        Question("math", question, str(values[first] + values[second]), pair),
        Question("math", of_both, str(share), pair),
        Question("perception", "Which bar is the highest?", names[highest], boxes[highest]),
        Question("general", f"What value does bar {names[first]} have?", str(values[first]), boxes[first]),
    ]


def _share(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> Drawn:
    parts = rng.choice((5, 6, 8, 9, 12))
    shaded = rng.randrange(1, parts)
    color = rng.choice(list(COLORS))
    left, upper, lower = width // 10, height // 3, height * 2 // 3
    step = (width - 2 * left) // parts
    filled = set(rng.sample(range(parts), shaded))
    for place in range(parts):
        box = (left + place * step, upper, left + (place + 1) * step, lower)
        draw.rectangle(
            box, fill=COLORS[color] if place in filled else None, outline=COLORS["black"], width=max(1, width // 400)
        )
    whole = _clip((left - 9, upper - 9, left + parts * step + 9, lower + 9), width, height)
    question = "What share is shaded? Answer as a reduced fraction."
    return "a strip with shaded parts", [
        Question("math", question, str(Fraction(shaded, parts)), whole),
        Question("perception", "Which colour are the shaded parts?", color, whole),
        Question("general", "How many parts does the strip have?", str(parts), whole),
    ]


def _sign(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> Drawn:
    name, year, color = f"{rng.choice(_NAMES)} {rng.choice(_TRADES)}", rng.randrange(1801, 1990), rng.choice(list(COLORS))
    draw.rounded_rectangle(
        (width // 10, height // 4, width * 9 // 10, height * 3 // 4),
        height // 20,
        outline=COLORS[color],
        width=max(2, width // 100),
    )
    _write(draw, (width / 2, height * 0.42), name, width / 16, color)
    small = _clip(_write(draw, (width / 2, height * 0.63), f"founded {year}", width / 40), width, height)
    return f"the sign of {name}", [
        Question("search", f"In which year was {name} founded?", str(year), small),
        Question(
            "search", "What is the whole name on the sign?", name, (width // 10, height // 4, width * 9 // 10, height // 2)
        ),
        Question("general", "Which colour is the frame of the sign?", color, (0, 0, width, height)),
    ]


def _table(draw: ImageDraw.ImageDraw, width: int, height: int, rng: random.Random) -> Drawn:
    cities, years = rng.sample(_NAMES, 4), ("2021", "2022", "2023")
    numbers = [[rng.randrange(100, 1000) for _ in years] for _ in cities]
    cell_w, cell_h, text = width // 5, height // 6, min(width, height) / 26
    boxes: dict[tuple[int, int], Box] = {}
    for column, year in enumerate(years):
        _write(draw, ((column + 2) * cell_w, cell_h * 0.8), year, text, "blue")
    for row, city in enumerate(cities):
        _write(draw, (cell_w * 0.8, (row + 1.8) * cell_h), city, text, "purple")
        for column in range(len(years)):
            at = ((column + 2) * cell_w, (row + 1.8) * cell_h)
            boxes[row, column] = _clip(_write(draw, at, str(numbers[row][column]), text), width, height)
    row, column = rng.randrange(len(cities)), rng.randrange(len(years))
    gain = numbers[row][2] - numbers[row][0]
    across = (boxes[row, 0][0], boxes[row, 0][1], boxes[row, 2][2], boxes[row, 2][3])
    return "a table of numbers", [
        Question(
            "general", f"Which number stands at {cities[row]}, {years[column]}?", str(numbers[row][column]), boxes[row, column]
        ),
        Question("math", f"By how much did {cities[row]} change from 2021 to 2023? (2023 minus 2021)", str(gain), across),
        Question("perception", f"Which name stands in row {row + 1} of the table?", cities[row], (0, 0, width, height)),
    ]


KINDS: dict[str, Callable[[ImageDraw.ImageDraw, int, int, random.Random], Drawn]] = {
    "bars": _bars,
    "shapes": _shapes,
    "sign": _sign,
    "share": _share,
    "table": _table,
}
