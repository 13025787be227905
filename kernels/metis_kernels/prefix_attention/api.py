"""`prefix_attention`: causal attention of packed groups whose rollouts share their prompt. `full_attention`: of segments that
see themselves whole, as the images of a vision tower do.

Shape letters: N tokens of a pack, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metis_kernels import _check
from metis_kernels._impl import available, choose
from metis_kernels.prefix_attention.segments import Segments

AttentionImpl = Literal["auto", "flash", "triton", "cpu", "reference"]
FullAttentionImpl = Literal["auto", "sdpa", "cpu", "reference"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def prefix_attention(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    impl: AttentionImpl = "auto",
) -> Tensor:
    """Each token attends to the prefix of its segment and, causally, to its segment. Differentiable.

    The same as one dense causal attention for every rollout over prompt and rollout, with the prompt's own tokens computed
    once; the gradients of the prompt's keys and values are the sums over its rollouts.

    Args:
        query_NHD: bfloat16, float16, float32 or float64.
        key_NKD, value_NKD: same dtype; H is a multiple of K (grouped-query heads).
        segments: what each token sees; their tokens are the rows, in order.
        scale: factor of the scores. Default 1 / sqrt(D).
        impl: flash, triton, cpu, reference, or auto: on a GPU flash where flash-attn is installed and takes dtype and head
            size, else triton; on the CPU cpu where it can run, else reference.

    Returns:
        [N, H, D] in the dtype of the inputs.

    Raises:
        ValueError: a shape, dtype, device or the segments do not fit, or `impl` cannot run here.
    """
    _check.tensor("query_NHD", query_NHD, (None, None, None), _FLOATS, axes="[N, H, D]")
    num_tokens, num_heads, size = query_NHD.shape
    _check.tensor("key_NKD", key_NKD, (num_tokens, None, size), (query_NHD.dtype,), query_NHD.device, axes="[N, K, D]")
    num_kv = key_NKD.shape[1]
    if num_kv == 0 or num_heads % num_kv:
        raise ValueError(f"key_NKD: expected a number of heads that divides the {num_heads} of query_NHD, got {num_kv}")
    _check.tensor("value_NKD", value_NKD, key_NKD.shape, (query_NHD.dtype,), query_NHD.device, axes="[N, K, D]")
    if segments.num_tokens != num_tokens:
        raise ValueError(f"segments: expected {num_tokens} tokens, as query_NHD has, got {segments.num_tokens}")
    if not segments.causal:
        raise ValueError("segments: expected causal ones, got causal=False, which full_attention is for")
    chosen = _choose(impl, query_NHD.device, query_NHD.dtype, size)
    return _attend(query_NHD, key_NKD, value_NKD, segments, _factor(scale, size), chosen)


def full_attention(
    query_NHD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    offsets: Sequence[int],
    *,
    scale: float | None = None,
    impl: FullAttentionImpl = "auto",
) -> Tensor:
    """Each token attends to the whole of its segment. Differentiable.

    Nothing of the size of all scores is held, forward or backward: cpu keeps blocks of them in the cache, and so does torch's
    attention of bfloat16, float16 and float32. That one is what a GPU runs (flash or memory-efficient kernels, neighbours of
    one length in a batch), so that there is no Triton form of this.

    Args:
        query_NHD: bfloat16, float16, float32 or float64.
        key_NHD, value_NHD: same shape and dtype.
        offsets: ascending numbers from 0 to N; tokens from one to the next are a segment.
        scale: factor of the scores. Default 1 / sqrt(D).
        impl: sdpa (torch's), cpu, reference, or auto: cpu where it can run, else sdpa. In float32, segments of one length with
            heads below 64 go to sdpa too: it takes 0.7 to 0.95 of the time there, as measured with AVX-512.

    Returns:
        [N, H, D] in the dtype of the inputs.

    Raises:
        ValueError: a shape, dtype, device or the offsets do not fit, or `impl` cannot run here.
    """
    _check.tensor("query_NHD", query_NHD, (None, None, None), _FLOATS, axes="[N, H, D]")
    num_tokens, _, size = query_NHD.shape
    for name, tensor in (("key_NHD", key_NHD), ("value_NHD", value_NHD)):
        _check.tensor(name, tensor, query_NHD.shape, (query_NHD.dtype,), query_NHD.device, axes="[N, H, D]")
    segments = Segments(tuple(offsets), (-1,) * (len(offsets) - 1), causal=False)
    if segments.num_tokens != num_tokens:
        raise ValueError(f"offsets: expected the last one to be {num_tokens}, the tokens of query_NHD, got {offsets[-1]}")
    factor = _factor(scale, size)
    chosen = choose_full(impl, query_NHD.device, query_NHD.dtype, size, segments)
    if chosen == "sdpa":
        return _sdpa(query_NHD, key_NHD, value_NHD, segments, factor)
    return _attend(query_NHD, key_NHD, value_NHD, segments, factor, chosen)


def _factor(scale: float | None, size: int) -> float:
    factor = float(size) ** -0.5 if scale is None else scale
    _check.at_least("scale", factor, 0, strictly=True)
    return factor


def _attend(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, segments: Segments, scale: float, impl: str) -> Tensor:
    tables = list(segments.offsets), list(segments.prefix)
    out, _ = torch.ops.metis_kernels.prefix_attention(query_NHD, key_NKD, value_NKD, *tables, scale, impl, segments.causal)
    return out


def _sdpa(query_NHD: Tensor, key_NHD: Tensor, value_NHD: Tensor, segments: Segments, scale: float) -> Tensor:
    """torch's attention; neighbours of one length are a batch."""
    parts: list[Tensor] = []
    start = 0
    for length, same in groupby(stop - first for first, stop in pairwise(segments.offsets)):
        stop = start + length * len(list(same))
        if stop > start:
            # [segments, H, length, D]
            query, key, value = (
                part[start:stop].unflatten(0, (-1, length)).transpose(1, 2) for part in (query_NHD, key_NHD, value_NHD)
            )
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts or [query_NHD])


