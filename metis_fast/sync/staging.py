"""The sender's side: versions of the weights in shared memory, for the engines of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metis_fast.errors import SyncError
from metis_fast.sync.manifest import Bucket, Layout, Manifest, Place
from metis_fast.sync.reader import Reader
from metis_fast.sync.segment import THREADS, Segment, checksum, create, tensor_at


class Staging:
    """Two segments in turn: the version before the last is overwritten by the next one, the last whole one stays for engines
    that start again.

    Whoever writes waits until every engine has loaded the last version, or has given up on it.

    shapes: of all tensors, by Hugging Face names (`hf_shapes`). dtype: of all of them.

    Raises:
        EngineError: shared memory has no room for two versions.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, bucket_bytes: int) -> None:
        self.layout = Layout.of(shapes, dtype, bucket_bytes)
        self._dtype = dtype
        self._places = {place.name: place for place in self.layout.places}
        self._bytes_in = [0] * len(self.layout.ranges)  # what follows a tensor for alignment is never written
        for place in self.layout.places:
            for index, nbytes in self._parts(place):
                self._bytes_in[index] += nbytes
        self._segments = create(2, self.layout.num_bytes)
        self._at = 0
        self._current: Manifest | None = None
        self._damage = ""

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def current(self) -> Manifest | None:
        """The last whole version."""
        return self._current

    @property
    def damage(self) -> str:
        """What `examine` has found wrong with the current version, or ""."""
        return self._damage

    def tensors(self) -> dict[str, Tensor]:
        """Those of the current version, in shared memory, by name; the next one may be written while they are read."""
        if self._current is None:
            return {}
        data = self._segments[self._at].data
        return {place.name: tensor_at(data, place) for place in self.layout.places}

    def examine(self) -> str:
        """Read the current version as an engine would; returns `damage`. What is damaged can only be written again."""
        if self._current is not None and not self._damage:
            try:
                Reader(self._current)
            except SyncError as error:
                self._damage = str(error)
        return self._damage

    def write(self, weights: Iterator[tuple[str, Tensor]], version: int) -> Manifest:
        """Stage a version. Whatever is raised on the way, `current` is as it was.

        weights: all tensors, in any order, on any device; each is copied before the next one is asked for.

        Raises:
            ValueError: a tensor is missing, unknown, came twice, or is of another shape or dtype; or the version is not newer
                (that of a damaged one may come again).
        """
        if self._current is not None and version < self._current.version + (not self._damage):
            raise ValueError(f"weight version {version} came after version {self._current.version}")
        segment, layout = self._segments[1 - self._at], self.layout
        segment.begin()
        left = list(self._bytes_in)
        missing = dict(self._places)
        crcs: dict[int, Future[int]] = {}
        with ThreadPoolExecutor(THREADS) as pool:  # checksums of what is there, while the rest comes
            for name, tensor in weights:
                place = missing.pop(name, None)
                if place is None or place.shape != tuple(tensor.shape) or tensor.dtype != self._dtype:
                    known = self._places.get(name)
                    expected = f"{known.shape} {known.dtype}, once" if known else "no such tensor"
                    raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} came, expected {expected}")
                tensor_at(segment.data, place).copy_(tensor.detach())
                for index, nbytes in self._parts(place):
                    left[index] -= nbytes
                    if not left[index]:
                        crcs[index] = pool.submit(checksum, self._bucket(segment, index))
            if missing:
                raise ValueError(f"{len(missing)} tensors did not come ({', '.join(sorted(missing)[:3])})")
        manifest = Manifest.of(
            version,
            segment.name,
            layout.places,
            tuple(Bucket(offset, nbytes, crcs[i].result()) for i, (offset, nbytes) in enumerate(layout.ranges)),
        )
        segment.finish(manifest)
        self._current, self._at, self._damage = manifest, 1 - self._at, ""
        return manifest

    def _parts(self, place: Place) -> Iterator[tuple[int, int]]:
        """(bucket, bytes of the tensor in it)."""
        end = place.offset + place.nbytes
        for index in self.layout.buckets_of(place):
            offset, nbytes = self.layout.ranges[index]
            yield index, min(end, offset + nbytes) - max(place.offset, offset)

    def _bucket(self, segment: Segment, index: int) -> npt.NDArray[np.uint8]:
        offset, nbytes = self.layout.ranges[index]
        return segment.data[offset : offset + nbytes]

    def close(self) -> None:
        """Remove both segments."""
        for segment in self._segments:
            segment.close()
