"""Temporary folders that end with their process, however that ends.

A process holds a lock (flock) on its folder as long as it lives. What nobody holds was left by a process that was killed, and
the next one that makes a folder of that kind removes it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path


class OwnFolder:
    """A new folder below `base`, whose name begins with `prefix`. Close it to remove it with all that is in it.

    Its lock is the kind that `checkpoint.atomic` takes of the folder above what it writes: give that a folder inside of it.

    Raises:
        OSError: there is no room, or it may not be made.
    """

    def __init__(self, base: Path, prefix: str) -> None:
        _remove_stale(base, prefix)
        while True:
            self.path = base / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
            self.path.mkdir(mode=0o700)
            self._fd = -1
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                if self.path.exists():
                    return
            except FileNotFoundError:
                pass
            self.close()  # taken for stale between these calls

    def close(self) -> None:
        """Remove it. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _remove_stale(base: Path, prefix: str) -> None:
    for path in base.glob(f"{prefix}*"):
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
