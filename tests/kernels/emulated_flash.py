"""The two varlen functions of flash_attn.flash_attn_interface (2.7 and later) in PyTorch, as strict about what they are given.

Any dtype is taken, so that the arithmetic around them can be tested in float64. As with the real ones, out and log-sum-exp are
those of the call's own keys, gradients are written into the tensors that are given, and backward believes the out and
log-sum-exp that it is handed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

calls: list[str] = []


def _sequences(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor, longest: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    assert query.shape[2] == key.shape[2] and key.shape == value.shape and query.shape[1] % key.shape[1] == 0
    assert query.shape[2] % 8 == 0 and all(x.stride(-1) == 1 for x in (query, key, value))
    assert query_offsets.dtype == key_offsets.dtype == torch.int32 and len(query_offsets) == len(key_offsets) > 1
    assert query_offsets[0] == key_offsets[0] == 0
    assert query_offsets[-1] == len(query) and key_offsets[-1] == len(key)
    lengths = query_offsets.diff(), key_offsets.diff()
    assert all(int(x.min()) > 0 for x in lengths)
    assert tuple(int(x.max()) for x in lengths) == longest
    for i in range(len(query_offsets) - 1):
        yield slice(*query_offsets[i : i + 2].tolist()), slice(*key_offsets[i : i + 2].tolist())


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    scores = scale * torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(query.shape[1] // key.shape[1], 1))
    if causal:  # the last query sees the last key
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _check_options(
    dropout_p: float, window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None
) -> None:
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    calls.append("forward")
    _check_options(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    assert not return_softmax and block_table is None
    out = torch.full_like(q, torch.nan)
    lse = torch.full((q.shape[1], len(q)), torch.nan, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys in _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k)):
        scores = _scores(q[rows].to(lse.dtype), k[keys].to(lse.dtype), softmax_scale, causal)
        group = q.shape[1] // v.shape[1]
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys].to(lse.dtype).repeat_interleave(group, 1)).to(
            q.dtype
        )
        lse[:, rows] = scores.logsumexp(-1)
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> Tensor:
    calls.append("deterministic backward" if deterministic else "backward")
    _check_options(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    assert dout.shape == out.shape == dq.shape == q.shape and dk.shape == dv.shape == k.shape
    assert softmax_lse.shape == (q.shape[1], len(q)) and softmax_lse.is_contiguous()
    wide, group = softmax_lse.dtype, q.shape[1] // k.shape[1]
    for given in (dq, dk, dv):
        given.fill_(torch.nan)
    for rows, keys in _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k)):
        query, d_out, key, value = q[rows].to(wide), dout[rows].to(wide), k[keys].to(wide), v[keys].to(wide)
        p = (_scores(query, key, softmax_scale, causal) - softmax_lse[:, rows, None]).exp()
        delta = (d_out * out[rows].to(wide)).sum(-1).T[..., None]
        d_scores = softmax_scale * p * (torch.einsum("qhd,khd->hqk", d_out, value.repeat_interleave(group, 1)) - delta)
        dq[rows] = torch.einsum("hqk,khd->qhd", d_scores, key.repeat_interleave(group, 1)).to(q.dtype)
        for given, weights, what in ((dk, d_scores, query), (dv, p, d_out)):
            of_heads = torch.einsum("hqk,qhd->khd", weights, what)
            given[keys] = of_heads.unflatten(1, (-1, group)).sum(2).to(given.dtype)
    return torch.empty(0)
