"""Engines that play a script, with faults (`metis_fast.testing.faults`), in worker processes that start in a moment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
from harness import FORK

from metis_fast.config import Config
from metis_fast.model import Policy
from metis_fast.node import opening
from metis_fast.rollout.vllm.engine import VllmEngine
from metis_fast.workers import server
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import Job, Process

SERVICE = "metis_fast.testing.faults:ScriptedVllm"


class ScriptedEngines(VllmEngine):
    """`VllmEngine` whose workers play the script in `rollout.vllm.arguments.faults`."""

    def __init__(self, config: Config, policy: Policy, hub: Hub) -> None:
        super().__init__(config, policy, hub, SERVICE)


def _worker(command: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    Path(log).with_suffix(f".{os.getpid()}").touch()
    join, name = command[command.index("--join") + 1], command[command.index("--name") + 1]
    code = server.run(join, name, 60.0)
    os._exit(code)


class _Forked:
    def __init__(self, process: ForkServerProcess, log: Path) -> None:
        self._process, self._log = process, log

    def exit_code(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        assert self._process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # before it had a group of its own
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()

    def describe(self) -> str:
        return str(self._log)


def left_running(logs: Path, wait_s: float = 5.0) -> list[int]:
    """Process ids of workers that still run, given some time to end."""
    deadline = time.monotonic() + wait_s
    pids = [int(path.suffix[1:]) for path in logs.glob("*.*") if path.suffix != ".log"]
    assert pids
    while (left := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


class ForkLauncher:
    """`LocalLauncher` whose workers have imported everything before they start."""

    host = "127.0.0.1"

    def __init__(self, logs: Path, gpus: Sequence[str] = (), withheld: Collection[str] = ()) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._started: list[_Forked] = []

    def start(self, job: Job) -> Process:
        """See `Launcher`."""
        log = self._logs / f"{job.name}.log"
        process = FORK.Process(target=_worker, args=(list(job.command), dict(job.environment), str(log)))
        process.start()
        self._started.append(_Forked(process, log))
        return self._started[-1]

    def close(self) -> None:
        """See `Launcher`."""
        for process in self._started:
            process.kill()


def use() -> None:
    """Let whole runs of this process have such engines. It must come from the fork server itself."""
    # multiprocessing would start another server in every such process, which imports everything anew
    forkserver._forkserver.ensure_running = lambda: None  # pyright: ignore
    opening.VllmEngine = ScriptedEngines
    opening.LocalLauncher = ForkLauncher
