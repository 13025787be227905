"""Weights, masters and optimizer states split over data-parallel ranks: torch's FSDP2 around the trainer's pass.

A unit is a decoder layer or a block of the vision tower; embeddings, LM head, norms and mergers are one more. What leaves the
trainer (state, checkpoints) is whole again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from metis_fast.model import Policy
from metis_fast.train.forward import PackPass


def shard(forward: PackPass, policy: Policy, group: dist.ProcessGroup) -> None:
    """Split the pass over the ranks of a group, in place.

    Gradients are summed in float32, not averaged: the denominators of the loss are those of the whole mini-batch.
    """
    mesh = DeviceMesh.from_group(group, policy.head.device.type)
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for unit in (*policy.decoder.layers, *policy.vision_blocks):
        fully_shard(unit, mesh=mesh, mp_policy=precision)
    fully_shard(forward, mesh=mesh, mp_policy=precision)
    for module in forward.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def whole(value: Tensor) -> Tensor:
    """The tensor, gathered if it is split. All ranks call this together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor `whole`, without gradient."""
    return {name: whole(tensor.detach()) for name, tensor in tensors.items()}


def split_like(tensors: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors split as those of the same name in `live` are; the others as they are."""
    return {name: _like(tensor, live.get(name)) for name, tensor in tensors.items()}


def _like(tensor: Tensor, live: Tensor | None) -> Tensor:
    if not isinstance(live, DTensor) or tensor.shape != live.shape:
        return tensor
    return distribute_tensor(tensor.to(live.device), live.device_mesh, live.placements, src_data_rank=None)


def gather_objects(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """`value` of every rank, in their order."""
    if group is None:
        return [value]
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, value, group)
    return out
