"""Folders that appear on disk whole or not at all, whatever kills the process or fills the disk in between.

A folder is written under a `.tmp-` name beside its target, flushed, and renamed. Replacing an existing target needs two
renames (the old one aside, the new one in), since Linux renames no folder onto a full one; `clean_leftovers` undoes the first
rename if the process died before the second.

A writer holds a shared `flock` on the parent folder, `clean_leftovers` asks for an exclusive one and goes away without it, so
that a reader which opens the folder of a live run never removes what is just being written. The lock dies with its process.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TMP = ".tmp-"
_ASIDE = ".aside-"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends it is flushed to disk and becomes `target`.

    An existing `target` is replaced, and untouched until the new one is complete. If the block or the flush raises, the new
    folder is removed and the error goes on. Modes of files follow the umask.

    Raises:
        OSError: the parent folder is missing, read-only or full.
    """
    tmp = target.parent / f"{_TMP}{target.name}-{secrets.token_hex(4)}"
    with _locked(target.parent, exclusive=False):
        tmp.mkdir()
        try:
            yield tmp
            _let_others_read(tmp)
            _flush_tree(tmp)
            _put_in_place(tmp, target)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)  # gone already if it became the target


def remove_folder(path: Path) -> None:
    """Remove a folder; it loses its name first, so that a half-removed one is never taken for a whole one.

    Raises:
        OSError: it cannot be renamed.
    """
    doomed = path.parent / f"{_TMP}{path.name}-{secrets.token_hex(4)}"
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean_leftovers(parent: Path, name: str = "") -> None:
    """Remove what killed writers left in `parent`, and finish or undo their replacements; a live writer is left alone.

    name: only leftovers of targets whose name starts so.

    Raises:
        OSError: `parent` cannot be read or written.
    """
    with _locked(parent, exclusive=True) as alone:
        if not alone:
            return
        for path in sorted(parent.iterdir()):
            if path.name.startswith(f"{_TMP}{name}"):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(f"{_ASIDE}{name}"):
                target = parent / path.name.removeprefix(_ASIDE)
                if target.exists():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.rename(target)


def _put_in_place(tmp: Path, target: Path) -> None:
    aside = target.parent / f"{_ASIDE}{target.name}"
    replaces = target.exists()
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    try:
        tmp.rename(target)
    except OSError:
        if replaces:
            aside.rename(target)
        raise
    _flush(target.parent)
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)


def _let_others_read(folder: Path) -> None:
    """As the umask has it for the folder: safetensors writes through temporary files, which are for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root) / name
            if mode & ~path.stat().st_mode:
                path.chmod(mode)


def _flush_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _flush(Path(root) / name)
        _flush(Path(root))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path, *, exclusive: bool) -> Iterator[bool]:
    """Hold a lock on a folder: shared ones are waited for, an exclusive one is not. Yields whether it is safe to go on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
            free = True
        except BlockingIOError:
            free = False
        except OSError:
            free = True  # no flock here (Lustre mounted without it): one writer a folder is then up to the user
        try:
            yield free
        finally:
            if free:
                _unlock(descriptor)
    finally:
        os.close(descriptor)


def _unlock(descriptor: int) -> None:
    # Closing is not enough: a child process forked meanwhile holds the same lock until it ends.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError:
        return
