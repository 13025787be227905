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
        """pid: its first process. scratch: its folder as it sees it, a file system of its own; "" if it has none.

        limit: bytes of memory; only what comes near to it is measured exactly.
        """
        self._pid = pid
        self._scratch = scratch
        self._limit = limit
        self._usage = Usage()
        self._last: dict[str, tuple[int, int]] = {}  # CPU time and delay of each thread, ns

    def measure(self) -> Usage:
        """What it uses now. Threads that began and ended since the last time are not in it."""
        processes: list[str] = []
        parents = {} if _TELLS_CHILDREN else _parents()
        todo, threads = [str(self._pid)], dict[str, tuple[int, int]]()
        while todo:
            process = todo.pop()
            try:
                tasks = os.listdir(f"/proc/{process}/task")
            except OSError:  # gone
                continue
            processes.append(process)
            for task in tasks:
                times = _read(f"/proc/{process}/task/{task}/schedstat").split()
                threads[task] = (int(times[0]), int(times[1])) if len(times) > 1 else (0, 0)
                todo += _read(f"/proc/{process}/task/{task}/children").decode("ascii").split() if _TELLS_CHILDREN else ()
            todo += parents.get(process, ())
        now, before = time.monotonic_ns(), self._usage
        none = (0, 0)
        passed = [(own - self._last.get(t, none)[0], delay - self._last.get(t, none)[1]) for t, (own, delay) in threads.items()]
        self._last = threads
        first = not before.at_ns  # what was used before is for the start of the session
        delay = 0 if first else min(now - before.at_ns, max((delay for _, delay in passed), default=0))
        self._usage = Usage(
            cpu_ns=0 if first else before.cpu_ns + sum(max(0, own) for own, _ in passed),
            delay_ns=before.delay_ns + max(0, delay),
            memory=self._memory(processes),
            tasks=len(threads),
            at_ns=now,
        )
        return self._usage

    def _memory(self, processes: list[str]) -> int:
        files = self._files()
        resident = 0
        for process in processes:
            sizes = _read(f"/proc/{process}/statm").split()
            resident += int(sizes[1]) * _PAGE if len(sizes) > 1 else 0
        if resident + files <= self._limit:
            return resident + files
        # Pages that processes share were counted for each of them, those of the warm interpreter above all.
        kilobytes = 0
        for process in processes:
            kilobytes += sum(int(size) for size in _ANONYMOUS.findall(_read(f"/proc/{process}/smaps_rollup")))
        return kilobytes * 1024 + files

    def _files(self) -> int:
        if not self._scratch:
            return 0
        try:
            found = os.statvfs(f"/proc/{self._pid}/root{self._scratch}")
        except OSError:  # it is about to begin or has ended
            return 0
        return (found.f_blocks - found.f_bfree) * found.f_frsize
