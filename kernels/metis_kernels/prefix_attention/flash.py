"""`prefix_attention` by flash-attention's kernels (Dao, 2023; the package flash-attn, from 2.7 on).

Each segment with itself, causally, is one varlen call; rollouts with their prompts, without a mask, are another one. Both see
a part of a rollout's keys, and are merged by their log-sum-exps:

    lse = log(exp lse_own + exp lse_prompt),   out = exp(lse_own - lse) out_own + exp(lse_prompt - lse) out_prompt

Backward, each call is given the merged out and lse: its probabilities then are those over all keys, and so is d_out . out,
which is all that the gradient of a part needs to know of the rest.

Shape letters: N tokens of a pack, H query heads, K key/value heads, D head size, R tokens that see a prompt, P tokens of
prompts that are seen.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from metis_kernels.prefix_attention.segments import Segments, readers

OLDEST = (2, 7)
"""The first flash-attn with these arguments."""

LARGEST_HEAD = 256


def why_not(device: torch.device, dtype: torch.dtype, size: int) -> str:
    """Returns "" if it can run on tensors of this device, dtype and head size, else why it cannot."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"it takes CUDA tensors of bfloat16 or float16, got {str(dtype).removeprefix('torch.')} on {device.type}"
    if size % 8 or size > LARGEST_HEAD:
        return f"it takes head sizes that are multiples of 8, up to {LARGEST_HEAD}, got {size}"
    found = _library()
    return found if isinstance(found, str) else ""


@functools.cache
def _library() -> ModuleType | str:
    """flash_attn.flash_attn_interface, or why there is none."""
    try:
        package = importlib.import_module("flash_attn")
        interface = importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError as error:  # of its CUDA library too, if it was built for another torch
        return f"flash-attn cannot be imported ({error}); pip install flash-attn"
    version = tuple(int(part) for part in package.__version__.split(".")[:2])
    if version < OLDEST:
        return f"flash-attn {package.__version__} is too old; install {'.'.join(map(str, OLDEST))} or later"
    return interface


def _interface() -> ModuleType:
    found = _library()
    assert isinstance(found, ModuleType)  # `why_not` was asked before
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """Sequences of a varlen call: where they begin and end, int32 on the device, and the longest of them."""

    query_offsets: Tensor
    key_offsets: Tensor
    longest_query: int
    longest_key: int
    causal: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Calls:
    """own: all segments with themselves. prompt: what rows [R] see at prompt_rows [P], None if nothing is shared."""

    own: _Call
    prompt: _Call | None
    rows_R: Tensor
    prompt_rows_P: Tensor


def _call(queries: list[int], keys: list[int], device: torch.device, *, causal: bool) -> _Call:
    """Of sequences with these lengths."""

    def offsets(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)

    return _Call(offsets(queries), offsets(keys), max(queries), max(keys), causal)


@functools.lru_cache(maxsize=16)
def _calls(segments: Segments, device: torch.device) -> _Calls:
    own = [one.stop - one.start for one in segments if one.stop > one.start]
    seen = readers(segments)
    rows = [row for ranges in seen.values() for start, stop in ranges for row in range(start, stop)]
    prompt_rows = [row for start, stop in seen for row in range(start, stop)]
    num_queries = [sum(stop - start for start, stop in ranges) for ranges in seen.values()]
    num_keys = [stop - start for start, stop in seen]
    return _Calls(
        own=_call(own, own, device, causal=True),
        prompt=_call(num_queries, num_keys, device, causal=False) if seen else None,
        rows_R=torch.tensor(rows, dtype=torch.int64).to(device),
        prompt_rows_P=torch.tensor(prompt_rows, dtype=torch.int64).to(device),
    )


def _varlen_forward(query: Tensor, key: Tensor, value: Tensor, call: _Call, scale: float) -> tuple[Tensor, Tensor]:
    """(out [.., H, D], lse [H, ..] float32)."""
    out, lse, *_ = _interface()._flash_attn_varlen_forward(
        query,
        key,
        value,
        call.query_offsets,
        call.key_offsets,
        call.longest_query,
        call.longest_key,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=call.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
    )
    return out, lse


def _varlen_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: _Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    _interface()._flash_attn_varlen_backward(
        d_out,
        query,
        key,
        value,
        out,
        lse,
        d_query,
        d_key,
        d_value,
        call.query_offsets,
        call.key_offsets,
        call.longest_query,
        call.longest_key,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=call.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return d_query, d_key, d_value


def forward(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """(out [N, H, D] in the inputs' dtype, lse [N, H] float32)."""
    if not segments.num_tokens:
        return query_NHD.new_empty(query_NHD.shape), query_NHD.new_empty(query_NHD.shape[:2], dtype=torch.float32)
    calls = _calls(segments, query_NHD.device)
    out, lse_HN = _varlen_forward(query_NHD, key_NKD, value_NKD, calls.own, scale)
    if calls.prompt is None:
        return out, lse_HN.T.contiguous()
    rows = calls.rows_R
    prompt_out, prompt_lse_HR = _varlen_forward(
        query_NHD[rows], key_NKD[calls.prompt_rows_P], value_NKD[calls.prompt_rows_P], calls.prompt, scale
    )
    own_lse_HR = lse_HN[:, rows]
    merged_HR = torch.logaddexp(own_lse_HR, prompt_lse_HR)
    weights = ((part - merged_HR).exp().T[..., None] for part in (own_lse_HR, prompt_lse_HR))
    merged_out = torch.addcmul(out[rows] * next(weights), prompt_out, next(weights))
    out[rows] = merged_out.to(out.dtype)
    lse_HN[:, rows] = merged_HR
    return out, lse_HN.T.contiguous()


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
    """(dQuery, dKey, dValue) in the inputs' dtype. dQuery of the two calls is summed in a changing order unless
    `torch.use_deterministic_algorithms` is on, as flash-attention does it."""
    if not segments.num_tokens:
        return query_NHD.new_empty(query_NHD.shape), key_NKD.new_empty(key_NKD.shape), value_NKD.new_empty(value_NKD.shape)
    calls = _calls(segments, query_NHD.device)
    lse_HN = lse_NH.T.contiguous()
    gradients = _varlen_backward(d_out_NHD, query_NHD, key_NKD, value_NKD, out_NHD, lse_HN, calls.own, scale)
    if calls.prompt is None:
        return gradients
    rows, prompt_rows = calls.rows_R, calls.prompt_rows_P
    parts = _varlen_backward(
        d_out_NHD[rows],
        query_NHD[rows],
        key_NKD[prompt_rows],
        value_NKD[prompt_rows],
        out_NHD[rows],
        lse_HN[:, rows].contiguous(),
        calls.prompt,
        scale,
    )
    for total, part, where in zip(gradients, parts, (rows, prompt_rows, prompt_rows), strict=True):
        total[where] += part  # every row once
    return gradients
