"""What a staged version of the weights consists of, and how it is told from a damaged one.

The data of a segment are the tensors one after the other, each at a multiple of `ALIGN` bytes; they are cut into buckets of
equal size, whatever tensors lie there. A bucket is what is checked, encoded and sent at a time; so the largest message does not
depend on the largest tensor (the embedding of Qwen3-VL-8B has 1.2 GB).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from metis_fast.errors import SyncError

ALIGN = 64  # bytes; a cache line, and a multiple of every element size


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies.

    name: Hugging Face's. dtype: torch's, such as "bfloat16". offset: bytes from the start of the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Without what follows for alignment."""
        return prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """Places of all tensors of a model, the same for all versions.

    num_bytes: of the data, a multiple of `ALIGN`. bucket_bytes: of every bucket but the last, likewise. itemsize: of the
    elements, all of one dtype.
    """

    places: tuple[Place, ...]
    num_bytes: int
    bucket_bytes: int
    itemsize: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, bucket_bytes: int) -> Layout:
        """Tensors in the order of `shapes`. bucket_bytes: rounded up to a multiple of `ALIGN`."""
        places: list[Place] = []
        at = 0
        for name, shape in shapes.items():
            places.append(Place(name, str(dtype).removeprefix("torch."), tuple(shape), at))
            at = _aligned(at + places[-1].nbytes)
        return cls(tuple(places), at, _aligned(bucket_bytes), dtype.itemsize)

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(offset, nbytes) of every bucket."""
        size, end = self.bucket_bytes, self.num_bytes
        return tuple((at, min(size, end - at)) for at in range(0, end, size))

    def buckets_of(self, place: Place) -> range:
        """Indices of the buckets that a tensor has bytes in."""
        if not place.nbytes:
            return range(0)
        return range(place.offset // self.bucket_bytes, (place.offset + place.nbytes - 1) // self.bucket_bytes + 1)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class Bucket:
    """A range of the data. offset: bytes from their start. crc32: zlib's, of those bytes."""

    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A staged version.

    version: training steps done. segment: file in `segment.FOLDER` of the machine where it lies. digest: SHA-256 of everything
    else but the segment, checksums included, so that two with the same digest are of the same weights.
    """

    version: int
    segment: str
    places: tuple[Place, ...]
    buckets: tuple[Bucket, ...]
    digest: str

    @classmethod
    def of(cls, version: int, segment: str, places: tuple[Place, ...], buckets: tuple[Bucket, ...]) -> Manifest:
        """With its digest."""
        return cls(version, segment, places, buckets, _digest(version, places, buckets))

    @property
    def num_bytes(self) -> int:
        """Of the data."""
        return sum(bucket.nbytes for bucket in self.buckets)

    def in_bucket(self, index: int) -> str:
        """A bucket as a message names it: its number and the first tensors that have bytes in it."""
        bucket = self.buckets[index]
        end = bucket.offset + bucket.nbytes
        names = [p.name for p in self.places if p.offset < end and p.offset + p.nbytes > bucket.offset]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        return f"bucket {index} of {len(self.buckets)} ({', '.join(names[:2])}{more})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and vLLM's messages carry them."""
        return {
            "version": self.version,
            "segment": self.segment,
            "places": [[p.name, p.dtype, list(p.shape), p.offset] for p in self.places],
            "buckets": [[b.offset, b.nbytes, b.crc32] for b in self.buckets],
            "digest": self.digest,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Manifest:
        """What `to_dict` made.

        Raises:
            SyncError: it is something else, or not as it was made.
        """
        try:
            manifest = cls(
                version=int(plain["version"]),
                segment=str(plain["segment"]),
                places=tuple(Place(str(n), str(d), tuple(int(x) for x in s), int(o)) for n, d, s, o in plain["places"]),
                buckets=tuple(Bucket(int(o), int(n), int(c)) for o, n, c in plain["buckets"]),
                digest=str(plain["digest"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SyncError(
                f"expected the manifest of a weight version, got something else ({error!r}); send it again"
            ) from None
        manifest.check()
        return manifest

    def check(self) -> None:
        """Whether it agrees with its own digest, and every tensor lies in the data, once.

        Raises:
            SyncError: it does not.
        """
        found = _digest(self.version, self.places, self.buckets)
        if found != self.digest:
            raise SyncError(
                f"manifest of weight version {self.version}: digest {found[:16]}, expected {self.digest[:16]}; "
                f"tensors or checksums changed on the way ({len(self.places)} tensors, {len(self.buckets)} buckets came)"
            )
        at = 0
        for bucket in self.buckets:
            if bucket.offset != at or bucket.nbytes <= 0:
                raise SyncError(f"weight version {self.version}: a bucket begins at byte {bucket.offset}, expected {at}")
            at += bucket.nbytes
        end = 0
        for place in self.places:
            if place.offset < end or place.offset + place.nbytes > at:
                raise SyncError(f"weight version {self.version}: {place.name} lies outside the data, or over another tensor")
            end = place.offset + place.nbytes
        if len({place.name for place in self.places}) != len(self.places):
            raise SyncError(f"weight version {self.version} has a tensor twice")


def _digest(version: int, places: tuple[Place, ...], buckets: tuple[Bucket, ...]) -> str:
    plain = [
        version,
        [[p.name, p.dtype, p.shape, p.offset] for p in places],
        [[b.offset, b.nbytes, b.crc32] for b in buckets],
    ]
    return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()
