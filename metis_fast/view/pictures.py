"""The curves of the overview as numbers: which there are, of one run, of several side by side, and of seeds as a band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from metis_fast.report.log import GROUPS, Evaluation
from metis_fast.report.slices import KINDS, has_rates
from metis_fast.types import Outcome, Savings
from metis_fast.view.run import Step

Json = dict[str, Any]
Points = dict[int, float]

_MOST_POINTS = 1000  # of a curve; a screen has no more columns
_SEED_KEYS = ("run.seed", "run.dir")
_MOST_NAMED = 3  # settings in the name of a variant


@dataclass(frozen=True, slots=True)
class Picture:
    """series: label -> tag of `Source.points`. form: rate (axis to 100 %), share, number, log or stack."""

    name: str
    title: str
    note: str
    series: Mapping[str, str]
    form: str = "number"


@dataclass(frozen=True, slots=True)
class Source:
    """A run's curves. points: tag -> step -> value. variant: equal for runs that differ in their seed only."""

    run: str
    points: Mapping[str, Points]
    variant: str


def _tags(group: str, names: Sequence[str]) -> dict[str, str]:
    return {name: f"{group}/{name}" for name in names}


def pictures(abilities: Sequence[str], stages: Sequence[str], ages: int) -> tuple[Picture, ...]:
    """All there may be. abilities, stages: of the runs. ages: how many different ones tokens have."""
    savings = [saving.name for saving in fields(Savings)]
    kinds = ("all", *KINDS)
    aged = {f"{age} update{'' if age == 1 else 's'}": f"staleness/{age}" for age in range(ages)}
    ended = _tags("outcomes", [one.value for one in Outcome])
    right, called = "training rollouts that are right", "training rollouts that call a tool"
    return (
        Picture("heldout_accuracy", "Held-out accuracy", "share that is right", _tags("heldout_accuracy", kinds), "rate"),
        Picture("heldout_tools", "Held-out tool rate", "share that calls a tool", _tags("heldout_tool_rate", kinds), "rate"),
        Picture("accuracy_kind", "Accuracy by kind", right, _tags("accuracy", kinds), "rate"),
        Picture("tools_kind", "Tool rate by kind", called, _tags("tool_rate", kinds), "rate"),
        Picture("accuracy_ability", "Accuracy by ability", right, _tags("accuracy", abilities), "rate"),
        Picture("tools_ability", "Tool rate by ability", called, _tags("tool_rate", abilities), "rate"),
        Picture("rewards", "Rewards", "means over the rollouts of a step", {"r_acc": "reward/acc", "r_tool": "reward/tool"}),
        Picture("losses", "Losses", "the two terms, before their weights", {"accuracy": "loss/acc", "tool": "loss/tool"}),
        Picture(
            "signal_rollouts",
            "Rollouts with signal",
            "share of rollouts that a channel moves (stored steps)",
            {"accuracy": "signal/acc_rollouts", "tool": "signal/tool_rollouts"},
            "rate",
        ),
        Picture(
            "signal_tokens",
            "Tokens with signal",
            "share of sampled tokens that a channel moves (stored steps)",
            {"accuracy": "signal/acc_tokens", "tool": "signal/tool_tokens"},
            "rate",
        ),
        Picture(
            "signal_groups",
            "Qualifying and signal",
            "rollouts in Q; groups whose Q differs in calls",
            {"qualifying": "share/qualifying", "signal": "share/signal"},
            "rate",
        ),
        Picture("clip", "Clip fractions", "share of a channel's tokens", _tags("clip", ("acc", "tool")), "share"),
        Picture(
            "ratio",
            "Ratio extremes",
            "largest and smallest probability ratio, new to old",
            {"largest": "policy/ratio_max", "smallest": "policy/ratio_min"},
            "log",
        ),
        Picture(
            "gap",
            "Engine gap and KL",
            "nats: mean |trainer - engine|; mean old - new",
            {"engine gap": "policy/engine_gap", "KL": "policy/kl"},
        ),
        Picture("entropy", "Entropy", "nats, mean over sampled tokens", {"entropy": "policy/entropy"}),
        Picture("grad_norm", "Gradient norm", "before clipping", {"gradient norm": "optimizer/grad_norm"}),
        Picture("length", "Response length", "sampled tokens a rollout", {"tokens": "response_tokens/all"}),
        Picture("staleness", "Staleness", "share of trained tokens, by the updates that their weights lacked", aged, "stack"),
        Picture("outcomes", "Outcomes", "rollouts of a step by how they ended", ended, "stack"),
        Picture(
            "failures",
            "Failures of ours",
            "rollouts broken off; rollouts whose judge failed",
            {"infrastructure": "share/infra_failed_rate", "judge": "share/judge_failed_rate"},
            "share",
        ),
        Picture("seconds", "Time by stage", "seconds of a step", _tags("seconds", stages), "stack"),
        Picture(
            "speed",
            "Tokens a second",
            "of the whole step: sampled; run by the trainer",
            {"sampled": "speed/sampled", "trained": "speed/run"},
        ),
        Picture(
            "flops",
            "FLOPs of the update",
            "run, and avoided by each saving",
            {"run": "flops/run"} | _tags("flops_avoided", savings),
            "stack",
        ),
        Picture("groups", "Groups a step left", "sampled on; begun before; dropped; played again", _tags("groups", GROUPS)),
    )


