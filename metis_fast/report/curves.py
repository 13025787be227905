"""The curves of the report, as SVG text that takes its ink from the page, so that one picture suits light and dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from metis_fast.report.cold_start import ColdStart
from metis_fast.report.log import GROUPS, Evaluation, step_scalars
from metis_fast.report.slices import KINDS, has_rates, main_abilities
from metis_fast.types import Outcome, Savings, StepStats

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Okabe and Ito's colours, which people with colour-blindness tell apart, without the two that vanish on white or on black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#999999")
_STEPS_BEFORE_SMOOTHING = 40

# Stand-ins that matplotlib takes for colours; the SVG gets the page's own in their place.
_INK, _GRID = "#010203", "#040506"

Series = Mapping[str, tuple[Sequence[int], Sequence[float]]]
Form = Literal["rate", "share", "number", "log", "stack"]  # a rate has an axis to 100 %, a share up to its largest value


@dataclass(frozen=True, slots=True)
class Curve:
    """One picture. svg: trusted markup; it holds numbers and names, those of the data escaped, and no text of a model."""

    title: str
    note: str
    svg: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which tags make a picture. tags: label -> tag of `step_scalars`."""

    title: str
    note: str
    tags: Mapping[str, str]
    form: Form = "number"


def _tags(group: str, names: Sequence[str]) -> dict[str, str]:
    return {name: f"{group}/{name}" for name in names}


