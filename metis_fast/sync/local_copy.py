"""The receiver's side on another machine: buckets come by messages and become a staged version there.

copy.begin(manifest.to_dict(), staging.base(copy.version))
for payload in staging.payloads(base): copy.bucket(payload.index, payload.encoding, payload.data, payload.crc32)
copy.commit()  # the manifest of the copy, for a `Reader` of this machine
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from metis_fast.errors import SyncError
from metis_fast.sync.delta import decode
from metis_fast.sync.manifest import Manifest
from metis_fast.sync.segment import Segment, checksum, create


class LocalCopy:
    """Two segments in turn, as in `Staging`; made when the first version comes, for its size."""

    def __init__(self) -> None:
        self._segments: tuple[Segment, ...] = ()
        self._at = 0
        self._current: Manifest | None = None
        self._coming: Manifest | None = None
        self._base = False
        self._arrived: set[int] = set()

    def __enter__(self) -> LocalCopy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def version(self) -> int | None:
        """Of the last whole copy."""
        return None if self._current is None else self._current.version

    @property
    def current(self) -> Manifest | None:
        """The last whole copy."""
        return self._current

    def begin(self, manifest: Mapping[str, Any], base: int | None) -> None:
        """Expect the buckets of a version. What was begun before and not committed is forgotten.

        manifest: `Manifest.to_dict` of the sender's. base: version that the payloads are deltas against; None: they are full.

        Raises:
            SyncError: the manifest is damaged or of an older version, or the copy is not of version `base`.
            EngineError: shared memory has no room for two versions.
        """
        self.abort()
        coming, current = Manifest.from_dict(manifest), self._current
        if current is not None and coming.version < current.version:
            raise SyncError(f"weight version {coming.version} came after version {current.version}; expected a later one")
        if base is not None and (current is None or current.version != base or not _alike(current, coming)):
            raise SyncError(
                f"weight version {coming.version} is told against version {base}, but this machine has a copy of "
                f"{'none' if current is None else current.version}; send it in full"
            )
        if not self._segments or self._segments[0].data.nbytes != coming.num_bytes:
            self.close()
            self._segments = create(2, coming.num_bytes)
        target = self._segments[1 - self._at]
        target.begin()
        self._coming = replace(coming, segment=target.name)
        self._base = base is not None
        self._arrived.clear()

    def bucket(self, index: int, encoding: str, payload: npt.NDArray[np.uint8] | bytes | memoryview, crc: int) -> None:
        """Take a bucket; any order. One that was refused may be sent again. Fields of a `Payload`.

        Raises:
            SyncError: nothing was begun, there is no such bucket, or it did not arrive as it was sent.
        """
        coming = self._coming
        if coming is None or not 0 <= index < len(coming.buckets):
            raise SyncError(f"bucket {index} came, expected {'none' if coming is None else f'0 to {len(coming.buckets) - 1}'}")
        data = np.frombuffer(payload, np.uint8)
        what = f"weight version {coming.version}, {coming.in_bucket(index)}"
        if (found := checksum(data)) != crc:
            raise SyncError(f"{what}: payload of {data.nbytes} bytes has CRC-32 {found:08x}, expected {crc:08x}; send it again")
        bucket = coming.buckets[index]
        where = slice(bucket.offset, bucket.offset + bucket.nbytes)
        target = self._segments[1 - self._at].data[where]
        if self._base and encoding != "full":
            target[:] = self._segments[self._at].data[where]
        elif encoding != "full":
            raise SyncError(f"{what}: {encoding} came, expected all of it")
        decode(encoding, data, target, getattr(torch, coming.places[0].dtype).itemsize)
        if (found := checksum(target)) != bucket.crc32:
            self._arrived.discard(index)
            raise SyncError(
                f"{what}: {bucket.nbytes} bytes from {encoding} have CRC-32 {found:08x}, expected {bucket.crc32:08x}; "
                "send it again, in full"
            )
        self._arrived.add(index)

    def commit(self) -> Manifest:
        """The version is whole, every bucket verified: it is `current` from here on.

        Raises:
            SyncError: nothing was begun, or buckets did not come.
        """
        coming = self._coming
        if coming is None:
            raise SyncError("a weight version was to be committed, but none was begun")
        missing = [i for i in range(len(coming.buckets)) if i not in self._arrived]
        if missing:
            raise SyncError(
                f"weight version {coming.version}: {len(missing)} of {len(coming.buckets)} buckets did not come; "
                f"the first is {coming.in_bucket(missing[0])}; send them"
            )
        self._segments[1 - self._at].finish(coming)
        self._current, self._coming, self._at = coming, None, 1 - self._at
        return coming

    def abort(self) -> None:
        """Forget what was begun; the last whole copy stays."""
        self._coming = None
        self._arrived.clear()

    def close(self) -> None:
        """Remove both segments."""
        self.abort()
        for segment in self._segments:
            segment.close()
        self._segments, self._current = (), None


def _alike(a: Manifest, b: Manifest) -> bool:
    """Whether the same tensors lie in the same places."""
    return a.places == b.places and [x.offset for x in a.buckets] == [x.offset for x in b.buckets]
