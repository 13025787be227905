"""What the run sends and hears by the thousand comes out of a pickle as it went in."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields
from typing import Any

import pytest

from metis_fast.compact import Compact
from metis_fast.summary import GroupSummary, Job, NoVerdict, RolloutSummary, ScoredSummary, Scores
from metis_fast.types import ImageSpan, Outcome, Score, Verdict

SPAN = ImageSpan("a" * 64, 3, 7, (1, 4, 4))
ROLLOUT = RolloutSummary("p", 1, 20, 9, b"key", 8, 1, 0, (SPAN,), ((3, 8),), Outcome.ANSWERED, "none")
VERDICT = Verdict(True, False, "blue", "rule", "the same text")
SCORE = Score(VERDICT, Outcome.ANSWERED, 0.9, 0.5, -1.25, 1e-300, True, True, True, "")
GROUP = GroupSummary(Job("train", 5, "s", 16), "vqa", None, "rule", (ROLLOUT,), (VERDICT, NoVerdict("late", "5 s"), None), 2, 7)
SENT = [*map(Scores, (None, 7), ((SCORE,), ())), ScoredSummary(GROUP, (SCORE,))]


@pytest.mark.parametrize("one", SENT, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("protocol", [2, 5])
def test_it_comes_out_as_it_went_in(one: object, protocol: int) -> None:
    data = pickle.dumps(one, protocol)
    assert pickle.loads(data) == one and copy.deepcopy(one) == one
    assert b"_dataclass" not in data


def test_every_field_is_an_argument() -> None:
    kinds: list[Any] = Compact.__subclasses__()
    assert len(kinds) >= 9
    for kind in kinds:
        assert all(field.init and not field.kw_only for field in fields(kind)), kind
