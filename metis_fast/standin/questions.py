"""Rows that all sets share: a picture, encoded as one of the published forms, and a question that it answers."""

from __future__ import annotations

import random
from dataclasses import dataclass

from metis_fast.standin.pictures import KINDS, Picture, Question, as_jpeg, as_png, draw

ABILITIES = ("math", "perception", "search", "general")
_POOL = 20  # pictures that are drawn; more rows ask other questions about them
_SMALLER = (25, 64)  # every fourth picture: 2048 x 1536 becomes 800 x 600
SEARCH_EVERY = 2  # search rows: which of them have the key of the published image-search cache


@dataclass(frozen=True, slots=True)
class Asked:
    """A row. number: from 0. image: the picture, encoded. index: what `extra_info.index` says."""

    number: int
    picture: Picture
    image: bytes
    question: Question
    index: str
    tools: tuple[str, ...]

    def crop(self, box: tuple[int, int, int, int], png: bool) -> bytes:
        """A part of the picture, as a tool shows it."""
        part = self.picture.image.crop(box)
        return as_png(part) if png else as_jpeg(part)


def ask(rows: int, pixels: tuple[int, int], rng: random.Random) -> list[Asked]:
    """rows: how many. pixels: (width, height) of most pictures."""
    kinds = list(KINDS)
    pictures: list[tuple[Picture, bytes]] = []
    for number in range(min(rows, _POOL)):
        size = pixels if number % 4 != 3 else (pixels[0] * _SMALLER[0] // _SMALLER[1], pixels[1] * _SMALLER[0] // _SMALLER[1])
        picture = draw(kinds[number % len(kinds)], size, rng)
        # RGBA PNG and JPEG in turn; of the latter, some were taken with the camera on its side or upside down
        orientation = (1, 6, 1, 3)[number // 2 % 4]
        pictures.append((picture, as_jpeg(picture.image, orientation) if number % 2 else as_png(picture.image)))
    asked = []
    for number in range(rows):
        picture, image = pictures[number % len(pictures)]
        question = picture.questions[number // len(pictures) % len(picture.questions)]
        if number < len(pictures):  # abilities in turn, where the picture has such a question
            wanted = ABILITIES[number // len(kinds) % len(ABILITIES)]
            question = next((one for one in picture.questions if one.ability == wanted), question)
        is_search = question.ability == "search"
        index = f"fvqa_train_{number}" if is_search and number % SEARCH_EVERY == 0 else f"source_index_{number}"
        tools = ("python", "text_search", "image_search") if question.ability in ("search", "general") else ("python",)
        asked.append(Asked(number, picture, image, question, index, tools))
    return asked