def _plans(stages: Sequence[str], ages: int, abilities: Sequence[str]) -> tuple[_Plan, ...]:
    """ages: how many different ones tokens have; 1 where all were sampled by the weights that were trained."""
    outcomes = [outcome.value for outcome in Outcome]
    savings = [saving.name for saving in fields(Savings)]
    ahead = (
        _Plan(
            "Staleness",
            "share of trained tokens by the updates that their weights lacked",
            {str(age): f"staleness/{age}" for age in range(ages)},
            "stack",
        ),
        _Plan("Groups a step left", "sampled on during its update; of these begun before; dropped", _tags("groups", GROUPS)),
    )
    return (
        _Plan("Accuracy by kind", "share of training rollouts that are right", _tags("accuracy", KINDS), "rate"),
        _Plan("Tool rate by kind", "share of rollouts that call a tool", _tags("tool_rate", KINDS), "rate"),
        _Plan("Accuracy by ability", "share of training rollouts that are right", _tags("accuracy", abilities), "rate"),
        _Plan("Tool rate by ability", "share of rollouts that call a tool", _tags("tool_rate", abilities), "rate"),
        _Plan("Rewards", "means over the rollouts of a step", {"r_acc": "reward/acc", "r_tool": "reward/tool"}),
        _Plan("Losses", "the two terms, before their weights", {"accuracy": "loss/acc", "tool": "loss/tool"}),
        _Plan(
            "Qualifying and signal shares",
            "rollouts that are right; groups whose right rollouts differ in calls",
            {"qualifying": "share/qualifying", "signal": "share/signal"},
            "share",
        ),
        _Plan("Clip fractions", "share of a channel's tokens that are clipped", _tags("clip", ("acc", "tool")), "share"),
        _Plan("Entropy", "nats, mean over sampled tokens", {"entropy": "policy/entropy"}),
        _Plan("Gradient norm", "before clipping", {"gradient norm": "optimizer/grad_norm"}),
        _Plan(
            "Ratio extremes",
            "largest and smallest probability ratio, new to old policy",
            {"largest": "policy/ratio_max", "smallest": "policy/ratio_min"},
            "log",
        ),
        _Plan(
            "Engine gap and KL",
            "mean |log-prob of trainer - engine|; mean log-prob old - new",
            {"engine gap": "policy/engine_gap", "KL": "policy/kl"},
        ),
        _Plan("Response length", "sampled tokens a rollout", {"tokens": "response_tokens/all"}),
        _Plan("Outcomes", "rollouts of a step by how they ended", _tags("outcomes", outcomes), "stack"),
        _Plan(
            "FLOPs of the update",
            "run, and avoided by each saving",
            {"run": "flops/run"} | _tags("flops_avoided", savings),
            "stack",
        ),
        _Plan("Time by stage", "seconds of a step", _tags("seconds", stages), "stack"),
        *(ahead if ages > 1 else ()),
    )


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean; at the ends, over what is there."""
    width = max(len(values) // 20, 3) | 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _plain(name: str) -> str:
    """A name, of an ability perhaps, that matplotlib shall neither set as a formula nor leave out of the legend."""
    return ("\u200b" + name if name.startswith("_") else name).replace("$", r"\$")


def _draw_lines(axes: Axes, series: Series) -> None:
    for (name, (steps, values)), colour in zip(series.items(), _COLOURS, strict=False):
        label = _plain(name)
        if len(steps) >= _STEPS_BEFORE_SMOOTHING:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(steps, _smooth(np.asarray(values)), color=colour, linewidth=1.8, label=label)
        else:
            axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)


def _draw_stack(axes: Axes, series: Series) -> None:
    steps = sorted({step for own, _ in series.values() for step in own})
    row = {step: index for index, step in enumerate(steps)}
    heights = np.zeros((len(series), len(steps) + 1))
    for height, (own, values) in zip(heights, series.values(), strict=True):
        height[[row[step] for step in own]] = values
    heights[:, -1] = heights[:, -2]  # the right edge of the last step
    edges = np.array([*steps, steps[-1] + 1]) - 0.5
    colours = [_COLOURS[index % len(_COLOURS)] for index in range(len(series))]
    axes.stackplot(edges, heights, labels=list(series), colors=colours, step="post", linewidth=0, alpha=0.85)


def _svg(name: str, series: Series, form: Form) -> str:
    settings: dict[RcKeyType, str | float] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # element ids must differ between the pictures of a page, and not between two writes
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _GRID,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _GRID,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        if form == "stack":
            _draw_stack(axes, series)
        else:
            _draw_lines(axes, series)
        if form in ("rate", "share"):
            highest = 1.0 if form == "rate" else max(0.01, *(max(values) for _, values in series.values()))
            axes.set_ylim(-0.02 * highest, 1.04 * highest)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        if form == "log":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
        axes.set_axisbelow(True)
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.margins(x=0.01)
        figure.legend(
            loc="outside upper left", ncols=3, frameon=False, fontsize=8.5, handlelength=1.2, borderpad=0, columnspacing=1.2
        )
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor").replace(_GRID, "var(--line)")


def _heldout(evaluations: Sequence[Evaluation]) -> list[Curve]:
    """Held-out rates over steps; before and after alone are a table, not a curve."""
    if len(evaluations) < 3:
        return []
    present = [kind for kind in KINDS if any(kind in evaluation.slices for evaluation in evaluations)]
    names = present or ["all", *main_abilities(evaluation.slices for evaluation in evaluations)]
    curves = []
    for title, rate in (("Held-out accuracy", "accuracy"), ("Held-out tool rate", "tool_rate")):
        series = {}
        for name in names:
            points = [(entry.step, getattr(entry.slices[name], rate)) for entry in evaluations if _rated(entry, name)]
            if points:
                series[name] = tuple(zip(*points, strict=True))
        curves.append(Curve(title, "on prompts that are not trained on", _svg(title, series, "rate")))
    return curves


def _rated(evaluation: Evaluation, name: str) -> bool:
    return name in evaluation.slices and has_rates(evaluation.slices[name])


def draw_cold_start(cold: ColdStart) -> list[Curve]:
    """Loss with what was held out, learning rate and gradient norm of a cold start; rows that were left out, if some were."""
    plans: tuple[tuple[str, str, Mapping[str, tuple[Sequence[Mapping[str, float]], str]]], ...] = (
        (
            "Loss of the cold start",
            "negative log-likelihood, mean over the tokens of the assistant",
            {"trained on": (cold.steps, "loss"), "held out": (cold.evaluations, "loss")},
        ),
        ("Learning rate of the cold start", "AdamW's", {"learning rate": (cold.steps, "lr")}),
        ("Gradient norm of the cold start", "before clipping", {"gradient norm": (cold.steps, "grad_norm")}),
        (
            "Rows left out",
            "so far, over all epochs",
            {
                name: (cold.steps, f"{name}_rows")
                for name in ("bad", "long")
                if any(line.get(f"{name}_rows") for line in cold.steps)
            },
        ),
    )
    curves = []
    for title, note, lines in plans:
        series = {}
        for label, (records, key) in lines.items():
            points = [(line["step"], line[key]) for line in records if key in line and np.isfinite(line[key])]
            if points:
                series[label] = tuple(zip(*points, strict=True))
        if series:
            curves.append(Curve(title, note, _svg(title, series, "number")))
    return curves


def draw_curves(steps: Sequence[StepStats], evaluations: Sequence[Evaluation]) -> list[Curve]:
    """Every picture for which the run has data, in reading order. Non-finite values are left out."""
    points = [(stats.step, step_scalars(stats)) for stats in steps]
    stages = list(dict.fromkeys(stage for stats in steps for stage in stats.seconds))
    curves = _heldout(evaluations)
    ages = max((len(stats.staleness) for stats in steps), default=0)
    for plan in _plans(stages, ages, main_abilities(stats.slices for stats in steps)):
        series = {}
        for label, tag in plan.tags.items():
            own = [(step, scalars[tag]) for step, scalars in points if tag in scalars and np.isfinite(scalars[tag])]
            if own:
                series[label] = tuple(zip(*own, strict=True))
        if series:
            curves.append(Curve(plan.title, plan.note, _svg(plan.title, series, plan.form)))
    return curves
