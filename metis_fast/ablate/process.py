"""A process of `metis-fast train`, and what it cost.

Run as a module it becomes that command after it has asked the kernel to be told when its parent dies: a killed ablation leaves
no run behind that would stand in the way of the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_PR_SET_PDEATHSIG = 1
_KIB = 1024 if sys.platform == "darwin" else 1  # ru_maxrss is in bytes there


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended. code: its exit code, negative for a signal's number. cpu_s: seconds of it and of what it waited for.
    peak_mib: resident memory of the largest of these processes at its peak. why: its last line, if it failed.
    """

    code: int
    cpu_s: float
    wall_s: float
    peak_mib: float
    why: str = ""


class Started(Protocol):
    """A run that was started, wherever it is."""

    def poll(self) -> Ended | None:
        """None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to end at its next safe point."""
        ...

    def kill(self) -> None:
        """End it and all that it started, at once."""
        ...


class Process:
    """`metis-fast train CONFIG` on this machine. log: takes its output, after what is there."""

    def __init__(self, config: Path, log: Path) -> None:
        self._log, self._began = log, time.monotonic()
        with log.open("ab") as file:
            # in a session of its own: Ctrl-C of a terminal is for the ablation, which passes on one stop, not two
            self._process = subprocess.Popen(
                [sys.executable, "-m", "metis_fast.ablate.process", str(os.getpid()), "train", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> Ended | None:
        """None while it runs."""
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if not pid:
            return None
        code = self._process.returncode = os.waitstatus_to_exitcode(status)
        return Ended(
            code=code,
            cpu_s=usage.ru_utime + usage.ru_stime,
            wall_s=time.monotonic() - self._began,
            peak_mib=usage.ru_maxrss / _KIB / 1024,
            why=self._why(code) if code else "",
        )

    def _why(self, code: int) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:  # it was removed with the run's folder
            lines = []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        by = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{by}: {last[:400]}" if last else by

    def stop(self) -> None:
        """As SIGTERM does: the last whole step is saved."""
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        """With its whole session."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def main(arguments: Sequence[str]) -> None:
    """Become `metis-fast`. arguments: the process id of the parent, then those of the command line."""
    parent, *words = arguments
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGTERM))
        if os.getppid() != int(parent):  # it has died meanwhile
            sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-m", "metis_fast", *words])


if __name__ == "__main__":
    main(sys.argv[1:])
