"""`prefix_attention` in Triton: jobs made of the segments on the host, kernels in `_kernels`.

One launch forward. Backward: delta, dQuery, dKey and dValue of the segments themselves, and where prompts are shared, prompts
against their rollouts and the sum of a prompt's slots. Memory beside the results: 8 bytes a token and head, and the slots,
about `MOST_PARTS` float32 copies of the shared prompts' dKey and dValue.

Shape letters: N tokens of a pack, H query heads, K key heads, D head size, J jobs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from metis_kernels._launch import launch
from metis_kernels.prefix_attention import _kernels
from metis_kernels.prefix_attention.segments import Segments, readers

LARGEST_HEAD = 128
"""Head sizes above it would not fit into the registers of a block of these shapes."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Block shapes of a kernel. queries, keys: rows of a block; chosen so that nothing spills at D = 128."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = {2: Tile(64, 64, 4, 3), 4: Tile(32, 16, 8, 2)}
QUERY_GRADIENT = {2: Tile(64, 32, 4, 3), 4: Tile(32, 16, 4, 2)}
KEY_GRADIENT = {2: Tile(32, 64, 4, 3), 4: Tile(32, 16, 8, 2)}
"""By bytes of an element. Products of float32 stay float32, so they run outside of the tensor cores, from registers."""

DELTA_ROWS = 64
SLOT_ROWS = 16

MOST_PARTS = 8
"""Parts that the queries of a prompt's rollouts are cut into. A block of prompt keys otherwise walks all of them alone, G times
as long as a rollout's own blocks."""

LEAST_PART = 1024
"""Queries of a part; shorter ones would spend their time on slots."""

PART_STEP = 128
"""Parts are multiples of it, as it is of every block of queries: only the last block of a rollout is not full."""


@dataclass(frozen=True, slots=True, eq=False)
class _KeyJobs:
    """Tables on the device, int32, longest jobs first; see the kernels. slot_rows: of all slots together."""

    own_J5: Tensor
    shared_J5: Tensor
    blocks_B4: Tensor
    slot_rows: int


def _table(rows: list[tuple[int, ...]], width: int, device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), width)
    if device.type == "cuda":  # pinned, so that the copy does not wait for what the device still does
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


@functools.lru_cache(maxsize=16)
def _query_jobs(segments: Segments, block: int, device: torch.device) -> Tensor:
    """Of blocks of queries, [J, 5]."""
    jobs = [
        (first, one.stop, one.start, one.prefix_start, one.prefix_stop)
        for one in segments
        for first in range(one.start, one.stop, block)
    ]
    jobs.sort(key=lambda job: -(job[0] - job[2] + job[4] - job[3]))
    return _table(jobs, 5, device)


