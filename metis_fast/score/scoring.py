"""Scores a batch of groups: verdicts, rewards, advantages."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from metis_fast.config import Config, ScoreConfig
from metis_fast.errors import JudgeError
from metis_fast.score.advantage import GroupAdvantages, GroupRewards, advantages
from metis_fast.score.protocol import Judge, JudgeUnavailable
from metis_fast.score.reward import accuracy_reward, tool_reward
from metis_fast.summary import Judged, NoVerdict, RolloutSummary
from metis_fast.types import Group, Outcome, Prompt, Rollout, Score, ScoredGroup, Verdict

log = logging.getLogger(__name__)

_REASONS = 3  # told of those for which verdicts are missing


async def judge_groups(groups: Sequence[Group], judge: Judge) -> list[tuple[Judged, ...]]:
    """Verdicts of every rollout, by group. One that ended in INFRASTRUCTURE_ERROR is not judged."""
    every = await asyncio.gather(*(_judged(judge, group.prompt, rollout) for group in groups for rollout in group.rollouts))
    following = iter(every)
    return [tuple(next(following) for _ in group.rollouts) for group in groups]


async def _judged(judge: Judge, prompt: Prompt, rollout: Rollout) -> Judged:
    if rollout.outcome is Outcome.INFRASTRUCTURE_ERROR:
        return None
    try:
        return await judge.judge(prompt, rollout)
    except JudgeUnavailable as error:
        return NoVerdict(error.reason, str(error))


class Scored(Protocol):
    """What scores follow from; see `GroupSummary`."""

    @property
    def judge_style(self) -> str: ...
    @property
    def rollouts(self) -> Sequence[Rollout] | Sequence[RolloutSummary]: ...
    @property
    def verdicts(self) -> Sequence[Judged]: ...


def score(groups: Sequence[Scored], config: Config) -> list[tuple[Score, ...]]:
    """Rewards and advantages over a batch, in the order of `groups`.

    A rollout without a verdict, whether our machinery broke it off (INFRASTRUCTURE_ERROR) or its judge failed (JUDGE_ERROR),
    counts in no mean. Missing verdicts of a judge are a warning.

    Raises:
        JudgeError: a judge is dead, or more than `score.max_missing_share` of its verdicts are missing. It has to stop the run,
            which would otherwise train on next to nothing.
    """
    _tell_missing(groups, config.score)
    rewards = [_rewards(group, config.score) for group in groups]
    computed = advantages(rewards, config.score, reference_noise=config.loss.normalization == "reference")
    return [
        tuple(_score(group, i, reward, advantage) for i in range(len(group.rollouts)))
        for group, reward, advantage in zip(groups, rewards, computed, strict=True)
    ]


def _score(group: Scored, i: int, reward: GroupRewards, advantage: GroupAdvantages) -> Score:
    verdict = group.verdicts[i]
    if not isinstance(verdict, Verdict):
        return Score(verdict=None, outcome=Outcome.INFRASTRUCTURE_ERROR if verdict is None else Outcome.JUDGE_ERROR)
    return Score(
        verdict=verdict,
        outcome=group.rollouts[i].outcome,
        r_acc=float(reward.r_acc[i]),
        r_tool=float(reward.r_tool[i]),
        adv_acc=float(advantage.adv_acc[i]),
        adv_tool=float(advantage.adv_tool[i]),
        qualifies=verdict.correct,
        in_tool_denominator=bool(advantage.in_tool_denominator[i]),
        needs_gradient=bool(advantage.needs_gradient[i]),
    )


@dataclass(frozen=True, slots=True)
class _Here:
    judge_style: str
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Judged, ...]


async def score_groups(groups: Sequence[Group], judge: Judge, config: Config) -> list[ScoredGroup]:
    """`judge_groups` and `score` of groups that are here."""
    found = await judge_groups(groups, judge)
    judged = [_Here(group.prompt.judge_style, group.rollouts, own) for group, own in zip(groups, found, strict=True)]
    scores = score(judged, config)
    return [ScoredGroup(group.prompt, group.rollouts, own) for group, own in zip(groups, scores, strict=True)]


def _tell_missing(groups: Sequence[Scored], config: ScoreConfig) -> None:
    """Of every judge style separately: a warning where verdicts are missing, a stop where too many are, or all.

    A rollout without an answer is wrong without a judge, so its verdict is no sign of life. Failures on a single prompt may be
    that prompt's: resuming would meet them again.
    """
    by_style: dict[str, list[Sequence[Judged]]] = {}
    for group in groups:
        style = group.judge_style if config.judge == "by_row" else config.judge
        by_style.setdefault(style, []).append(group.verdicts)
    alone = not any(isinstance(verdict, Verdict) for group in groups for verdict in group.verdicts)
    for style, parts in by_style.items():
        failed = [[verdict for verdict in found if isinstance(verdict, NoVerdict)] for found in parts]
        failures = [failure for part in failed for failure in part]
        if not failures:
            continue
        given = [verdict for found in parts for verdict in found if isinstance(verdict, Verdict) and verdict.answer]
        asked = len(failures) + len(given)
        missing = f"{len(failures) if given else 'any'} of {asked} rollouts with an answer ({_reasons(failures)})"
        problem = f"the judge of style {style!r} gave no verdict for {missing}"
        several = alone or sum(map(bool, failed)) > 1
        if several and not given:
            raise JudgeError(f"{problem}; see that it runs, then resume")
        if several and len(failures) > config.max_missing_share * asked:
            limit = f"more than score.max_missing_share={config.max_missing_share:g}"
            raise JudgeError(f"{problem}, {limit}; mend the judge or raise that setting, then resume")
        log.warning("%s", problem)


def _reasons(failures: Sequence[NoVerdict]) -> str:
    """The most frequent ones with their numbers, each with the detail of its last failure."""
    last = {failure.reason: failure for failure in failures}
    counts = Counter(failure.reason for failure in failures).most_common()
    told = [f"{count} x {last[reason].text}" for reason, count in counts[:_REASONS]]
    others = sum(count for _, count in counts[_REASONS:])
    return " | ".join([*told, *([f"{others} for other reasons"] if others else [])])


def _rewards(group: Scored, config: ScoreConfig) -> GroupRewards:
    size = len(group.verdicts)
    r_acc, r_tool, correct, valid = np.zeros(size), np.zeros(size), np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for i, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True)):
        if isinstance(verdict, Verdict):
            r_acc[i] = accuracy_reward(verdict, config)
            r_tool[i] = tool_reward(verdict, rollout.num_tool_calls)
            correct[i], valid[i] = verdict.correct, True
    return GroupRewards(r_acc, r_tool, correct, valid)
