"""Weights as objects of Ray's: buckets of whole tensors, which each machine gets once and reads in place.

With `sync.mode: delta` whoever publishes a version puts beside every bucket what makes it of that of the version before. A node
whose engine has that one pulls the changes alone, and checks what comes of them; any other node, the buckets.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metis_fast.errors import EngineError, SyncError, one_line
from metis_fast.rollout.engine import SyncReport
from metis_fast.sync.delta import Encoding, decode, encode
from metis_fast.sync.manifest import ALIGN, Place
from metis_fast.sync.segment import THREADS, checksum

_LOG = logging.getLogger(__name__)
_AHEAD = 4  # buckets that are pulled, and made of changes, before they are asked for

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Whole tensors, one after the other. places: where each of them lies in the data."""

    data: npt.NDArray[np.uint8]
    places: tuple[Place, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, which share the bucket's memory; they are not to be written to."""
        with warnings.catch_warnings():  # Ray's objects cannot be written to, and torch says so each time
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            data = torch.from_numpy(self.data)
        for place in self.places:
            flat = data[place.offset : place.offset + place.nbytes]
            yield place.name, flat.view(getattr(torch, place.dtype)).view(place.shape)


def pack(weights: Iterator[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Weights in their order, in buckets of at most so many bytes, or of one tensor that is larger."""
    waiting: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        num = tensor.numel() * tensor.element_size()
        if waiting and size + num > bucket_bytes:
            yield _bucket(waiting)
            waiting, size = [], 0
        waiting.append((name, tensor))
        size += _aligned(num)
    if waiting:
        yield _bucket(waiting)


def _aligned(size: int) -> int:
    return size + -size % ALIGN


def _bucket(weights: Sequence[tuple[str, Tensor]]) -> Bucket:
    places: list[Place] = []
    end = 0
    for name, tensor in weights:
        place = Place(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end)
        places.append(place)
        end += _aligned(place.nbytes)
    data = torch.zeros(end, dtype=torch.uint8)  # what lies between tensors is compared and checked, too
    for place, (_, tensor) in zip(places, weights, strict=True):
        data[place.offset : place.offset + place.nbytes].view(tensor.dtype).view(place.shape).copy_(tensor.detach())
    return Bucket(data.numpy(), tuple(places))


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What makes a bucket of that of the version before. data: see `sync.delta`. crc32: of the bucket that comes of it."""

    places: tuple[Place, ...]
    encoding: Encoding
    data: npt.NDArray[np.uint8]
    crc32: int

    def applied(self, held: Mapping[str, Tensor]) -> Bucket:
        """The bucket. held: tensors of the version before.

        Raises:
            SyncError: these are others.
        """
        lacking = next((place.name for place in self.places if place.name not in held), "")
        if lacking:
            raise SyncError(f"there is no {lacking} that changes could be told against")
        made = _bucket([(place.name, held[place.name]) for place in self.places])
        if made.places != self.places:
            raise SyncError("there are tensors of other shapes or types than changes are told against")
        decode(self.encoding, self.data, made.data, _itemsize(self.places))
        if (found := checksum(made.data)) != self.crc32:
            raise SyncError(f"what changes have made has CRC-32 {found:08x}, expected {self.crc32:08x}")
        return made


def _itemsize(places: Sequence[Place]) -> int:
    return min(getattr(torch, place.dtype).itemsize for place in places)


def changes(old: Bucket, new: Bucket) -> Changes:
    """From one version's bucket to another's with the same places."""
    encoding, data = encode(old.data, new.data, _itemsize(new.places))
    return Changes(new.places, encoding, data, checksum(new.data))


# -- publishing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Published:
    """Keys of a version's objects, which live as long as somebody holds them.

    full: of its buckets. base: version that changes are told against; None: there are none. changes: for each of `full`, of its
    `Changes`, or of the bucket itself where these would be no smaller.
    """

    full: tuple[Any, ...]
    base: int | None = None
    changes: tuple[Any, ...] = ()

    @staticmethod
    def joined(parts: Sequence[Published]) -> Published:
        """Of several processes that have each put some of the buckets."""
        full = tuple(key for part in parts for key in part.full)
        bases = {part.base for part in parts}
        if len(bases) != 1 or None in bases:
            return Published(full)
        return Published(full, bases.pop(), tuple(key for part in parts for key in part.changes))


class Publication:
    """A version that is being put into Ray by this process.

    version: None where no later one is told against it. before: the one that changes are told against.
    """

    def __init__(self, version: int | None, before: Publication | None = None) -> None:
        self.version, self.keys = version, dict[tuple[Place, ...], Any]()
        self._before = before
        self._changes: list[Future[Any]] = []
        self._threads = ThreadPoolExecutor(THREADS, "encode")

    def put(self, bucket: Bucket) -> None:
        """In any order. Its changes are looked for while others come."""
        key = self.keys[bucket.places] = _put(bucket)
        if self._before is not None:
            self._changes.append(self._threads.submit(_put_changes, self._before.keys.get(bucket.places), key))

    def finish(self) -> Published:
        """All buckets came."""
        full, before = tuple(self.keys.values()), self._before
        self._threads.shutdown()
        self._before = None  # whose objects may go
        if before is None:
            return Published(full)
        return Published(full, before.version, tuple(one.result() for one in self._changes))


def _put_changes(old: Any, new: Any) -> Any:
    import ray

    if old is None:  # the version before was cut into other buckets
        return new
    found = changes(ray.get(old), ray.get(new))
    return new if found.encoding == "full" else _put(found)


def _put(value: Bucket | Changes) -> Any:
    import ray
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError

    try:
        return ray.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise EngineError(
            f"Ray's object store has no room for a version of the weights ({one_line(error)[:200]}); start Ray with a larger "
            "--object-store-memory on the trainer's machines, or free the disk that it spills to"
        ) from None


class Publisher:
    """Publishes a trainer's weights from this process. delta: with what differs from the version before, which is held."""

    def __init__(self, bucket_bytes: int, delta: bool) -> None:
        self._bucket_bytes, self._delta = bucket_bytes, delta
        self._last: Publication | None = None

    def publish(self, weights: Iterator[tuple[str, Tensor]], version: int) -> Published:
        """All tensors, by Hugging Face names."""
        coming = Publication(version, self._last)
        for bucket in pack(weights, self._bucket_bytes):
            coming.put(bucket)
        found = coming.finish()
        self._last = coming if self._delta else None
        return found


# -- reading ----------------------------------------------------------------------------------------------------------------


class Arriving:
    """A published version on its way into this process: `Weights` of the node in it.

    has: version that this process had before; None: none. held: its tensors by Hugging Face names, where they are still there.
    """

    def __init__(
        self, published: Published, version: int, has: int | None = None, held: Callable[[], Mapping[str, Tensor]] = dict
    ) -> None:
        self.version, self.turn = version, asyncio.Lock()
        self._published, self._has, self._held = published, has, held
        self._pulled: dict[Any, int] = {}
        self._mode: str = "full"
        self._retries = 0

    def objects(self) -> Published:
        """See `Weights`."""
        return self._published

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Weights`. A tensor may be a view of Ray's memory: it is not to be written to.

        Raises:
            ray.exceptions.RayError: an object is lost.
        """
        published, has = self._published, self._has
        self._has = None  # should it be asked for again, what is held by then may be of no version
        held = self._held() if has is not None and has == published.base else {}
        keys, self._mode = (published.changes, "delta") if held else (published.full, "full")
        with ThreadPoolExecutor(_AHEAD, "weights") as threads:
            pairs = zip(keys, published.full, strict=True)
            for bucket in _in_turn(threads, lambda pair: self._bucket(*pair, held), pairs):
                yield from bucket.tensors()

    def _bucket(self, key: Any, full: Any, held: Mapping[str, Tensor]) -> Bucket:
        found = self._pull(key)
        if isinstance(found, Changes):
            try:
                return found.applied(held)
            except SyncError as error:
                _LOG.warning("weight version %d, %s: %s; fetching all of it", self.version, found.places[0].name, error)
                self._retries += 1
                found = self._pull(full)
        return found

    def _pull(self, key: Any) -> Any:
        import ray

        found: Bucket | Changes = ray.get(key)
        self._pulled[key] = found.data.nbytes
        return found

    def told(self, report: SyncReport) -> SyncReport:
        """What the engine has said of the update, with what came to this machine."""
        if not self._pulled:
            return report
        retries = report.retries + self._retries
        return replace(report, mode=self._mode, num_bytes=sum(self._pulled.values()), retries=retries)


def _in_turn(threads: Executor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in the order of the items, a few of which are worked on ahead."""
    running: deque[Future[R]] = deque()
    for item in items:
        running.append(threads.submit(work, item))
        if len(running) > _AHEAD:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def read(published: Published) -> Iterator[tuple[str, Tensor]]:
    """What was published, all of it. A tensor is a view of Ray's memory: it is not to be written to.

    Raises:
        ray.exceptions.RayError: an object is lost.
    """
    return Arriving(published, 0).tensors()
