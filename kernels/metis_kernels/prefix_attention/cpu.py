"""`prefix_attention` on the CPU: blocks of scores that stay in the cache (kernels/csrc/attention_impl.h).

Shape letters: N tokens of a pack, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from metis_kernels.prefix_attention.segments import Segments

_OPS = torch.ops.metis_kernels_cpu


@functools.lru_cache(maxsize=64)
def _families(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """(first segment of each family and their number in all, first token and last token + 1 of each segment), int64.

    A family is a segment without a prefix and those that see it, in this order.
    """
    members: dict[int, list[int]] = {i: [i] for i, seen in enumerate(segments.prefix) if seen < 0}
    for i, seen in enumerate(segments.prefix):
        if seen >= 0:
            members[seen].append(i)
    order = [i for family in members.values() for i in family]
    first = [0]
    for family in members.values():
        first.append(first[-1] + len(family))
    start = [segments.offsets[i] for i in order]
    stop = [segments.offsets[i + 1] for i in order]
    return torch.tensor(first), torch.tensor(start, dtype=torch.int64), torch.tensor(stop, dtype=torch.int64)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def forward(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """(out [N, H, D] in the inputs' dtype, lse [N, H] float32)."""
    out = torch.empty(query_NHD.shape, dtype=query_NHD.dtype)
    lse = torch.empty(query_NHD.shape[:2], dtype=torch.float32)
    query, key, value = _rows(query_NHD), _rows(key_NKD), _rows(value_NKD)
    _OPS.attention_forward(query, key, value, *_families(segments), scale, out, lse, segments.causal)
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
    """(dQuery, dKey, dValue) in the inputs' dtype, summed in float32."""
    query, key, value = _rows(query_NHD), _rows(key_NKD), _rows(value_NKD)
    d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
    gradients = d_query, d_key, d_value
    tables = _families(segments)
    d_out, out = _rows(d_out_NHD), _rows(out_NHD)
    _OPS.attention_backward(d_out, query, key, value, out, lse_NH, *tables, scale, *gradients, segments.causal)
    return d_query, d_key, d_value
