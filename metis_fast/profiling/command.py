"""The command `metis-fast profile`: some real steps of a run, recorded, in a copy of its folder."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from torch.profiler import profile

from metis_fast import config as config_module
from metis_fast.checkpoint.resume import CheckpointStore
from metis_fast.config import Config
from metis_fast.demo import command as demo
from metis_fast.errors import ConfigError
from metis_fast.profiling.recorder import Recorder
from metis_fast.profiling.tables import OpRow, as_text, op_rows, tabulate
from metis_fast.profiling.trace import write_trace
from metis_fast.run import pipeline
from metis_fast.run.folder import held
from metis_fast.spans import listening
from metis_fast.torch_profiler import profiler
from metis_fast.train.megatron.traced import folder_of_ranks, traces_in, want

_UNFINISHED = ".profile-unfinished"  # while a folder is no profile yet
_DEMO = {"base", "cold_start"}  # what the phases of a demo name


def run(args: argparse.Namespace) -> int:
    """The command.

    Raises:
        ConfigError: the folder is not new, there are fewer steps left, or what a run's config can have wrong.
    """
    if args.steps < 1:
        raise ConfigError(f"--steps: expected 1 or more, got {args.steps}")
    out: Path = args.out
    _check_new(out)
    asked = config_module.load(args.config, args.overrides)
    _check_left(asked, args.steps)
    with _begun(out):
        return _profile(args, asked, out)


def _check_new(out: Path) -> None:
    """Raises ConfigError where something is in the way."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: a file stands there; name a new folder")
    if out.is_dir() and not (out / _UNFINISHED).exists() and any(path.name != ".lock" for path in out.iterdir()):
        raise ConfigError(f"--out {out} is not empty; name a new folder")


@contextmanager
def _begun(out: Path) -> Iterator[None]:
    """Make the folder, or empty that of a profile which was stopped or killed."""
    with held(out, "--out"):
        if (out / _UNFINISHED).exists():
            for name in ("run", "ops"):
                shutil.rmtree(out / name, ignore_errors=True)
        (out / _UNFINISHED).touch()
        done = False
        try:
            yield
            done = True
        finally:
            if done or {path.name for path in out.iterdir()} == {".lock", _UNFINISHED}:
                (out / _UNFINISHED).unlink()


def _profile(args: argparse.Namespace, asked: Config, out: Path) -> int:
    config = _copied(asked, out / "run")
    steps = Steps(args.steps, None if args.no_ops else out / "ops")
    with held(config.run.dir), ExitStack() as stack:
        stack.callback(steps.close)
        if steps.folder is not None:
            stack.enter_context(folder_of_ranks(steps.folder))
        stack.enter_context(listening(steps.recorder))
        stack.enter_context(steps.recorder.sampling())
        pipeline.train(config, goes_on=steps.begins)
    if len(steps.recorder.steps) < args.steps:
        raise ConfigError(
            f"the run ended after {len(steps.recorder.steps)} of {args.steps} recorded steps; "
            "lower --steps or raise train.steps"
        )
    tables = tabulate(steps.recorder, steps.ops)
    write_trace(out / "trace.json.gz", steps.recorder, steps.traces)
    if steps.folder is not None:
        shutil.rmtree(steps.folder)
    document = json.dumps(asdict(tables), indent=1)
    (out / "profile.json").write_text(document + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(asdict(tables) | {"trace": str(out / "trace.json.gz")}))
        return 0
    print(as_text(tables))
    print(f"\ntrace: {out / 'trace.json.gz'}  (open it in https://ui.perfetto.dev; docs/profile.md says how without a network)")
    return 0


def _newest(folder: Path) -> int:
    """The step of the newest checkpoint in a run's folder; 0 where there is none."""
    checkpoints = folder / "checkpoints"
    return max(CheckpointStore(checkpoints, 1).steps(), default=0) if checkpoints.is_dir() else 0


