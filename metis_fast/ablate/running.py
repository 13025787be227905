"""Makes the runs of an ablation: a few at a time, each once, and goes on where an earlier call was stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

from pydantic import TypeAdapter
from tqdm import tqdm

from metis_fast import config as config_module
from metis_fast.ablate.process import Ended, Process, Started
from metis_fast.ablate.spec import Planned
from metis_fast.config import Config, deciding
from metis_fast.errors import ConfigError
from metis_fast.report.progress import progress
from metis_fast.run.folder import held
from metis_fast.run.interrupt import Interrupts
from metis_fast.scratch import replaced

_RECORD, _LOG, _METRICS = "ablate.json", "train.log", "metrics.jsonl"
_POLL_S = 0.2
_FREE_S = 60.0  # for the run of an ablation that was killed to save its state
_STOPPED = (130, -2, -15)
OUT = "`out` (--out)"
"""What names the folder of an ablation."""

Start = Callable[[Path, Path], Started]
"""Starts `metis-fast train` of a config file, which writes to a log."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took, over all its starts. settings: a digest of those that decide its result. ended: it has its result.

    cpu_s, wall_s: seconds of its processes. peak_mib: resident memory of the largest one. why: it failed, if it has not ended.
    """

    settings: str
    ended: bool
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_mib: float = 0.0
    why: str = ""


def read_cost(folder: Path) -> Cost | None:
    """Of a run of an ablation; None where it never ended, or its record is damaged: it is started again, and ends at once."""
    try:
        return _cost().validate_json((folder / _RECORD).read_bytes())
    except (OSError, ValueError):
        return None


@cache
def _cost() -> TypeAdapter[Cost]:
    return TypeAdapter(Cost)


def digest(config: Config) -> str:
    """Of the settings that decide a run's result, and of its number of steps, which a single run may raise."""
    tree = deciding(config) | {"steps": config.train.steps}
    return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def run_all(runs: Sequence[Planned], jobs: int, interrupts: Interrupts, start: Start = Process, quiet: bool = False) -> int:
    """Make all runs that have not ended yet. A run that fails is said, and the others go on.

    jobs: runs at a time. quiet: what is said goes to stderr. Returns the number of runs that failed.

    Raises:
        ConfigError: a run has ended with other settings.
        Interrupted: a signal came; the runs that were going have saved their last whole steps.
    """
    left = [run for run in runs if not _has_ended(run)]
    going: dict[Started, Planned] = {}
    failed, num_ended = 0, len(runs) - len(left)
    steps_before = sum(run.config.train.steps for run in runs if run not in left)  # of runs that go no more
    say = _say_to(sys.stderr if quiet else sys.stdout)
    if num_ended:
        say(f"{num_ended} of {len(runs)} runs have ended before")
    if left:
        say(f"runs to make: {len(left)}, {jobs} at a time; what each says is in its {_LOG}")
    total = sum(run.config.train.steps for run in runs)
    with progress(total, "ablation", runs[0].config.log, "step") as bar:
        try:
            while left or going:
                interrupts.check()
                while left and len(going) < jobs:
                    run = left.pop(0)
                    going[_started(run, start)] = run
                bar.update(steps_before + sum(map(_num_steps, going.values())) - bar.n)
                for process, run in list(going.items()):
                    ended = process.poll()
                    if ended is not None:
                        del going[process]
                        num_ended += 1
                        steps_before += _num_steps(run)
                        failed += ended.code != 0
                        _book(run, ended)
                        say(f"{run.name}: {_outcome(ended, run)} ({num_ended} of {len(runs)})")
                time.sleep(_POLL_S)
        finally:
            _stop_all(going)
    return failed


def _say_to(stream: object) -> Callable[[str], None]:
    return lambda line: tqdm.write(line, file=stream)  # pyright: ignore[reportArgumentType]


def _outcome(ended: Ended, run: Planned) -> str:
    if ended.code == 0:
        return f"done, {ended.cpu_s / 60:.1f} CPU minutes"
    return f"failed, {ended.why}; see {run.folder / _LOG}"


def is_as_planned(run: Planned, cost: Cost) -> bool:
    """Whether it was made with the settings that it would be made with now. A release with new ones counts their defaults."""
    wanted = digest(run.config)
    if cost.settings == wanted:
        return True
    try:
        return digest(config_module.load(run.folder / "config.yaml", [])) == wanted
    except ConfigError:
        return False


def _has_ended(run: Planned) -> bool:
    cost = read_cost(run.folder)
    if cost is None or not cost.ended:
        return False
    if not is_as_planned(run, cost):
        raise ConfigError(
            f"{run.folder} holds a run with other settings, or of a budget other than {run.config.train.steps} steps; restore "
            "them, name the variant or `out` otherwise, or remove that folder"
        )
    return True


def _started(run: Planned, start: Start) -> Started:
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    _wait_until_free(folder)
    file = folder.with_name(f"{folder.name}.yaml")
    file.write_text(config_module.to_yaml(run.config, only_changes=True), encoding="utf-8")
    return start(file, folder / _LOG)


def _wait_until_free(folder: Path) -> None:
    deadline = time.monotonic() + _FREE_S
    while True:
        try:
            with held(folder, OUT):
                return
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


def _num_steps(run: Planned) -> int:
    path = run.folder / _METRICS
    return min(path.read_bytes().count(b"\n"), run.config.train.steps) if path.exists() else 0


def _book(run: Planned, ended: Ended) -> None:
    settings = digest(run.config)
    before = read_cost(run.folder)
    if before is None or before.settings != settings:
        before = Cost(settings, False)
    cost = replace(
        before,
        ended=ended.code == 0,
        cpu_s=before.cpu_s + ended.cpu_s,
        wall_s=before.wall_s + ended.wall_s,
        peak_mib=max(before.peak_mib, ended.peak_mib),
        why=ended.why,
    )
    run.folder.mkdir(parents=True, exist_ok=True)  # it may have been removed meanwhile: then the run has failed
    with replaced(run.folder / _RECORD) as scratch:
        scratch.write_text(json.dumps(asdict(cost), indent=1) + "\n", encoding="utf-8")


def _stop_all(going: dict[Started, Planned]) -> None:
    """A second Ctrl-C while they save their states ends them at once."""
    for process in going:
        process.stop()
    try:
        while going:
            for process, run in list(going.items()):
                ended = process.poll()
                if ended is not None:
                    del going[process]
                    _book(run, replace(ended, why="stopped" if ended.code in _STOPPED else ended.why))
            time.sleep(_POLL_S)
    finally:
        for process in going:
            with suppress(ProcessLookupError):
                process.kill()
