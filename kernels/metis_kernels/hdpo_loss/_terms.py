"""The part of the loss that works on log-probabilities: ratio, both surrogates, optional terms, metrics.

O(L) work on vectors, in plain PyTorch, used around the implementations that do the O(L V H) work. Nothing here goes back to
the host. ALGORITHM: with d = logp - old, rho = exp(clamp(d, -20, 20)) and the bounds of the clip by the sign of A,

    S(A) = -A clamp(rho, low, high),   A >= 0: [0, 1 + eps_high],   A < 0: [1 - eps_low, dual_clip]

which is max(-A rho, -A clip(rho, 1 - eps_low, 1 + eps_high)), limited to -A dual_clip for A < 0.

Shape letters: L tokens that take part ("live").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""exp(20) is still far from overflow; beyond it the gradient is 0."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Bounds of the surrogates and of the importance weight.

    dual_clip: c > 1, inf is off. tis_cap: 0 is off.
    """

    eps_low: float
    eps_high: float
    dual_clip: float
    tis_cap: float


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """What the loss knows of every live token, [L] each, one float dtype.

    scaled_acc_L, scaled_tool_L: w * A / N of either channel. scaled_one_L: 1 / N_acc, for the terms that have no advantage.
    old_logp_L: None where the proximal policy is the current one. engine_logp_L, ref_logp_L: None where not used.
    """

    scaled_acc_L: Tensor
    scaled_tool_L: Tensor
    scaled_one_L: Tensor
    old_logp_L: Tensor | None
    engine_logp_L: Tensor | None
    ref_logp_L: Tensor | None

    def rows(self, rows: slice | Tensor) -> Tokens:
        """Some of the tokens, by slice or index."""

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        return Tokens(
            self.scaled_acc_L[rows],
            self.scaled_tool_L[rows],
            self.scaled_one_L[rows],
            cut(self.old_logp_L),
            cut(self.engine_logp_L),
            cut(self.ref_logp_L),
        )


