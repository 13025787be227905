"""One self-contained `report.html` of a run: no script, no request to anywhere; everything is in the file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from metis_fast.config import Config
from metis_fast.errors import DataError
from metis_fast.report.cold_start import read_cold_start
from metis_fast.report.conversations import sample_conversations
from metis_fast.report.curves import draw_cold_start, draw_curves
from metis_fast.report.log import read_evaluations, read_steps
from metis_fast.report.summary import read_summary, summary_rows


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _config_leaves(path: Path) -> dict[str, Any]:
    """Dotted key -> value. Read as plain YAML: the config of an older version must not stop its report."""
    if not path.exists():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return dict(_leaves(tree)) if isinstance(tree, dict) else {}


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"


def _template() -> jinja2.Template:
    text = resources.files("metis_fast.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "duration": _duration, "trusted": Markup}
    return environment.from_string(text)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, from whatever of the run is there; return its path. The folder may be that of a
    cold start alone.

    Raises:
        DataError: nothing to report, or a file of the run cannot be read.
    """
    cold = read_cold_start(run_dir)
    alone = cold is not None and cold.folder == run_dir  # its files have the names of a run's
    steps, evaluations = ([], []) if alone else (read_steps(run_dir), read_evaluations(run_dir))
    summary = read_summary(run_dir / "summary.json") if (run_dir / "summary.json").exists() else None
    conversations = sample_conversations(run_dir / "rollouts", steps[-1].step if steps else None)
    benchmarks = _benchmarks(run_dir)
    if not (steps or evaluations or summary or conversations or cold or benchmarks):
        raise DataError(
            f"{run_dir}: expected a run's metrics.jsonl, eval.jsonl, summary.json, rollouts/ or sft/, found none; give the "
            "folder that `run.dir` names"
        )
    config = _config_leaves(run_dir / "config.yaml") or (_config_leaves(cold.folder / "config.yaml") if cold else {})
    defaults = dict(_leaves(Config().model_dump(mode="json")))
    page = _template().render(
        name=run_dir.resolve().name,
        seed=summary.seed if summary else config.get("run.seed", defaults["run.seed"]),
        wall_s=summary.wall_s if summary else sum(sum(stats.seconds.values()) for stats in steps),
        num_steps=len(steps),
        num_rollouts=sum(sum(stats.outcomes.values()) for stats in steps),
        final=steps[-1].slices.get("all") if steps else None,
        changes=[(key, value, defaults.get(key)) for key, value in config.items() if value != defaults.get(key)],
        rows=list(summary_rows(summary)) if summary else [],
        curves=draw_curves(steps, evaluations),
        cold=cold,
        cold_curves=draw_cold_start(cold) if cold else [],
        outcomes=_total_outcomes([stats.outcomes for stats in steps]),
        tool_errors=sum(stats.tool_errors for stats in steps),
        conversations=conversations,
        benchmarks=benchmarks,
    )
    path = run_dir / "report.html"
    scratch = path.with_name(f".report.html.{os.getpid()}.tmp")  # the run may write its own at the same time
    try:
        scratch.write_text(page, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def _benchmarks(run_dir: Path) -> str:
    """Results beside the published ones as HTML, with those of the first and of the last step; "" where there are none."""
    folder = run_dir / "benchmarks"
    steps = sorted({path.parents[1] for path in folder.glob("step-*/*/result.json")})
    places = [run_dir] if any(folder.glob("*/result.json")) else []
    places += steps[:1] + steps[1:][-1:]
    if not places:
        return ""
    from metis_fast.evaluate.table import as_html, make_table  # most runs have none

    return as_html(make_table(places, paper=True))


def _total_outcomes(counts: list[Mapping[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for count in counts for name in count)
    return {name: sum(count.get(name, 0) for count in counts) for name in names}
