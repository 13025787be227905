"""A rank's part of a checkpoint on disk, in Megatron-core's distributed format, written by threads.

Megatron-core's own writer starts three processes a rank for it, which would outlive a killed rank and import everything anew;
torch's writer does with threads, and writes the same files. Tensors are named by their place in the whole model, so that any
other layout finds its parts.
"""

from __future__ import annotations

import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from metis_fast.errors import CheckpointError

_THREADS = 2  # a rank; a node has eight ranks


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
        reason = " ".join(str(error).split())[-300:]
        raise CheckpointError(
            f"cannot write the checkpoint to {folder}: {reason}; free some space and run the command again"
        ) from error


def load(state: ShardedStateDict, folder: Path) -> dict[str, Any]:
    """What `save` wrote, as far as this rank needs it. All ranks call this together.

    Raises:
        CheckpointError: it is of another model, `model.freeze` or optimizer, or damaged.
    """
    try:
        return cast("dict[str, Any]", dist_checkpointing.load(state, str(folder)))
    except (
        CheckpointingException,
        CheckpointException,
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder} does not fit this run ({reason}); resume with the model, model.freeze and optimizer of the run "
            "that wrote it"
        ) from error
