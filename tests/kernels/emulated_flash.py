"""The varlen functions of flash-attention's libraries in PyTorch, as strict about what they are given.

The module itself stands for flash_attn.flash_attn_interface (2.7 and later); `FUNCTIONS_3` and `OPERATORS_3` for the
flash_attn_interface of FlashAttention-3, before and after its functions became custom operators.

Any dtype is taken, so that the arithmetic around them can be tested in float64. As with the real ones, out and log-sum-exp are
those of the call's own keys, gradients are written into the tensors that are given, and backward believes the out and
log-sum-exp that it is handed.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

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
    calls.append("2 forward")
    _check_options(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    assert not return_softmax and block_table is None
    out, lse = _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), softmax_scale, causal)
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    longest: tuple[int, int],
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse [H, ..])"""
    out = torch.full_like(q, torch.nan)
    lse = torch.full((q.shape[1], len(q)), torch.nan, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys in _sequences(q, k, v, query_offsets, key_offsets, longest):
        scores = _scores(q[rows].to(lse.dtype), k[keys].to(lse.dtype), softmax_scale, causal)
        group = q.shape[1] // v.shape[1]
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys].to(lse.dtype).repeat_interleave(group, 1)).to(
            q.dtype
        )
        lse[:, rows] = scores.logsumexp(-1)
    return out, lse


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
    calls.append("2 deterministic backward" if deterministic else "2 backward")
    _check_options(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    longest = max_seqlen_q, max_seqlen_k
    _differentiate(dout, q, k, v, out, softmax_lse, (dq, dk, dv), cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal)
    return torch.empty(0)


def _differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    query_offsets: Tensor,
    key_offsets: Tensor,
    longest: tuple[int, int],
    softmax_scale: float,
    causal: bool,
) -> None:
    dq, dk, dv = gradients
    assert dout.shape == out.shape == dq.shape == q.shape and dk.shape == dv.shape == k.shape
    assert softmax_lse.shape == (q.shape[1], len(q)) and softmax_lse.is_contiguous()
    wide, group = softmax_lse.dtype, q.shape[1] // k.shape[1]
    for given in (dq, dk, dv):
        given.fill_(torch.nan)
    for rows, keys in _sequences(q, k, v, query_offsets, key_offsets, longest):
        query, d_out, key, value = q[rows].to(wide), dout[rows].to(wide), k[keys].to(wide), v[keys].to(wide)
        p = (_scores(query, key, softmax_scale, causal) - softmax_lse[:, rows, None]).exp()
        delta = (d_out * out[rows].to(wide)).sum(-1).T[..., None]
        d_scores = softmax_scale * p * (torch.einsum("qhd,khd->hqk", d_out, value.repeat_interleave(group, 1)) - delta)
        dq[rows] = torch.einsum("hqk,khd->qhd", d_scores, key.repeat_interleave(group, 1)).to(q.dtype)
        for given, weights, what in ((dk, d_scores, query), (dv, p, d_out)):
            of_heads = torch.einsum("hqk,qhd->khd", weights, what)
            given[keys] = of_heads.unflatten(1, (-1, group)).sum(2).to(given.dtype)


def _forward_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    qv: Tensor | None,
    out: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    page_table: Tensor | None,
    kv_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    seqlens_rotary: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    calls.append("3 forward")
    unused = k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k
    unused += rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, scheduler_metadata, pack_gqa
    assert all(x is None for x in unused) and rotary_interleaved
    assert (window_size, attention_chunk, softcap, num_splits, sm_margin) == ((-1, -1), 0, 0.0, 1, 0)
    assert cu_seqlens_q is not None and cu_seqlens_k is not None and softmax_scale is not None
    assert max_seqlen_q is not None and max_seqlen_k is not None
    longest = max_seqlen_q, max_seqlen_k
    return *_attend(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal), None, None


def _backward_3(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sequed_q: Tensor | None,  # as it is spelt there
    sequed_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    calls.append("3 backward")
    assert (window_size, softcap, deterministic, sm_margin) == ((-1, -1), 0.0, False, 0)
    assert sequed_q is None and sequed_k is None and softmax_scale is not None
    assert dq is not None and dk is not None and dv is not None
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    assert max_seqlen_q is not None and max_seqlen_k is not None
    longest = max_seqlen_q, max_seqlen_k
    _differentiate(dout, q, k, v, out, softmax_lse, (dq, dk, dv), cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal)
    return dq, dk, dv, torch.empty(0)


@torch.library.custom_op("emulated_flash_3::_flash_attn_forward", mutates_args=(), device_types="cpu")
def _forward_3_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse, *_ = _forward_3(
        q, k, v, k_new, v_new, qv, out_, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, (window_size_left, window_size_right), attention_chunk,
        softcap, rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip
    return out, lse, torch.empty(0), torch.empty(0)


@torch.library.custom_op("emulated_flash_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def _backward_3_operator(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    *_, softmax_d = _backward_3(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, is_causal, (window_size_left, window_size_right), softcap, deterministic, sm_margin,
    )  # fmt: skip
    return softmax_d


def interface_3(**functions: object) -> ModuleType:
    """A flash_attn_interface of these functions."""
    module = ModuleType("flash_attn_interface")
    vars(module).update({f"_flash_attn_{name}": function for name, function in functions.items()})
    return module


FUNCTIONS_3 = interface_3(forward=_forward_3, backward=_backward_3)
OPERATORS_3 = interface_3(forward=_forward_3_operator, backward=_backward_3_operator)
