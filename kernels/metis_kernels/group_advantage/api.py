"""`group_advantage`: the advantages of a batch of groups, which rollouts need a gradient, and the loss's denominators.

Shape letters: N rollouts of all groups, one group after another; P groups, P1 = P + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from metis_kernels import _check
from metis_kernels._impl import Impl, choose
from metis_kernels.group_advantage import _groups
from metis_kernels.group_advantage._groups import Estimator


@dataclass(frozen=True, slots=True, eq=False)
class GroupAdvantage:
    """What `group_advantage` returns, on the device of the rewards. 0 and False for a rollout without a verdict.

    adv_acc_N, adv_tool_N: float32. Estimators with one advantage have it in adv_acc_N.
    in_tool_N: bool, the rollout is in a Q_p with signal; its tokens count in num_tool.
    needs_gradient_N: bool, in some channel with a weight above 0, the rewards that its advantage is made of are not all
        equal. Where no other term is in the loss, all other rollouts can be left out of the update; that is exact.
    signal_acc_P, signal_tool_P: bool, the channel's rewards are not all equal in that group.
    num_acc, num_tool: 0-d int64, N_acc and N_tool: the sampled tokens of all rollouts with a verdict, those of uniform
        groups included, and of the rollouts in in_tool_N.
    """

    adv_acc_N: Tensor
    adv_tool_N: Tensor
    in_tool_N: Tensor
    needs_gradient_N: Tensor
    signal_acc_P: Tensor
    signal_tool_P: Tensor
    num_acc: Tensor
    num_tool: Tensor


def group_advantage(
    r_acc_N: Tensor,
    r_tool_N: Tensor,
    correct_N: Tensor,
    valid_N: Tensor,
    num_tokens_N: Tensor,
    offsets_P1: Tensor,
    *,
    estimator: Estimator = "hdpo",
    alpha: float = 0.15,
    norm_by_std: bool = True,
    w_acc: float = 1.0,
    w_tool: float = 0.15,
    impl: Impl = "auto",
) -> GroupAdvantage:
    """Advantages A(r) = (r - mean) / (std + 1e-6) over sets of rollouts of one group; std with n - 1.

        hdpo      A_acc = A(r_acc) over the rollouts with a verdict, A_tool = A(r_tool) over Q_p, the correct ones of them
        grpo      A_acc = A(r_acc)
        coupled   A_acc = A(r_acc + alpha r_tool)
        gdpo      A_acc = s / (std of s over the batch + 1e-6), s = A(r_acc) + alpha A(r_tool)

    An advantage is exactly 0 where all rewards that enter its mean are equal, one reward or none included. That is decided
    by comparing the rewards: the float mean of equal rewards is not always equal to them, and dividing its noise by
    std + 1e-6 would make advantages of several hundredths of it. All arithmetic is float64, rounded to float32 at the end.

    A NaN reward of a rollout with a verdict counts as different from all others and makes NaN of the advantages of its
    set; with gdpo, of the batch's, except those that are exactly 0.

    Args:
        r_acc_N, r_tool_N: rewards, both float32 or both float64. What stands where there is no verdict is never read.
        correct_N: bool, r_ans = 1.
        valid_N: bool, the rollout has a verdict.
        num_tokens_N: int64, sampled tokens of each rollout.
        offsets_P1: int64, ascending from 0 to N: group p is rollouts offsets[p] to offsets[p + 1], at most 1024 of them.
            Best on the host, where it is checked and gives the block size; on the device of the rewards it is taken as
            right, since checking would wait for the device.
        estimator: see above.
        alpha: weight of r_tool in coupled and gdpo, >= 0.
        norm_by_std: False leaves out every division by a standard deviation (Dr. GRPO).
        w_acc, w_tool: weights of the two losses, >= 0; only whether they are 0 matters, in needs_gradient_N.
        impl: see `metis_kernels`.

    Raises:
        ValueError: a shape, dtype, device or option is not as stated, or `impl` cannot run here.

    Source: HDPO: Metis (arXiv 2604.08545); GRPO: arXiv 2402.03300; Dr. GRPO: arXiv 2503.20783; GDPO: arXiv 2601.05242.
    """
    _check.tensor("r_acc_N", r_acc_N, (None,), (torch.float32, torch.float64), axes="[N]")
    num, device = len(r_acc_N), r_acc_N.device
    _check.tensor("r_tool_N", r_tool_N, (num,), (r_acc_N.dtype,), device, axes="[N]")
    _check.tensor("correct_N", correct_N, (num,), (torch.bool,), device, axes="[N]")
    _check.tensor("valid_N", valid_N, (num,), (torch.bool,), device, axes="[N]")
    _check.tensor("num_tokens_N", num_tokens_N, (num,), (torch.int64,), device, axes="[N]")
    on_host = isinstance(offsets_P1, Tensor) and offsets_P1.device.type == "cpu"
    _check.tensor("offsets_P1", offsets_P1, (None,), (torch.int64,), None if on_host else device, axes="[P + 1]")
    if len(offsets_P1) == 0:
        raise ValueError("offsets_P1: expected shape [P + 1], at least one offset, got [0]")
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator: expected one of {', '.join(get_args(Estimator))}, got {estimator!r}")
    for name, number in (("alpha", alpha), ("w_acc", w_acc), ("w_tool", w_tool)):
        _check.at_least(name, number, 0)
    adv_acc, adv_tool, in_tool, needs_gradient, signal_acc, signal_tool, num_sampled = torch.ops.metis_kernels.group_advantage(
        r_acc_N.detach(),
        r_tool_N.detach(),
        correct_N,
        valid_N,
        num_tokens_N,
        offsets_P1,
        estimator,
        alpha,
        norm_by_std,
        w_acc > 0,
        w_tool > 0,
        impl,
    )
    num_acc, num_tool = num_sampled.unbind()
    return GroupAdvantage(adv_acc, adv_tool, in_tool, needs_gradient, signal_acc, signal_tool, num_acc, num_tool)


@torch.library.custom_op("metis_kernels::group_advantage", mutates_args=())
def _group_advantage(
    r_acc: Tensor,
    r_tool: Tensor,
    correct: Tensor,
    valid: Tensor,
    num_tokens: Tensor,
    offsets: Tensor,
    estimator: str,
    alpha: float,
    norm_by_std: bool,
    use_acc: bool,
    use_tool: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of GroupAdvantage in order, but num_acc and num_tool in one [2]."""
    # Chosen here and not before, since it looks for files, which torch.compile cannot trace. Not by the rewards' dtype:
    # every implementation of this op takes float64 too.
    chosen = choose(impl, r_acc.device, torch.float32)  # pyright: ignore[reportArgumentType]  an op takes any str
    largest = _groups.largest_group(offsets, len(r_acc))
    arguments = (r_acc, r_tool, correct, valid, num_tokens, offsets, estimator, alpha, norm_by_std, use_acc, use_tool)
    # the local imports keep triton and the C++ library out of processes that do not use them
    if chosen == "triton":
        from metis_kernels.group_advantage import triton

        return triton.group_advantage(*arguments, largest)
    if chosen == "cpu":
        from metis_kernels.group_advantage import cpu

        return cpu.group_advantage(*arguments)
    from metis_kernels.group_advantage import reference

    return reference.group_advantage(*arguments)


@_group_advantage.register_fake
def _(
    r_acc: Tensor,
    r_tool: Tensor,
    correct: Tensor,
    valid: Tensor,
    num_tokens: Tensor,
    offsets: Tensor,
    *options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (num,), num_groups = r_acc.shape, offsets.shape[0] - 1
    adv = r_acc.new_empty((num,), dtype=torch.float32)
    mask = r_acc.new_empty((num,), dtype=torch.bool)
    signal = r_acc.new_empty((num_groups,), dtype=torch.bool)
    num_sampled = r_acc.new_empty((2,), dtype=torch.int64)
    return (
        adv,
        torch.empty_like(adv),
        mask,
        torch.empty_like(mask),
        signal,
        torch.empty_like(signal),
        num_sampled,
    )
