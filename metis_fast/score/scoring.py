"""Scores a batch of groups: verdicts, rewards, advantages."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from metis_fast.config import Config, ScoreConfig
from metis_fast.errors import JudgeError
from metis_fast.score.advantage import GroupRewards, advantages
from metis_fast.score.protocol import Judge, JudgeUnavailable
from metis_fast.score.reward import accuracy_reward, tool_reward
from metis_fast.types import Group, Outcome, Prompt, Rollout, Score, ScoredGroup, Verdict

log = logging.getLogger(__name__)

_REASONS = 3  # told of those for which verdicts are missing


async def score_groups(groups: Sequence[Group], judge: Judge, config: Config) -> list[ScoredGroup]:
    """Judge every rollout and compute rewards and advantages over the batch, in the order of `groups`.

    A rollout that ended in INFRASTRUCTURE_ERROR is not judged; it and those whose judge failed (JUDGE_ERROR) have no verdict
    and count in no mean. Missing verdicts of a judge are a warning.

    Raises:
        JudgeError: a judge is dead, or more than `score.max_missing_share` of its verdicts are missing. It has to stop the run,
            which would otherwise train on next to nothing.
    """
    verdicts = await asyncio.gather(*(_verdict(judge, group.prompt, rollout) for group in groups for rollout in group.rollouts))
    following = iter(verdicts)
    judged = [[next(following) for _ in group.rollouts] for group in groups]
    _tell_missing(groups, judged, config.score.max_missing_share)
    rewards = [_rewards(group, found, config.score) for group, found in zip(groups, judged, strict=True)]
    reference_noise = config.loss.normalization == "reference"
    computed = advantages(rewards, config.score, reference_noise)
    scored = []
    for group, found, reward, advantage in zip(groups, judged, rewards, computed, strict=True):
        scores = []
        for i, (rollout, verdict) in enumerate(zip(group.rollouts, found, strict=True)):
            if not isinstance(verdict, Verdict):
                failed = Outcome.INFRASTRUCTURE_ERROR if verdict is None else Outcome.JUDGE_ERROR
                scores.append(Score(verdict=None, outcome=failed))
                continue
            scores.append(
                Score(
                    verdict=verdict,
                    outcome=rollout.outcome,
                    r_acc=float(reward.r_acc[i]),
                    r_tool=float(reward.r_tool[i]),
                    adv_acc=float(advantage.adv_acc[i]),
                    adv_tool=float(advantage.adv_tool[i]),
                    qualifies=verdict.correct,
                    in_tool_denominator=bool(advantage.in_tool_denominator[i]),
                    needs_gradient=bool(advantage.needs_gradient[i]),
                )
            )
        scored.append(ScoredGroup(prompt=group.prompt, rollouts=group.rollouts, scores=tuple(scores)))
    return scored


def _tell_missing(
    groups: Sequence[Group], judged: Sequence[Sequence[Verdict | JudgeUnavailable | None]], max_share: float
) -> None:
    """Of every judge style separately: a warning where verdicts are missing, a stop where too many are, or all.

    A rollout without an answer is wrong without a judge, so its verdict is no sign of life. Failures on a single prompt may be
    that prompt's: resuming would meet them again.
    """
    by_style: dict[str, list[Sequence[Verdict | JudgeUnavailable | None]]] = {}
    for group, found in zip(groups, judged, strict=True):
        by_style.setdefault(group.prompt.judge_style, []).append(found)
    alone = not any(isinstance(verdict, Verdict) for found in judged for verdict in found)
    for style, parts in by_style.items():
        failed = [[verdict for verdict in found if isinstance(verdict, JudgeUnavailable)] for found in parts]
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
        if several and len(failures) > max_share * asked:
            limit = f"more than score.max_missing_share={max_share:g}"
            raise JudgeError(f"{problem}, {limit}; mend the judge or raise that setting, then resume")
        log.warning("%s", problem)


def _reasons(failures: Sequence[JudgeUnavailable]) -> str:
    """The most frequent ones with their numbers, each with the detail of its last failure."""
    last = {failure.reason: failure for failure in failures}
    counts = Counter(failure.reason for failure in failures).most_common()
    told = [f"{count} x {last[reason]}" for reason, count in counts[:_REASONS]]
    others = sum(count for _, count in counts[_REASONS:])
    return " | ".join([*told, *([f"{others} for other reasons"] if others else [])])


async def _verdict(judge: Judge, prompt: Prompt, rollout: Rollout) -> Verdict | JudgeUnavailable | None:
    """None: there is nothing to judge, our machinery broke the rollout off."""
    if rollout.outcome is Outcome.INFRASTRUCTURE_ERROR:
        return None
    try:
        return await judge.judge(prompt, rollout)
    except JudgeUnavailable as error:
        return error


def _rewards(group: Group, verdicts: Sequence[Verdict | JudgeUnavailable | None], config: ScoreConfig) -> GroupRewards:
    size = len(verdicts)
    r_acc, r_tool, correct, valid = np.zeros(size), np.zeros(size), np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for i, (rollout, verdict) in enumerate(zip(group.rollouts, verdicts, strict=True)):
        if isinstance(verdict, Verdict):
            r_acc[i] = accuracy_reward(verdict, config)
            r_tool[i] = tool_reward(verdict, rollout.num_tool_calls)
            correct[i], valid[i] = verdict.correct, True
    return GroupRewards(r_acc, r_tool, correct, valid)
