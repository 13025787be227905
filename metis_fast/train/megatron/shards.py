"""A rank's part of a checkpoint on disk, in Megatron-core's distributed format, written by threads.

Megatron-core's own writer starts three processes a rank for it, which would outlive a killed rank and import everything anew;
torch's writer does with threads, and writes the same files. Tensors are named by their place in the whole model, so that any
other layout finds its parts.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from metis_fast.errors import CheckpointError

_THREADS = 2  # a rank; a node has eight ranks
_BATCH_BYTES = 4 << 30  # read at once beside what a rank holds


class _Strategy(SaveShardedStrategy):
    """Copies what this rank has to write to host memory and writes it in a thread."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__("torch_dist", 1)
        self._group = group
        self.writing: Future[Any] | None = None

    @property
    def can_handle_sharded_objects(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] (annotated as False)
        return True

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Returns when everything has been copied."""
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        for part in (part for parts in named.values() for part in parts):
            if isinstance(part, ShardedTensor):
                assert part.data is not None
                part.data = part.data.detach().to("cpu", copy=True)
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing = thread.submit(
            dcp.save,
            mcore_to_pyt_state_dict(named, False),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=_THREADS),
            # Megatron-core decides who writes what several ranks have
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=self._group,
        )
        thread.shutdown(wait=False)  # ends by itself when that is done


def save(state: ShardedStateDict, folder: Path, group: dist.ProcessGroup) -> Future[Any]:
    """Begin to write; all ranks call this together. The result is there when this rank's part, or all of it on the first rank,
    is on disk; weights may change meanwhile.

    group: gloo, of all ranks, for nothing else until then.
    """
    strategy = _Strategy(group)
    dist_checkpointing.save(state, str(folder), strategy)
    assert strategy.writing is not None
    return strategy.writing


def finish(writing: Future[Any], folder: Path) -> None:
    """Wait for `save`.

    Raises:
        CheckpointError: the disk is full or failed.
    """
    try:
        writing.result()
    except (OSError, RuntimeError, CheckpointException) as error:
        # torch gathers what happened on every rank, each with its stack
        first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) and error.failures else error
        reason = " ".join(str(first).split())[-300:]
        raise CheckpointError(f"a rank could not write to {folder}: {reason or type(first).__name__}") from error


def load(state: ShardedStateDict, folder: Path, whole: bool = True) -> dict[str, Any]:
    """What `save` wrote, as far as this rank asks for it. All ranks call this together.

    whole: whether they ask for every part of what they ask for, which is checked then.

    Raises:
        CheckpointError: it is of another model, `model.freeze` or optimizer, or damaged.
    """
    try:
        return cast("dict[str, Any]", dist_checkpointing.load(state, str(folder), validate_access_integrity=whole))
    except (
        CheckpointingException, CheckpointException, OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder} does not fit this run ({reason}); resume with the model, model.freeze and optimizer of the run "
            "that wrote it"
        ) from error


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What a rank has of the optimizer's state of one parameter.

    place: of the parameter in the whole model, as a checkpoint of the model has it. start, stop: this replica's elements of the
    flattened parameter; states: those elements, by the name of the state; they are what the optimizer steps with. copy: of a
    tied embedding, whose state is another stage's to write.
    """

    place: ShardedTensor | ShardedTensorFactory
    numel: int
    start: int
    stop: int
    states: Mapping[str, Tensor]
    copy: bool


def optimizer_state(pieces: Sequence[Piece], replicas: dist.ProcessGroup, split: bool) -> ShardedStateDict:
    """The whole optimizer state of every parameter, each on one of the replicas; all of them call this together.

    split: whether a replica has only its part of each.

    Megatron-core 0.16 has the same in `fully_reshardable`, but takes the states of a buffer with several buckets (tied
    embeddings, overlapped reduction) from the wrong places.
    """
    out: ShardedStateDict = {}
    rank, size = dist.get_rank(replicas), dist.get_world_size(replicas)
    for number, piece in enumerate(pieces):
        owner = number % size
        for name, part in () if piece.copy else piece.states.items():
            # bits, whose sum with zeros is exact
            whole = torch.zeros(piece.numel, dtype=torch.int32, device=part.device)
            whole[piece.start : piece.stop] = part.detach().view(torch.int32)
            if split and size > 1:
                dist.reduce(whole, group=replicas, group_dst=owner)
            if rank == owner:
                out[f"{number}.{name}"] = _placed(piece, name, whole.view(torch.float32), replica=0)
    return out


def load_optimizer_state(pieces: Sequence[Piece], folder: Path) -> None:
    """Fill the states of the pieces from what `optimizer_state` gave, some gigabytes at a time.

    Raises:
        CheckpointError: see `load`.
    """
    wanted = [(piece, name) for piece in pieces for name in piece.states if piece.stop > piece.start]
    batches: list[list[tuple[Piece, str]]] = [[]]
    size = 0
    for piece, name in wanted:
        if batches[-1] and size + 4 * piece.numel > _BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append((piece, name))
        size += 4 * piece.numel
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, len(batches))
    batches += [[]] * (max(counts) - len(batches))  # all ranks load together
    for batch in batches:
        state = {str(i): _placed(piece, name, torch.empty(piece.numel), replica=1) for i, (piece, name) in enumerate(batch)}
        found = load(state, folder, whole=False)
        for i, (piece, name) in enumerate(batch):
            piece.states[name].copy_(found[str(i)].flatten()[piece.start : piece.stop])


def _placed(piece: Piece, name: str, whole: Tensor, replica: int) -> ShardedTensor | ShardedTensorFactory:
    place = piece.place
    assert isinstance(place.replica_id, tuple)
    changes: dict[str, Any] = {
        "key": f"optimizer.{name}.{place.key}",
        "data": whole.view(place.data.shape),  # pyright: ignore[reportOptionalMemberAccess]
        "replica_id": (*place.replica_id[:-1], replica),  # the last part of it counts replicas of the model
    }
    if isinstance(place, ShardedTensor):
        changes["dtype"] = whole.dtype
    return replace(place, **changes)
