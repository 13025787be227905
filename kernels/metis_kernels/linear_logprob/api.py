"""`linear_logprob`: hidden states and LM head to log-probabilities, without the logits. No gradient.

Shape letters: T tokens, H hidden size, V rows of the head (of this rank's shard).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metis_kernels import _check, _shard
from metis_kernels._impl import Impl, choose
from metis_kernels._shard import VocabShard

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class LinearLogprob:
    """[T] float32 each (float64 for float64 inputs): log-probability of the target, entropy in nats, log-sum-exp.

    lse_T is what `hdpo_loss` takes as its anchor.
    """

    logp_T: Tensor
    entropy_T: Tensor
    lse_T: Tensor


def linear_logprob(
    hidden_TH: Tensor,
    head_VH: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    shard: VocabShard | None = None,
    chunk: int | None = None,
    impl: Impl = "auto",
) -> LinearLogprob:
    """Log-probability of each target under softmax(hidden @ head.T / temperature), its entropy and log-sum-exp.

    Logits are float32 sums of products of the inputs, never rounded to their dtype, and only a tile of them exists at a
    time. With a vocabulary shard, the ranks exchange one all-gather of [T, 3] float32: unlike a sum, it needs no common
    anchor and is exact for any logits.

    Args:
        hidden_TH: hidden states, bfloat16, float16, float32 or float64. Non-finite ones give non-finite results.
        head_VH: LM head of the same dtype; the local rows if `shard` is given.
        targets_T: int64 indices into the whole vocabulary.
        temperature: > 0.
        shard: where the local rows of the head stand, and the tensor-parallel group.
        chunk: tokens whose statistics are taken at once; changes memory and speed only. Default: chosen by the
            implementation.
        impl: see `metis_kernels`.

    Raises:
        ValueError: a shape, dtype, device or option is not as stated, or `impl` cannot run here.
    """
    check_head(hidden_TH, head_VH, targets_T, temperature, chunk)
    chosen = choose(impl, hidden_TH.device, hidden_TH.dtype)
    start, group = _shard.unpack(shard)
    logp, entropy, lse = torch.ops.metis_kernels.linear_logprob(
        hidden_TH.detach(), head_VH.detach(), targets_T, temperature, start, group, chunk or 0, chosen
    )
    return LinearLogprob(logp, entropy, lse)


def check_head(hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, temperature: float, chunk: int | None) -> None:
    """The checks that `linear_logprob` and `hdpo_loss` share.

    Raises:
        ValueError: see `linear_logprob`.
    """
    _check.tensor("hidden_TH", hidden_TH, (None, None), FLOATS, axes="[T, H]")
    num_tokens, size = hidden_TH.shape
    if size == 0:
        raise ValueError(f"hidden_TH: expected at least one column, got shape {list(hidden_TH.shape)}")
    _check.tensor("head_VH", head_VH, (None, size), (hidden_TH.dtype,), hidden_TH.device, axes="[V, H]")
    _check.tensor("targets_T", targets_T, (num_tokens,), (torch.int64,), hidden_TH.device, axes="[T]")
    if len(head_VH) == 0:
        raise ValueError(f"head_VH: expected at least one row, got shape {list(head_VH.shape)}")
    _check.at_least("temperature", temperature, 0, strictly=True)
    if chunk is not None:
        _check.at_least("chunk", chunk, 1, whole=True)


@torch.library.custom_op("metis_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float,
    vocab_start: int,
    group: str,
    chunk: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check.indices("targets_T", targets, None if group else len(head))
    # the local imports keep triton and the C++ library out of processes that do not use them
    if impl == "triton":
        from metis_kernels.linear_logprob import triton

        return triton.linear_logprob(hidden, head, targets, temperature, vocab_start, group, chunk)
    if impl == "cpu":
        from metis_kernels.linear_logprob import cpu

        return cpu.linear_logprob(hidden, head, targets, temperature, vocab_start, group, chunk)
    from metis_kernels.linear_logprob import reference

    return reference.linear_logprob(hidden, head, targets, temperature, vocab_start, group, chunk or 1024)


@_linear_logprob.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float,
    vocab_start: int,
    group: str,
    chunk: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logp = hidden.new_empty((hidden.shape[0],), dtype=wide)
    return logp, torch.empty_like(logp), torch.empty_like(logp)
