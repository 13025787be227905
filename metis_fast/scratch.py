"""Files that are replaced whole or not at all: written under a hidden name beside their place, then renamed.

The hidden file goes with whatever ends its writer: an error, Ctrl-C, SIGTERM, a closed terminal. After a SIGKILL it stays until
somebody writes the same file again. A writer holds a lock (flock) on it, so that one that is still at work is left alone.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ENDS = (signal.SIGTERM, signal.SIGHUP)  # what ends a process without a word, unless it has said otherwise
_NAME = 200  # bytes of a name that are kept, of the 255 that it may have


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield the path of an empty file to fill; when the block ends it is renamed to `path`. A link is followed.

    Raises:
        KeyboardInterrupt: SIGTERM or SIGHUP came; `path` is as it was.
        OSError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    stem = f".{os.fsencode(target.name)[:_NAME].decode('utf-8', 'ignore')}."
    with stopped_by_signals():
        _remove_stale(target.parent, stem)
        scratch, lock = _made(target.parent, stem)
        try:
            yield scratch
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)
            os.close(lock)


def _made(folder: Path, stem: str) -> tuple[Path, int]:
    while True:
        scratch = folder / f"{stem}{secrets.token_hex(4)}.tmp"
        lock = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if scratch.exists():
            return scratch, lock
        os.close(lock)  # taken for stale between these calls


def _remove_stale(folder: Path, stem: str) -> None:
    try:
        ours = re.compile(re.escape(stem) + r"[0-9a-f]{8}\.tmp")
        names = [name for name in os.listdir(folder) if ours.fullmatch(name)]
    except OSError:  # it may be written, and not be listed
        return
    for name in names:
        with suppress(OSError):  # gone, or somebody else's, or its writer lives, or there are no locks
            lock = os.open(folder / name, os.O_WRONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (folder / name).unlink()
            finally:
                os.close(lock)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop the block as Ctrl-C does, so that it cleans up. Who handles them already, ignores them, or runs
    in another thread, goes on so.

    Raises:
        KeyboardInterrupt: one came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in _ENDS if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
