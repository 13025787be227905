"""The table and the picture of the README: several finished demo runs, each seed and the mean.

    python bench/demo_seeds.py runs/seed0 runs/seed1 runs/seed2 --figure docs/demo_result.svg

Every figure comes from the runs' own `summary.json` and `metrics.jsonl`; nothing is computed anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metis_fast.report.log import read_steps
from metis_fast.report.slices import KINDS
from metis_fast.report.summary import Summary, read_summary
from metis_fast.svg import COLOURS, picture


def table(summaries: Sequence[Summary]) -> str:
    """Markdown: tool rate and accuracy before and after, mean over the runs and every run."""
    lines = ["| prompts | tool-call rate | accuracy |", "| --- | --- | --- |"]
    for kind in KINDS:
        cells = []
        for field in ("tool_rate", "accuracy"):
            before = [getattr(s.before.kinds[kind], field) * 100 for s in summaries]
            after = [getattr(s.after.kinds[kind], field) * 100 for s in summaries]
            each = ", ".join(f"{b:.1f} → {a:.1f}" for b, a in zip(before, after, strict=True))
            cells.append(f"**{np.mean(before):.1f} % → {np.mean(after):.1f} %** ({each})")
        lines.append(f"| {kind} | {cells[0]} | {cells[1]} |")
    lines.append("")
    lines.append("Seeds " + ", ".join(str(s.seed) for s in summaries) + "; ")
    lines.append(
        "wall time " + ", ".join(f"{s.wall_s / 60:.1f}" for s in summaries) + " min (the whole job, after installation)."
    )
    return "\n".join(lines)


def draw(runs: Sequence[Path], figure: Path) -> None:
    """Tool rate and accuracy of the training rollouts by step: thin lines are runs, thick ones their mean."""
    steps = [read_steps(run) for run in runs]
    length = min(map(len, steps))
    with picture(figure, 9, 3.2, columns=2) as axes:
        for axis, field, title in zip(axes, ("tool_rate", "accuracy"), ("rollouts that call a tool", "accuracy"), strict=True):
            for kind, colour in zip(KINDS, COLOURS, strict=False):
                curves = np.array(
                    [
                        [getattr(step.slices[kind], field) if kind in step.slices else np.nan for step in run[:length]]
                        for run in steps
                    ]
                )
                for curve in curves:
                    axis.plot(curve * 100, color=colour, alpha=0.2, linewidth=0.8)
                axis.plot(np.nanmean(curves, 0) * 100, color=colour, linewidth=2, label=kind.replace("_", " "))
            axis.set(title=title, xlabel="HDPO step", ylabel="%", ylim=(-3, 103))
        axes[0].legend()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of finished `metis-fast demo` jobs")
    parser.add_argument("--figure", type=Path, help="where to write the picture (SVG)")
    args = parser.parse_args()
    if args.figure is not None and args.figure.suffix != ".svg":
        parser.error(f"--figure {args.figure}: expected a name that ends in .svg")
    print(table([read_summary(run / "summary.json") for run in args.runs]))
    if args.figure is not None:
        draw(args.runs, args.figure)


if __name__ == "__main__":
    main()
