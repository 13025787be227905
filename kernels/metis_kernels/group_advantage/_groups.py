"""What the implementations of `group_advantage` share: names, constants, the check of the offsets, GDPO's last step.

Shape letters: N rollouts of all groups, P groups.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["hdpo", "grpo", "coupled", "gdpo"]

EPSILON = 1e-6
"""Added to a standard deviation before dividing by it (the public recipe's value)."""

MAX_GROUP = 1024
"""Most rollouts of a group: the kernel holds a group in the registers of one program, 4 values a thread at 8 warps."""


def largest_group(offsets_P1: Tensor, num_rollouts: int) -> int:
    """Size of the largest group. On an accelerator, where looking would wait for the device: a bound of it.

    Raises:
        ValueError: offsets on the host do not cut the rollouts into groups, or a group is too large.
    """
    if offsets_P1.device.type != "cpu":
        return min(num_rollouts, MAX_GROUP)
    first, last = int(offsets_P1[0]), int(offsets_P1[-1])
    if first != 0 or last != num_rollouts:
        raise ValueError(f"offsets_P1: expected 0 first and N = {num_rollouts} last, got {first} and {last}")
    sizes_P = offsets_P1.diff()
    if not len(sizes_P):
        return 0
    if int(sizes_P.min()) < 0:
        p = int(sizes_P.argmin())
        raise ValueError(
            f"offsets_P1: expected ascending values, got {int(offsets_P1[p])} then {int(offsets_P1[p + 1])} at index {p}"
        )
    p = int(sizes_P.argmax())
    if int(sizes_P[p]) > MAX_GROUP:
        raise ValueError(f"offsets_P1: expected groups of at most {MAX_GROUP} rollouts, got {int(sizes_P[p])} in group {p}")
    return int(sizes_P[p])


def normalise_over_batch(sums_N: Tensor, valid_N: Tensor) -> Tensor:
    """GDPO: s / (std of s over the rollouts with a verdict + EPSILON), [N] float64.

    Each group's sums add up to 0, so the mean over the batch is 0 too; its float noise is not subtracted.
    """
    std = (sums_N.square().sum() / (valid_N.sum() - 1)).sqrt()
    # what is 0 stays 0 where a NaN reward elsewhere, or a batch of one rollout, makes the standard deviation NaN
    return torch.where(sums_N == 0, 0.0, sums_N / (std + EPSILON))
