"""A rank's weights and optimizer state into a checkpoint and back, under this layout or another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from metis_fast.errors import CheckpointError
from metis_fast.train.megatron import shards
from metis_fast.train.megatron.optimizer import Optimizer
from metis_fast.train.megatron.policy import MegatronPolicy


class Checkpoints:
    """All ranks make one, and call its methods, together.

    replicas: the group of data-parallel replicas. control: a group of all ranks.
    """

    def __init__(
        self,
        policies: Sequence[MegatronPolicy],
        optimizer: Optimizer,
        replicas: dist.ProcessGroup,
        control: dist.ProcessGroup,
    ) -> None:
        self._policies, self._optimizer, self._replicas, self._control = policies, optimizer, replicas, control
        # of its own: a checkpoint is written while training goes on
        self._writers = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._writing: tuple[Future[Any], Path] | None = None

    def save(self, folder: Path) -> None:
        """Begin to write weights, masters and moments, each rank its own; `saved` waits for the end. Training may go on."""
        weights = self._weights_state()
        state = {
            "weights": weights,
            "optimizer": shards.optimizer_state(self._pieces(weights), self._replicas, self._optimizer.split),
        }
        self._writing = (shards.save(state, folder, self._writers), folder)

    def saved(self) -> None:
        """Wait for the end of `save`.

        Raises:
            CheckpointError: the disk is full or failed; on every rank.
        """
        assert self._writing is not None
        (writing, folder), self._writing = self._writing, None
        problem = None
        try:
            shards.finish(writing, folder)
        except CheckpointError as error:
            problem = error
        found: list[CheckpointError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, problem, group=self._control)
        if first := next((error for error in found if error is not None), None):
            raise first

    def load(self, folder: Path, num_updates: int) -> None:
        """Take over what `save` wrote, under this layout or another.

        Raises:
            CheckpointError: it is of another model or optimizer.
        """
        pieces = self._pieces(self._weights_state())
        state = shards.load({"weights": self._weights_state()}, folder)
        for i, policy in enumerate(self._policies):
            policy.load_state_dict(state["weights"][f"model{i}"])
        shards.load_optimizer_state(pieces, folder)
        self._optimizer.set_updates(num_updates)

    def _weights_state(self) -> dict[str, Any]:
        """Weights by names and places in the whole model, where any other layout finds its parts."""
        metadata = {"dp_cp_group": self._replicas}
        return {f"model{i}": policy.sharded_state_dict(metadata=metadata) for i, policy in enumerate(self._policies)}

    def _pieces(self, weights: Mapping[str, Any]) -> list[shards.Piece]:
        """The optimizer's state of every trained parameter, in the same order on all replicas."""
        out: list[shards.Piece] = []
        for i, policy in enumerate(self._policies):
            for name, parameter in policy.named_parameters():
                if parameter.requires_grad:
                    copy = name == "output_layer.weight" and policy.share_embeddings_and_output_weights
                    start, stop, states = self._optimizer.states(parameter)
                    place = weights[f"model{i}"][name]
                    out.append(shards.Piece(place, parameter.numel(), start, stop, states, copy))
        return out
