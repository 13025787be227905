"""Where a rank runs, what goes through its model in one pass, and what Megatron-core's schedule is told about gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from metis_fast.train.megatron.policy import PassInput
from metis_fast.train.pack import Pack

Table = list[tuple[list[float], str]]
"""Numbers of the loss of a pack, with the rollouts it is of."""


class Context(Protocol):
    """What a rank knows of where it runs (see `rank`)."""

    rank: int
    device: torch.device
    control: dist.ProcessGroup

    def aborted(self) -> bool:
        """Whether the run asked to leave what is being done; all ranks ask together and hear the same."""
        ...


class PackLoss(Protocol):
    """The loss of a pack, and numbers of it on the device. where: how the head is split, and where its gradient goes."""

    def __call__(self, pack: Pack, hidden_TH: Tensor, head_VH: Tensor, **where: Any) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """A pack, and what of it goes through the model; its images come when it runs."""

    pack: Pack
    given: PassInput


def with_values(one: Pass, **values: Tensor) -> Pass:
    """The pass with tensors of its pack replaced."""
    return replace(one, pack=replace(one.pack, **cast(Mapping[str, Any], values)))


def finalize(models: list[Any], num_tokens: object = None, **options: Any) -> None:
    """Sum gradients over replicas, and over what splits tokens. Nothing is divided: the loss has its denominators."""
    finalize_model_grads(models, None, **options)


class HeadReady(torch.autograd.Function):
    """The loss; backward says that a gradient of the head came, which is in its `main_grad` by then: overlapped reduction
    waits for one of every parameter."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, head: Tensor) -> Tensor:
        ctx.nothing = head.new_zeros(()).expand_as(head)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, ctx.nothing
