"""The LM head split over the ranks of a tensor-parallel group, by rows of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from metis_kernels import _check


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This rank's rows of the LM head: `start` is the vocabulary index of the first one.

    Shards may have any sizes, as long as together they are the whole vocabulary, each row once. `group`: the
    tensor-parallel process group; every rank of it calls the op with the same hidden states, targets and options.
    """

    start: int
    group: dist.ProcessGroup

    def __post_init__(self) -> None:
        """Raises ValueError: `start` is no row of a vocabulary, or `group` no process group."""
        _check.at_least("VocabShard.start", self.start, 0, whole=True)
        if not isinstance(self.group, dist.ProcessGroup):
            raise ValueError(f"VocabShard.group: expected a process group, got {self.group!r}")


def unpack(shard: VocabShard | None) -> tuple[int, str]:
    """(first row, name of the group), what a `torch.library` op can carry of a shard; (0, "") for None.

    Raises:
        ValueError: it is something else.
    """
    if shard is None:
        return 0, ""
    if not isinstance(shard, VocabShard):
        raise ValueError(f"shard: expected a VocabShard or None, got {type(shard).__name__}")
    return shard.start, shard.group.group_name


def resolve(group_name: str) -> dist.ProcessGroup | None:
    """The group of that name (what a `torch.library` op can carry), None for ""."""
    if not group_name:
        return None
    # not exported, but what torch's own functional collectives do with the name that they carry
    return dist.distributed_c10d._resolve_process_group(group_name)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]


def local_targets(targets_T: Tensor, vocab_start: int, num_local: int) -> Tensor:
    """Row of the local shard for each target, -1 where another rank has it."""
    local = targets_T - vocab_start
    return torch.where((local >= 0) & (local < num_local), local, -1)


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce (sum) in place; nothing without a group."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def max_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce (maximum) in place; nothing without a group."""
    if group is not None:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return value


def gather_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-gather: [R, *value.shape], ranks in order; [1, ...] without a group."""
    if group is None:
        return value[None]
    world = dist.get_world_size(group)
    out = value.new_empty((world * value.shape[0], *value.shape[1:]))  # gloo wants ranks joined along the first axis
    dist.all_gather_single(out, value.contiguous(), group=group)
    return out.view(world, *value.shape)
