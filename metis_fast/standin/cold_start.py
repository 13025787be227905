"""Metis-ColdStart: whole conversations as JSON text, with their images as base64 text or as binary."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from metis_fast.standin.files import write_shards
from metis_fast.standin.questions import Asked
from metis_fast.standin.words import call, code_result, image_result, search_result, system_message

_MOST_IMAGES = 15  # of a row, as published
_MISFIT_EVERY = 16
_CROPS = tuple((x / 4, y / 4) for y in range(3) for x in range(3))  # where further looks begin, as shares of the sides


@dataclass(slots=True)
class Talk:
    """A conversation while it is written."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)

    def say(self, role: str, content: str, *images: bytes) -> None:
        """A message, and the images at its marks."""
        self.messages.append({"content": content, "role": role})
        self.images += images


def write_cold_start(folder: Path, asked: Sequence[Asked], base64_text: bool, misfits: bool = True) -> None:
    """As the hub has it. base64_text: images as text, else as binary. misfits: some rows have a mark without an image."""
    write_shards(folder, asked, lambda rows: _table(rows, base64_text, misfits))


def _table(rows: Sequence[Asked], base64_text: bool, misfits: bool) -> pa.Table:
    talks = [_talk(one, misfits) for one in rows]
    images = [[base64.b64encode(image).decode() if base64_text else image for image in talk.images] for talk in talks]
    return pa.table(
        {
            "messages": pa.array([json.dumps(talk.messages, ensure_ascii=False) for talk in talks], pa.string()),
            "images": pa.array(images, pa.list_(pa.string() if base64_text else pa.binary())),
        }
    )


def _talk(one: Asked, misfits: bool) -> Talk:
    talk = Talk()
    talk.say("system", system_message(one.tools))
    _TALKS[one.number % len(_TALKS)](talk, one)
    if misfits and one.number % _MISFIT_EVERY == _MISFIT_EVERY - 1:
        talk.messages[1]["content"] = "<image>\n" + str(talk.messages[1]["content"])
    return talk


def _ask(talk: Talk, one: Asked) -> None:
    talk.say("user", f"<image>\n{one.question.text}", one.image)


def _answer(talk: Talk, one: Asked, thought: str) -> None:
    talk.say("assistant", f"<reason>{thought}</reason>\n<answer>{one.question.answer}</answer>")


def _look(talk: Talk, one: Asked, boxes: Sequence[tuple[int, int, int, int]], role: str = "user") -> None:
    """A call that shows parts of the image, and what comes back."""
    code = "\n".join(f"plt.imshow(image_1.crop({box}))\nplt.show()" for box in boxes)
    talk.say("assistant", f"<reason>That is too small to be sure; I look closer.</reason>\n{call('python', {'code': code})}")
    crops = [one.crop(box, png=number % 2 == 0) for number, box in enumerate(boxes)]
    talk.say(role, code_result("", len(crops)), *crops)


def _crop(talk: Talk, one: Asked) -> None:
    _ask(talk, one)
    _look(talk, one, [one.question.box])
    _answer(talk, one, "Now it can be read.")


def _direct(talk: Talk, one: Asked) -> None:
    _ask(talk, one)
    _answer(talk, one, f"The image shows {one.picture.subject}; that is enough.")


def _without_image(talk: Talk, one: Asked) -> None:
    a, b = 317 + one.number, 48
    talk.say("user", f"What is {a} * {b}?")
    talk.say("assistant", f"<reason>I compute it.</reason>\n{call('python', {'code': f'print({a} * {b})'})}")
    talk.say("user", code_result(f"{a * b}\n", 0))
    talk.say("assistant", f"<reason>That is it.</reason>\n<answer>{a * b}</answer>")


def _text_search(talk: Talk, one: Asked) -> None:
    _ask(talk, one)
    query = f"{one.picture.subject}: {one.question.text}"
    talk.say("assistant", f"<reason>I search for it.</reason>\n{call('text_search', {'query': query})}")
    pages = [("About it", "https://example.org/a", f"It is said to be {one.question.answer}.")]
    pages.append(("More about it", "https://example.org/b", "Nothing that helps."))
    talk.say("user", f"<tool_response>\n{search_result(query, pages)}\n</tool_response>")
    _answer(talk, one, "The first page says so.")


def _tool_role(talk: Talk, one: Asked) -> None:
    _ask(talk, one)
    _look(talk, one, [one.question.box], role="tool")
    _answer(talk, one, "The part that came back shows it.")


def _parts(talk: Talk, one: Asked) -> None:
    """Content as lists of parts, as chat templates take it."""
    talk.say("user", "", one.image)
    talk.messages[-1]["content"] = [{"type": "image"}, {"type": "text", "text": one.question.text}]
    talk.say("assistant", "")
    text = f"<reason>It is plain to see.</reason>\n<answer>{one.question.answer}</answer>"
    talk.messages[-1]["content"] = [{"type": "text", "text": text}]


def _many_looks(talk: Talk, one: Asked) -> None:
    """Up to as many images as any published row has."""
    _ask(talk, one)
    width, height = one.picture.image.size
    shown = 1
    calls = 7 if one.number % (2 * len(_TALKS)) < len(_TALKS) else 2
    for number in range(calls):
        boxes = []
        for place in (2 * number, 2 * number + 1):
            x, y = _CROPS[place % len(_CROPS)]
            left, upper = int(x * width), int(y * height)
            boxes.append((left, upper, left + max(32, width // 8), upper + max(32, height // 8)))
        boxes = boxes[: _MOST_IMAGES - shown]
        _look(talk, one, boxes)
        shown += len(boxes)
    _answer(talk, one, "I have seen all of it.")


def _image_search(talk: Talk, one: Asked) -> None:
    _ask(talk, one)
    talk.say("assistant", f"<reason>I search for the image.</reason>\n{call('image_search', {})}")
    found = [one.crop(one.question.box, png=False)]
    talk.say("user", image_result([f"A page with {one.picture.subject}"]), *found)
    _answer(talk, one, "The page shows the same.")


_TALKS = (_crop, _direct, _without_image, _text_search, _tool_role, _parts, _many_looks, _image_search)
