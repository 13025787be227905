"""Runs the command line in processes of their own, breaks them at a chosen moment, and compares what they leave behind.

Processes are forked from a server that has imported torch and transformers once (multiprocessing's `forkserver`): a command
then starts in a tenth of a second instead of five. `test_run_kill.py` shows that the installed program does the same.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import psutil
import torch

import metis_fast
from metis_fast.checkpoint.resume import CheckpointStore
from metis_fast.config import SftPhase
from metis_fast.rollout.store import read_rollouts

HERE = Path(__file__).parent
SMALL = HERE / "small.yaml"
AGENT = HERE / "agent"
PROGRAM = Path(sys.executable).with_name("metis-fast")
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        *("metis_fast.cli", "metis_fast.demo.command", "metis_fast.report.html", "metis_fast.score.llm"),
        # what verbs import at first use
        *("metis_fast.tools.search.local", "metis_fast.tools.server.serving", "metis_fast.serve.serving"),
        *("metis_fast.evaluate.run", "metis_fast.doctor.command"),
        *("torch.utils.tensorboard", "tensorboard.compat.proto.summary_pb2"),
    ]
)
_OTHERS = re.compile("wandb-(artifacts|media)$")  # made where megatron imports wandb; a kill leaves them
_LISTED = Path(f"/proc/self/task/{os.getpid()}/children").exists()
_LIMIT_S = 240.0  # of a command, on a machine that does other things too


@dataclass(frozen=True, slots=True)
class Moment:
    """When a process sends itself a signal: `delay_s` after its main thread entered a function, the `entry`-th time.

    stage: "<file stem>.<function>". The signal is sent while the function still runs: at its end, if that comes earlier.
    rank: the one that is sent the signal instead.
    """

    stage: str
    number: signal.Signals
    entry: int = 1
    delay_s: float = 0.0
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code (negative: the signal that killed it), what it wrote, and when the signal came.

    hit: whether the moment was reached. after_s: seconds from the signal to the end. orphans: processes left behind.
    """

    code: int
    out: str
    err: str
    hit: bool
    after_s: float
    orphans: tuple[str, ...]
    scratch: tuple[str, ...]


def rank_pid(run: int, number: int) -> int:
    """The process of one of a run's Megatron ranks."""
    ending = ["--rank", str(number)]
    while True:  # it may be about to start
        for child in psutil.Process(run).children():
            with contextlib.suppress(psutil.Error):
                if child.cmdline()[-2:] == ending:
                    return child.pid


class _Watch:
    """Counts the calls of a stage in the main thread, and strikes when the moment comes.

    Its functions get the code of a wrapper, so that whoever has imported them by name calls that, too. Looking at the frames of
    another thread would be less work, and sometimes ends in a frame that is none (CPython issue 106883 and others).
    """

    def __init__(self, moment: Moment, mark: Path) -> None:
        self._moment, self._mark, self._thread = moment, mark, threading.get_ident()
        self._entries, self._struck, self._lock = 0, False, threading.Lock()
        module, _, name = moment.stage.partition(".")
        found = [function for part in _modules(module) for function in _functions(part, name)]
        assert found, f"no function {moment.stage}"
        for function in found:
            self._wrap(function)

    def _wrap(self, function: FunctionType) -> None:
        code, scope = function.__code__, function.__globals__
        whole = FunctionType(code, scope, function.__name__, function.__defaults__)
        whole.__kwdefaults__ = function.__kwdefaults__

        def watched(*args: object, **kwargs: object) -> object:
            if threading.get_ident() != self._thread:
                return whole(*args, **kwargs)
            self._enter()
            try:
                return whole(*args, **kwargs)
            finally:
                if self._entries >= self._moment.entry:
                    self._strike()  # a fast machine is done before the moment comes

        name = f"_watched_{id(function)}"
        scope[name] = watched
        made: dict[str, FunctionType] = {}
        exec(f"def wrapper(*args, **kwargs): return {name}(*args, **kwargs)", made)
        function.__defaults__ = function.__kwdefaults__ = None
        function.__code__ = made["wrapper"].__code__

    def _enter(self) -> None:
        self._entries += 1
        if self._entries != self._moment.entry:
            return
        if self._moment.delay_s == 0:
            self._strike()
        else:
            threading.Thread(target=self._later, daemon=True).start()

    def _later(self) -> None:
        time.sleep(self._moment.delay_s)
        self._strike()

    def _strike(self) -> None:
        with self._lock:
            if self._struck:
                return
            self._struck = True
        pid = os.getpid() if self._moment.rank is None else rank_pid(os.getpid(), self._moment.rank)
        self._mark.write_text(str(time.time()))
        os.kill(pid, self._moment.number)


