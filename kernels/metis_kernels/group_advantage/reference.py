"""Grouped advantages, written like the formulas: see api.group_advantage.

Shape letters: N rollouts of all groups, P groups, G rollouts of one group, Q of them the set that a mean is taken over.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from metis_kernels.group_advantage._groups import EPSILON, normalise_over_batch


def _channel(rewards_G: Tensor, members_G: Tensor, norm_by_std: bool) -> tuple[Tensor, Tensor]:
    """(A [G] float64, 0 outside the members; signal, 0-d bool)."""
    values_G = torch.zeros_like(rewards_G)
    rewards_Q = rewards_G[members_G]
    # max == min, in a form that also holds for no members; NaN differs from everything
    signal = (rewards_Q != rewards_Q[:1]).any()
    if signal:
        centred_Q = rewards_Q - rewards_Q.mean()
        # a single NaN is a set of one with signal
        variance = centred_Q.square().sum() / max(len(rewards_Q) - 1, 1)
        values_G[members_G] = centred_Q / (variance.sqrt() + EPSILON) if norm_by_std else centred_Q
    return values_G, signal


def group_advantage(
    r_acc_N: Tensor,
    r_tool_N: Tensor,
    correct_N: Tensor,
    valid_N: Tensor,
    num_tokens_N: Tensor,
    offsets_P1: Tensor,
    estimator: str,
    alpha: float,
    norm_by_std: bool,
    use_acc: bool,
    use_tool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of GroupAdvantage in order, but num_acc and num_tool in one [2]."""
    r_acc_N, r_tool_N = r_acc_N.double(), r_tool_N.double()
    acc_N, tool_N = torch.zeros_like(r_acc_N), torch.zeros_like(r_acc_N)
    has_acc_N, has_tool_N = torch.zeros_like(valid_N), torch.zeros_like(valid_N)
    signal_acc_P = torch.zeros(len(offsets_P1) - 1, dtype=torch.bool, device=r_acc_N.device)
    signal_tool_P = torch.zeros_like(signal_acc_P)
    for p, (start, stop) in enumerate(itertools.pairwise(offsets_P1.tolist())):
        group = slice(start, stop)
        r_acc, r_tool, valid = r_acc_N[group], r_tool_N[group], valid_N[group]
        rewards = r_acc + alpha * r_tool if estimator == "coupled" else r_acc
        acc_N[group], signal_acc_P[p] = _channel(rewards, valid, norm_by_std)
        if estimator == "gdpo":
            more, more_signal = _channel(r_tool, valid, norm_by_std)
            acc_N[group] += alpha * more
            signal_acc_P[p] |= more_signal & (alpha > 0)
        has_acc_N[group] = valid & signal_acc_P[p]
        if estimator == "hdpo":
            qualifying = valid & correct_N[group]
            tool_N[group], signal_tool_P[p] = _channel(r_tool, qualifying, norm_by_std)
            has_tool_N[group] = qualifying & signal_tool_P[p]
    if estimator == "gdpo" and norm_by_std:
        acc_N = normalise_over_batch(acc_N, valid_N)
    needs_gradient_N = (has_acc_N & use_acc) | (has_tool_N & use_tool)
    num_sampled = torch.stack([num_tokens_N[valid_N].sum(), num_tokens_N[has_tool_N].sum()])
    return acc_N.float(), tool_N.float(), has_tool_N, needs_gradient_N, signal_acc_P, signal_tool_P, num_sampled
