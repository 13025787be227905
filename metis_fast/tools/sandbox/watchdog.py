"""What a session uses, of all its processes together, read from /proc by the warm server: no limit of the kernel's counts that.

Costs about 0.1 ms for a session of one process.
"""

from __future__ import annotations

import os
import re
import time

from metis_fast.tools.sandbox.board import Usage

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TELLS_CHILDREN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")  # few kernels do not
_ANONYMOUS = re.compile(rb"^(?:Pss_Anon|SwapPss): +(\d+) kB", re.MULTILINE)
_NUMBERS = re.compile(rb"^NSpid:.*\s(\d+)$", re.MULTILINE)  # of a task; the last is the one in its own namespace
_SOCKETS = re.compile(rb"^sockets: used (\d+)", re.MULTILINE)
_MOST_PROCESSES = 256  # in one look: there are fewer, but a chain of ever new ones could be followed for ever
_FREE_SOCKETS = 256  # so many are nobody's business
_EXACT_S = 0.03  # of CPU time, to measure exactly in one look: others wait for the server meanwhile
_UNSEEN_CPU_NS, _UNSEEN_DELAY_NS = 1_000_000, 20_000_000  # of a task that began and ended between two looks


def _read(path: str) -> bytes:
    """Nothing where the process or thread is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 1 << 16)
    except OSError:  # it has ended since
        return b""
    finally:
        os.close(fd)


def _socket_bytes() -> int:
    """What a socket can hold of what was sent and not yet received, about."""
    return int(_read("/proc/sys/net/core/wmem_default") or 0) * 4 // 3


def _number(tasks: list[str]) -> int:
    """The highest number of tasks in the session's own namespace: it counts them. 0 where they have all ended."""
    for task in sorted(tasks, key=int, reverse=True)[:4]:
        if found := _NUMBERS.search(_read(f"/proc/{task}/status")):
            return int(found[1])
    return 0


def _parents() -> dict[str, list[str]]:
    """All processes that there are, by their parents."""
    found: dict[str, list[str]] = {}
    for process in filter(str.isdigit, os.listdir("/proc")):
        fields = _read(f"/proc/{process}/stat").rpartition(b")")[2].split()
        if len(fields) > 1:
            found.setdefault(fields[1].decode("ascii"), []).append(process)
    return found


class Watch:
    """Measures one session again and again."""

    def __init__(self, pid: int, scratch: str, limit: int) -> None:
        """pid: its first process. scratch: its folder as it sees it, a file system of its own; "" if it has none, and no other
        namespace either.

        limit: bytes of memory; only what comes near to it is measured exactly.
        """
        self._pid = pid
        self._scratch = scratch
        self._limit = limit
        self._usage = Usage()
        self._last: dict[str, tuple[int, int]] = {}  # CPU time and delay of each thread, ns
        self._num_begun = 0  # tasks, ever
        self._socket_bytes = _socket_bytes()
        self._unmeasured: list[str] = []  # of an exact measurement that goes on
        self._measured = 0  # bytes of the others
        self._exact = 0  # what the last one gave

    @property
    def tasks(self) -> int:
        """Processes and threads when it was last measured."""
        return self._usage.tasks

    def measure(self) -> Usage:
        """What it uses now. Threads that began and ended since the last time are not in it, but for an estimate."""
        processes: list[list[str]] = []  # paths of the threads of each
        parents = {} if _TELLS_CHILDREN else _parents()
        todo, threads = [str(self._pid)], dict[str, tuple[int, int]]()
        while todo and len(processes) < _MOST_PROCESSES:
            process = todo.pop()
            try:
                tasks = os.listdir(f"/proc/{process}/task")
            except OSError:  # gone
                continue
            processes.append([f"/proc/{process}/task/{task}" for task in tasks])
            for task in tasks:
                times = _read(f"/proc/{process}/task/{task}/schedstat").split()
                threads[task] = (int(times[0]), int(times[1])) if len(times) > 1 else (0, 0)
                todo += _read(f"/proc/{process}/task/{task}/children").decode("ascii").split() if _TELLS_CHILDREN else ()
            todo += parents.get(process, ())
        now, before = time.monotonic_ns(), self._usage
        none = (0, 0)
        passed = [(own - self._last.get(t, none)[0], delay - self._last.get(t, none)[1]) for t, (own, delay) in threads.items()]
        unseen = self._unseen([task for task in threads if task not in self._last])
        self._last = threads
        first = not before.at_ns  # what was used before is for the start of the session
        delay = 0 if first else min(now - before.at_ns, max((delay for _, delay in passed), default=0))
        guess = min(now - before.at_ns, unseen * _UNSEEN_CPU_NS)
        self._usage = Usage(
            cpu_ns=0 if first else before.cpu_ns + sum(max(0, own) for own, _ in passed) + guess,
            # or a session could keep itself from running, with children too short-lived to be seen
            delay_ns=before.delay_ns + max(0, delay - unseen * _UNSEEN_DELAY_NS),
            memory=self._memory(processes),
            tasks=len(threads),
            at_ns=now,
        )
        return self._usage

    def _unseen(self, new: list[str]) -> int:
        """How many tasks began and ended since the last time. new: those that began and are there."""
        begun = _number(new) if new and self._scratch else 0
        if not begun:
            return 0
        before, self._num_begun = self._num_begun, begun
        return max(0, begun - before - len(new)) if before else 0

    def _memory(self, processes: list[list[str]]) -> int:
        resident = 0
        living: list[str] = []  # a thread of each process; the first one, for which the process stands in /proc, may have ended
        for threads in processes:
            for thread in threads:
                sizes = _read(f"{thread}/statm").split()
                if len(sizes) > 1 and sizes[0] != b"0":
                    resident += int(sizes[1]) * _PAGE
                    living.append(thread)
                    break
        rest = self._files(processes[0]) + self._in_sockets(living) if processes else 0
        if resident + rest <= self._limit:
            self._unmeasured, self._exact = [], 0
            return resident + rest
        # Pages that processes share were counted for each of them, those of the warm interpreter above all.
        return self._exact_memory(living, rest) + rest

    def _exact_memory(self, living: list[str], rest: int) -> int:
        """Of all processes; where they have much, over several looks: until then it is what the last measurement gave."""
        at_once = not self._unmeasured
        if at_once:
            self._unmeasured, self._measured = list(living), 0
        until = time.thread_time() + _EXACT_S
        while self._unmeasured:
            self._measured += _exactly(self._unmeasured.pop())
            if time.thread_time() >= until:
                break
        if self._measured + rest > self._limit:
            self._measured = self._measured if at_once else sum(map(_exactly, living))  # not of several moments
            self._unmeasured = []
        if not self._unmeasured:
            self._exact = self._measured
        return self._exact or self._measured

    def _in_sockets(self, living: list[str]) -> int:
        if not living or not self._scratch:
            return 0
        found = _SOCKETS.search(_read(f"{living[0]}/net/sockstat"))
        return max(0, int(found[1]) - _FREE_SOCKETS) * self._socket_bytes if found else 0

    def _files(self, threads: list[str]) -> int:
        """threads: of the first process."""
        for thread in threads if self._scratch else ():
            try:
                found = os.statvfs(f"{thread}/root{self._scratch}")
            except OSError:  # it is about to begin or has ended
                continue
            return (found.f_blocks - found.f_bfree) * found.f_frsize
        return 0


def _exactly(thread: str) -> int:
    """Bytes of memory of its process, pages that it shares with others in parts."""
    return 1024 * sum(int(size) for size in _ANONYMOUS.findall(_read(f"{thread}/smaps_rollup")))
