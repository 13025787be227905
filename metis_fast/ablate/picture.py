"""The results of an ablation as one picture: what each variant still calls tools for, and what it gets right."""

from __future__ import annotations

from pathlib import Path

from metis_fast.ablate.results import Results, Variant
from metis_fast.svg import COLOURS, GREY, picture

_DIRECT = "direct"


def write_picture(folder: Path, results: Results) -> Path:
    """results.svg; without a variant that of an earlier call is removed.

    A small dot a seed, a large one for the mean over seeds; a cross is the policy before training. Across: tool rate on direct
    prompts, or on all where kinds are not told. Up: accuracy on all prompts.
    """
    path = folder / "results.svg"
    if not results.variants:
        path.unlink(missing_ok=True)
        return path
    kind = _DIRECT if _DIRECT in results.kinds else "all"
    where = "direct" if kind == _DIRECT else "held-out"
    with picture(path, 6.4, 3.8) as (axes,):
        before = results.variants[0].before
        start = (before["tool_rate"].get(kind), before["accuracy"].get("all"))
        if start[0] is not None and start[1] is not None:
            axes.plot(100 * start[0].mean, 100 * start[1].mean, "x", color=GREY, label="before training")
        for number, variant in enumerate(results.variants):
            colour = COLOURS[number % len(COLOURS)]
            across, up = _points(variant, kind)
            axes.plot(across[1:], up[1:], "o", color=colour, markersize=3, alpha=0.5)
            axes.plot(across[:1], up[:1], "o", color=colour, markersize=8, label=variant.name)
        axes.set(xlabel=f"{where} prompts with a call, %", ylabel="accuracy on all held-out prompts, %", xlim=(-3, 103))
        axes.figure.legend(loc="outside right upper", fontsize=8)
    return path


def _points(variant: Variant, kind: str) -> tuple[list[float], list[float]]:
    """Tool rate and accuracy in percent: first the mean, then every seed."""
    rate, right = variant.after["tool_rate"].get(kind), variant.after["accuracy"].get("all")
    if rate is None or right is None:
        return [], []
    return [100 * value for value in (rate.mean, *rate.seeds)], [100 * value for value in (right.mean, *right.seeds)]
