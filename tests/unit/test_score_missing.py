"""Verdicts that are missing over several steps, and rollouts that were broken off: when a run stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from metis_fast.config import ScoreConfig
from metis_fast.errors import JudgeError, MetisError
from metis_fast.score.missing import MissingVerdicts
from metis_fast.summary import Judged, NoVerdict
from metis_fast.testing.judge import text_rollout
from metis_fast.types import Outcome, Rollout, Verdict


@dataclass(frozen=True)
class Played:
    judge_style: str
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Judged, ...]


def step(*groups: str, style: str = "rule") -> list[Played]:
    """A letter a rollout: v has a verdict, e one without an answer, f a judge that failed, b was broken off."""
    rollout = text_rollout("p", ["<answer>4</answer>"])
    broken = replace(rollout, outcome=Outcome.INFRASTRUCTURE_ERROR, error="server gone")
    says: dict[str, Judged] = {
        "v": Verdict(True, True, "4"),
        "e": Verdict(False, False, ""),
        "f": NoVerdict("HTTP status 503", "HTTP status 503 (down)"),
        "b": None,
    }
    return [
        Played(style, tuple(broken if letter == "b" else rollout for letter in group), tuple(says[letter] for letter in group))
        for group in groups
    ]


def stopped(config: ScoreConfig, *steps: Sequence[Played]) -> int | None:
    """The step at which a run stops."""
    missing = MissingVerdicts(config)
    for number, groups in enumerate(steps):
        try:
            missing.see(groups, number)
        except JudgeError:
            return number
    return None


def test_a_judge_that_fails_a_little_all_the_time_stops_the_run_over_several_steps():
    some = step("vvvf", "vvvf", "vvvv")  # a sixth
    assert stopped(ScoreConfig(max_missing_share=0.2, missing_steps=4), *[some] * 10) is None
    assert stopped(ScoreConfig(max_missing_share=0.16, missing_steps=4), *[some] * 10) == 0
    good, bad = step("vvvv", "vvvv"), step("vvff", "vvff")
    one, four = ScoreConfig(max_missing_share=0.25), ScoreConfig(max_missing_share=0.25, missing_steps=4)
    assert stopped(one, good, good, bad) == 2
    assert stopped(four, good, good, bad) is None  # 4 of 24
    assert stopped(four, good, good, bad, bad) is None  # 8 of 32
    assert stopped(four, good, good, bad, bad, bad) == 4  # 12 of 32, as the first one is not counted any more


def test_the_line_says_what_was_counted():
    missing = MissingVerdicts(ScoreConfig(max_missing_share=0.25, missing_steps=3))
    missing.see(step("vvff", "vvvv", "vvvv"), 7)
    with pytest.raises(JudgeError) as caught:
        missing.see(step("vvff", "vvff"), 8)
    assert str(caught.value) == (
        "the judge of style 'rule' gave no verdict for 4 of 8 rollouts with an answer (4 x HTTP status 503 (down)), and for 6 "
        "of 20 in 2 steps, more than score.max_missing_share=0.25; mend the judge or raise that setting, then resume"
    )


def test_a_step_without_any_verdict_stops_the_run_whatever_came_before():
    good, dead = step("vvvv", "vvvv", "vvvv", "vvvv"), step("ff", "fe")
    assert stopped(ScoreConfig(max_missing_share=1.0, missing_steps=100), *[good] * 20, dead) == 20


def test_a_style_does_not_hide_another_one():
    steps = [[*step("vvvv", "vvvv"), *step("vf", "vf", "vf", style="llm")]] * 3
    assert stopped(ScoreConfig(max_missing_share=0.4, missing_steps=3), *steps) == 0
    assert stopped(ScoreConfig(max_missing_share=0.5, missing_steps=3), *steps) is None


def test_failures_of_one_prompt_may_be_that_prompts_but_not_step_after_step():
    odd = step("ffff", "vvvv")
    assert stopped(ScoreConfig(max_missing_share=0.4), *[odd] * 5) is None
    assert stopped(ScoreConfig(max_missing_share=0.4, missing_steps=5), *[odd] * 5) == 1


def test_a_step_that_is_scored_again_counts_once_and_an_evaluation_by_itself():
    config = ScoreConfig(max_missing_share=0.3, missing_steps=2)
    missing = MissingVerdicts(config)
    missing.see(step("vvvv", "vvvv"), 0)
    for _ in range(5):
        missing.see(step("vvff", "vvff"), 1)  # 4 of 16
    missing.see(step("vvvv", "vvvv", "ffvv", "fvvv"))
    with pytest.raises(JudgeError):
        missing.see(step("vvff", "vvff"))  # no good step before it counts


@pytest.mark.parametrize(("share", "stops"), [(1.0, False), (0.5, False), (0.4, True), (0.0, True)])
def test_a_stated_share_of_broken_rollouts_stops_the_run(share: float, stops: bool):
    missing = MissingVerdicts(ScoreConfig(max_broken_share=share, missing_steps=2))
    missing.see(step("vvvv", "vvvv"), 0)
    if not stops:
        return missing.see(step("bbbb", "bbbb"), 1)
    says = (
        rf"8 of 16 rollouts in 2 steps were broken off by failures of ours \(8 x server gone\), more than "
        rf"score\.max_broken_share={share:g}; mend what failed or raise that setting, then resume"
    )
    with pytest.raises(MetisError, match=says) as caught:
        missing.see(step("bbbb", "bbbb"), 1)
    assert not isinstance(caught.value, JudgeError)  # the judge is not to blame
