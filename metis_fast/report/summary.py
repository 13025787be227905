"""What training changed: tool-call rate and accuracy on the held-out prompts, before and after (`summary.json`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metis_fast.errors import DataError, one_line
from metis_fast.report.lines import named
from metis_fast.report.slices import KINDS, abilities_in, has_rates, plain_kind
from metis_fast.scratch import replaced
from metis_fast.types import Slice


@dataclass(frozen=True, slots=True)
class Rates:
    """tool_rate: share of rollouts with a tool call. accuracy: share that is right."""

    tool_rate: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Side:
    """The held-out rates of one policy.

    kinds: `KINDS` that the data has -> rates. by_ability: ability -> ("all" or kind) -> rates.
    """

    kinds: Mapping[str, Rates]
    by_ability: Mapping[str, Mapping[str, Rates]]


@dataclass(frozen=True, slots=True)
class Summary:
    """A finished run. wall_s: seconds of the whole job, interruptions left out."""

    seed: int
    wall_s: float
    before: Side
    after: Side


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One line of the before/after table. indent: 0 for a kind or an ability, 1 for a kind within an ability."""

    name: str
    indent: int
    before: Rates | None
    after: Rates | None


def _side(slices: Mapping[str, Slice]) -> Side:
    def rates(names: Mapping[str, str]) -> dict[str, Rates]:
        found = {label: slices[key] for label, key in names.items() if key in slices and has_rates(slices[key])}
        return {label: Rates(entry.tool_rate, entry.accuracy) for label, entry in found.items()}

    abilities = abilities_in(slices)
    return Side(
        kinds=rates({kind: kind for kind in KINDS}),
        by_ability={name: rates({kind: f"{name}/{kind}" for kind in KINDS} | {"all": name}) for name in abilities},
    )


def _side_tree(side: Side) -> dict[str, object]:
    def tree(rates: Mapping[str, Rates]) -> dict[str, dict[str, float]]:
        return {name: {"tool_rate": entry.tool_rate, "accuracy": entry.accuracy} for name, entry in rates.items()}

    return {**tree(side.kinds), "by_ability": {name: tree(rates) for name, rates in side.by_ability.items()}}


def _side_from(tree: Mapping[str, Any]) -> Side:
    def rates(entries: Mapping[str, Any]) -> dict[str, Rates]:
        known = {name: entries[name] for name in ("all", *KINDS) if name in entries}
        return {name: Rates(_number(entry["tool_rate"]), _number(entry["accuracy"])) for name, entry in known.items()}

    return Side(kinds=rates(tree), by_ability={name: rates(entries) for name, entries in tree["by_ability"].items()})


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"a number that is {number}")
    return number


def _unknown(tree: Mapping[str, Any]) -> Iterator[str]:
    """Of a newer version: what `_side_from` and `read_summary` leave out."""
    yield from sorted(tree.keys() - {"seed", "wall_s", "before", "after"})
    for name in ("before", "after"):
        side = tree[name]
        places = {name: side, **{f"{name}.by_ability.{ability}": own for ability, own in side["by_ability"].items()}}
        for place, entries in places.items():
            for kind, entry in entries.items():
                if kind not in ("all", "by_ability", *KINDS):
                    yield f"{place}.{kind}"
                elif kind != "by_ability":
                    yield from (f"{place}.{kind}.{own}" for own in sorted(entry.keys() - {"tool_rate", "accuracy"}))


def write_summary(path: Path, *, seed: int, wall_s: float, before: Mapping[str, Slice], after: Mapping[str, Slice]) -> Summary:
    """Write `summary.json`, atomically, from the slices of the evaluations before and after training.

    Kinds that the held-out set does not have are left out, and what has no verdict.
    """
    summary = Summary(seed=seed, wall_s=wall_s, before=_side(before), after=_side(after))
    tree = {"seed": seed, "wall_s": wall_s, "before": _side_tree(summary.before), "after": _side_tree(summary.after)}
    with replaced(path) as scratch:
        scratch.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return summary


def read_summary(path: Path, say: Callable[[str], None] = lambda note: None) -> Summary:
    """Read what `write_summary` wrote. say: called with a line, where fields of a newer version are left out.

    Raises:
        DataError: the file is missing or is not a summary.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        wall_s = _number(tree["wall_s"])
        summary = Summary(int(tree["seed"]), wall_s, _side_from(tree["before"]), _side_from(tree["after"]))
        if unknown := [*_unknown(tree)]:
            say(f"{path.name}: fields of a newer version are left out: {named(unknown)}")
        return summary
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give the summary of a finished run") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{path}: expected the summary of a run, got {one_line(error)[:200]}; give a file that a run wrote"
        ) from None


def summary_rows(summary: Summary) -> Iterator[SummaryRow]:
    """The lines of the before/after table: kinds first, then every ability with its kinds."""
    before, after = summary.before, summary.after
    for kind in KINDS:
        if kind in before.kinds or kind in after.kinds:
            yield SummaryRow(kind, 0, before.kinds.get(kind), after.kinds.get(kind))
    for ability in sorted({*before.by_ability, *after.by_ability}):
        old, new = before.by_ability.get(ability, {}), after.by_ability.get(ability, {})
        for name in ("all", *KINDS):
            if name in old or name in new:
                yield SummaryRow(ability if name == "all" else name, int(name != "all"), old.get(name), new.get(name))


def compared(before: Mapping[str, Slice], after: Mapping[str, Slice]) -> Iterator[SummaryRow]:
    """The lines of such a table for a run that goes on: all prompts first, grades of kinds last."""

    def rates(side: Mapping[str, Slice], name: str) -> Rates | None:
        return Rates(side[name].tool_rate, side[name].accuracy) if name in side and has_rates(side[name]) else None

    def row(name: str) -> Iterator[SummaryRow]:
        old, new = rates(before, name), rates(after, name)
        if old is not None or new is not None:
            yield SummaryRow(name, 0, old, new)

    yield from row("all")
    yield from summary_rows(Summary(0, 0.0, _side(before), _side(after)))
    for name in dict.fromkeys([*before, *after]):
        if "/" not in name and plain_kind(name) != name:
            yield from row(name)


def print_summary_table(summary: Summary) -> None:
    """Print tool-call rate and accuracy, before -> after, by kind and by ability."""

    def change(before: float | None, after: float | None) -> str:
        return " -> ".join("-".rjust(6) if value is None else f"{value:6.1%}" for value in (before, after))

    table = [("", "tool-call rate", "accuracy")]
    for row in summary_rows(summary):
        old, new = row.before, row.after
        tool_rate = change(old and old.tool_rate, new and new.tool_rate)
        table.append(("  " * row.indent + row.name, tool_rate, change(old and old.accuracy, new and new.accuracy)))
    width = max(len(name) for name, _, _ in table)
    for name, tool_rate, accuracy in table:
        print(f"{name.ljust(width)}   {tool_rate.rjust(16)}   {accuracy.rjust(16)}")
