"""`prefix_attention` by flash-attention's kernels: FlashAttention-3 on Hopper (Shah et al., 2024; the module
flash_attn_interface, built from hopper/), else FlashAttention-2 (Dao, 2023; the package flash-attn, from 2.7 on).

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
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from metis_kernels.prefix_attention.segments import Segments, readers

OLDEST = (2, 7)
"""The first flash-attn with these arguments."""

LARGEST_HEAD = 256

_ARGUMENTS_3 = {
    "_flash_attn_forward": (
        "q k v k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k "
        "page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale softmax_scale "
        "causal"
    ),
    "_flash_attn_backward": (
        "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv "
        "softmax_scale causal"
    ),
}
"""What FlashAttention-3's functions begin with, both as functions with `window_size` and as custom operators with
`window_size_left` and `window_size_right`; the rest is left to its defaults: no window, no softcap, one split."""


def why_not(device: torch.device, dtype: torch.dtype, size: int) -> str:
    """Returns "" if it can run on tensors of this device, dtype and head size, else why it cannot."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"it takes CUDA tensors of bfloat16 or float16, got {str(dtype).removeprefix('torch.')} on {device.type}"
    if size % 8 or size > LARGEST_HEAD:
        return f"it takes head sizes that are multiples of 8, up to {LARGEST_HEAD}, got {size}"
    found = _kernels(device, dtype, size)
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


@functools.cache
def _library_3() -> ModuleType | str:
    """FlashAttention-3's flash_attn_interface, or why there is none. It is built from sources of any day, so that arguments are
    looked at and not a version."""
    try:
        interface = importlib.import_module("flash_attn_interface")
    except ImportError as error:
        return f"FlashAttention-3 cannot be imported ({error})"
    for name, known in _ARGUMENTS_3.items():
        function = getattr(interface, name, None)
        function = getattr(function, "_init_fn", function)  # what a custom operator was made of; itself it takes anything
        names = [one.rstrip("_").removeprefix("is_") for one in inspect.signature(function).parameters] if function else []
        if not f"{' '.join(names)} ".startswith(f"{known} "):
            return (
                f"FlashAttention-3's {name} takes ({', '.join(names)}), which is not known here; build hopper/ of a later one"
            )
    return interface


@functools.cache
def _build_flags_3() -> Mapping[str, bool]:
    """What FlashAttention-3 was built without; nothing where the build did not write it down."""
    try:
        return importlib.import_module("flash_attn_config").CONFIG["build_flags"]
    except ImportError:
        return {}


def _why_not_3(dtype: torch.dtype, size: int) -> str:
    """As `why_not`, of FlashAttention-3 on a GPU that it is made for."""
    # Its deterministic backward takes heads up to 192 only, and older builds leave semaphores of grouped heads uninitialised.
    if torch.are_deterministic_algorithms_enabled():
        return "FlashAttention-3 is not taken where torch.use_deterministic_algorithms is on"
    found = _library_3()
    if isinstance(found, str):
        return found
    without = {name.removeprefix("FLASHATTENTION_DISABLE_") for name, value in _build_flags_3().items() if value}
    needs = {"VARLEN", "BACKWARD"} | ({"FP16"} if dtype == torch.float16 else set())
    heads = {f"HDIM{largest}" for largest in (64, 96, 128, 192, LARGEST_HEAD) if largest >= size}  # smaller ones are padded
    if heads <= without:
        needs |= heads
    missing = sorted(needs & without)
    return f"FlashAttention-3 was built without {', '.join(missing)}" if missing else ""


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)


def _kernels(device: torch.device, dtype: torch.dtype, size: int) -> _Kernels | str:
    """What runs tensors like these, or why nothing does."""
    why_not_3 = ""
    if _is_hopper(device):
        why_not_3 = _why_not_3(dtype, size)
        if not why_not_3:
            return _FLASH_3
    found = _library()
    if isinstance(found, str):
        return f"{found}; {why_not_3}" if why_not_3 else found
    return _FLASH_2


