"""Scored groups for tests of a trainer, and a trainer that has taken a step on some."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from trainer_cases import ANSWER, CALL, score

from metis_fast.config import Config
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Observation, ScoredGroup


@pytest.fixture(scope="module")
def groups(play, make_prompt, picture) -> list[ScoredGroup]:
    """Two groups of odd lengths: text and images, in prompts and observations, advantages of all signs, one rollout without
    any, one without a verdict."""
    one, two = (
        make_prompt("Which city?", uid="a"),
        make_prompt("<image> or <image>?", [picture(0), picture(1, 96, 32)], uid="b"),
    )
    shown = [Observation("see <image>", (picture(2),)), Observation("nothing")]
    rollouts_of_one = (
        play(one, [ANSWER % "Paris"], index=0),
        play(one, [CALL % "1", "hm " + CALL % "2 + 2", ANSWER % "Lyon"], shown, index=1),
        play(one, [ANSWER % ("no " * 9)], index=2),
    )
    rollouts_of_two = (
        play(two, [CALL % "x", ANSWER % "first"], shown, index=0),
        play(two, [ANSWER % "second"], index=1),
        play(two, ["I look. " + CALL % "y", ANSWER % "both"], index=2),
    )
    return [
        ScoredGroup(one, rollouts_of_one, (score(0.7, 0.9), score(-1.1, -0.4), score(0.0, 0.0))),
        ScoredGroup(two, rollouts_of_two, (score(0.0, 0.0), score(0.5, 0.0), score(1.3, -0.6))),
    ]


@pytest.fixture
def trained(load_tiny):
    """A trainer after one `update` of a fresh policy."""

    def run(groups: Sequence[ScoredGroup], settings: Config, steps: int = 1) -> TorchTrainer:
        trainer = TorchTrainer(load_tiny(settings.model.dtype), settings, settings.train.optim, 10)
        for _ in range(steps):
            trainer.update(groups)
        return trainer

    return run
