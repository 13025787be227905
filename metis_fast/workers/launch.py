"""Starts worker processes on this machine; `metis_fast.cluster` does it through Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from metis_fast.errors import ConfigError

Role = Literal["engine", "tools", "judge", "rank"]


def engine_gpus(total: int, ranks: int, wanted: int) -> list[str]:
    """GPUs of this machine for engines: those behind the trainer's ranks; where these are too few, the same ones, shared."""
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    names = visible[:total] if visible else [str(number) for number in range(total)]
    return names[ranks:] if ranks + wanted <= total else names


@dataclass(frozen=True, slots=True)
class Job:
    """One worker to start.

    command: after the Python interpreter. environment: added to the node's own; holds the key, which is on no command line.
    cpus, gpus: what it needs of a node.
    """

    name: str
    role: Role
    command: Sequence[str]
    environment: Mapping[str, str]
    cpus: float = 1.0
    gpus: int = 0


class Process(Protocol):
    """A worker that was started, wherever it is."""

    def exit_code(self) -> int | None:
        """None while it runs."""
        ...

    def kill(self) -> None:
        """End it and all that it started, at once. May be called twice."""
        ...

    def describe(self) -> str:
        """Where its output is."""
        ...


class Launcher(Protocol):
    """Starts workers, and the ranks of a trainer."""

    @property
    def host(self) -> str:
        """Address of this machine that what it starts can reach."""
        ...

    def start(self, job: Job) -> Process:
        """Start one; it dials in by itself.

        Raises:
            ConfigError: there is no room for it.
        """
        ...

    def close(self) -> None:
        """End everything that was started."""
        ...


class _Local:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log

    def exit_code(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def describe(self) -> str:
        return str(self._log)


class LocalLauncher:
    """Workers of this machine, each with a log in `logs`.

    gpus: ids, as CUDA_VISIBLE_DEVICES takes them, that jobs get, the same ones whenever a job is started again.
    """

    host = "127.0.0.1"

    def __init__(self, logs: Path, gpus: Sequence[str] = ()) -> None:
        self._logs = logs
        self._free = list(gpus)
        self._gpus: dict[str, list[str]] = {}
        self._started: list[_Local] = []

    def start(self, job: Job) -> Process:
        """See `Launcher`."""
        log = self._logs / f"{job.name}.log"
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-P", *job.command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self._visible(job), **job.environment},
                    start_new_session=True,  # Ctrl-C is for the run; and it ends with all that it started
                )
        except OSError as error:
            raise ConfigError(f"cannot start worker {job.name}: {error.strerror} ({error.filename or log})") from None
        started = _Local(process, log)
        self._started.append(started)
        return started

    def _visible(self, job: Job) -> dict[str, str]:
        if not job.gpus:
            return {}
        if job.name not in self._gpus:
            if job.gpus > len(self._free):
                raise ConfigError(
                    f"worker {job.name} needs {job.gpus} GPUs of this machine, {len(self._free)} are left; lower "
                    "rollout.vllm.replicas or tensor_parallel, or set workers.launcher=ray"
                )
            self._gpus[job.name], self._free = self._free[: job.gpus], self._free[job.gpus :]
        return {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus[job.name])}

    def close(self) -> None:
        """See `Launcher`."""
        for process in self._started:
            process.kill()
        self._started.clear()
