"""Weight synchronisation: what brings an update to an engine, by mode.

shared: the engine samples with the trainer's own module; nothing moves. copied: another module of the same process, by name.
staged: an engine in another process of the same machine, through shared memory. full, delta: one on another machine, the bytes
that go over the connection; the network itself is not there. With the three last an engine checks every byte before it loads;
its own loading is not included. delta: `CHANGED` of the elements differ. vllm: the benchmark's own vLLM engine, the whole way
from a module's weights until it samples with them.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from metis_fast.model import Policy
from metis_fast.rollout.engine import Engine
from metis_fast.rollout.native import NativeEngine
from metis_fast.sync.measure import measure, synthetic

from ..candidate import Spread

CHANGED = 0.05
"""Share of the bfloat16 elements that differ, by one unit in the last place. An assumption: it depends on learning rate and
optimizer."""

_BUCKET_BYTES = 64 << 20


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


def measure_sync(policy: Policy, size_mb: int, runs: int) -> list[SyncRow]:
    """Every mode, `runs` times. policy: the native engine's; the others move `size_mb` MiB of synthetic bfloat16 weights.

    Raises:
        SyncError: something else arrived than was sent.
        EngineError: shared memory has no room.
    """
    before, after = synthetic(size_mb << 20, CHANGED)
    size = sum(tensor.nbytes for tensor in before.values())
    found: dict[str, tuple[int, int, list[float]]] = {}
    for _ in range(runs):
        for cost in measure(before, after, _BUCKET_BYTES):
            found.setdefault(cost.mode, (size, cost.num_bytes, []))[2].append(cost.seconds)
    weights = {name: tensor.clone() for name, tensor in policy.model.named_parameters()}
    size = sum(tensor.nbytes for tensor in weights.values())
    engine = NativeEngine(policy)
    for mode, sent in (("copied", weights), ("shared", {})):
        found[mode] = (size, *_updates(engine, sent, runs))
    engine.close()
    order = ("shared", "copied", "staged", "full", "delta")
    return [_row(mode, *found[mode]) for mode in order]


def measure_engine(engine: Engine, policy: Policy, runs: int) -> SyncRow:
    """Of a vLLM engine that serves `policy`.

    Raises:
        EngineError: it does not take them.
    """
    weights = {name: tensor.detach() for name, tensor in policy.model.named_parameters()}
    return _row("vllm", sum(tensor.nbytes for tensor in weights.values()), *_updates(engine, weights, runs))


def _updates(engine: Engine, weights: Mapping[str, Tensor], runs: int) -> tuple[int, list[float]]:
    """(bytes that moved, seconds of each) of updates that bring the same weights again."""
    reports = [asyncio.run(engine.update(iter(weights.items()), number)) for number in range(1, runs + 1)]
    return reports[0].num_bytes, [report.seconds for report in reports]
