"""The clipped dual-surrogate loss, in reference form (ALGORITHM section 4).

The LM head runs over chunks of tokens whose logits are recomputed in the backward pass, so [T, V] never exists at once.

Shape letters: T tokens with loss, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metis_fast.config import LossConfig

_LOG_RATIO_LIMIT = 20.0  # exp(20) is still far from overflow; beyond it the gradient is 0


def head_logp(hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy, from float32 logits divided by the temperature.

    Returns two [T] float32 tensors, both with gradient. At most `chunk` rows of logits exist at once, forward and backward.
    """
    logp, entropy = [], []
    for start in range(0, max(1, len(targets_T)), chunk):  # one empty chunk where nothing was sampled
        rows = slice(start, start + chunk)
        arguments = (hidden_TH[rows], head_VH, targets_T[rows], temperature)
        if torch.is_grad_enabled():
            out = checkpoint(_chunk_logp, *arguments, use_reentrant=False)
            assert out is not None
        else:
            out = _chunk_logp(*arguments)
        logp.append(out[0])
        entropy.append(out[1])
    return torch.cat(logp), torch.cat(entropy)


def _chunk_logp(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    # the product rounds to the weights' type, exactly as the engine's does; everything after it is float32
    all_logp = torch.log_softmax(F.linear(hidden, head).float() / temperature, -1)
    return all_logp.gather(1, targets[:, None])[:, 0], -(all_logp.exp() * all_logp).sum(-1)


@dataclass(frozen=True, slots=True, eq=False)
class Surrogate:
    """One channel of one micro-batch: its loss (a scalar with gradient) and how many of its live tokens are clipped."""

    loss: Tensor
    num_clipped: Tensor
    num_live: Tensor


def surrogate(ratio_T: Tensor, adv_T: Tensor, weight_T: Tensor | None, denominator: float, config: LossConfig) -> Surrogate:
    """sum_t S(A_t) / denominator, 0 where the denominator is 0.

    ratio_T: exp(clamped log-ratio), with gradient. weight_T: truncated importance weights, or None.
    """
    # S(A) of ALGORITHM section 4 is -A * clamp(rho, low, high) with bounds that depend on the sign of A: the upper clip for
    # A >= 0, the lower clip and the dual clip for A < 0. clamp passes the gradient on both bounds, as the spec asks.
    negative = adv_T < 0
    low = torch.where(negative, 1 - config.eps_low, 0.0)
    high = torch.where(negative, config.dual_clip, 1 + config.eps_high)
    per_token = -adv_T * ratio_T.clamp(low, high)
    if weight_T is not None:
        per_token = per_token * weight_T
    live = adv_T != 0
    clipped = live & ((ratio_T < low) | (ratio_T > high))
    loss = per_token.sum() / denominator if denominator else per_token.sum() * 0.0
    return Surrogate(loss, clipped.sum(), live.sum())


def log_ratio_to_ratio(log_ratio_T: Tensor) -> Tensor:
    """rho = exp(clamp(log ratio, -20, 20))."""
    return log_ratio_T.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()


def truncated_weight(old_logp_T: Tensor, engine_logp_T: Tensor, cap: float) -> Tensor:
    """min(exp(logp_old - logp_engine), C): corrects for an engine that is not quite the trainer."""
    return log_ratio_to_ratio(old_logp_T - engine_logp_T).clamp(max=cap)


def k3(logp_T: Tensor, ref_logp_T: Tensor) -> Tensor:
    """The k3 estimator of KL(policy || reference): exp(d) - d - 1 with d = ref - logp (Schulman, 2020)."""
    difference = (ref_logp_T - logp_T).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return difference.exp() - difference - 1