def _modules(stem: str) -> list[ModuleType]:
    """Those of the project whose files have that name."""
    names = [found.name for found in pkgutil.walk_packages(metis_fast.__path__, "metis_fast.")]
    return [importlib.import_module(name) for name in names if name.rpartition(".")[2] == stem]


def _functions(module: ModuleType, name: str) -> list[FunctionType]:
    """Of a module and of its classes; those that decorators have wrapped."""
    scopes = [vars(module), *(vars(kind) for kind in vars(module).values() if isinstance(kind, type))]
    found = [inspect.unwrap(getattr(scope[name], "__func__", scope[name])) for scope in scopes if name in scope]
    return [one for one in found if isinstance(one, FunctionType) and one.__module__ == module.__name__]


def _main(arguments: list[str], folder: str, moment: Moment | None, before: Callable[[], None] | None) -> None:
    from metis_fast import cli

    os.setsid()  # a group of its own, as a shell gives to a command
    for name, descriptor in (("out", 1), ("err", 2)):
        handle = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, descriptor)
        os.close(handle)
    os.environ["TMPDIR"] = tempfile.tempdir = f"{folder}/tmp"
    if moment is not None:
        _Watch(moment, Path(folder, "mark"))
    if before is not None:
        before()
    sys.exit(cli.main(arguments))


def below(pid: int) -> Iterator[int]:
    """Processes that one has started, grandchildren included. Where the kernel lists them, the table of all is not read."""
    if not _LISTED:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield from (child.pid for child in psutil.Process(pid).children(recursive=True))
        return
    threads: list[str] = []
    with contextlib.suppress(OSError):  # it has ended
        threads = os.listdir(f"/proc/{pid}/task")
    for thread in threads:
        children = ""
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text()
        for child in map(int, children.split()):
            yield child
            yield from below(child)


def without_ray() -> None:
    """Before a command: whatever of it imports Ray fails."""
    assert "ray" not in sys.modules
    sys.modules["ray"] = None  # pyright: ignore[reportArgumentType] - which is how an import fails


def _zombie(process: psutil.Process) -> bool:
    """Whether it has ended and waits for init to take note; it runs no more."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Command:
    """A command that runs; `wait` for its end."""

    def __init__(
        self,
        arguments: Sequence[object],
        folder: Path,
        moment: Moment | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        """folder: for its output and its temporary files; made here. before: called in it first."""
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        (folder / "mark").unlink(missing_ok=True)
        self.folder = folder
        self._process: ForkServerProcess = FORK.Process(
            target=_main, args=(list(map(str, arguments)), str(folder), moment, before)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    def family(self) -> list[psutil.Process]:
        """The processes it started, grandchildren included."""
        found: list[psutil.Process] = []
        for pid in below(self.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def named(self, part: str) -> list[psutil.Process]:
        """Those of its family with `part` in an argument; one that ended meanwhile has none."""
        found: list[psutil.Process] = []
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):  # that of a zombie is one, too
                if any(part in argument for argument in process.cmdline()):
                    found.append(process)
        return found

    def wait(self) -> Ended:
        """Until it ends; whatever it leaves running is given some seconds, and reported."""
        family: dict[int, psutil.Process] = {}
        deadline = time.monotonic() + _LIMIT_S
        while self.alive and time.monotonic() < deadline:
            family |= {process.pid: process for process in self.family()}
            self._process.join(0.05)
        ended = time.time()
        if self.alive:
            self._process.kill()
            raise AssertionError(f"still running after {_LIMIT_S:g} s: {self.read('err')}")
        left = [process for process in psutil.wait_procs(family.values(), timeout=8)[1] if not _zombie(process)]
        mark = self.folder / "mark"
        return Ended(
            code=self._process.exitcode if self._process.exitcode is not None else -1,
            out=self.read("out"),
            err=self.read("err"),
            hit=mark.exists(),
            after_s=ended - float(mark.read_text()) if mark.exists() else 0.0,
            orphans=tuple(str(process) for process in left),
            scratch=tuple(sorted(name for path in (self.folder / "tmp").iterdir() if not _OTHERS.search(name := path.name))),
        )

    def read(self, name: str) -> str:
        """What it has written so far, "out" or "err"."""
        return (self.folder / name).read_text(errors="replace") if (self.folder / name).exists() else ""


def run(arguments: Sequence[object], folder: Path, moment: Moment | None = None) -> Ended:
    """Run a command to its end."""
    return Command(arguments, folder, moment).wait()


def succeed(arguments: Sequence[object], folder: Path) -> str:
    """Run a command that has to work; returns its standard output."""
    ended = run(arguments, folder)
    assert ended.code == 0, ended
    return ended.out


def cut(run: Path, out: Path, step: int) -> Path:
    """A copy of a finished run as it was after so many steps, of which it has a checkpoint. Logs and rollouts go on, as those
    of a run that was killed before its next checkpoint."""
    shutil.copytree(run, out, symlinks=True)
    for path in (out / "checkpoints").iterdir():
        if path.name > f"step-{step:06d}":
            shutil.rmtree(path)
    for name in ("trained", "ranks"):
        shutil.rmtree(out / name, ignore_errors=True)
    return out


def error_line(ended: Ended, warned: str = "") -> str:
    """The one line on stderr of a command that failed for a reason that its user can mend.

    warned: begins a line of the log that comes before it.
    """
    assert ended.code == 2, ended
    lines = ended.err.splitlines()
    if warned:
        assert lines.pop(0).startswith(f"WARNING {warned}"), ended.err
    assert len(lines) == 1 and lines[0].startswith("metis-fast: "), ended.err
    return lines[0]


def _digest(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _tensor_digest(tensor: torch.Tensor) -> str:
    bits = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {sha256(bits).hexdigest()[:16]}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text().splitlines())


def checkpoint_state(folder: Path) -> dict[str, str]:
    """Everything in the newest checkpoint that a run's future depends on, by name, as digests."""
    loaded = CheckpointStore(folder, keep_last=1).latest()
    assert loaded is not None, folder
    scalars = {name: value for name, value in loaded.state.scalars.items() if name != "wall_s"}
    state = {f"tensor {name}": _tensor_digest(tensor) for name, tensor in loaded.state.tensors.items()}
    state |= {f"scalar {name}": _digest(value) for name, value in scalars.items()}
    # Python's and numpy's global generators start from the system's entropy in every process; nothing in a run draws from them
    return state | {"torch generator": _tensor_digest(loaded.state.rng.torch_cpu), "step": str(loaded.state.step)}


