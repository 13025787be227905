"""The warm server of Python sessions, seen from the trainer: starts it, opens sessions in it, keeps some ready.

Everything here is free of the running event loop, so that one toolbox serves several `asyncio.run` calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path

from metis_fast.config import PythonToolConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.machine import num_cores
from metis_fast.open_files import allow_files
from metis_fast.tools.python_session import End, SandboxProcess, SessionEndedError
from metis_fast.tools.sandbox.board import Board, Usage, make_board
from metis_fast.tools.sandbox.cgroups import make_group, remove_group
from metis_fast.tools.sandbox.warm import missing
from metis_fast.tools.sandbox.wire import READY, WATCH, Layers, Limits, WireError
from metis_fast.tools.slots import Slots

log = logging.getLogger(__name__)

_START_S = 60.0  # a cold import of numpy and Pillow on a loaded machine, with room
_CPU_CALLS = 20  # a session may use the CPU time of this many calls; the paper's rollouts have ten turns
_MAX_TASKS = 64  # processes and threads of a session
_SLOW = b"slow"
# sys.path is set by hand because the server ignores the caller's folder and PYTHONPATH, as `-I` would have it. Not `-I` itself:
# it also ignores PYTHONHASHSEED, which makes the order of sets repeat. The environment is ours, so nothing else differs.
# An alarm of the agent's that raises again and again must end before any function of ours is entered: each entry runs handlers.
_COMMAND = """
import signal, sys
sys.path.insert(0, sys.argv.pop(1))
from metis_fast.tools.sandbox.server import main
del sys.path[0]
for call in main():
    with call, call:
        try:
            for code in call:
                exec(code, call.scope)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
