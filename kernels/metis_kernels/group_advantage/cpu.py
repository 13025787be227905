"""Grouped advantages in C++ (kernels/csrc/group_advantage.cpp), float64 inside.

Shape letters: N rollouts of all groups, P groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis_kernels.group_advantage._groups import EPSILON


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
    return torch.ops.metis_kernels_cpu.group_advantage(
        r_acc_N.double().contiguous(),
        r_tool_N.double().contiguous(),
        correct_N.contiguous(),
        valid_N.contiguous(),
        num_tokens_N.contiguous(),
        offsets_P1.contiguous(),
        estimator,
        alpha,
        EPSILON,
        norm_by_std,
        use_acc,
        use_tool,
    )