def _check_left(asked: Config, num: int) -> None:
    """Whether the run has as many steps left as are to be seen; said before anything is made."""
    done, needed = _newest(asked.run.dir), num + 1
    if asked.train.steps - done < needed:
        raise ConfigError(
            f"train.steps={asked.train.steps}, and {asked.run.dir} has {done} of them already; {needed} more are needed, "
            f"one to warm up and --steps {num}; set train.steps={done + needed} or lower --steps"
        )


def _copied(asked: Config, folder: Path) -> Config:
    """The config of the copy. A demo whose cold start is there is taken from there; else it is made anew, in the copy."""
    played = {phase.trajectories.name for phase in asked.sft.phases}
    if not asked.data.train and played and played <= _DEMO:
        if not (asked.run.dir / "cold_start").exists():
            asked = asked.model_copy(update={"run": asked.run.model_copy(update={"dir": folder})})
            demo.prepare(demo.resolve(asked))
        resolved = demo.resolve(asked)
    else:
        resolved = asked
    goes_on = _copy_newest(asked.run.dir, folder)
    evaluation = {"benchmarks": (), "every": 0}  # of many prompts, and of none that is trained on
    changes = {
        "run": resolved.run.model_copy(update={"dir": folder}),
        "eval": resolved.eval.model_copy(update=evaluation),
        "checkpoint": resolved.checkpoint.model_copy(update={"keep_last": 1}),
        "log": resolved.log.model_copy(update={"trackers": (), "panel": "off"}),
    }
    if not goes_on:  # a run that goes on has the files that it had, and evaluates nothing before its end
        changes["data"] = resolved.data.model_copy(update={"heldout": ()})
    return resolved.model_copy(update=changes)


def _copy_newest(source: Path, target: Path) -> bool:
    """The newest checkpoint of a run with what the run was made of, if there is one. Its bytes are not copied where the disk
    has links: files of a checkpoint are never written again, and removing a link leaves the other."""
    step = _newest(source)
    if source.resolve() == target.resolve() or not step:
        return False
    name = f"step-{step:06d}"
    here, there = source / "checkpoints" / name, target / "checkpoints" / name
    for file in sorted(path for path in here.rglob("*") if path.is_file()):
        own = there / file.relative_to(here)
        own.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, own)
        except OSError:  # another disk, or one without links
            shutil.copyfile(file, own)
    shutil.copy(source / "inputs.json", target / "inputs.json")
    return True


class Steps:
    """Which steps of a run are recorded: the first one warms up, the others are, and in the last one torch's ops, too.

    recorder: of spans. ops, traces: of the last step, once that is over.
    """

    def __init__(self, num: int, folder: Path | None) -> None:
        """folder: for traces of ops; None: they are not recorded."""
        self.recorder = Recorder()
        self.ops: list[OpRow] = []
        self.traces: list[tuple[str, Path]] = []
        self._num, self.folder = num, folder
        self._begun: list[tuple[int, int]] = []
        self._profiler: profile | None = None

    def begins(self, step: int) -> bool:
        """For `pipeline.train`."""
        now = time.perf_counter_ns()
        if len(self._begun) > 1:
            self.recorder.steps.append((*self._begun[-1], now))
        if len(self._begun) == self._num + 1:
            self._end_ops()
            return False
        if len(self._begun) == self._num and self.folder is not None:
            want(self.folder, True)
            self._profiler = profiler()
            self._profiler.start()
        self._begun.append((step, time.perf_counter_ns()))
        return True

    def _end_ops(self) -> None:
        if self._profiler is None or self.folder is None:
            return
        one, self._profiler = self._profiler, None
        one.stop()
        want(self.folder, False)
        path = self.folder / "run.json"
        one.export_chrome_trace(str(path))
        self.traces = [("torch", path), *traces_in(self.folder)]
        self.ops = op_rows(one)

    def close(self) -> None:
        """Stop what still records, after an error."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
