"""Muon (Jordan et al., 2024) with its matrix products in a dtype of choice.

torch's own runs them in bfloat16 whatever it is given, which a processor without bfloat16 instructions emulates: that was three
quarters of an SFT step of the demo.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, and the steps: Keller Jordan's, as torch.optim.Muon has them
_STEPS = 5
_EPS = 1e-7


def orthogonal(update: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of a matrix U S V^T, up to singular values of 0.5 to 1.5, by five Newton-Schulz steps in `dtype`."""
    a, b, c = _COEFFICIENTS
    tall = update.shape[0] > update.shape[1]
    x = update.to(dtype)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=_EPS)  # so that no singular value is above 1
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Steps of `lr` times the orthogonalised Nesterov momentum, times sqrt(rows / columns) for tall matrices. No decay.

    dtype: of the products. In bfloat16 it is `torch.optim.Muon(weight_decay=0, adjust_lr_fn="original")`, bit for bit.
    """

    def __init__(self, params: ParamsT, lr: float, dtype: torch.dtype, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step over all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(momentum, group["momentum"]), self._dtype)
                rows, columns = parameter.shape
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))
