"""The results of an ablation as Markdown, JSON and CSV.

Nothing in `results.*` hangs on clocks: an ablation that was killed and run again writes the same bytes. What was measured of
time and memory is in `profile.*`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from metis_fast.ablate.results import RATES, Profile, Results, Spread, Test, Variant
from metis_fast.scratch import replaced

_TITLES = {"tool_rate": "tool rate", "accuracy": "accuracy"}
_LEAST_SEEDS = 3


def write_tables(folder: Path, results: Results) -> list[Path]:
    """results.md, results.json, results.csv, profile.md, profile.json. Returns their paths."""
    files = {
        "results.md": results_markdown(results),
        "results.json": json.dumps(_results_tree(results), indent=1) + "\n",
        "results.csv": _results_csv(results),
        "profile.md": profile_markdown(results.variants),
        "profile.json": json.dumps({one.name: asdict(one.profile) for one in results.variants}, indent=1) + "\n",
    }
    return [_write(folder / name, text) for name, text in files.items()]


def _write(path: Path, text: str) -> Path:
    with replaced(path) as scratch:  # --tables may run beside the ablation
        scratch.write_text(text, encoding="utf-8")
    return path


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row("---" for _ in head), *map(_row, rows)]


def _percent(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.1%}" + ("" if spread.std is None else f" ± {100 * spread.std:.1f}")


def results_markdown(results: Results) -> str:
    """Before and after, and tests against the first variant."""
    lines = ["# Results", ""]
    if results.missing:
        lines += [f"Without a result: {', '.join(f'{name} ({why})' for name, why in results.missing.items())}.", ""]
    if not results.variants:
        return "\n".join(lines)
    first = results.variants[0]
    lines += [f"Held-out prompts, mean over seeds ± standard deviation of single seeds; seeds {_seeds(first)}.", ""]
    for rate in RATES:
        head = ["variant", *(f"{_TITLES[rate]}: {kind}" for kind in results.kinds)]
        before = ["before training", *(_percent(first.before[rate].get(kind)) for kind in results.kinds)]
        rows = [
            [one.name + _own_seeds(one, first), *(_percent(one.after[rate].get(kind)) for kind in results.kinds)]
            for one in results.variants
        ]
        lines += [*_table(head, [before, *rows]), ""]
    own = [test for test in results.tests if test.first == first.name]
    if own:
        lines += [f"## Against {first.name}", "", *_tests_table(own), "", _reading(own), ""]
    return "\n".join(lines)


def _seeds(variant: Variant) -> str:
    return ", ".join(map(str, variant.seeds))


def _own_seeds(variant: Variant, first: Variant) -> str:
    return "" if variant.seeds == first.seeds else f" (seeds {_seeds(variant)})"


def _tests_table(tests: Sequence[Test]) -> list[str]:
    def p(value: float | None) -> str:
        return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"

    head = ["variant", "rate", "prompts", "difference in points", "p by seed", "p by prompt"]
    rows = [
        [
            test.second,
            _TITLES[test.rate],
            test.kind,
            f"{100 * test.by_seed.difference:+.1f}",
            p(test.by_seed.t_p),
            p(test.by_prompt.sign_p),
        ]
        for test in tests
    ]
    return _table(head, rows)


def _reading(tests: Sequence[Test]) -> str:
    seeds = min(test.by_seed.n for test in tests)
    lines = [
        "By seed: paired t test over the seeds' means; it says what another seed would show. By prompt: sign-flip test over",
        "the held-out prompts of these seeds; it says nothing of other seeds. Neither is corrected for the number of tests",
        f"({len(tests)} in this table).",
    ]
    if seeds < _LEAST_SEEDS:
        lines.append(f"With {seeds} seeds the test by seed can show next to nothing.")
    return "\n".join(lines)


def _results_tree(results: Results) -> dict[str, object]:
    return {
        "kinds": results.kinds,
        "variants": {
            one.name: {
                "seeds": one.seeds,
                "before": {rate: {k: asdict(v) for k, v in own.items()} for rate, own in one.before.items()},
                "after": {rate: {k: asdict(v) for k, v in own.items()} for rate, own in one.after.items()},
            }
            for one in results.variants
        },
        "tests": [asdict(test) for test in results.tests],
        "missing": results.missing,
    }


def _results_csv(results: Results) -> str:
    """A line for each variant, seed, rate and kind of prompt."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", "rate", "prompts", "before", "after"])
    for one in results.variants:
        for rate in RATES:
            for kind in results.kinds:
                before, after = one.before[rate].get(kind), one.after[rate].get(kind)
                if before is None or after is None:
                    continue
                for seed, old, new in zip(one.seeds, before.seeds, after.seeds, strict=True):
                    writer.writerow([one.name, seed, rate, kind, f"{old:.6f}", f"{new:.6f}"])
    return text.getvalue()


def profile_markdown(variants: Sequence[Variant]) -> str:
    """What a step of each variant took."""
    stages = list(dict.fromkeys(stage for one in variants for stage in one.profile.wall_s))
    savings = list(dict.fromkeys(name for one in variants for name in one.profile.avoided))
    profiles = {one.name: one.profile for one in variants}

    def table(columns: Mapping[str, str], cells: Mapping[str, Sequence[str]]) -> list[str]:
        return _table(["variant", *columns.values()], [[name, *own] for name, own in cells.items()])

    def seconds(values: Mapping[str, float]) -> list[str]:
        return [f"{sum(values.values()):.2f}", *(f"{values.get(stage, 0.0):.2f}" for stage in stages)]

    staged = {"all": "all"} | {stage: stage for stage in stages}
    work = ("tokens run", "tokens sampled", "sampled a CPU second", "GFLOP", *(f"avoided: {name}" for name in savings))
    whole = ("steps", "CPU minutes", "wall minutes", "peak MiB")
    return "\n".join(
        [
            "# Throughput profile",
            "",
            "Means over all steps of all seeds. Seconds are those of the training process. What tools and judges take in",
            "processes of their own is in the wall seconds of the rollout stage, and in the CPU minutes of a run.",
            "",
            "## CPU seconds of a step, by stage",
            "",
            *table(staged, {name: seconds(one.cpu_s) for name, one in profiles.items()}),
            "",
            "## Wall seconds of a step, by stage",
            "",
            *table(staged, {name: seconds(one.wall_s) for name, one in profiles.items()}),
            "",
            "## Work of a step",
            "",
            *table({name: name for name in work}, {name: _work(one, savings) for name, one in profiles.items()}),
            "",
            "FLOPs are those of the update; avoided: share of what an update without savings would compute.",
            "",
            "## A whole run",
            "",
            *table(
                {name: name for name in whole},
                {
                    name: [
                        str(one.steps),
                        f"{one.run_cpu_s / 60:.2f}",
                        f"{one.run_wall_s / 60:.2f}",
                        f"{one.peak_mib:.0f}",
                    ]
                    for name, one in profiles.items()
                },
            ),
            "",
            "Steps are those of all seeds; minutes are means over seeds, with evaluations and start. An attempt that was",
            "killed with its ablation is not in them.",
            "",
        ]
    )


def _work(profile: Profile, savings: Sequence[str]) -> list[str]:
    cpu_s = sum(profile.cpu_s.values())
    return [
        f"{profile.tokens:.0f}",
        f"{profile.sampled:.0f}",
        f"{profile.sampled / cpu_s:.0f}" if cpu_s else "-",
        f"{profile.flops / 1e9:.1f}",
        *(f"{profile.avoided[name]:.1%}" for name in savings),
    ]
