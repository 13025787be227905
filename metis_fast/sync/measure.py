"""What a weight update costs by the way it goes: for `metis-fast bench rollout`, and to choose `sync.mode`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metis_fast.errors import SyncError
from metis_fast.sync.local_copy import LocalCopy
from metis_fast.sync.reader import Reader
from metis_fast.sync.staging import Staging


@dataclass(frozen=True, slots=True)
class SyncCost:
    """Of one update, in one process, without a network and without the engine's loading.

    mode: "staged" (an engine of the same machine), "full" or "delta" (a copy on another one). num_bytes: of the payloads; of
    the segment where nothing is sent. stage_s: trainer to shared memory, checksums included. send_s: encoding, decoding and
    checks. verify_s: what an engine does before it loads.
    """

    mode: Literal["staged", "full", "delta"]
    num_bytes: int
    stage_s: float
    send_s: float
    verify_s: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.stage_s + self.send_s + self.verify_s


def measure(before: Mapping[str, Tensor], after: Mapping[str, Tensor], bucket_bytes: int) -> tuple[SyncCost, ...]:
    """Bring an update from version `before` to `after` of a model's weights over every way, and check that `after` arrives.

    before, after: all tensors by name, of one dtype: `trainer.weights()` (cloned) around an update, or `synthetic`.
    bucket_bytes: `sync.bucket_mb` in bytes.

    Returns staged, full, delta, in this order.

    Raises:
        SyncError: something else arrived.
        EngineError: shared memory has no room for four versions.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
    dtype = next(iter(before.values())).dtype
    with Staging(shapes, dtype, bucket_bytes) as staging, LocalCopy() as copy:
        staging.write(iter(before.items()), 0)
        _send(staging, copy, None)
        start = time.perf_counter()
        staged = staging.write(iter(after.items()), 1)
        stage_s = time.perf_counter() - start
        costs = [SyncCost("staged", staged.num_bytes, stage_s, 0.0, _verify(staging, after))]
        order: tuple[tuple[Literal["full", "delta"], int | None], ...] = (("delta", 0), ("full", None))
        for mode, base in order:  # the copy has version 0 once
            start = time.perf_counter()
            num_bytes = _send(staging, copy, base)
            send_s = time.perf_counter() - start
            costs.insert(1, SyncCost(mode, num_bytes, stage_s, send_s, _verify(copy, after)))
    return tuple(costs)


def _send(staging: Staging, copy: LocalCopy, base: int | None) -> int:
    assert staging.current is not None
    copy.begin(staging.current.to_dict(), base)
    num_bytes = 0
    for payload in staging.payloads(base):
        copy.bucket(payload.index, payload.encoding, payload.data, payload.crc32)
        num_bytes += payload.data.nbytes
    copy.commit()
    return num_bytes


def _verify(holder: Staging | LocalCopy, expected: Mapping[str, Tensor]) -> float:
    assert holder.current is not None
    start = time.perf_counter()
    reader = Reader(holder.current)
    seconds = time.perf_counter() - start
    for name, tensor in reader:
        if not torch.equal(tensor.view(torch.uint8), expected[name].contiguous().cpu().view(torch.uint8)):
            raise SyncError(f"{name} is not what was sent")
    return seconds


def synthetic(
    num_bytes: int, changed: float, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of about so many bytes in 16 tensors, before and after an update that changes each element with probability
    `changed`, by one unit in the last place."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, num_bytes // (16 * dtype.itemsize))
    before = {f"layers.{i}.weight": torch.randn(count, generator=generator).to(dtype) for i in range(16)}
    after: dict[str, Tensor] = {}
    for name, tensor in before.items():
        bits = tensor.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
        after[name] = (bits + (torch.rand(count, generator=generator) < changed)).to(bits.dtype).view(dtype)
    return before, after
