"""The whole job: cold start, steps of the budget, runs, tables. Each part is skipped when it is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from metis_fast import config as config_module
from metis_fast.ablate.boundary import curves, write_boundary
from metis_fast.ablate.picture import write_picture
from metis_fast.ablate.process import Process
from metis_fast.ablate.results import Results, collect
from metis_fast.ablate.running import OUT, Start, read_cost, run_all
from metis_fast.ablate.spec import Ablation, Planned, planned_runs, shared_config
from metis_fast.ablate.table import write_tables
from metis_fast.config import Config
from metis_fast.errors import ConfigError, DataError
from metis_fast.run.folder import held
from metis_fast.run.interrupt import Interrupts

_PILOT_STEPS = (2, 10)
_BUDGET, _PILOT = "budget.json", "pilot"


def make(ablation: Ablation, quiet: bool = False, start: Start | None = None) -> int:
    """Make all runs that are not there yet, and the tables.

    quiet: what is said goes to stderr. start: what starts a run; None: a process here, or Ray where a cluster is named.
    Returns the number of runs that failed.

    Raises:
        Interrupted: a signal came; the same call goes on.
        MetisError: anything that a user can mend.
    """
    shared = shared_config(ablation)
    if not shared.data.heldout:
        raise ConfigError("an ablation compares held-out prompts, and data.heldout is empty; name some in the base")
    if ablation.demo is None and not (shared.model.path / "config.json").is_file():
        name = "model.path of the base" if ablation.cold_start is None else "cold_start"
        raise ConfigError(f"{name}: expected the folder of a model, from which all runs begin; {shared.model.path} is none")
    planned_runs(ablation, shared, ablation.budget.steps)  # what cannot work is said before anything is made
    with held(ablation.out, OUT):
        _cold_start(ablation, shared)
        with Interrupts() as interrupts, ExitStack() as stack:
            start = start or _starter(ablation, shared, stack)
            steps = _steps(ablation, shared, interrupts, start, quiet)
            runs = planned_runs(ablation, shared, steps)
            failed = run_all(runs, ablation.jobs, interrupts, start, quiet)
        _write(ablation.out, runs, collect(runs))
    return failed


def tables(ablation: Ablation) -> int:
    """Write the tables of the runs that have ended. Returns the number of those that have failed.

    Raises:
        DataError: none has ended.
    """
    shared = shared_config(ablation)
    budget = _known_budget(ablation)
    runs = planned_runs(ablation, shared, ablation.budget.steps or budget)
    results = collect(runs)
    if not results.variants:
        why = "; ".join(f"{name} {why}" for name, why in [*results.missing.items()][:1])
        raise DataError(f"{ablation.out}: no run of this ablation has a result ({why}); start it without --tables")
    _write(ablation.out, runs, results)
    costs = [cost for run in runs if (cost := read_cost(run.folder)) is not None]
    return sum(not cost.ended and cost.why not in ("", "stopped") for cost in costs)


def _write(out: Path, runs: Sequence[Planned], results: Results) -> None:
    write_tables(out, results)
    write_picture(out, results)
    write_boundary(out, curves(runs))


def _cold_start(ablation: Ablation, shared: Config) -> None:
    if ablation.demo is None:
        return
    from metis_fast.demo import command as demo

    own = config_module.build(config_module.merge(shared.model_dump(mode="python"), {"run": {"dir": ablation.demo.absolute()}}))
    with held(own.run.dir, "`demo`"):
        demo.prepare(demo.resolve(own))


def _starter(ablation: Ablation, shared: Config, stack: ExitStack) -> Start:
    if ablation.ray is None:
        return Process
    try:
        from metis_fast.ablate.tasks import RayTasks
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("`ray` needs Ray; in the project's folder: pip install -e '.[ray]', or leave it out") from None
    tasks = RayTasks(ablation.ray, cpus=max(1, shared.run.threads))
    stack.callback(tasks.close)
    return tasks.start


def _known_budget(ablation: Ablation) -> int | None:
    """The steps that a pilot found for this budget."""
    try:
        tree = json.loads((ablation.out / _BUDGET).read_text(encoding="utf-8"))
        return int(tree["steps"]) if tree["cpu_minutes"] == ablation.budget.cpu_minutes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _steps(ablation: Ablation, shared: Config, interrupts: Interrupts, start: Start, quiet: bool) -> int | None:
    """Of every run. CPU minutes are made steps by two short runs of the first variant, once."""
    minutes = ablation.budget.cpu_minutes
    if minutes is None:
        return ablation.budget.steps
    known = _known_budget(ablation)
    if known is not None:
        return known
    first = replace(ablation, variants=dict([next(iter(ablation.variants.items()))]), seeds=ablation.seeds[:1])
    pilots = [run for steps in _PILOT_STEPS for run in planned_runs(replace(first, out=_pilot(ablation, steps)), shared, steps)]
    if run_all(pilots, 1, interrupts, start, quiet):
        raise ConfigError("the pilot, which measures what a step costs, has failed; mend it, or set budget.steps")
    steps = _affordable(pilots, 60 * minutes)
    path = ablation.out / _BUDGET
    path.write_text(json.dumps({"cpu_minutes": minutes, "steps": steps}) + "\n", encoding="utf-8")
    shutil.rmtree(ablation.out / _PILOT, ignore_errors=True)  # what it found is in budget.json
    return steps


def _pilot(ablation: Ablation, steps: int) -> Path:
    return ablation.out / _PILOT / f"{steps}-steps"


def _affordable(pilots: Sequence[Planned], cpu_s: float) -> int:
    costs = [cost.cpu_s for run in pilots if (cost := read_cost(run.folder)) is not None]
    (short, long), (few, many) = costs, _PILOT_STEPS
    each = max((long - short) / (many - few), 1e-3)
    steps = int((cpu_s - short) / each) + few
    if steps < few:
        raise ConfigError(
            f"budget.cpu_minutes={cpu_s / 60:g}: {few} steps take {short / 60:.2f}; give more, or evaluate fewer prompts"
        )
    return steps