"""


def _environment() -> dict[str, str]:
    return {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",  # what a child has printed is there, also if it is killed
        "MALLOC_ARENA_MAX": "1",  # of 64 MiB of address space each, one a thread, they would use up the memory limit
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MPLBACKEND": "agg",  # a name that processes know which the agent's code starts; see `figures` for its own
    }


class PythonServer:
    """The warm server process. Restarted by the next `open` after it died."""

    def __init__(self, config: PythonToolConfig, scratch: Path) -> None:
        """Start it.

        Raises:
            ToolSetupError: it does not start, or no sandbox can be set up on this machine.
        """
        if not sys.platform.startswith("linux"):
            raise ToolSetupError(
                "the python tool needs Linux, with its sandbox or without (--unsafe-tools); remove `python` from tools.enabled"
            )
        self.limits = Limits(
            memory_mb=config.memory_mb,
            session_memory_mb=config.session_memory_mb,
            scratch_mb=config.scratch_mb,
            cpu_s=math.ceil(config.timeout_s * _CPU_CALLS),
            max_output_chars=config.max_output_chars,
            max_image_pixels=config.max_image_pixels,
            max_shown_mb=config.max_shown_mb,
            max_tasks=_MAX_TASKS,
            unsafe=config.unsafe,
        )
        self.slots = Slots(2 * num_cores())
        self._warm = config.warm
        self._pool_size = config.pool
        if absent := missing(config.warm):
            raise ToolSetupError(
                f"tools.python.warm: expected installed libraries, got {', '.join(config.warm)}; "
                f"pip install {' '.join(absent)}, or remove what is missing"
            )
        allow_files(1 << 15)  # a session takes three here
        self._scratch = scratch
        self._lock = threading.Lock()
        self._closed = False
        self._live: set[SandboxProcess] = set()
        self._pool: deque[SandboxProcess] = deque()
        self._numbers: list[int] = []  # of ended sessions, to be used again
        self._next_number = 1  # 0 is the server's own
        self.layers = Layers(False, False, 0, "watchdog")
        self._board = Board(make_board())
        try:
            self._folder, self._process, self._control = self._start()
        except ToolSetupError:
            os.close(self._board.fd)
            raise
        log.info("python tool: sessions are kept in by %s", self.layers if not config.unsafe else "nothing (unsafe)")
        self._refill()

    @property
    def pid(self) -> int:
        """PID of the server's outermost process."""
        return self._process.pid

    def _start(self) -> tuple[Path, subprocess.Popen[bytes], socket.socket]:
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="python-", dir=self._scratch))
        except OSError as error:
            raise ToolSetupError(f"cannot use scratch folder {self._scratch}: {error.strerror}; choose another") from None
        (folder / "root").mkdir()
        self._group = None if self.limits.unsafe else make_group(f"metis-{os.getpid()}-{folder.name}")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(__file__).resolve().parents[2])
        group = os.open(self._group, os.O_PATH | os.O_CLOEXEC) if self._group is not None else -1
        fds = [theirs.fileno(), self._board.fd, *([group] if group >= 0 else [])]
        places = [str(os.getpid()), str((folder / "root").resolve()), self.limits.to_json(), ",".join(self._warm)]
        with theirs, (folder / "log").open("wb") as written:
            process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-c", _COMMAND, root, *(str(fd) for fd in (*fds[:2], group)), *places],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=written,
                cwd="/",
                env=_environment(),
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer alone
            )
        if group >= 0:
            os.close(group)
        ours.settimeout(_START_S)
        try:
            answer = ours.recv(4096)
        except TimeoutError:
            answer = _SLOW
        except OSError as error:
            answer = f"error {error}".encode()
        if answer.startswith(READY):
            self.layers = Layers.from_json(answer.removeprefix(READY))
            return folder, process, ours
        process.kill()
        process.wait()
        ours.close()
        reason = answer.decode(errors="replace").removeprefix("error ") or _last_line(folder / "log") or "the server ended"
        self._remove(folder)
        if answer == _SLOW:
            raise ToolSetupError(
                f"the Python server did not start within {_START_S:g} s: the machine has too much to do; run again"
            )
        if self.limits.unsafe:
            raise ToolSetupError(f"the Python server did not start ({reason}); remove `python` from tools.enabled")
        raise ToolSetupError(
            f"no sandbox for the python tool on this machine ({reason}); allow unprivileged user namespaces and seccomp "
            "filters, or, on a machine that you can throw away, set tools.python.unsafe=true (--unsafe-tools)"
        )

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if self._group is not None:
            remove_group(self._group)

    def _stop(self) -> None:
        while self._pool:
            self.discard(self._pool.pop())
        self._control.close()  # the server ends by itself, and with it all sessions
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._remove(self._folder)

    def _ensure_alive(self) -> None:
        with self._lock:
            if self._closed:
                raise InfrastructureError("the toolbox is closed")
            if self._process.poll() is None:
                return
            self._stop()
            try:
                self._folder, self._process, self._control = self._start()
            except ToolSetupError as error:
                raise InfrastructureError(f"the Python server died and did not start again: {error}") from None

    def _begin(self) -> SandboxProcess:
        """Have the server fork a session, and do not wait for it. Raises OSError."""
        number = self._numbers.pop() if self._numbers else self._next_number
        self._next_number = max(self._next_number, number + 1)
        self._board.clear(number)
        process = SandboxProcess(number, self.limits)
        try:
            process.send(self._control)
        except OSError:
            self.discard(process)
            raise
        return process

    def _refill(self) -> None:
        """Have as many sessions ready as wanted; they start while nobody waits for them."""
        with contextlib.suppress(OSError):  # the server died, or there are no more descriptors: `open` will see
            while not self._closed and len(self._pool) < self._pool_size:
                self._pool.append(self._begin())

    async def open(self) -> SandboxProcess:
        """A fresh session: one that is ready, or else a new one.

        Raises:
            InfrastructureError: the server died, or cannot fork.
        """
        if self._closed or self._process.poll() is not None:
            await asyncio.to_thread(self._ensure_alive)
        while self._pool:
            process = self._pool.popleft()
            if await self._is_ready(process):
                return process
        try:
            process = self._begin()
        except OSError as error:
            raise InfrastructureError(f"cannot open a Python session: {error}") from None
        if not await self._is_ready(process):
            reason = _last_line(self._folder / "log") or "it ended at once, or did not start in time"
            raise InfrastructureError(f"cannot open a Python session: {reason}")
        return process

    async def _is_ready(self, process: SandboxProcess) -> bool:
        """Whether a session has started and lives; one that does not is discarded."""
        ready = False
        try:
            async with asyncio.timeout(_START_S):
                await process.ready()
            ready = not process.has_more  # its end
        except (OSError, SessionEndedError, WireError):  # a TimeoutError is an OSError
            pass
        finally:
            if ready:
                self._live.add(process)
            else:
                self.discard(process)
        return ready

    def set_running(self, process: SandboxProcess, running: bool) -> None:
        """Say that a call of the session begins or ends."""
        if not self._closed:
            self._board.set_running(process.number, running)

    def watch(self) -> None:
        """Have the server measure sessions in which a call runs, until none does."""
        if self._closed:
            return
        poll = select.poll()
        with contextlib.suppress(OSError, ValueError):  # it is gone, or closed by the thread that starts the next one
            poll.register(self._control, select.POLLOUT)
            if poll.poll(0):  # otherwise it has not yet read what it was told before
                self._control.send(WATCH)

    def usage(self, process: SandboxProcess) -> Usage:
        """What a session used when it was last measured."""
        return Usage() if self._closed else self._board.usage(process.number)

    async def end(self, process: SandboxProcess, by_itself: bool = False, in_call: bool = True) -> End:
        """End a session, see `SandboxProcess.end`."""
        try:
            end = await process.end(by_itself, in_call)
        finally:
            self._live.discard(process)
        if not self._closed:
            self._numbers.append(process.number)
            self._refill()
        return end

    def discard(self, process: SandboxProcess) -> None:
        """End a session without waiting for it. Its number is not used again: the server may still write of it."""
        process.discard()
        self._live.discard(process)

    def close(self) -> None:
        """Stop the server and every session, and remove its folder. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for process in self._live:
                process.discard()
            self._live.clear()
            self._stop()
            os.close(self._board.fd)


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip()), "")
