"""Starts worker processes on this machine; `metis_fast.cluster` does it through Ray."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from metis_fast.errors import ConfigError

_LOG = logging.getLogger(__name__)
_GONE_S = 10.0  # for a killed process

Role = Literal["engine", "tools", "judge", "rank"]


def engine_gpus(total: int, ranks: int, wanted: int, share: bool) -> list[str]:
    """GPUs of this machine for engines, those behind the trainer's ranks. Fewer than wanted where there are no more.

    share: where these are too few, all of them, the ranks' own as well: engine and trainer take turns.
    """
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    names = visible[:total] if visible else [str(number) for number in range(total)]
    return names if share and ranks + wanted > total else names[ranks:]


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
    """Starts workers, and the ranks of a trainer. Many threads start some at once."""

    def start(self, job: Job) -> Process:
        """Start one; it dials in by itself.

        Raises:
            ConfigError: there is no room for it.
        """
        ...

    def close(self) -> None:
        """End everything that was started."""
        ...


SCRATCH = "METIS_FAST_SCRATCH"
"""Variable with a worker's folder for temporary files, which nobody needs after it."""

_SOCKET_PATH = 107  # bytes that the path of a Unix socket may have
_REMOVALS, _REMOVAL_S = 100, 0.05
_NAME = 64  # of them, for what is below TMPDIR: this folder's name, and the longest that vLLM, torch and Python choose


def _make_scratch() -> str:
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > _SOCKET_PATH - _NAME:
        base = "/tmp"
    return tempfile.mkdtemp(prefix="metis-", dir=base)


def _torch_cache() -> str:
    """Where torch keeps what it has compiled, below TMPDIR; a worker that starts without it waits for a compiler."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        name = f"uid_{os.getuid()}"
    return str(Path(tempfile.gettempdir()) / f"torchinductor_{name}")


class Child:
    """A process of this machine, in a group of its own.

    command: after the Python interpreter. environment: all of it. log: takes its output, after what is there. scratch: give it
    a folder for temporary files (TMPDIR) that is removed with it; vLLM leaves some behind however it ends.

    Raises:
        OSError: the log or the folder cannot be made, or no process be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, scratch: bool) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = _make_scratch() if scratch else ""
        self._gone = False  # killed, with its group
        own = {"TMPDIR": self._scratch, SCRATCH: self._scratch} if scratch else {}
        kept = {"TORCHINDUCTOR_CACHE_DIR": _torch_cache()} if scratch else {}
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**kept, **environment, **own},
                    start_new_session=True,  # Ctrl-C is for the run; and it ends with all that it started
                )
        except BaseException:  # Ctrl-C, too: it goes on, and no folder stays behind
            remove_scratch(self._scratch)
            raise

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End it and all that it started, and remove its temporary files. May be called twice.

        One that does not go, since a device's driver or a file system holds it, is left where it is.
        """
        if self._gone:
            return  # the number may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(_GONE_S)
            self._gone = True
        except subprocess.TimeoutExpired:
            _LOG.warning("process %d was killed %g s ago and is still there; it is left alone", self._process.pid, _GONE_S)
        remove_scratch(self._scratch)


def remove_scratch(folder: str) -> None:
    """The folder that SCRATCH names, and all that is in it; nothing if that is empty.

    Tried again while it is there: threads of the worker, and what it has started, may put a file in it meanwhile.
    """
    for _ in range(_REMOVALS if folder else 0):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(_REMOVAL_S)


class _Local:
    def __init__(self, child: Child, log: Path, ended: Callable[[_Local], None]) -> None:
        self._child, self._log, self._ended = child, log, ended

    def exit_code(self) -> int | None:
        return self._child.exit_code()

    def kill(self) -> None:
        self._child.kill()
        self._ended(self)

    def describe(self) -> str:
        return str(self._log)


class LocalLauncher:
    """Workers of this machine, each with a log in `logs`.

    gpus: ids, as CUDA_VISIBLE_DEVICES takes them, that jobs get, the same ones whenever a job is started again. withheld:
    variables of this process (keys) that a job has only if it asks for them.
    """

    def __init__(self, logs: Path, gpus: Sequence[str] = (), withheld: Collection[str] = ()) -> None:
        self._logs = logs
        self._withheld = frozenset(withheld)
        self._free = list(gpus)
        self._gpus: dict[str, list[str]] = {}
        self._running: set[_Local] = set()
        self._lock = threading.Lock()
        self._closed = False

    def start(self, job: Job) -> Process:
        """See `Launcher`."""
        log = self._logs / f"{job.name}.log"
        with self._lock:
            if self._closed:
                raise ConfigError("the run ends")
            try:
                own = {name: value for name, value in os.environ.items() if name not in self._withheld}
                child = Child(job.command, {**own, **self._visible(job), **job.environment}, log, scratch=True)
            except OSError as error:
                raise ConfigError(f"cannot start worker {job.name}: {error.strerror} ({error.filename or log})") from None
            started = _Local(child, log, self._running.discard)
            self._running.add(started)
            return started

    def _visible(self, job: Job) -> dict[str, str]:
        if not job.gpus:
            return {}
        if job.name not in self._gpus:
            if job.gpus > len(self._free):
                raise ConfigError(
                    f"worker {job.name} needs {job.gpus} GPUs of this machine, {len(self._free)} are left beside those of the "
                    "trainer's ranks and of other workers; lower rollout.vllm.replicas or tensor_parallel, set "
                    "rollout.vllm.sleep=true for engines that share the ranks' GPUs, or workers.launcher=ray"
                )
            self._gpus[job.name], self._free = self._free[: job.gpus], self._free[job.gpus :]
        return {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus[job.name])}

    def close(self) -> None:
        """See `Launcher`."""
        with self._lock:  # what is being started is there then, and nothing more comes
            self._closed = True
        for process in list(self._running):
            process.kill()
