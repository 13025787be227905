"""Segments: files in shared memory, each with one version of the weights or none.

A segment has a header of `HEADER` bytes (magic, version, digest of the manifest), then the data. While it is written its
version is -1. Its owner holds a lock on it (flock) as long as it lives; what nobody holds was left by a process that died, and
the next one that opens segments removes it. A lock tells that better than the process id in the name, which another process may
have by now, or a process in another container.

Plain files and mmap rather than `multiprocessing.shared_memory`, whose resource tracker (Python 3.11) removes a segment when
any process that had it open ends.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metis_fast.errors import EngineError, SyncError
from metis_fast.sync.manifest import Manifest, Place

FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")  # whatever a process's own TMPDIR is
HEADER = 64
THREADS = min(8, os.cpu_count() or 1)

_PREFIX = "metis-fast-weights-"
_HEAD = struct.Struct("<8sq32s")
_MAGIC = b"MFWEIGHT"
_WRITING = -1


def free_bytes() -> int:
    """Of the file system of shared memory."""
    found = os.statvfs(FOLDER)
    return found.f_bavail * found.f_frsize


def remove_stale() -> None:
    """Remove the segments of processes that died."""
    for path in FOLDER.glob(f"{_PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # gone, or somebody else's
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:  # its owner lives
            pass
        finally:
            os.close(fd)


def create(count: int, num_bytes: int) -> tuple[Segment, ...]:
    """New segments for so many bytes of data each; their memory is reserved.

    Raises:
        EngineError: there is not so much shared memory, or this is not Linux.
    """
    if not hasattr(os, "posix_fallocate"):
        raise EngineError("weights for other processes are staged in shared memory as Linux has it; use rollout.engine=native")
    remove_stale()
    need, free = count * (num_bytes + HEADER), free_bytes()
    if need > free:
        raise EngineError(
            f"{count} weight versions need {need / 1e6:.0f} MB of {FOLDER}, which has {free / 1e6:.0f} MB free; enlarge it "
            f"(containers: --shm-size; otherwise mount -o remount,size=…) or free some of it"
        )
    token = secrets.token_hex(4)
    made: list[Segment] = []
    try:
        for index in range(count):
            made.append(Segment(f"{_PREFIX}{os.getpid()}-{token}-{index}", num_bytes))
    except OSError as error:
        for segment in made:
            segment.close()
        if error.errno != errno.ENOSPC:
            raise
        raise EngineError(
            f"{FOLDER} has no room for {count} weight versions of {num_bytes / 1e6:.0f} MB; enlarge it "
            "(containers: --shm-size) or free some of it"
        ) from None
    return tuple(made)


class Segment:
    """A segment of this process's own."""

    def __init__(self, name: str, num_bytes: int) -> None:
        self.name = name
        path = FOLDER / name
        while True:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(self._fd), path.stat()):
                break
            os.close(self._fd)  # taken for stale between these two calls
        try:
            # a write into shared memory that is not there is no error but SIGBUS
            os.posix_fallocate(self._fd, 0, HEADER + num_bytes)
            self._map = mmap.mmap(self._fd, HEADER + num_bytes)
        except BaseException:  # whatever it is, it goes on, and no shared memory stays behind
            self.close()
            raise
        self.data = np.frombuffer(self._map, np.uint8)[HEADER:]
        self.begin()

    def begin(self) -> None:
        """From here on it holds no version."""
        _HEAD.pack_into(self._map, 0, _MAGIC, _WRITING, bytes(32))

    def finish(self, manifest: Manifest) -> None:
        """The data are those of the manifest."""
        _HEAD.pack_into(self._map, 0, _MAGIC, manifest.version, bytes.fromhex(manifest.digest))

    def close(self) -> None:
        """Remove it. What another process has mapped stays there until that lets go."""
        (FOLDER / self.name).unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Opened:
    """Somebody's segment, mapped for reading.

    Raises:
        SyncError: it is not there, is cut short, or does not hold the manifest's version.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        what, expected = f"weight version {manifest.version}", HEADER + manifest.num_bytes
        if Path(manifest.segment).name != manifest.segment:
            raise SyncError(f"{what}: expected the name of a segment in {FOLDER}, got {manifest.segment!r}")
        path = FOLDER / manifest.segment
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected:
                    raise SyncError(f"{what}: {path} has {size} bytes, expected {expected}; stage the version again")
                # a private mapping: torch wants memory that it could write to, and nothing may reach the owner's
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise SyncError(
                f"{what}: there is no {path} on this machine; a run that ended removes its segments, and those of another "
                "machine cannot be read here"
            ) from None
        self.check_holds()
        self.data = np.frombuffer(self._map, np.uint8)[HEADER:]

    def check_holds(self) -> None:
        """Whether the segment holds the version, still.

        Raises:
            SyncError: it holds another one, or is being written.
        """
        magic, version, digest = _HEAD.unpack_from(self._map, 0)
        if magic != _MAGIC:
            raise SyncError(f"{FOLDER / self._manifest.segment} is no segment of weights")
        if version != self._manifest.version or digest.hex() != self._manifest.digest:
            held = "is being written" if version == _WRITING else f"holds weight version {version} ({digest.hex()[:16]})"
            raise SyncError(
                f"{FOLDER / self._manifest.segment} {held}, expected version {self._manifest.version} "
                f"({self._manifest.digest[:16]}); ask for the newest one"
            )


def tensor_at(data: npt.NDArray[np.uint8], place: Place) -> Tensor:
    """A tensor of a segment's data, sharing its memory."""
    raw = torch.from_numpy(data[place.offset : place.offset + place.nbytes])
    return raw.view(getattr(torch, place.dtype)).view(place.shape)


def checksum(data: npt.NDArray[np.uint8]) -> int:
    """CRC-32, at 3.5 GB/s; zlib leaves Python's lock meanwhile."""
    return crc32(data.data)


def checksums(data: npt.NDArray[np.uint8], ranges: Sequence[tuple[int, int]], threads: int = THREADS) -> list[int]:
    """Of every (offset, nbytes)."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda at: checksum(data[at[0] : at[0] + at[1]]), ranges))
