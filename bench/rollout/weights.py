"""Weight synchronisation: what brings an update to an engine, by mode.

shared: the engine samples with the trainer's own module; nothing moves. copied: another module of the same process, by name.
staged: an engine in another process of the same machine, through shared memory. full, delta: one on another machine, the bytes
that Ray carries there as objects; Ray itself and the network are not there. With the three last an engine checks every byte
before it loads; its own loading is not included. delta: `CHANGED` of the elements differ. vllm: the benchmark's own vLLM
engine, the whole way from a module's weights until it samples with them.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metis_fast.cluster.weights import Bucket, changes, pack
from metis_fast.errors import SyncError
from metis_fast.model import Policy
from metis_fast.rollout.engine import Engine
from metis_fast.rollout.native import NativeEngine
from metis_fast.sync.reader import Reader
from metis_fast.sync.staging import Staging

from ..candidate import Spread

CHANGED = 0.05
"""Share of the bfloat16 elements that differ, by one unit in the last place. An assumption: it depends on learning rate and
optimizer."""

_BUCKET_BYTES = 64 << 20

Weights = Mapping[str, Tensor]
_Way = Callable[[Weights], tuple[int, Iterator[tuple[str, Tensor]]]]
"""From what the other end holds to (bytes that move there, 0 where none do, and the weights)."""


@dataclass(frozen=True, slots=True)
class SyncRow:
    """A mode. size: bytes of the weights. num_bytes: of them, that moved. seconds: of one update."""

    mode: str
    size: int
    num_bytes: int
    seconds: Spread

    @property
    def gbytes_per_s(self) -> float | None:
        """Weights brought up to date in a second; None where nothing has to be."""
        return self.size / self.seconds.median / 1e9 if self.num_bytes else None


def _row(mode: str, size: int, num_bytes: int, seconds: list[float]) -> SyncRow:
    return SyncRow(mode, size, num_bytes, Spread(statistics.median(seconds), min(seconds), max(seconds)))


def synthetic(num_bytes: int, changed: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """bfloat16 weights of about so many bytes in 16 tensors, before and after an update that changes each element with
    probability `changed`, by one unit in the last place."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, num_bytes // 32)
    before = {f"layers.{i}.weight": torch.randn(count, generator=generator).bfloat16() for i in range(16)}
    after: dict[str, Tensor] = {}
    for name, tensor in before.items():
        bits = tensor.view(torch.int16)
        after[name] = (bits + (torch.rand(count, generator=generator) < changed)).to(bits.dtype).view(torch.bfloat16)
    return before, after


def _staged(after: Weights) -> _Way:
    return lambda held: (0, iter(after.items()))


def _full(after: Weights) -> _Way:
    def way(held: Weights) -> tuple[int, Iterator[tuple[str, Tensor]]]:
        buckets = list(pack(iter(after.items()), _BUCKET_BYTES))
        return sum(bucket.data.nbytes for bucket in buckets), _tensors(buckets)

    return way


def _delta(before: Weights, after: Weights) -> _Way:
    kept = list(pack(iter(before.items()), _BUCKET_BYTES))  # by whoever publishes

    def way(held: Weights) -> tuple[int, Iterator[tuple[str, Tensor]]]:
        made = [changes(old, new) for old, new in zip(kept, pack(iter(after.items()), _BUCKET_BYTES), strict=True)]
        return sum(one.data.nbytes for one in made), _tensors(one.applied(held) for one in made)

    return way


def _tensors(buckets: Iterable[Bucket]) -> Iterator[tuple[str, Tensor]]:
    for bucket in buckets:
        yield from bucket.tensors()


def _arrive(staging: Staging, version: int, way: _Way, expected: Weights) -> tuple[int, float]:
    """Bytes that moved to the machine (its own: those of the segment), and seconds until an engine there has checked them all.

    Raises:
        SyncError: something else arrived.
    """
    start = time.perf_counter()
    moved, weights = way(staging.tensors())
    manifest = staging.write(weights, version)
    reader = Reader(manifest)
    seconds = time.perf_counter() - start
    for name, tensor in reader:
        if not torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)):
            raise SyncError(f"{name} is not what was sent")
    return moved or manifest.num_bytes, seconds


def measure_sync(policy: Policy, size_mb: int, runs: int) -> list[SyncRow]:
    """Every mode, `runs` times. policy: the native engine's; the others move `size_mb` MiB of synthetic bfloat16 weights.

    Raises:
        SyncError: something else arrived than was sent.
        EngineError: shared memory has no room.
    """
    before, after = synthetic(size_mb << 20, CHANGED)
    size = sum(tensor.nbytes for tensor in before.values())
    found: dict[str, tuple[int, int, list[float]]] = {}
    ways = {"staged": _staged(after), "full": _full(after), "delta": _delta(before, after)}
    shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
    with Staging(shapes, torch.bfloat16, _BUCKET_BYTES) as staging:
        versions = itertools.count()
        for _ in range(runs):
            for mode, way in ways.items():
                staging.write(iter(before.items()), next(versions))
                num_bytes, seconds = _arrive(staging, next(versions), way, after)
                found.setdefault(mode, (size, num_bytes, []))[2].append(seconds)
    weights = {name: tensor.clone() for name, tensor in policy.model.named_parameters()}
    size = sum(tensor.nbytes for tensor in weights.values())
    engine = NativeEngine(policy)
    for mode, sent in (("copied", weights), ("shared", {})):
        found[mode] = (size, *_updates(engine, sent, runs))
    engine.close()
    return [_row(mode, *found[mode]) for mode in ("shared", "copied", *ways)]


def measure_engine(engine: Engine, policy: Policy, runs: int) -> SyncRow:
    """Of a vLLM engine that serves `policy`.

    Raises:
        EngineError: it does not take them.
    """
    weights = {name: tensor.detach() for name, tensor in policy.model.named_parameters()}
    return _row("vllm", sum(tensor.nbytes for tensor in weights.values()), *_updates(engine, weights, runs))


def _updates(engine: Engine, weights: Weights, runs: int) -> tuple[int, list[float]]:
    """(bytes that moved, seconds of each) of updates that bring the same weights again."""
    reports = [asyncio.run(engine.update(iter(weights.items()), number)) for number in range(1, runs + 1)]
    return reports[0].num_bytes, [report.seconds for report in reports]
