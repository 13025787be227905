"""Jobs of several processes, started as an operator would, and found again by a mark in their environment."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from harness import HERE

SRUN = HERE / "fake_srun.py"
TWO_RANKS = (
    "train.backend=megatron",
    "train.megatron.pipeline_parallel=2",
    "data.heldout=[]",
    "eval.every=0",
    "log.progress=false",
)
_LIMIT_S = 600.0  # of machines that have other work, too


class Job:
    """A job started by a launch file. Whatever carries its mark in the environment belongs to it."""

    def __init__(self, command: Sequence[object], folder: Path, **environment: str) -> None:
        folder.mkdir()
        self.mark = f"METIS_TEST_JOB={folder}"
        self.err = folder / "err"
        own = {"METIS_TEST_JOB": str(folder), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
        with self.err.open("wb") as err:
            self._process = subprocess.Popen(
                list(map(str, command)), stdout=err, stderr=err, env=os.environ | own, start_new_session=True
            )
        self.pid = self._process.pid

    def wait(self, left_s: float = 60, limit_s: float = _LIMIT_S) -> int:
        """Its exit code; nothing of it is left, soon after its end."""
        code = self._process.wait(limit_s)
        deadline = time.monotonic() + left_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, left
        return code

    def processes(self, *words: str) -> list[psutil.Process]:
        """Of its processes, those with these words in their command lines; the stand-in for srun has those of its tasks."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = self.mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                line = process.cmdline()
            except (OSError, psutil.Error):
                continue
            if words and str(SRUN) in line:
                continue
            if mine and process.pid != self.pid and line and all(word in line for word in words):
                found.append(process)
        return found

    def when(self, happened: Callable[[], bool]) -> None:
        """Wait for something while it runs."""
        deadline = time.monotonic() + _LIMIT_S
        while not happened():
            assert self._process.poll() is None and time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.05)

    def end(self) -> None:
        """Leave nothing behind, whatever a test found."""
        for process in self.processes():
            process.kill()
        self._process.kill()
        self._process.wait()