@torch.compiler.assume_constant_result
def choose_full(impl: FullAttentionImpl, device: torch.device, dtype: torch.dtype, size: int, segments: Segments) -> str:
    """The implementation to run.

    Raises:
        ValueError: `impl` is unknown or cannot run on these tensors.
    """
    if impl not in get_args(FullAttentionImpl):
        raise ValueError(f"impl: expected one of {', '.join(get_args(FullAttentionImpl))}, got {impl!r}")
    if impl == "auto":
        lengths = {stop - start for start, stop in pairwise(segments.offsets)}
        for_torch = dtype == torch.float32 and size < 64 and len(lengths) == 1  # one batch of small products
        return "sdpa" if for_torch or available("cpu", device, dtype) else "cpu"
    return impl if impl == "sdpa" else choose(impl, device, dtype)


@torch.compiler.assume_constant_result  # Dynamo cannot follow the look-ups; they do not change within a process
def _choose(impl: AttentionImpl, device: torch.device, dtype: torch.dtype, size: int) -> str:
    from metis_kernels.prefix_attention import flash

    if impl not in get_args(AttentionImpl):
        raise ValueError(f"impl: expected one of {', '.join(get_args(AttentionImpl))}, got {impl!r}")
    if impl == "auto" and device.type == "cuda" and not flash.why_not(device, dtype, size):
        return "flash"
    if impl != "flash":
        chosen = choose(impl, device, dtype)
        if impl == "auto" and chosen == "triton":
            from metis_kernels.prefix_attention.triton import LARGEST_HEAD

            return chosen if size <= LARGEST_HEAD else "reference"
        return chosen
    why_not = flash.why_not(device, dtype, size)
    if why_not:
        raise ValueError(f"impl='flash' cannot run here: {why_not}")
    return impl


def _implementation(impl: str) -> ModuleType:
    # the local imports keep libraries out of processes that do not use them
    if impl == "flash":
        from metis_kernels.prefix_attention import flash as implementation
    elif impl == "triton":
        from metis_kernels.prefix_attention import triton as implementation
    elif impl == "cpu":
        from metis_kernels.prefix_attention import cpu as implementation
    else:
        from metis_kernels.prefix_attention import reference as implementation
    return implementation


@torch.library.custom_op("metis_kernels::prefix_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: list[int],
    prefix: list[int],
    scale: float,
    impl: str,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    return _implementation(impl).forward(query, key, value, Segments(tuple(offsets), tuple(prefix), causal), scale)


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: list[int],
    prefix: list[int],
    scale: float,
    impl: str,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=wide)


@torch.library.custom_op("metis_kernels::prefix_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: list[int],
    prefix: list[int],
    scale: float,
    impl: str,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = Segments(tuple(offsets), tuple(prefix), causal)
    return _implementation(impl).backward(d_out, query, key, value, out, lse, segments, scale)


@_backward.register_fake
def _(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: list[int],
    prefix: list[int],
    scale: float,
    impl: str,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.offsets, ctx.prefix, ctx.scale, ctx.impl, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 8
    d_query, d_key, d_value = torch.ops.metis_kernels.prefix_attention_backward(
        d_out.contiguous(), *ctx.saved_tensors, ctx.offsets, ctx.prefix, ctx.scale, ctx.impl, ctx.causal
    )
    return d_query, d_key, d_value, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
