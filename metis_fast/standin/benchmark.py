"""A benchmark in the shape of VLMEvalKit: a TSV with base64 images; a short `image` is the index of the row that has it."""

from __future__ import annotations

import base64
import csv
import random
from collections.abc import Sequence
from pathlib import Path

from metis_fast.standin.questions import Asked

_LETTERS = "ABCD"


def write_benchmark(path: Path, asked: Sequence[Asked]) -> None:
    """Choice questions with four options; the right one is `answer`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = ["index", "image", "question", *_LETTERS, "answer", "category", "l2-category", "split"]
    others = sorted({one.question.answer for one in asked} | {"none of them", "it cannot be seen", "more than ten", "0"})
    first_with: dict[bytes, int] = {}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for one in asked:
            rng = random.Random(f"{one.number}/{one.question.text}")
            wrong = rng.sample([answer for answer in others if answer != one.question.answer], len(_LETTERS) - 1)
            place = rng.randrange(len(_LETTERS))
            options = [*wrong[:place], one.question.answer, *wrong[place:]]
            first = first_with.setdefault(one.image, one.number)
            image = base64.b64encode(one.image).decode() if first == one.number else str(first)
            row = {"index": one.number, "image": image, "question": one.question.text, "answer": _LETTERS[place]}
            row |= dict(zip(_LETTERS, options, strict=True))
            row |= {"category": one.question.ability, "l2-category": one.picture.subject, "split": "test"}
            writer.writerow(row)
