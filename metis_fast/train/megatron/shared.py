"""Files in shared memory that processes of one machine hand each other: groups on their way to ranks, weights on their way out.

A process has a folder of its own and holds a lock on it (flock) as long as it lives; what nobody holds was left by a process
that died, and the next one that makes a folder removes it (see `metis_fast.sync.segment`).
"""

from __future__ import annotations

import fcntl
import os
import pickle
import secrets
import shutil
from pathlib import Path

from metis_fast.sync.segment import FOLDER, free_bytes
from metis_fast.types import Group

_PREFIX = "metis-fast-ranks-"


class Shared:
    """A folder of this process's own. Close it to remove it with all that is in it."""

    def __init__(self) -> None:
        _remove_stale()
        while True:
            self._folder = FOLDER / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
            self._folder.mkdir(mode=0o700)
            self._fd = -1
            try:
                self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                if self._folder.exists():
                    return
            except FileNotFoundError:
                pass
            self.close()  # taken for stale between these calls

    def path(self, name: str) -> Path:
        """Of a file in it."""
        return self._folder / name

    def write(self, number: int, group: Group) -> Path:
        """A group into a file of its own.

        Raises:
            OSError: there is no room; `no_room` says what to do.
        """
        path = self.path(f"group-{number}")
        with path.open("wb") as file:
            pickle.dump(group, file, protocol=5)
        return path

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read(path: str) -> Group:
    """A group that was written by a process of this run."""
    with open(path, "rb") as file:
        return pickle.load(file)


def no_room(error: OSError) -> str:
    """What to say of a folder that cannot be written."""
    return (
        f"cannot hand groups to the ranks through {FOLDER} ({error.strerror or error}, {free_bytes() / 1e6:.0f} MB are free); "
        "it has to hold those of one step: enlarge it (containers: --shm-size) or lower rollout.prompts_per_step"
    )


def _remove_stale() -> None:
    for path in FOLDER.glob(f"{_PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # gone, or somebody else's
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:  # its owner lives
            pass
        finally:
            os.close(fd)