def rollout_state(folder: Path) -> dict[str, str]:
    """Every stored rollout, by part and place; how long its tools took is left out."""
    state = {}
    for part in sorted(folder.glob("*.parquet")):
        for i, stored in enumerate(read_rollouts(part)):
            rollout = stored.rollout
            turns = [asdict(replace(turn, tool_s=0.0)) for turn in rollout.turns]
            numbers = [rollout.tokens.tobytes(), rollout.logp.tobytes(), rollout.sampled.tobytes()]
            numbers.append(rollout.weight_version.tobytes())
            images = [image.sha256 for image in rollout.images]
            place = f"{part.name}/{i} {rollout.prompt_uid.split('/')[-1]}#{rollout.index}"
            state[place] = _digest([*map(bytes.hex, numbers), turns, images, rollout.outcome, asdict(stored.score)])
    return state


def run_state(folder: Path) -> dict[str, str]:
    """What a finished run leaves, clocks aside: two runs are the same if these are equal."""
    state = checkpoint_state(folder / "checkpoints") | rollout_state(folder / "rollouts")
    for record in _lines(folder / "metrics.jsonl"):
        state[f"metrics {record['step']}"] = _digest(record | {"seconds": None, "cpu_seconds": None})
    for number, record in enumerate(_lines(folder / "eval.jsonl")):
        state[f"eval {number}"] = _digest(record)
    for path in sorted((folder / "trained").iterdir()):
        state[f"trained/{path.name}"] = sha256(path.read_bytes()).hexdigest()[:16]
    return state


def sft_state(folder: Path, out: Path) -> dict[str, str]:
    """As `run_state`, for a cold start in `folder` exported to `out`."""
    state = checkpoint_state(folder / "sft" / "checkpoints")
    state["metrics"] = sha256((folder / "sft" / "metrics.jsonl").read_bytes()).hexdigest()[:16]
    return state | {path.name: sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(out.iterdir())}


def moments(seed: int, stages: Sequence[tuple[str, float]], number: signal.Signals) -> list[Moment]:
    """One moment in each of the stages, in random order and at a random time within it.

    stages: name and, in seconds, the longest delay, which the stage has to last longer than.
    """
    random_ = random.Random(seed)
    chosen = [Moment(stage, number, delay_s=random_.uniform(0, delay)) for stage, delay in stages]
    random_.shuffle(chosen)
    return chosen


def phases(*folders: tuple[Path, int]) -> str:
    """An `sft.phases=` override."""
    parts = [SftPhase(trajectories=folder, steps=steps).model_dump(mode="json") for folder, steps in folders]
    return f"sft.phases={json.dumps(parts)}"
