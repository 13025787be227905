"""The folder of a run: made before anything else is, and used by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from metis_fast.errors import ConfigError

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems have none


@contextmanager
def held(folder: Path, setting: str = "run.dir") -> Iterator[None]:
    """Make the folder, and keep other processes out of it while the block runs. The lock dies with its process. A folder that
    was made here and got nothing in it is removed. setting: what names the folder, for messages.

    Raises:
        ConfigError: it cannot be made or written, or another process holds it.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = "a file stands there" if error.errno in (errno.EEXIST, errno.ENOTDIR) else error.strerror
        raise ConfigError(
            f"cannot write into the folder {folder}: {why}; set {setting} to a folder that you can write"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is running in {folder}; wait until it has ended, or set another {setting}"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        if is_new:
            with suppress(OSError):  # another process came in just now
                if os.listdir(folder) == [_LOCK]:
                    (folder / _LOCK).unlink()
                    folder.rmdir()
        os.close(lock)
