"""Verdicts that are missing: what is told of them, and when they stop a run, which would else train on next to nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from metis_fast.config import ScoreConfig
from metis_fast.errors import JudgeError, MetisError
from metis_fast.summary import Judged, NoVerdict, RolloutSummary
from metis_fast.types import Outcome, Rollout, Verdict

log = logging.getLogger(__name__)

_REASONS = 3  # told of those for which verdicts are missing


class Played(Protocol):
    """A group that was played and judged; see `GroupSummary`."""

    @property
    def judge_style(self) -> str: ...
    @property
    def rollouts(self) -> Sequence[Rollout] | Sequence[RolloutSummary]: ...
    @property
    def verdicts(self) -> Sequence[Judged]: ...


@dataclass(frozen=True, slots=True)
class _Count:
    """Of one step and style. failed: answers without a verdict; prompts: that they belong to; given: answers with one."""

    failed: int = 0
    prompts: int = 0
    given: int = 0

    def __add__(self, other: _Count) -> _Count:
        return _Count(self.failed + other.failed, self.prompts + other.prompts, self.given + other.given)


@dataclass(frozen=True, slots=True)
class _Step:
    """styles: judge style -> answers. broken: rollouts that our machinery broke off, of `rollouts`."""

    styles: Mapping[str, _Count]
    broken: int
    rollouts: int


class MissingVerdicts:
    """Counts them over the last `score.missing_steps` steps of this process."""

    def __init__(self, config: ScoreConfig) -> None:
        self._config = config
        self._steps: dict[int, _Step] = {}

    def see(self, groups: Sequence[Played], step: int | None = None) -> None:
        """Of every judge style separately: a warning where verdicts are missing, a stop where too many are, or all; and a stop
        where our machinery broke off too many rollouts.

        A rollout without an answer is wrong without a judge, so its verdict is no sign of life. Failures on a single prompt may
        be that prompt's: resuming would meet them again.

        step: of training; one that is seen again, because some of it was played again, counts once. None: an evaluation,
            which counts by itself.

        Raises:
            JudgeError: a judge is dead, or more than `score.max_missing_share` of its verdicts are missing.
            MetisError: more than `score.max_broken_share` of the rollouts were broken off.
        """
        by_style: dict[str, list[Sequence[Judged]]] = {}
        for group in groups:
            style = group.judge_style if self._config.judge == "by_row" else self._config.judge
            by_style.setdefault(style, []).append(group.verdicts)
        failures = {style: _failures(parts) for style, parts in by_style.items()}
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        broken = [rollout.error for rollout in rollouts if rollout.outcome is Outcome.INFRASTRUCTURE_ERROR]
        now = _Step({style: _count(parts) for style, parts in by_style.items()}, len(broken), len(rollouts))
        seen = self._window(now, step)
        alone = not any(isinstance(verdict, Verdict) for group in groups for verdict in group.verdicts)
        if broken:
            self._broken(seen, broken)
        for style, failed in failures.items():
            if failed:
                self._missing(style, failed, now.styles[style], [one.styles.get(style, _Count()) for one in seen], alone)

    def _window(self, now: _Step, step: int | None) -> list[_Step]:
        if step is None:
            return [now]
        self._steps[step] = now
        self._steps = {at: one for at, one in self._steps.items() if step - self._config.missing_steps < at <= step}
        return list(self._steps.values())

    def _missing(self, style: str, failures: Sequence[NoVerdict], now: _Count, seen: Sequence[_Count], alone: bool) -> None:
        config, total = self._config, sum(seen, _Count())
        missing = f"{len(failures) if now.given else 'any'} of {now.failed + now.given} rollouts with an answer"
        problem = f"the judge of style {style!r} gave no verdict for {missing} ({_reasons(failures)})"
        if (alone or now.prompts > 1) and not now.given:
            raise JudgeError(f"{problem}; see that it runs, then resume")
        if (alone or total.prompts > 1) and total.failed > config.max_missing_share * (total.failed + total.given):
            window = f", and for {total.failed} of {total.failed + total.given} in {len(seen)} steps" if len(seen) > 1 else ""
            limit = f"more than score.max_missing_share={config.max_missing_share:g}"
            raise JudgeError(f"{problem}{window}, {limit}; mend the judge or raise that setting, then resume")
        log.warning("%s", problem)

    def _broken(self, seen: Sequence[_Step], errors: Sequence[str]) -> None:
        config, broken, total = self._config, sum(one.broken for one in seen), sum(one.rollouts for one in seen)
        steps = f" in {len(seen)} steps" if len(seen) > 1 else ""
        problem = f"{broken} of {total} rollouts{steps} were broken off by failures of ours ({_counted(Counter(errors))})"
        if broken > config.max_broken_share * total:
            limit = f"more than score.max_broken_share={config.max_broken_share:g}"
            raise MetisError(f"{problem}, {limit}; mend what failed or raise that setting, then resume")


def _failures(parts: Sequence[Sequence[Judged]]) -> list[NoVerdict]:
    return [verdict for found in parts for verdict in found if isinstance(verdict, NoVerdict)]


def _count(parts: Sequence[Sequence[Judged]]) -> _Count:
    failed = [sum(isinstance(verdict, NoVerdict) for verdict in found) for found in parts]
    given = sum(isinstance(verdict, Verdict) and bool(verdict.answer) for found in parts for verdict in found)
    return _Count(sum(failed), sum(map(bool, failed)), given)


def _reasons(failures: Sequence[NoVerdict]) -> str:
    """The most frequent ones with their numbers, each with the detail of its last failure."""
    last = {failure.reason: failure.text for failure in failures}
    return _counted(Counter(failure.reason for failure in failures), last)


def _counted(counts: Counter[str], texts: Mapping[str, str] | None = None) -> str:
    told = [f"{count} x {(texts or {}).get(reason, reason)}" for reason, count in counts.most_common(_REASONS)]
    others = sum(count for _, count in counts.most_common()[_REASONS:])
    return " | ".join([*told, *([f"{others} for other reasons"] if others else [])])
