"""The results of an ablation as one picture: what each variant still calls tools for, and what it gets right."""

from __future__ import annotations

from pathlib import Path

from metis_fast.ablate.results import Results, Variant
from metis_fast.scratch import replaced

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
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
    import matplotlib
    from matplotlib.figure import Figure

    kind = _DIRECT if _DIRECT in results.kinds else "all"
    with matplotlib.rc_context({"svg.hashsalt": "metis_fast"}):  # the same picture is the same file
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        before = results.variants[0].before
        start = (before["tool_rate"].get(kind), before["accuracy"].get("all"))
        if start[0] is not None and start[1] is not None:
            axes.plot(100 * start[0].mean, 100 * start[1].mean, "x", color="#4b5563", label="before training")
        for number, variant in enumerate(results.variants):
            colour = COLOURS[number % len(COLOURS)]
            across, up = _points(variant, kind)
            axes.plot(across[1:], up[1:], "o", color=colour, markersize=3, alpha=0.5)
            axes.plot(across[:1], up[:1], "o", color=colour, markersize=8, label=variant.name)
        where = "direct" if kind == _DIRECT else "held-out"
        axes.set(xlabel=f"{where} prompts with a call, %", ylabel="accuracy on all held-out prompts, %", xlim=(-3, 103))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        with replaced(path) as scratch:
            figure.savefig(scratch, format="svg", metadata={"Date": None})
    return path


def _points(variant: Variant, kind: str) -> tuple[list[float], list[float]]:
    """Tool rate and accuracy in percent: first the mean, then every seed."""
    rate, right = variant.after["tool_rate"].get(kind), variant.after["accuracy"].get("all")
    if rate is None or right is None:
        return [], []
    return [100 * value for value in (rate.mean, *rate.seeds)], [100 * value for value in (right.mean, *right.seeds)]
