"""Limits of a whole session by the kernel, where this process may make control groups (cgroups(7), version 2).

The trainer makes a group beside its own, the warm server one in it for each session. Where that is not possible, or the
trainer's own group has a memory limit that the new one would not be under, the watchdog does it by polling.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from metis_fast.tools.sandbox.wire import Limits

_ROOT = Path("/sys/fs/cgroup")
_NEEDED = frozenset(("memory", "pids"))
_CPU = "cpu"  # where it is delegated: then each session gets as much of the processor as others, however many processes it has
_MEMORY, _PIDS = "memory.max", "pids.max"


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


def make_group(name: str, root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> Path | None:
    """A group for those of the sessions, or None where none can be made. root: where the hierarchy is mounted."""
    if _NEEDED.difference(_words(root / "cgroup.controllers")):
        return None
    lines = membership.read_text(encoding="ascii", errors="replace").splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None or ".." in own.split("/"):  # not within what is mounted here
        return None
    parent = (root / own).parent if own else root  # a group has processes or groups with limits, not both; the root may
    if own and _words(root / own / _MEMORY) != ["max"]:
        return None
    delegated = _words(parent / "cgroup.subtree_control")
    if _NEEDED.difference(delegated):
        return None
    group = parent / name
    try:
        group.mkdir()
        (group / "cgroup.subtree_control").write_text(
            " ".join(f"+{name}" for name in (*sorted(_NEEDED), *([_CPU] if _CPU in delegated else []))), encoding="ascii"
        )
    except OSError:
        remove_group(group)
        return None
    return group


def remove_group(group: Path) -> None:
    """Remove it when its processes have ended; the kernel may take a moment to see that."""
    for _ in range(50):
        try:
            for inner in group.iterdir():
                if inner.is_dir():
                    inner.rmdir()
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
        else:
            return


class Cgroups:
    """The groups of sessions, by number, in the server."""

    def __init__(self, folder: int, limits: Limits) -> None:
        """folder: descriptor of the group that `make_group` made."""
        self._folder = folder
        self._serial = 0
        self._names: dict[int, str] = {}
        self._left: list[str] = []  # ended, but not yet for the kernel
        self._values = {
            _MEMORY: str(limits.session_memory_mb << 20),
            "memory.swap.max": "0",
            "memory.oom.group": "1",
            _PIDS: str(limits.max_tasks),
        }

    def _write(self, path: str, text: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._folder)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def make(self, number: int) -> None:
        """Make the group of a session, with its limits. Raises OSError."""
        self._serial += 1
        name = f"{number}-{self._serial}"  # what happened in one of another session of that number is not this one's
        os.mkdir(name, dir_fd=self._folder)
        self._names[number] = name
        self.limit(name)

    def limit(self, name: str) -> None:
        """Give a group its limits. Raises OSError."""
        for kind, value in self._values.items():
            with contextlib.suppress(FileNotFoundError):  # no swap in this kernel, or older than memory.oom.group
                self._write(f"{name}/{kind}", value)

    def enter(self, number: int) -> None:
        """Put the calling process there. Raises OSError."""
        self._write(f"{self._names[number]}/cgroup.procs", "0")

    def was_full(self, number: int) -> bool:
        """Whether the kernel has killed because of its memory limit, and not because the machine was short of memory."""
        try:
            fd = os.open(f"{self._names[number]}/memory.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._folder)
        except OSError:
            return False
        with os.fdopen(fd, encoding="ascii") as file:
            counts = dict(line.split() for line in file)
        # the second also counts kills for which the limit was not the reason
        return int(counts.get("oom", 0)) > 0 and int(counts.get("oom_kill", 0)) > 0

    def remove(self, number: int) -> None:
        """Once its processes have ended; where the kernel has not yet seen that, it is tried again with the next one."""
        if number in self._names:
            self._left.append(self._names.pop(number))
        left, self._left = self._left, []
        for name in left:
            try:
                os.rmdir(name, dir_fd=self._folder)
            except OSError:
                self._left.append(name)

    def works(self) -> bool:
        """Whether a process can be put into such a group, tried with one."""
        number = 0
        try:
            self.make(number)
            child = os.fork()
            if not child:
                status = 1
                try:
                    self.enter(number)
                    status = 0
                finally:
                    os._exit(status)
            return os.waitpid(child, 0)[1] == 0
        except OSError:
            return False
        finally:
            self.remove(number)
