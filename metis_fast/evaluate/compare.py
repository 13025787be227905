"""Two runs on the same questions: by how much they differ, and whether that is more than chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metis_fast.errors import DataError
from metis_fast.evaluate.replies import read_lines
from metis_fast.evaluate.result import Stored, read_results
from metis_fast.evaluate.statistics import Comparison, compare


@dataclass(frozen=True, slots=True)
class Compared:
    """A benchmark of two runs by one scorer. test: over the questions that both have a value of, and that ask the same in both.
    notes: what else differs."""

    benchmark: str
    scorer: str
    test: Comparison
    notes: tuple[str, ...]


def compare_runs(first: Path, second: Path) -> list[Compared]:
    """Every benchmark and scorer that both runs have.

    Raises:
        DataError: a run has no result, or the two have none in common.
    """
    others = _by_name(read_results(second))
    found = [part for name, one in _by_name(read_results(first)).items() if name in others
             for part in _compared(one, others[name])]  # fmt: skip
    if not found:
        raise DataError(
            f"{first} and {second} have no question of the same benchmark with a mark of the same scorer; give two runs of one"
        )
    return found


def _by_name(stored: Sequence[Stored]) -> dict[str, Stored]:
    """By benchmark. Of one that was run with tools and without, that with: give the folder of a benchmark for another one."""
    found: dict[str, Stored] = {}
    for one in stored:
        if one.benchmark not in found or one.result["settings"]["tools"] == "on":
            found[one.benchmark] = one
    return found


def _compared(first: Stored, second: Stored) -> Iterator[Compared]:
    marks, more = (_marked(one) for one in (first, second))
    clusters = {index: record["cluster"] for index, record in (marks | more).items()}
    other = {index for index in marks.keys() & more.keys() if marks[index]["asked"] != more[index]["asked"]}
    notes = tuple(_notes(first.result["settings"], second.result["settings"]))
    if other:
        notes += (f"{len(other)} questions of the same index ask something else, and are left out",)
    for scorer in first.result["scorers"]:
        if scorer in second.result["scorers"]:
            values, others = (
                {index: value for index, value in one.values(scorer).items() if index not in other} for one in (first, second)
            )
            if values.keys() & others.keys():
                about = _judges(first.result["judge"], second.result["judge"]) if scorer.startswith("judge:") else ()
                yield Compared(first.benchmark, scorer, compare(values, others, clusters), (*notes, *about))


def _marked(stored: Stored) -> dict[str, dict[str, Any]]:
    """Question -> a mark of it.

    Raises:
        DataError: an earlier version wrote them, which did not say what was asked.
    """
    path = stored.folder / "marks.jsonl"
    found = {record["index"]: record for record in read_lines(path)}
    if not all("asked" in record for record in found.values()):
        raise DataError(f"{path}: expected what each question asks, got none; run the benchmark again, to score")
    return found


def _judges(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs between the judges of two runs."""
    if one["model"] != other["model"]:
        return (f"judge: {one['model']} and {other['model']}",)
    return ("another prompt or other settings of the judge",) if one.get("settings") != other.get("settings") else ()


def _notes(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """What else differs between two runs than their weights, so that nobody takes it for an effect of these."""
    if one["md5"] != other["md5"]:
        yield "other data files"
    for name in ("prompt", "system", "tools", "max_questions"):
        if one[name] != other[name]:
            told = "another system text" if name == "system" else f"{name}: {one[name]} and {other[name]}"
            yield told
    for name, value in one["decoding"].items():
        if other["decoding"].get(name) != value:
            yield f"{name}: {value} and {other['decoding'].get(name)}"


def as_json(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """For programs."""
    return [dataclasses.asdict(one) for one in compared]


def as_text(compared: Sequence[Compared]) -> str:
    """For people: points are per cent."""
    lines = [f"{'benchmark':20} {'scorer':16} {'second - first':>16} {'t test':>8} {'sign flip':>9}  questions"]
    for one in compared:
        test = one.test
        error = "" if test.error is None else f" ± {100 * test.error:.1f}"
        p = ["-" if value is None else f"{value:.3f}" for value in (test.t_p, test.sign_p)]
        lines.append(
            f"{one.benchmark:20} {one.scorer:16} {f'{100 * test.difference:+.1f}{error}':>16} {p[0]:>8} {p[1]:>9}  "
            f"{test.n} in {test.clusters} clusters: {test.better} better, {test.worse} worse; "
            f"{test.only_first} and {test.only_second} in one run only"
        )
    notes = dict.fromkeys(f"{one.benchmark}: {note}" for one in compared for note in one.notes)
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])
