"""Rates by kind of prompt: does the agent answer right, and does it call tools where it need not?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Protocol

from metis_fast.summary import Outline
from metis_fast.types import Ability, Score, Slice, Verdict

KINDS = ("direct", "uncertain", "tool_needed")
"""What `prompt.extra["kind"]` of the demo set may say of a prompt: whether a tool is needed to answer it."""


def _mean(values: Iterable[float]) -> float:
    values = tuple(values)
    return fmean(values) if values else 0.0


def _slice(members: Sequence[tuple[Outline, Verdict | None]]) -> Slice:
    judged = [(rollout, verdict) for rollout, verdict in members if verdict is not None]
    return Slice(
        num=len(members),
        num_no_verdict=len(members) - len(judged),
        accuracy=_mean(verdict.correct for _, verdict in judged),
        tool_rate=_mean(rollout.num_tool_calls > 0 for rollout, _ in judged),
        tool_calls=_mean(rollout.num_tool_calls for rollout, _ in judged),
        format_rate=_mean(verdict.format_ok for _, verdict in judged),
        response_tokens=_mean(rollout.num_sampled for rollout, _ in judged),
    )


class Rated(Protocol):
    """A group of which rates are made, wherever it lies: `ScoredGroup`, `ScoredSummary`."""

    @property
    def ability(self) -> Ability: ...
    @property
    def kind(self) -> str | None: ...
    @property
    def rollouts(self) -> Sequence[Outline]: ...
    @property
    def scores(self) -> Sequence[Score]: ...


def slices(groups: Sequence[Rated]) -> dict[str, Slice]:
    """Rates over "all", "<ability>", "<kind>" and "<ability>/<kind>", in that order.

    Rates are over the rollouts with a verdict, 0 where there is none. A `kind` outside `KINDS` makes no slice, so that a data
    set with a free-text column of that name does not make thousands.
    """
    members: defaultdict[tuple[int, str], list[tuple[Outline, Verdict | None]]] = defaultdict(list)
    for group in groups:
        ability, kind = group.ability.value, group.kind
        keys = [(0, "all"), (1, ability)]
        if kind in KINDS:
            keys += [(2, kind), (3, f"{ability}/{kind}")]
        for rollout, score in zip(group.rollouts, group.scores, strict=True):
            for key in keys:
                members[key].append((rollout, score.verdict))
    return {key[1]: _slice(members[key]) for key in sorted(members)}
