"""Scores a batch of groups: verdicts, rewards, advantages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metis_fast.config import Config, ScoreConfig
from metis_fast.score.advantage import GroupAdvantages, GroupRewards, advantages
from metis_fast.score.missing import MissingVerdicts, Played
from metis_fast.score.protocol import Judge, JudgeUnavailable
from metis_fast.score.reward import accuracy_reward, tool_reward
from metis_fast.spans import Lane, span
from metis_fast.summary import Judged, NoVerdict
from metis_fast.types import Group, Outcome, Prompt, Rollout, Score, ScoredGroup, Verdict


async def judge_groups(groups: Sequence[Group], judge: Judge) -> list[tuple[Judged, ...]]:
    """Verdicts of every rollout, by group. One that ended in INFRASTRUCTURE_ERROR is not judged."""
    asked = [asyncio.ensure_future(_judged(judge, group.prompt, rollout)) for group in groups for rollout in group.rollouts]
    try:
        every = await asyncio.gather(*asked)
    finally:  # an error ends the run; the others would meet a recording that is closed, and log that
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    following = iter(every)
    return [tuple(next(following) for _ in group.rollouts) for group in groups]


async def _judged(judge: Judge, prompt: Prompt, rollout: Rollout) -> Judged:
    if rollout.outcome is Outcome.INFRASTRUCTURE_ERROR:
        return None
    try:
        with span(Lane.JUDGE, prompt.judge_style or "judge"):
            return await judge.judge(prompt, rollout)
    except JudgeUnavailable as error:
        return NoVerdict(error.reason, str(error))


def score(
    groups: Sequence[Played], config: Config, missing: MissingVerdicts | None = None, step: int | None = None
) -> list[tuple[Score, ...]]:
    """Rewards and advantages over a batch, in the order of `groups`.

    A rollout without a verdict, whether our machinery broke it off (INFRASTRUCTURE_ERROR) or its judge failed (JUDGE_ERROR),
    counts in no mean. Missing verdicts of a judge are a warning.

    missing: counts them over several steps; None: these groups count by themselves. step: that they are of.

    Raises:
        JudgeError, MetisError: too many verdicts are missing; see `MissingVerdicts.see`.
    """
    (missing or MissingVerdicts(config.score)).see(groups, step)
    rewards = [_rewards(group, config.score) for group in groups]
    computed = advantages(rewards, config.score, reference_noise=config.loss.normalization == "reference")
    return [
        tuple(_score(group, i, reward, advantage) for i in range(len(group.rollouts)))
        for group, reward, advantage in zip(groups, rewards, computed, strict=True)
    ]


def _score(group: Played, i: int, reward: GroupRewards, advantage: GroupAdvantages) -> Score:
    verdict = group.verdicts[i]
    if not isinstance(verdict, Verdict):
        if verdict is None:
            return Score(verdict=None, outcome=Outcome.INFRASTRUCTURE_ERROR)
        return Score(verdict=None, outcome=Outcome.JUDGE_ERROR, no_verdict=verdict.text)
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


def _rewards(group: Played, config: ScoreConfig) -> GroupRewards:
    size = len(group.verdicts)
    r_acc, r_tool, correct, valid = np.zeros(size), np.zeros(size), np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for i, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True)):
        if isinstance(verdict, Verdict):
            r_acc[i] = accuracy_reward(verdict, config)
            r_tool[i] = tool_reward(verdict, rollout.num_tool_calls)
            correct[i], valid[i] = verdict.correct, True
    return GroupRewards(r_acc, r_tool, correct, valid)
