"""A rank as the run sees it: its process, which may be another machine's, its connection, and how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from metis_fast.machine import PARENT
from metis_fast.train.megatron.wire import KEY, Channel, Died, Message
from metis_fast.workers.launch import Process

_GONE_S = 5.0  # for killed ones


@dataclass(slots=True)
class Peer:
    """process, log: None if it was not started here. placed: if Ray has started it. channel: None until it has joined.
    host: "" until then. pinged: when, if unanswered."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    placed: Process | None = None
    channel: Channel | None = None
    host: str = ""
    pinged: float | None = None

    def __str__(self) -> str:
        return f"rank {self.number}" + (f" on {self.host}" if self.process is None else "")

    @property
    def output(self) -> str:
        """Where to read what it has written, as the end of a sentence."""
        if self.placed is not None:
            return f" (log: {self.placed.describe()})"
        return " (its output is where its launcher puts it)" if self.log is None else f" (log: {self.log})"

    def last_word(self) -> Message | None:
        """What it has sent; None if it has hung up."""
        assert self.channel is not None
        try:
            return self.channel.receive()
        except (EOFError, OSError):
            return None

    def status(self, limit_s: float) -> int | None:
        """Exit code, if it has ended within the limit, as far as it can be known; minus the signal."""
        if self.process is not None:
            return _ended(self.process, limit_s)
        deadline = time.monotonic() + limit_s
        while self.placed is not None:
            status = self.placed.exit_code()
            if status is not None or time.monotonic() >= deadline:
                return status
            time.sleep(0.05)
        return None

    def ending(self, died: Died | None) -> str:
        """How it ended. died: what it has said of that itself."""
        status = self.status(_GONE_S)
        if status is None:
            how = "ended" if died is not None else "ended without a word (killed?)"
        elif status >= 0:
            how = f"ended with exit code {status}"
        else:
            how = f"was killed by {signal.Signals(-status).name}"
            how += " (by the kernel, if memory ran out)" if status == -signal.SIGKILL else ""
        last = died.error if died is not None else _tail(self.log)
        return f"{self} {how}{f': {last}' if last else ''}{self.output}"

    def kill(self) -> None:
        """End it and what it forked, now: by signal on this machine, and by hanging up. `bury` must follow."""
        if self.process is not None and self.process.returncode is None:
            # not reaped yet, so the number is still its group's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def bury(self) -> None:
        """End it through Ray, if that has placed it, and wait until it is gone."""
        if self.placed is not None:
            self.placed.kill()
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GONE_S)


def start(number: int, num_ranks: int, where: str, key: str, logs: Path, withheld: Collection[str] = ()) -> Peer:
    """Start a rank on this machine, which joins at `where`. withheld: variables of our environment that it does not get."""
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"rank-{number}.log"
    cores = len(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // num_ranks)),
        "GLOO_SOCKET_IFNAME": "lo",
        **{name: value for name, value in os.environ.items() if name not in withheld},
        "LOCAL_RANK": str(number),
        KEY: key,
        PARENT: str(os.getpid()),
    }
    with log.open("wb") as output:  # a file: a pipe that nobody reads would stop the rank
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "metis_fast", "rank", "--join", where, "--rank", str(number)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is for the run alone
        )
    return Peer(number, process, log)


def names(numbers: Sequence[int]) -> str:
    """ "rank 3" or "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"


def _ended(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Exit code, or minus the signal, of a process that has ended within the limit; it is left for `wait` to reap."""
    deadline = time.monotonic() + limit_s
    while True:
        status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is not None:
            return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.01)


def _tail(log: Path | None) -> str:
    """The last lines of a log, as one."""
    if log is None:
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(line.strip() for line in [line for line in lines if line.strip()][-3:])[-500:]