def _parts(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges cut into pieces of about equal length, `MOST_PARTS` of them unless there are more ranges."""
    total = sum(stop - start for start, stop in ranges)
    size = max(LEAST_PART, cdiv(total, MOST_PARTS))
    size = cdiv(size, PART_STEP) * PART_STEP
    return [(at, min(at + size, stop)) for start, stop in ranges for at in range(start, stop, size)]


@functools.lru_cache(maxsize=16)
def _key_jobs(segments: Segments, block: int, device: torch.device) -> _KeyJobs:
    parts_of = {prompt: _parts(ranges) for prompt, ranges in readers(segments).items()}
    own: list[tuple[int, ...]] = []
    shared: list[tuple[int, ...]] = []
    blocks: list[tuple[int, ...]] = []
    slot = 0
    for one in segments:
        parts = parts_of.get((one.start, one.stop), [])
        for first in range(one.start, one.stop, block):
            stop = min(first + block, one.stop)
            own.append((first, stop, first, one.stop, slot if parts else -1))
            if not parts:
                continue
            shared += [(first, stop, *part, slot + (i + 1) * block) for i, part in enumerate(parts)]
            blocks.append((first, stop, slot, len(parts) + 1))
            slot += (len(parts) + 1) * block
    for jobs in (own, shared):
        jobs.sort(key=lambda job: job[2] - job[3])
    return _KeyJobs(_table(own, 5, device), _table(shared, 5, device), _table(blocks, 4, device), slot)


def _rows(tensor: Tensor) -> Tensor:
    """With rows that the kernels can read: elements side by side, offsets within a block below 2^31."""
    return tensor if tensor.stride(2) == 1 and tensor.stride(0) < 2**24 else tensor.contiguous()


def _check(query_NHD: Tensor) -> None:
    size = query_NHD.shape[2]
    if size > LARGEST_HEAD:
        raise ValueError(
            f"query_NHD: impl='triton' takes heads of up to {LARGEST_HEAD}, got {size}; impl='reference' takes any"
        )


def _block_d(size: int) -> int:
    return max(16, next_power_of_2(size))  # 16 is the smallest dot


def forward(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """(out [N, H, D] in the inputs' dtype, lse [N, H] float32).

    Raises:
        ValueError: heads larger than 128.
    """
    _check(query_NHD)
    query, key, value = _rows(query_NHD), _rows(key_NKD), _rows(value_NKD)
    num_heads, size = query.shape[1:]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    tile = FORWARD[query.element_size()]
    jobs = _query_jobs(segments, tile.queries, query.device)
    if len(jobs):
        launch(
            _kernels.attention_forward,
            (len(jobs), num_heads),
            query, key, value, out, lse, jobs, num_heads,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            scale * math.log2(math.e),
            SIZE=size,
            GROUP=num_heads // key.shape[1],
            BLOCK_D=_block_d(size),
            BLOCK_Q=tile.queries,
            BLOCK_M=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


def backward(
    d_out_NHD: Tensor,
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    out_NHD: Tensor,
    lse_NH: Tensor,
    segments: Segments,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQuery, dKey, dValue) in the inputs' dtype, summed in float32, the same bits every time."""
    query, key, value = _rows(query_NHD), _rows(key_NKD), _rows(value_NKD)
    d_out, out = d_out_NHD.contiguous(), out_NHD.contiguous()
    (num_tokens, num_heads, size), num_keys, device = query.shape, key.shape[1], query.device
    d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (query, key, value))
    if not num_tokens:
        return d_query, d_key, d_value
    delta = torch.empty_like(lse_NH)
    block_d = _block_d(size)
    launch(
        _kernels.attention_delta,
        (cdiv(num_tokens, DELTA_ROWS), num_heads),
        out, d_out, delta, num_tokens, num_heads,
        SIZE=size, BLOCK_D=block_d, BLOCK_Q=DELTA_ROWS, num_warps=4,
    )  # fmt: skip
    strides = (query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1))
    group = num_heads // num_keys
    tile = QUERY_GRADIENT[query.element_size()]
    jobs = _query_jobs(segments, tile.queries, device)
    launch(
        _kernels.attention_query_gradient,
        (len(jobs), num_heads),
        query, key, value, d_out, lse_NH, delta, d_query, jobs, num_heads, *strides, scale,
        SIZE=size, GROUP=group, BLOCK_D=block_d, BLOCK_Q=tile.queries, BLOCK_M=tile.keys,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = KEY_GRADIENT[query.element_size()]
    tables = _key_jobs(segments, tile.keys, device)
    d_key_slots, d_value_slots = (
        torch.empty(tables.slot_rows, num_keys, size, dtype=torch.float32, device=device) for _ in range(2)
    )
    for jobs, causal in ((tables.own_J5, True), (tables.shared_J5, False)):
        if len(jobs):
            launch(
                _kernels.attention_key_gradient,
                (len(jobs), num_keys),
                query, key, value, d_out, lse_NH, delta, d_key, d_value, d_key_slots, d_value_slots, jobs, num_heads,
                *strides, scale,
                SIZE=size, GROUP=group, BLOCK_D=block_d, BLOCK_Q=tile.queries, BLOCK_M=tile.keys, CAUSAL=causal,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    if len(tables.blocks_B4):
        launch(
            _kernels.sum_slots,
            (len(tables.blocks_B4), num_keys, tile.keys // SLOT_ROWS),
            d_key_slots, d_value_slots, d_key, d_value, tables.blocks_B4,
            SIZE=size, BLOCK_D=block_d, BLOCK_M=tile.keys, ROWS=SLOT_ROWS, num_warps=4,
        )  # fmt: skip
    return d_query, d_key, d_value