def points(
    steps: Sequence[Step], evaluations: Sequence[Evaluation], signal: Sequence[Mapping[str, float]]
) -> dict[str, Points]:
    """Tag -> step -> value. signal: see `Snapshot.signal`."""
    found: dict[str, Points] = {}

    def put(tag: str, step: int, value: float) -> None:
        if math.isfinite(value):
            found.setdefault(tag, {})[step] = value

    for step in steps:
        stats, scalars = step.stats, step.scalars
        for tag, value in scalars.items():
            put(tag, stats.step, value)
        total = sum(stats.seconds.values())
        whole = stats.slices.get("all")
        if total > 0:
            put("speed/run", stats.step, scalars["tokens/run"] / total)
            if whole is not None:
                put("speed/sampled", stats.step, whole.response_tokens * (whole.num - whole.num_no_verdict) / total)
    for evaluation in evaluations:
        for name, entry in evaluation.slices.items():
            if has_rates(entry):
                put(f"heldout_accuracy/{name}", evaluation.step, entry.accuracy)
                put(f"heldout_tool_rate/{name}", evaluation.step, entry.tool_rate)
    for entry in signal:
        for name, value in entry.items():
            if name not in ("step", "num"):
                put(f"signal/{name}", int(entry["step"]), value)
    return found


def variants(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Run -> name of its variant: the settings in which runs differ, seed and folder left out. Equal for runs that differ in
    nothing else, and the run's own name for one without settings."""
    known = {run: {k: v for k, v in config.items() if k not in _SEED_KEYS} for run, config in configs.items() if config}
    keys = sorted({key for config in known.values() for key in config})
    differing = [key for key in keys if len({repr(config.get(key)) for config in known.values()}) > 1]
    named: dict[str, str] = {}
    taken: dict[str, tuple[str, ...]] = {}
    for run in configs:
        if run not in known:
            named[run] = run
            continue
        values = tuple(repr(known[run].get(key)) for key in differing)
        shown = [f"{key.rpartition('.')[2]}={known[run].get(key)}" for key in differing[:_MOST_NAMED]]
        label = (", ".join(shown) or "all runs")[:80]
        while taken.setdefault(label, values) != values:  # they differ in a setting that the name has no room for
            label += "*"
        named[run] = label
    return named


def _thin(steps: Sequence[int], values: Sequence[float], tag: str) -> tuple[list[int], list[float]]:
    """At most `_MOST_POINTS`: means of neighbours, extremes of extremes."""
    if len(steps) <= _MOST_POINTS:
        return list(steps), list(values)
    pieces = np.array_split(np.arange(len(steps)), _MOST_POINTS)
    array = np.asarray(values)
    merge = {"policy/ratio_max": np.max, "policy/ratio_min": np.min}.get(tag, np.mean)
    return [steps[piece[-1]] for piece in pieces], [float(merge(array[piece])) for piece in pieces]


def _curves(sources: Sequence[Source], tag: str, form: str) -> list[Points]:
    """Of the runs that have it. In a stack every step has one: nothing ended so, or took time, where none is logged."""
    if form != "stack":
        return [one.points[tag] for one in sources if tag in one.points]
    none = [dict.fromkeys(one.points.get("step", {}), 0.0) for one in sources]
    whole = [zeros | one.points.get(tag, {}) for zeros, one in zip(none, sources, strict=True)]
    return [curve for curve in whole if curve]


def _line(label: str, tag: str, curves: Sequence[Points]) -> Json | None:
    """One curve, with a band from the least to the greatest where there are several. Steps that not all have are left out of a
    band, which would jump there."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not steps:
        return None
    table = np.array([[curve[step] for step in steps] for curve in curves])
    kept, mean = _thin(steps, table.mean(0).tolist(), tag)
    line: Json = {"label": label, "steps": kept, "values": mean}
    if len(curves) > 1:
        line |= {"low": _thin(steps, table.min(0).tolist(), tag)[1], "high": _thin(steps, table.max(0).tolist(), tag)[1]}
        line["runs"] = len(curves)
    return line


def draw(sources: Sequence[Source], bands: bool, abilities: Sequence[str], stages: Sequence[str], ages: int) -> list[Json]:
    """The pictures that have something in them. Of one run: with a line for each series. Of several: one for each series, with
    a line for each run, or each variant with `bands`."""
    drawn: list[Json] = []
    by_variant: dict[str, list[Source]] = {}
    for source in sources:
        by_variant.setdefault(source.variant if bands else source.run, []).append(source)
    single = len(sources) == 1
    for picture in pictures(abilities, stages, ages):
        head = {"note": picture.note, "form": picture.form}
        if single:
            lines = [_line(label, tag, _curves(sources, tag, picture.form)) for label, tag in picture.series.items()]
            kept = [line for line in lines if line is not None and (picture.form != "stack" or any(line["values"]))]
            if kept and (len(kept[0]["steps"]) > 1 or not picture.name.startswith("heldout")):
                drawn.append({"name": picture.name, "title": picture.title, **head, "lines": kept})
            continue
        for label, tag in picture.series.items():
            lines = []
            for name, members in by_variant.items():
                line = _line(name, tag, _curves(members, tag, picture.form))
                lines += [line] if line is not None else []
            if not lines or (picture.form == "stack" and not any(any(line["values"]) for line in lines)):
                continue
            form = "number" if picture.form == "stack" else picture.form
            title = picture.title if len(picture.series) == 1 else f"{picture.title}: {label}"
            drawn.append({"name": f"{picture.name}-{label}", "title": title, **head, "form": form, "lines": lines})
    return drawn
