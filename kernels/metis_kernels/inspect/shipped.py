"""The launches of the shipped configurations: attention, LM head and patches of Qwen3-VL-8B, the first two split over 1, 2, 4
or 8 ranks.

Found by running the ops' host code on meta tensors, which have shapes and addresses and no memory. Sizes of inputs differ
only where a kernel could be specialised on them.

Shape letters: T tokens, L live tokens, H hidden size, V rows of the head (of this rank's shard), N rollouts, P groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

HIDDEN = 4096
VOCAB = 151936
QUERY_HEADS = 32
KEY_HEADS = 8
HEAD_SIZE = 128
PATCH, FRAMES, MERGE = 16, 2, 2
TENSOR_PARALLEL = (1, 2, 4, 8)
GROUP = 16

# Whole chunks and a rest that no power of two divides, so that lengths are seen both as multiples of 16 and not.
NUM_TOKENS = 2 * 4096 + 999
# Fewer live tokens than a GPU has room for blocks: rows of logits are split over programs.
FEW_TOKENS = 65


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to call an op. run: launches its kernels on meta tensors; what it returns is not looked at."""

    op: str
    name: str
    run: Callable[[], object]


def configurations() -> Iterator[Configuration]:
    """Every shipped configuration, op by op."""
    for estimator in ("hdpo", "grpo", "coupled", "gdpo"):
        yield Configuration("group_advantage", estimator, partial(group_advantage_launches, estimator))
    for dtype, name, ranks in _heads():
        yield Configuration("linear_logprob", name, partial(linear_logprob_launches, dtype, ranks))
    for dtype, name, ranks in _heads():
        train = partial(hdpo_loss_launches, dtype, ranks)
        yield Configuration("hdpo_loss", name, train)
        if ranks == 1:
            yield Configuration("hdpo_loss", f"{name}, few tokens", partial(train, num_live=FEW_TOKENS))
            yield Configuration("hdpo_loss", f"{name}, on policy", partial(train, on_policy=True))
            yield Configuration("hdpo_loss", f"{name}, all terms", partial(train, all_terms=True))
            yield Configuration("hdpo_loss", f"{name}, no gradient", partial(train, gradient=False))
    for dtype, name, ranks in _heads():
        yield Configuration("prefix_attention", name, partial(prefix_attention_launches, dtype, ranks))
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        yield Configuration("patchify", name, partial(patchify_launches, dtype))


def shipped_launches() -> None:
    """Run every configuration: what `compile_launches` takes to compile all shipped kernels."""
    for configuration in configurations():
        configuration.run()


def _heads() -> Iterator[tuple[torch.dtype, str, int]]:
    for ranks in TENSOR_PARALLEL:
        yield torch.bfloat16, f"bfloat16, tp {ranks}", ranks
    yield torch.float32, "float32, tp 1", 1


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def group_advantage_launches(estimator: str) -> object:
    """A batch of 64 groups of 16."""
    from metis_kernels.group_advantage import triton

    num_groups = 64
    num = num_groups * GROUP
    return triton.group_advantage(
        _meta(num),
        _meta(num),
        _meta(num, dtype=torch.bool),
        _meta(num, dtype=torch.bool),
        _meta(num, dtype=torch.int64),
        _meta(num_groups + 1, dtype=torch.int64),
        estimator,
        alpha=0.15,
        norm_by_std=True,
        use_acc=True,
        use_tool=True,
        largest=GROUP,
    )


def linear_logprob_launches(dtype: torch.dtype, ranks: int) -> object:
    """A batch of tokens against the first rank's shard of the head."""
    from metis_kernels.linear_logprob import triton

    return triton.linear_logprob(
        _meta(NUM_TOKENS, HIDDEN, dtype=dtype),
        _meta(VOCAB // ranks, HIDDEN, dtype=dtype),
        _meta(NUM_TOKENS, dtype=torch.int64),
        temperature=1.0,
        vocab_start=0,
        group_name="",
        chunk=0,
    )


def hdpo_loss_launches(
    dtype: torch.dtype,
    ranks: int,
    num_live: int = NUM_TOKENS,
    on_policy: bool = False,
    all_terms: bool = False,
    gradient: bool = True,
) -> object:
    """Loss and both gradients of live tokens against the first rank's shard of the head.

    on_policy: without old log-probabilities, so without an anchor. all_terms: entropy bonus, KL term and truncated
    importance weights.
    """
    from metis_kernels.hdpo_loss import triton
    from metis_kernels.hdpo_loss._terms import Clip, Tokens

    tokens = Tokens(
        scaled_acc_L=_meta(num_live),
        scaled_tool_L=_meta(num_live),
        scaled_one_L=_meta(num_live),
        old_logp_L=None if on_policy else _meta(num_live),
        engine_logp_L=_meta(num_live) if all_terms else None,
        ref_logp_L=_meta(num_live) if all_terms else None,
    )
    head_VH = _meta(VOCAB // ranks, HIDDEN, dtype=dtype)
    return triton.hdpo_loss(
        _meta(NUM_TOKENS, HIDDEN, dtype=dtype),
        head_VH,
        _meta(num_live, dtype=torch.int64),
        _meta(num_live, dtype=torch.int64),
        anchor_L=None,
        tokens=tokens,
        clip=Clip(eps_low=0.2, eps_high=0.2, dual_clip=3.0, tis_cap=2.0 if all_terms else 0.0),
        kl_coef=0.001 if all_terms else 0.0,
        entropy_coef=0.001 if all_terms else 0.0,
        with_entropy=gradient,  # the trainer reports entropies
        temperature=1.0,
        vocab_start=0,
        group_name="",
        chunk=0,
        d_hidden_TH=_meta(NUM_TOKENS, HIDDEN, dtype=dtype) if gradient else None,
        head_grad_VH=_meta(*head_VH.shape) if gradient else None,
    )


def prefix_attention_launches(dtype: torch.dtype, ranks: int) -> object:
    """Forward and backward of a pack with a shared prompt and a prompt alone.

    N tokens, H query heads, K key heads, D head size.
    """
    from metis_kernels.prefix_attention import triton
    from metis_kernels.prefix_attention.segments import Segments

    segments = Segments((0, 2000, 2500, 3000, 4000), (-1, 0, 0, -1))
    heads = QUERY_HEADS // ranks, KEY_HEADS // ranks, KEY_HEADS // ranks
    query_NHD, key_NKD, value_NKD = (_meta(segments.num_tokens, num, HEAD_SIZE, dtype=dtype) for num in heads)
    scale = HEAD_SIZE**-0.5
    out_NHD, lse_NH = triton.forward(query_NHD, key_NKD, value_NKD, segments, scale)
    return triton.backward(out_NHD, query_NHD, key_NKD, value_NKD, out_NHD, lse_NH, segments, scale)


def patchify_launches(dtype: torch.dtype) -> object:
    """An image of 3 million pixels."""
    from metis_kernels.patchify import triton

    return triton.patchify(_meta(1536, 2048, 3, dtype=torch.uint8), _meta(3, 256, dtype=dtype), PATCH, FRAMES, MERGE)
