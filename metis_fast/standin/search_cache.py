"""The published cache of image searches: pages by the index of a row, as JSON, with their images beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from metis_fast.standin.questions import Asked

_MISSED_EVERY = 5  # of the rows that have a key: those that the cache knows nothing of


def write_search_cache(path: Path, asked: Sequence[Asked]) -> None:
    """Write the JSON file and `cached_images/`. A page whose image could not be fetched has null in its place."""
    images = path.parent / "cached_images"
    images.mkdir(parents=True, exist_ok=True)
    for old in images.glob("*.jpg"):
        old.unlink()
    cache: dict[str, dict[str, list[str | None]]] = {}
    known = [one for one in asked if one.question.ability == "search"] or list(asked[:1])  # an empty cache is refused
    for number, one in enumerate(known):
        if number % _MISSED_EVERY == _MISSED_EVERY - 1:
            continue
        name = f"{one.index}_0.jpg"
        (images / name).write_bytes(one.crop(one.question.box, png=False))
        titles = [f"{one.picture.subject}: {one.question.answer}", f"Another page about {one.picture.subject}"]
        cache[one.index] = {"tool_returned_web_title": [*titles], "cached_images_path": [f"cached_images/{name}", None]}
    path.write_text(json.dumps(cache, indent=1, ensure_ascii=False), encoding="utf-8")
