"""Attention of packed groups, segment by segment, as defined.

    p = softmax over the visible keys of scale * q . k,   o = sum p v,   lse = log sum exp
    dv = p^T do,   ds = p (do . v - do . o),   dq = scale ds k,   dk = scale ds^T q

Shape letters: N tokens of a pack, H query heads, K key/value heads (H a multiple of K), D head size, Q and M queries and
visible keys of a segment, R = H / K query heads that share a key head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis_kernels.prefix_attention.segments import Segment, Segments


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _keys(segment: Segment, value_NKD: Tensor) -> Tensor:
    """[K, M, D]: prefix, then the segment itself."""
    prefix = value_NKD[segment.prefix_start : segment.prefix_stop]
    return torch.cat([prefix, value_NKD[segment.start : segment.stop]]).transpose(0, 1).to(_wide(value_NKD.dtype))


def _queries(segment: Segment, value_NHD: Tensor, num_kv: int) -> Tensor:
    """[K, R, Q, D]."""
    part = value_NHD[segment.start : segment.stop].to(_wide(value_NHD.dtype))
    return part.transpose(0, 1).unflatten(0, (num_kv, -1))


def _scores(segment: Segment, query_KRQD: Tensor, key_KMD: Tensor, scale: float, causal: bool) -> Tensor:
    """[K, R, Q, M], -inf where the key is not visible."""
    scores = scale * query_KRQD @ key_KMD[:, None].transpose(-1, -2)
    if not causal:
        return scores
    num_prefix = segment.prefix_stop - segment.prefix_start
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(num_prefix + 1)
    return scores.masked_fill(hidden, float("-inf"))


def forward(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """(out [N, H, D] in the inputs' dtype, lse [N, H] float32, float64 for float64 inputs)."""
    out = query_NHD.new_empty(query_NHD.shape)
    lse = query_NHD.new_empty(query_NHD.shape[:2], dtype=_wide(query_NHD.dtype))
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        query = _queries(segment, query_NHD, key_NKD.shape[1])
        scores = _scores(segment, query, _keys(segment, key_NKD), scale, segments.causal)
        out[rows] = (torch.softmax(scores, -1) @ _keys(segment, value_NKD)[:, None]).flatten(0, 1).transpose(0, 1).to(out.dtype)
        lse[rows] = torch.logsumexp(scores, -1).flatten(0, 1).T
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
    """(dQuery, dKey, dValue) in the inputs' dtype. A prompt's keys collect from all its rollouts in float32."""
    num_kv, wide = key_NKD.shape[1], _wide(query_NHD.dtype)
    d_query = query_NHD.new_empty(query_NHD.shape)
    d_key, d_value = (x.new_zeros(x.shape, dtype=wide) for x in (key_NKD, value_NKD))
    for segment in segments:
        rows, prefix = slice(segment.start, segment.stop), slice(segment.prefix_start, segment.prefix_stop)
        query, key, value = _queries(segment, query_NHD, num_kv), _keys(segment, key_NKD), _keys(segment, value_NKD)
        d_out, out = _queries(segment, d_out_NHD, num_kv), _queries(segment, out_NHD, num_kv)
        lse = lse_NH[rows].T.unflatten(0, (num_kv, -1))[..., None]
        p = (_scores(segment, query, key, scale, segments.causal) - lse).exp()
        d_scores = p * (d_out @ value[:, None].transpose(-1, -2) - (d_out * out).sum(-1, keepdim=True))
        d_query[rows] = (scale * d_scores @ key[:, None]).flatten(0, 1).transpose(0, 1).to(d_query.dtype)
        both_key = scale * (d_scores.transpose(-1, -2) @ query).sum(1).transpose(0, 1)
        both_value = (p.transpose(-1, -2) @ d_out).sum(1).transpose(0, 1)
        num_prefix = segment.prefix_stop - segment.prefix_start
        for total, both in ((d_key, both_key), (d_value, both_value)):
            total[prefix] += both[:num_prefix]
            total[rows] += both[num_prefix:]
    return d_query, d_key.to(key_NKD.dtype), d_value.to(value_NKD.dtype)
