"""Rates by kind of prompt: does the agent answer right, and does it call tools where it need not?"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Protocol

from metis_fast.summary import Outline
from metis_fast.types import Score, Slice, Verdict

KINDS = ("direct", "uncertain", "tool_needed")
"""What `prompt.extra["kind"]` of the demo set may say of a prompt: whether a tool is needed to answer it."""

_GRADED = re.compile(rf"({'|'.join(KINDS)})-0\.\d{{1,2}}")
_LONGEST_NAME = 100
_NO_TEXT = ("Cc", "Cs")  # what a terminal obeys, and halves of characters, which no file can hold
_MOST_SHOWN = 8  # as many as a picture has colours


def plain_kind(kind: str) -> str:
    """A kind without its grade: "uncertain" of "uncertain-0.7", which says how often a direct answer is right."""
    match = _GRADED.fullmatch(kind)
    return match[1] if match else kind


def _is_of_kind(name: str) -> bool:
    return plain_kind(name.rpartition("/")[2]) in KINDS


def ability_name(ability: str) -> str:
    """An ability, which is any text of the data, as the name of a slice: in one short line, and no name that slices have for
    something else."""
    text = "".join(" " if unicodedata.category(char) in _NO_TEXT else char for char in ability)
    name = " ".join(text.split())[:_LONGEST_NAME]
    taken = name == "all" or _is_of_kind(name)
    return f"{name} (ability)".strip() if taken or not name else name


def abilities_in(slices: Mapping[str, Slice]) -> list[str]:
    """The slices that are of abilities, by name."""
    return sorted(name for name in slices if name != "all" and not _is_of_kind(name))


def has_rates(of: Slice) -> bool:
    """Whether one of its rollouts has a verdict; else its rates are over nothing, and no numbers to show."""
    return of.num > of.num_no_verdict


def slice_lines(rates: Mapping[str, Slice]) -> Iterator[str]:
    """A table for a terminal."""
    yield f"{'':24} {'rollouts':>8} {'accuracy':>9} {'tool rate':>9} {'calls':>6}"
    for name, rate in rates.items():
        known = f"{rate.accuracy:9.3f} {rate.tool_rate:9.3f} {rate.tool_calls:6.2f}" if has_rates(rate) else "no verdict"
        yield f"{name:24} {rate.num:8} {known}"


def main_abilities(of: Iterable[Mapping[str, Slice]]) -> list[str]:
    """Those with the most rollouts in all, by name: as many as can be told apart in a picture or a line."""
    num = Counter[str]()
    for slices in of:
        num.update({name: slices[name].num for name in abilities_in(slices)})
    return sorted(name for name, _ in num.most_common(_MOST_SHOWN))


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
    def ability(self) -> str: ...
    @property
    def kind(self) -> str | None: ...
    @property
    def rollouts(self) -> Sequence[Outline]: ...
    @property
    def scores(self) -> Sequence[Score]: ...


def slices(groups: Sequence[Rated]) -> dict[str, Slice]:
    """Rates over "all", "<ability>", "<kind>", "<ability>/<kind>" and "<kind>-<grade>", in that order.

    Rates are over the rollouts with a verdict, 0 where there is none. A `kind` outside `KINDS` makes no slice, so that a data
    set with a free-text column of that name does not make thousands.
    """
    members: defaultdict[tuple[int, str], list[tuple[Outline, Verdict | None]]] = defaultdict(list)
    for group in groups:
        ability, kind = ability_name(group.ability), group.kind
        keys = [(0, "all"), (1, ability)]
        plain = plain_kind(kind) if kind is not None else None
        if plain in KINDS:
            keys += [(2, plain), (3, f"{ability}/{plain}")]
        if kind != plain:
            keys.append((4, str(kind)))
        for rollout, score in zip(group.rollouts, group.scores, strict=True):
            for key in keys:
                members[key].append((rollout, score.verdict))
    return {key[1]: _slice(members[key]) for key in sorted(members)}