def bounds(advantage_L: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """Range of rho in which the surrogate of that advantage has a gradient, bounds included."""
    negative = advantage_L < 0
    # tensors, not numbers: torch.where of two Python numbers has the default dtype, which would round the bounds. Filled on the
    # device: a copy of a number from the host waits for all that a GPU has still to do
    low = torch.where(negative, advantage_L.new_full((), 1 - clip.eps_low), 0.0)
    high = torch.where(negative, advantage_L.new_full((), clip.dual_clip), advantage_L.new_full((), 1 + clip.eps_high))
    return low, high


def _limited_exp(value: Tensor) -> Tensor:
    return value.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def log_ratio(logp_L: Tensor, tokens: Tokens) -> Tensor:
    """d = logp - old, exactly 0 where the proximal policy is the current one. NaN and Inf of logp are kept."""
    return logp_L - (logp_L if tokens.old_logp_L is None else tokens.old_logp_L)


def importance_weight(logp_L: Tensor, tokens: Tokens, clip: Clip) -> Tensor | None:
    """min(exp(old - engine), C), None where it is off."""
    if not clip.tis_cap:
        return None
    assert tokens.engine_logp_L is not None
    old = logp_L if tokens.old_logp_L is None else tokens.old_logp_L
    return _limited_exp(old - tokens.engine_logp_L).clamp(max=clip.tis_cap)


def coefficient(logp_L: Tensor, tokens: Tokens, clip: Clip, kl_coef: float) -> Tensor:
    """g = -dL/dlogp of every live token, entropy bonus not included."""
    difference = log_ratio(logp_L, tokens)
    ratio = _limited_exp(difference)
    g = torch.zeros_like(logp_L)
    for scaled in (tokens.scaled_acc_L, tokens.scaled_tool_L):
        low, high = bounds(scaled, clip)
        g = g + scaled * ratio * ((ratio >= low) & (ratio <= high))
    weight = importance_weight(logp_L, tokens, clip)
    if weight is not None:
        g = g * weight
    g = g * (difference.abs() <= LOG_RATIO_LIMIT)
    if kl_coef:
        assert tokens.ref_logp_L is not None
        to_ref = tokens.ref_logp_L - logp_L
        inside = to_ref.abs() <= LOG_RATIO_LIMIT
        g = g + kl_coef * tokens.scaled_one_L * (_limited_exp(to_ref) - 1) * inside
    return g


@dataclass(frozen=True, slots=True, eq=False)
class HdpoMetrics:
    """Of one call, each a 0-d float64 tensor without gradient: sums over the live tokens, so that calls add up.

    loss_acc, loss_tool: w * L of either surrogate, loss_scale included. loss_kl, loss_entropy: the optional terms as they
    enter the loss.
    num_live: tokens that took part. num_acc, num_tool: those whose advantage is not 0; num_clipped_acc, num_clipped_tool:
    those among them whose ratio is outside the bounds, so that the surrogate gives no gradient.
    sum_kl: of old - logp, the k1 estimate of KL(old || current). sum_entropy: of the entropies, 0 where none were asked for.
    sum_engine_gap: of |old - engine|. ratio_min, ratio_max: extremes of rho, 1 where there is no live token.
    """

    loss_acc: Tensor
    loss_tool: Tensor
    loss_kl: Tensor
    loss_entropy: Tensor
    num_live: Tensor
    num_acc: Tensor
    num_tool: Tensor
    num_clipped_acc: Tensor
    num_clipped_tool: Tensor
    sum_kl: Tensor
    sum_entropy: Tensor
    sum_engine_gap: Tensor
    ratio_min: Tensor
    ratio_max: Tensor


def loss_and_metrics(
    logp_L: Tensor, entropy_L: Tensor | None, tokens: Tokens, clip: Clip, kl_coef: float, entropy_coef: float
) -> tuple[Tensor, HdpoMetrics]:
    """The loss of the live tokens (0-d float64) and its metrics. Sums are taken in float64."""
    logp = logp_L.double()
    zero = logp.new_zeros(())
    difference = log_ratio(logp, tokens)
    ratio = _limited_exp(difference)
    weight = importance_weight(logp, tokens, clip)
    losses, nums, clipped = [], [], []
    for scaled in (tokens.scaled_acc_L, tokens.scaled_tool_L):
        low, high = bounds(scaled.double(), clip)
        value = -scaled * torch.minimum(torch.maximum(ratio, low), high)
        losses.append((value if weight is None else value * weight).sum())
        nums.append((scaled != 0).sum().double())
        clipped.append(((scaled != 0) & ((ratio < low) | (ratio > high))).sum().double())
    kl = zero
    if kl_coef:
        assert tokens.ref_logp_L is not None
        to_ref = (tokens.ref_logp_L - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        kl = (kl_coef * tokens.scaled_one_L * (to_ref.exp() - to_ref - 1)).sum()
    entropy = zero
    if entropy_coef:
        assert entropy_L is not None
        entropy = -(entropy_coef * tokens.scaled_one_L * entropy_L.double()).sum()
    gap = torch.zeros_like(logp)
    if tokens.engine_logp_L is not None:
        old = logp if tokens.old_logp_L is None else tokens.old_logp_L
        gap = (old - tokens.engine_logp_L).abs().double()
    # a row outside of the mask, which a caller may list as live, counts nowhere
    inside = tokens.scaled_one_L != 0

    def total(value_L: Tensor) -> Tensor:
        return value_L.where(inside, 0).sum()

    some = logp.numel() > 0
    metrics = HdpoMetrics(
        loss_acc=losses[0],
        loss_tool=losses[1],
        loss_kl=kl,
        loss_entropy=entropy,
        num_live=inside.sum().double(),
        num_acc=nums[0],
        num_tool=nums[1],
        num_clipped_acc=clipped[0],
        num_clipped_tool=clipped[1],
        sum_kl=-total(difference),
        sum_entropy=zero if entropy_L is None else total(entropy_L.double()),
        sum_engine_gap=total(gap),
        ratio_min=ratio.where(inside, torch.inf).min().where(inside.any(), 1) if some else zero + 1,
        ratio_max=ratio.where(inside, -torch.inf).max().where(inside.any(), 1) if some else zero + 1,
    )
    return losses[0] + losses[1] + kl + entropy, metrics
