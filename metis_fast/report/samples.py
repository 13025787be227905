"""Some rollouts of a step, from what the run has stored, to be looked at while it trains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from metis_fast import pixels
from metis_fast.pixels import ImageError
from metis_fast.rollout.store import StoredRollout, read_rollouts

_SIDE_PX = 320  # longest; some 20 KB as PNG
_IMAGES = 4  # of a rollout
_CHARS = 4000


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """name: `ability/kind`. text: question, what the policy wrote and what the tools answered; the model's and the data's, to
    be escaped. images: those of the prompt first, made smaller."""

    name: str
    uid: str
    text: str
    reward: float
    images: tuple[Image.Image, ...]


def parts_of(folder: Path, step: int) -> list[Path]:
    """Files with the rollouts of a step; of several nodes there are several. folder: the run's."""
    return sorted((folder / "rollouts").glob(f"step-{step:06d}*.parquet"))


def samples(folder: Path, step: int, most: int = 4) -> list[Sample]:
    """The first rollout of each of the first prompts of a step. None where none are stored.

    Raises:
        DataError: a file is damaged.
    """
    firsts = (one for part in parts_of(folder, step) for one in read_rollouts(part) if one.rollout.index == 0)
    return [_sample(one) for one in islice(firsts, most)]


def _sample(one: StoredRollout) -> Sample:
    images = []
    for blob in one.rollout.images[:_IMAGES]:
        try:
            picture = pixels.to_rgb(pixels.decode(blob.data))
        except ImageError:
            continue
        picture.thumbnail((_SIDE_PX, _SIDE_PX))
        images.append(picture)
    name = one.ability if one.kind is None else f"{one.ability}/{one.kind}"
    text = f"{one.question}\n\n{one.text}\n\nasked for: {json.dumps(one.answers, ensure_ascii=False)}"
    return Sample(name, one.rollout.prompt_uid, text[:_CHARS], one.score.r_acc, tuple(images))