def _kernels_of(query: Tensor) -> _Kernels:
    """Forward and backward ask anew: both libraries agree in what they keep, and only one of them may be deterministic."""
    found = _kernels(query.device, query.dtype, query.shape[-1])
    if isinstance(found, str):  # `why_not` was asked before: what torch is asked for has changed since
        raise ValueError(f"impl='flash' cannot run here: {found}")
    return found


def _module(found: ModuleType | str) -> ModuleType:
    assert isinstance(found, ModuleType)  # `_kernels` looked
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


def _forward_2(query: Tensor, key: Tensor, value: Tensor, call: _Call, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _module(_library())._flash_attn_varlen_forward(
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


def _backward_2(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    call: _Call,
    scale: float,
) -> None:
    _module(_library())._flash_attn_varlen_backward(
        d_out,
        query,
        key,
        value,
        out,
        lse,
        *gradients,
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


# By position, as the names differ between versions (`_ARGUMENTS_3`).


def _forward_3(query: Tensor, key: Tensor, value: Tensor, call: _Call, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _module(_library_3())._flash_attn_forward(
        query,
        key,
        value,
        *[None] * 4,  # new keys and values, a second part of the query, a place for out
        call.query_offsets,
        call.key_offsets,
        *[None] * 3,  # lengths of new keys, lengths that are used
        call.longest_query,
        call.longest_key,
        *[None] * 9,  # pages, padding, rotary positions, scales of 8-bit numbers
        scale,
        call.causal,
    )
    return out, lse


def _backward_3(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    call: _Call,
    scale: float,
) -> None:
    _module(_library_3())._flash_attn_backward(
        d_out,
        query,
        key,
        value,
        out,
        lse,
        call.query_offsets,
        call.key_offsets,
        *[None] * 2,  # lengths that are used
        call.longest_query,
        call.longest_key,
        *gradients,
        scale,
        call.causal,
    )


@dataclass(frozen=True, slots=True)
class _Kernels:
    """A library's varlen calls.

    forward: (out [.., H, D], lse [H, ..] float32) of query, key, value. backward: of d_out, query, key, value, out and lse,
    written into the gradients (dQuery, dKey, dValue).
    """

    forward: Callable[[Tensor, Tensor, Tensor, _Call, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor], _Call, float], None]


_FLASH_2 = _Kernels(_forward_2, _backward_2)
_FLASH_3 = _Kernels(_forward_3, _backward_3)


def _backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: _Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    new = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    gradients = new[0], new[1], new[2]
    _kernels_of(query).backward(d_out, query, key, value, out, lse, gradients, call, scale)
    return gradients


def forward(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, segments: Segments, scale: float) -> tuple[Tensor, Tensor]:
    """(out [N, H, D] in the inputs' dtype, lse [N, H] float32)."""
    if not segments.num_tokens:
        return query_NHD.new_empty(query_NHD.shape), query_NHD.new_empty(query_NHD.shape[:2], dtype=torch.float32)
    calls = _calls(segments, query_NHD.device)
    run = _kernels_of(query_NHD).forward
    out, lse_HN = run(query_NHD, key_NKD, value_NKD, calls.own, scale)
    if calls.prompt is None:
        return out, lse_HN.T.contiguous()
    rows = calls.rows_R
    prompt_out, prompt_lse_HR = run(
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
    """(dQuery, dKey, dValue) in the inputs' dtype. Gradients of a call are summed in a changing order unless
    `torch.use_deterministic_algorithms` is on, as flash-attention does it."""
    if not segments.num_tokens:
        return query_NHD.new_empty(query_NHD.shape), key_NKD.new_empty(key_NKD.shape), value_NKD.new_empty(value_NKD.shape)
    calls = _calls(segments, query_NHD.device)
    lse_HN = lse_NH.T.contiguous()
    gradients = _backward(d_out_NHD, query_NHD, key_NKD, value_NKD, out_NHD, lse_HN, calls.own, scale)
    if calls.prompt is None:
        return gradients
    rows, prompt_rows = calls.rows_R, calls.prompt_rows_P
    parts = _backward(
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
