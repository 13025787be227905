"""One self-contained `report.html` of a run: no script, no request to anywhere; everything is in the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import yaml
from markupsafe import Markup

from metis_fast.config import Config
from metis_fast.errors import DataError, one_line
from metis_fast.report.benchmarks import benchmark_table
from metis_fast.report.cold_start import read_cold_start
from metis_fast.report.conversations import sample_conversations
from metis_fast.report.curves import draw_cold_start, draw_curves
from metis_fast.report.lines import JsonLines
from metis_fast.report.log import Evaluation, evaluation_of, step_of, step_scalars, unknown_in_evaluation, unknown_in_step
from metis_fast.report.settings import leaves
from metis_fast.report.slices import has_rates
from metis_fast.report.summary import read_summary, summary_rows
from metis_fast.scratch import replaced
from metis_fast.types import StepStats

T = TypeVar("T")
R = TypeVar("R", StepStats, Evaluation)
Say = Callable[[str], None]


def _config_leaves(path: Path, say: Say) -> dict[str, Any]:
    """Dotted key -> value. Read as plain YAML: the config of another version must not stop its report."""
    if not path.exists():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return leaves(tree) if isinstance(tree, dict) else {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        say(f"{path.name} is not valid YAML: {one_line(error)[:200]}")
    except ValueError as error:  # PyYAML: a date that is none
        say(f"{path.name} cannot be read: {one_line(error)[:200]}")
    return {}


def _step(record: dict[str, Any]) -> StepStats:
    stats = step_of(record)
    step_scalars(stats)  # what has no curves is no step either
    return stats


def _lines(
    path: Path, make: Callable[[dict[str, Any]], R], unknown: Callable[[dict[str, Any]], Iterator[str]], say: Say
) -> list[R]:
    """The records of a file, the last one of each step, by step; none where there is no file."""
    if not path.exists():
        return []
    lines = JsonLines(path, make, unknown).read()
    for note in lines.notes:
        say(note)
    return [one for _, one in sorted({record.step: record for record in lines.records}.items())]


def _read(what: Callable[[], T], say: Say) -> T | None:
    """None, which is said, where it cannot be read."""
    try:
        return what()
    except DataError as error:
        say(one_line(error))
        return None


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
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


def write_report(run_dir: Path, say: Say = lambda note: None) -> Path:
    """Write `report.html` into a run folder, from whatever of the run is there; return its path. The folder may be that of a
    cold start alone.

    say: called with a line for all that is damaged, cut or of a newer version; the page has these lines, too.

    Raises:
        DataError: nothing to report.
    """
    notes: list[str] = []
    cold = _read(lambda: read_cold_start(run_dir), notes.append)
    alone = cold is not None and cold.folder == run_dir  # its files have the names of a run's
    steps: list[StepStats] = []
    evaluations: list[Evaluation] = []
    if not alone:
        steps = _lines(run_dir / "metrics.jsonl", _step, unknown_in_step, notes.append)
        evaluations = _lines(run_dir / "eval.jsonl", evaluation_of, unknown_in_evaluation, notes.append)
    path = run_dir / "summary.json"
    summary = _read(lambda: read_summary(path, notes.append), notes.append) if path.exists() else None
    conversations = sample_conversations(run_dir / "rollouts", steps[-1].step if steps else None, notes.append)
    benchmarks = _benchmarks(run_dir, notes.append)
    if not (steps or evaluations or summary or conversations or cold or benchmarks):
        raise DataError(
            f"{run_dir}: expected a run's metrics.jsonl, eval.jsonl, summary.json, rollouts/ or sft/, found none"
            f"{' that can be read (' + notes[0] + ')' if notes else ''}; give the folder that `run.dir` names"
        )
    config = _config_leaves(run_dir / "config.yaml", notes.append)
    if not config and cold:
        config = _config_leaves(cold.folder / "config.yaml", notes.append)
    defaults = leaves(Config().model_dump(mode="json"))
    final = steps[-1].slices.get("all") if steps else None
    page = _template().render(
        name=run_dir.resolve().name,
        seed=summary.seed if summary else config.get("run.seed", defaults["run.seed"]),
        wall_s=summary.wall_s if summary else sum(sum(stats.seconds.values()) for stats in steps),
        num_steps=len(steps),
        num_rollouts=sum(sum(stats.outcomes.values()) for stats in steps),
        final=final if final is not None and has_rates(final) else None,
        changes=[(key, value, defaults.get(key)) for key, value in config.items() if value != defaults.get(key)],
        rows=list(summary_rows(summary)) if summary else [],
        curves=draw_curves(steps, evaluations),
        cold=cold,
        cold_curves=draw_cold_start(cold) if cold else [],
        outcomes=_total_outcomes([stats.outcomes for stats in steps]),
        tool_errors=sum(stats.tool_errors for stats in steps),
        conversations=conversations,
        benchmarks=benchmarks,
        notes=list(dict.fromkeys(notes)),
    )
    for note in dict.fromkeys(notes):
        say(note)
    path = run_dir / "report.html"
    with replaced(path) as scratch:  # the run may write its own at the same time
        scratch.write_text(page, encoding="utf-8")
    return path


def _benchmarks(run_dir: Path, say: Say) -> str:
    """Results beside the published ones as HTML; "" where there are none."""
    table = benchmark_table(run_dir, say)
    if table is None:
        return ""
    from metis_fast.evaluate.table import as_html  # most runs have none

    return as_html(table)


def _total_outcomes(counts: list[Mapping[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for count in counts for name in count)
    return {name: sum(count.get(name, 0) for count in counts) for name in names}
