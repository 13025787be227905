"""Figures of the marks of one scorer. Several rollouts of a question are averaged first; marks without a value are no zeros."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from metis_fast.evaluate.question import Figure, Mark, Question
from metis_fast.evaluate.statistics import Mean, clustered_mean

Values = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Unit:
    """What a mean is taken over: a question, or several that count as one (a composite, the variants of a problem).

    value: None where it has none, because marks lack.
    """

    value: float | None
    cluster: str
    tags: Mapping[str, str]


def values_of(questions: Sequence[Question], marks: Sequence[Mark]) -> Values:
    """Of every question the mean of its marks that have a value; None where none has one. Questions without marks are left out.

    Raises:
        ValueError: a mark is of an unknown question, or of another scorer than the others.
    """
    known = {question.index for question in questions}
    found: dict[str, list[float]] = {}
    for mark in marks:
        if mark.index not in known:
            raise ValueError(
                f"a mark of question {mark.index!r}, which is not among the questions; expected marks of this file"
            )
        if mark.scorer != marks[0].scorer:
            raise ValueError(f"marks of {marks[0].scorer!r} and {mark.scorer!r}; expected those of one scorer at a time")
        values = found.setdefault(mark.index, [])
        if mark.value is not None:
            values.append(mark.value)
    return {index: math.fsum(values) / len(values) if values else None for index, values in found.items()}


def units_of(questions: Sequence[Question], marks: Sequence[Mark]) -> list[Unit]:
    """Each question that has marks, as a unit."""
    values = values_of(questions, marks)
    return [Unit(values[q.index], q.cluster, q.tags) for q in questions if q.index in values]


def grouped_units(
    questions: Sequence[Question],
    marks: Sequence[Mark],
    key: Callable[[Question], str],
    value: Callable[[Mapping[str, float]], float | None],
    role: Callable[[Question], str] = lambda question: question.index,
) -> list[Unit]:
    """Questions that count together, as one unit each: rollout by rollout, and then averaged.

    key: which belong together. value: of what the members have, by role, in one rollout; only where all of them have something.
    Members that were not asked at all make a unit without a value.
    """
    by_key: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_key[key(question)].append(question)
    known: dict[str, dict[int, float | None]] = defaultdict(dict)
    for mark in marks:
        known[mark.index][mark.rollout] = mark.value
    units = []
    for members in by_key.values():
        rollouts = sorted({rollout for question in members for rollout in known[question.index]})
        if not rollouts:
            continue
        found = []
        for rollout in rollouts:
            parts = {role(question): known[question.index].get(rollout) for question in members}
            whole = {name: part for name, part in parts.items() if part is not None}
            if len(whole) == len(parts) == len(members) and (one := value(whole)) is not None:
                found.append(one)
        units.append(Unit(math.fsum(found) / len(found) if found else None, members[0].cluster, members[0].tags))
    return units


def mean(name: str, units: Sequence[Unit], note: str = "", strata: str = "") -> Figure:
    """The mean of units, with its clustered error, and what it would be if the missing ones were all 0 or all 1.

    strata: a tag by whose values units are averaged first, so that each counts alike.
    """
    there = [unit for unit in units if unit.value is not None]
    missing = len(units) - len(there)
    if missing:
        note = "; ".join(filter(None, (note, f"{missing} of {len(units)} without a verdict")))
    bounds = [
        _stratified([(empty if unit.value is None else unit.value, unit) for unit in units], strata).value if units else None
        for empty in (0.0, 1.0)
    ]
    if not there:
        return Figure(name, None, None, 0, 0, missing, *bounds, note=note)
    found = _stratified([(unit.value, unit) for unit in there if unit.value is not None], strata)
    return Figure(name, found.value, found.error, found.n, found.clusters, missing, *bounds, note=note)


def _stratified(values: Sequence[tuple[float, Unit]], strata: str) -> Mean:
    return clustered_mean(
        [value for value, _ in values],
        [unit.cluster for _, unit in values],
        [unit.tags.get(strata, "") for _, unit in values] if strata else (),
    )


def by_tag(units: Sequence[Unit], tag: str, order: Sequence[str] = (), prefix: str = "") -> list[Figure]:
    """A mean for each value of a tag, those of `order` first; units without it are in none."""
    groups: dict[str, list[Unit]] = {name: [] for name in order}
    for unit in sorted((unit for unit in units if unit.tags.get(tag)), key=lambda unit: unit.tags[tag]):
        groups.setdefault(unit.tags[tag], []).append(unit)
    return [mean(prefix + name, members) for name, members in groups.items() if members]


def micro(*tags: str) -> Callable[[Sequence[Question], Sequence[Mark]], tuple[Figure, ...]]:
    """The aggregate of most benchmarks: the mean over all rows, then one for each value of some tags."""

    def aggregate(questions: Sequence[Question], marks: Sequence[Mark]) -> tuple[Figure, ...]:
        units = units_of(questions, marks)
        figures = [mean("overall", units)]
        for tag in tags:
            figures += by_tag(units, tag, prefix=f"{tag}/")
        return tuple(figures)

    return aggregate


def reasons(marks: Sequence[Mark]) -> dict[str, int]:
    """How often each reason was given, most frequent first."""
    counts: dict[str, int] = defaultdict(int)
    for mark in marks:
        if mark.reason:
            counts[mark.reason] += 1
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))
