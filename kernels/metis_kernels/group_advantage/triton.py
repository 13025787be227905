"""Grouped advantages in one launch, one program a group.

Every program holds its group in registers: two-pass mean and variance, no shared state but two integer counters, whose
atomic additions give the same sum in any order. Arithmetic is float64, whatever the rewards' dtype: there is little of it
(126 of 638 instructions for groups of 16 on sm_90, counted in the compiled kernel), it leaves the rounding of the result to
float32 (6e-8 relative) as the only error, for float64 rewards too, and its division and square root are correctly rounded,
where Triton's float32 ones are approximate.

Memory traffic for hdpo with verdicts everywhere and float32 rewards: 28 bytes a rollout (18 read, 10 written) and 18 a group
(offsets 16, signals 2). That is 15 kB for 32 groups of 16.

Shape letters: N rollouts of all groups, P groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis_kernels._launch import launch
from metis_kernels.group_advantage import _groups


@triton.jit
def _channel(
    rewards: tl.tensor, members: tl.tensor, EPSILON: tl.constexpr, NORM_BY_STD: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A of one group (float64, 0 outside the members), and whether the members' rewards differ (0 or 1)."""
    num = tl.sum(members.to(tl.int32), 0)
    lowest = tl.min(tl.where(members, rewards, float("inf")), 0)
    # "not equal to the lowest" rather than max != min: a GPU's minimum and maximum pass over NaN
    signal = tl.max((members & (rewards != lowest)).to(tl.int32), 0)
    mean = tl.sum(tl.where(members, rewards, 0.0), 0) / tl.maximum(num, 1)
    value = tl.where(members, rewards - mean, 0.0)
    if NORM_BY_STD:
        variance = tl.sum(value * value, 0) / (tl.maximum(num, 2) - 1)
        value = value / (tl.sqrt(variance) + EPSILON)
    # tl.max declares that it may return a tuple, which is so for return_indices only
    return tl.where(signal != 0, value, 0.0), signal  # pyright: ignore[reportReturnType]


@triton.jit
def group_advantage_kernel(
    r_acc_ptr: tl.tensor,
    r_tool_ptr: tl.tensor,
    correct_ptr: tl.tensor,
    valid_ptr: tl.tensor,
    num_tokens_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    adv_acc_ptr: tl.tensor,
    adv_tool_ptr: tl.tensor,
    in_tool_ptr: tl.tensor,
    needs_gradient_ptr: tl.tensor,
    signal_acc_ptr: tl.tensor,
    signal_tool_ptr: tl.tensor,
    num_sampled_ptr: tl.tensor,
    ESTIMATOR: tl.constexpr,
    ALPHA: tl.constexpr,
    EPSILON: tl.constexpr,
    NORM_BY_STD: tl.constexpr,
    USE_ACC: tl.constexpr,
    USE_TOOL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program p: group p. With gdpo, adv_acc is s, not yet normalised over the batch."""
    p = tl.program_id(0)
    start = tl.load(offsets_ptr + p)
    size = tl.load(offsets_ptr + p + 1) - start
    lane = tl.arange(0, BLOCK)
    inside = lane < size
    at = start + lane
    valid = tl.load(valid_ptr + at, mask=inside, other=0) != 0
    num_tokens = tl.load(num_tokens_ptr + at, mask=valid, other=0)

    rewards = tl.load(r_acc_ptr + at, mask=valid, other=0.0).to(tl.float64)
    r_tool = tl.load(r_tool_ptr + at, mask=valid, other=0.0).to(tl.float64)
    if ESTIMATOR == "coupled":
        rewards += ALPHA * r_tool
    adv_acc, signal_acc = _channel(rewards, valid, EPSILON, NORM_BY_STD)
    if ESTIMATOR == "gdpo":
        more, more_signal = _channel(r_tool, valid, EPSILON, NORM_BY_STD)
        adv_acc += ALPHA * more
        if ALPHA > 0:
            signal_acc |= more_signal
    needs_gradient = valid & (signal_acc != 0) & USE_ACC

    if ESTIMATOR == "hdpo":
        qualifying = tl.load(correct_ptr + at, mask=valid, other=0) != 0
        adv_tool, signal_tool = _channel(r_tool, qualifying, EPSILON, NORM_BY_STD)
        in_tool = qualifying & (signal_tool != 0)
        needs_gradient |= in_tool & USE_TOOL
        tl.atomic_add(num_sampled_ptr + 1, tl.sum(tl.where(in_tool, num_tokens, 0), 0), sem="relaxed")
    else:
        adv_tool = tl.zeros_like(adv_acc)
        signal_tool = tl.zeros_like(signal_acc)
        in_tool = tl.zeros_like(valid)
    tl.atomic_add(num_sampled_ptr, tl.sum(num_tokens, 0), sem="relaxed")

    tl.store(adv_acc_ptr + at, adv_acc, mask=inside)
    tl.store(adv_tool_ptr + at, adv_tool, mask=inside)
    tl.store(in_tool_ptr + at, in_tool, mask=inside)
    tl.store(needs_gradient_ptr + at, needs_gradient, mask=inside)
    tl.store(signal_acc_ptr + p, signal_acc != 0)
    tl.store(signal_tool_ptr + p, signal_tool != 0)


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
    largest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of GroupAdvantage in order, but num_acc and num_tool in one [2]. largest: bound of the group sizes.

    Besides the launch, 16 bytes are set to 0 for the counters. GDPO's standard deviation over the batch is taken in torch:
    a float sum over programs needs a second launch anyway if its order is to be fixed, and it is a baseline.
    """
    num, num_groups, device = len(r_acc_N), len(offsets_P1) - 1, r_acc_N.device
    over_batch = estimator == "gdpo" and norm_by_std
    adv_acc_N = torch.empty(num, dtype=torch.float64 if over_batch else torch.float32, device=device)
    adv_tool_N = torch.empty(num, dtype=torch.float32, device=device)
    in_tool_N, needs_gradient_N = (torch.empty(num, dtype=torch.bool, device=device) for _ in range(2))
    signal_acc_P, signal_tool_P = (torch.empty(num_groups, dtype=torch.bool, device=device) for _ in range(2))
    num_sampled = torch.zeros(2, dtype=torch.int64, device=device)
    block = triton.next_power_of_2(max(largest, 1))
    if num_groups:
        launch(
            group_advantage_kernel,
            (num_groups,),
            r_acc_N.contiguous(),
            r_tool_N.contiguous(),
            correct_N.contiguous(),
            valid_N.contiguous(),
            num_tokens_N.contiguous(),
            offsets_P1.to(device, non_blocking=True).contiguous(),
            adv_acc_N,
            adv_tool_N,
            in_tool_N,
            needs_gradient_N,
            signal_acc_P,
            signal_tool_P,
            num_sampled,
            num_warps=min(max(block // 128, 1), 8),
            ESTIMATOR=estimator,
            # a constant, since a float argument of a kernel is float32; fixed where unused, so that it makes no variants
            ALPHA=alpha if estimator in ("coupled", "gdpo") else 0.0,
            EPSILON=_groups.EPSILON,
            NORM_BY_STD=norm_by_std,
            USE_ACC=use_acc,
            USE_TOOL=use_tool if estimator == "hdpo" else False,
            BLOCK=block,
        )
    if over_batch:
        adv_acc_N = _groups.normalise_over_batch(adv_acc_N, valid_N).float()
    return adv_acc_N, adv_tool_N, in_tool_N, needs_gradient_N, signal_acc_P, signal_tool_P, num_sampled
