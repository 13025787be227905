"""Where training gives a tool up: tool rate against p, how often a direct answer is right, on prompts whose kind says p.

On a prompt that the tool always gets right, a direct sample is reinforced by HDPO if p > 1 / (1 + w), by a coupled reward if
p > 1/2 (docs/demo.md). w is `w_tool / w_acc` where both losses are means over the same tokens. They are not: the tool loss is
a mean over N_tool tokens, those of sets Q_p with signal, the accuracy loss over all N_acc. So w is `w_tool / w_acc` times
N_acc / N_tool.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from metis_fast.ablate.results import Spread, rates_of, spread, why_none
from metis_fast.ablate.spec import Planned
from metis_fast.config import Config
from metis_fast.report.heldout import read_heldout
from metis_fast.report.log import read_steps
from metis_fast.report.slices import plain_kind
from metis_fast.scratch import replaced
from metis_fast.svg import COLOURS, picture

_HALF = 0.5


@dataclass(frozen=True, slots=True)
class Curve:
    """Of a variant. tool_rate, accuracy: p -> held-out values. tool_right: how often rollouts that call are right.

    predicted: the p of the boundary, 1 / (1 + w_tool / w_acc) or 1/2; None where the method has none. by_tokens: the same with
    the numbers of tokens that training had. crossing: where the mean tool rate falls through one half, between two p.
    """

    name: str
    tool_rate: Mapping[float, Spread]
    accuracy: Mapping[float, Spread]
    tool_right: float | None
    predicted: float | None
    by_tokens: float | None
    crossing: float | None


def curves(runs: Sequence[Planned]) -> list[Curve]:
    """Of every variant with runs that have ended; none where the held-out prompts do not say p."""
    ended: dict[str, list[Planned]] = {}
    for run in runs:
        if not why_none(run):
            ended.setdefault(run.variant, []).append(run)
    found = [_curve(name, own) for name, own in ended.items()]
    return [curve for curve in found if curve.tool_rate]


def _curve(name: str, runs: Sequence[Planned]) -> Curve:
    evaluations = [read_heldout(run.folder, run.config.train.steps) for run in runs]
    graded = sorted(
        {kind for prompts in evaluations for prompt in prompts if (kind := prompt.kind) and kind != plain_kind(kind)}
    )
    by_rate: dict[str, dict[float, Spread]] = {"tool_rate": {}, "accuracy": {}}
    for rate, own in by_rate.items():
        for kind in graded:
            values = [list(rates_of(prompts, rate, kind).values()) for prompts in evaluations]
            if all(values):
                own[float(kind.rpartition("-")[2])] = spread([fmean(one) for one in values])
    called = [
        correct
        for prompts in evaluations
        for prompt in prompts
        if prompt.kind in graded
        for correct, calls in zip(prompt.correct, prompt.calls, strict=True)
        if calls
    ]
    predicted = _predicted(runs[0].config, 1.0)
    share = _tool_share(runs)
    return Curve(
        name=name,
        tool_rate=by_rate["tool_rate"],
        accuracy=by_rate["accuracy"],
        tool_right=fmean(called) if called else None,
        predicted=predicted,
        by_tokens=None if share is None else _predicted(runs[0].config, share),
        crossing=_crossing(by_rate["tool_rate"]),
    )


def _predicted(config: Config, share: float) -> float | None:
    """share: N_tool / N_acc."""
    if config.score.estimator == "coupled" and config.score.alpha > 0:
        return _HALF
    if config.score.estimator != "hdpo" or not (config.loss.w_tool and config.loss.w_acc):
        return None
    return 1 / (1 + config.loss.w_tool / config.loss.w_acc / share)


def _tool_share(runs: Sequence[Planned]) -> float | None:
    """N_tool / N_acc over the updates that had both."""
    updates = [update for run in runs for step in read_steps(run.folder) for update in step.updates if update.n_tool]
    return sum(one.n_tool for one in updates) / sum(one.n_acc for one in updates) if updates else None


def _crossing(rates: Mapping[float, Spread]) -> float | None:
    for (low, before), (high, after) in pairwise(sorted(rates.items())):
        if before.mean >= _HALF > after.mean:
            return low + (high - low) * (before.mean - _HALF) / (before.mean - after.mean)
    return None


def write_boundary(folder: Path, found: Sequence[Curve]) -> list[Path]:
    """boundary.md, boundary.csv, boundary.svg; without curves those of an earlier call are removed. Returns their paths."""
    paths = [folder / f"boundary.{ending}" for ending in ("md", "csv", "svg")]
    if not found:
        for path in paths:
            path.unlink(missing_ok=True)
        return []
    for path, text in zip(paths, (_markdown(found), _csv(found)), strict=False):
        with replaced(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
    _draw(found, paths[2])
    return paths


def _markdown(found: Sequence[Curve]) -> str:
    ps = sorted({p for curve in found for p in curve.tool_rate})

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    def cell(rates: Mapping[float, Spread], p: float) -> str:
        own = rates.get(p)
        return "-" if own is None else f"{own.mean:.1%}" + ("" if own.std is None else f" ± {100 * own.std:.1f}")

    lines = ["# Tool rate by p, how often a direct answer is right", ""]
    for title, rates in (
        ("tool rate", {curve.name: curve.tool_rate for curve in found}),
        ("accuracy", {curve.name: curve.accuracy for curve in found}),
    ):
        lines += [f"| {title} at p = | {' | '.join(f'{p:g}' for p in ps)} |", f"|{' --- |' * (1 + len(ps))}"]
        lines += [f"| {name} | {' | '.join(cell(own, p) for p in ps)} |" for name, own in rates.items()]
        lines.append("")
    lines += ["| boundary | predicted | by tokens | found | right with a call |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {one.name} | {' | '.join(map(number, (one.predicted, one.by_tokens, one.crossing, one.tool_right)))} |"
        for one in found
    ]
    lines += [
        "",
        "Predicted: 1 / (1 + w), with w = w_tool / w_acc; 1/2 for a coupled reward. By tokens: w times N_acc / N_tool,",
        "as training had them. Found: where the mean tool rate falls through one half, between two values of p.",
        "",
    ]
    return "\n".join(lines)


def _csv(found: Sequence[Curve]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "p", "tool_rate", "tool_rate_std", "accuracy", "accuracy_std"])
    for curve in found:
        for p, rate in curve.tool_rate.items():
            right = curve.accuracy[p]
            numbers = (rate.mean, rate.std, right.mean, right.std)
            writer.writerow([curve.name, f"{p:g}", *("" if value is None else f"{value:.6f}" for value in numbers)])
    return text.getvalue()


def _draw(found: Sequence[Curve], path: Path) -> None:
    """Lines: means over seeds; bands: from the least to the most; dotted: what is predicted."""
    with picture(path, 6.4, 3.8) as (axes,):
        for curve, colour in zip(found, COLOURS * len(found), strict=False):
            ps = sorted(curve.tool_rate)
            rates = [curve.tool_rate[p] for p in ps]
            axes.plot(
                ps, [100 * rate.mean for rate in rates], "o-", color=colour, linewidth=1.8, markersize=4, label=curve.name
            )
            low, high = ([100 * pick(rate.seeds) for rate in rates] for pick in (min, max))
            axes.fill_between(ps, low, high, color=colour, alpha=0.15, linewidth=0)
            if curve.predicted is not None:
                axes.axvline(curve.predicted, color=colour, linestyle=":", linewidth=1.2)
        axes.set(xlabel="p: a direct answer is right", ylabel="held-out prompts with a call, %", ylim=(-3, 103))
        axes.legend(fontsize=8)
