"""What a trainer back end is to the spine. `torch_backend` is one; the spine never asks which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from metis_fast.checkpoint.resume import Shards
from metis_fast.summary import ScoredSummary
from metis_fast.types import Rollout, ScoredGroup, UpdateStats


class GroupsLost(Exception):
    """Groups cannot be fetched any more: who held them is gone. Nothing was trained, and the trainer can be used on.

    numbers: their places among those that `Trainer.update` was given.
    """

    def __init__(self, numbers: tuple[int, ...]) -> None:
        super().__init__(f"groups {', '.join(map(str, numbers))} of an update are lost with who held them")
        self.numbers = numbers


@dataclass(frozen=True, slots=True, eq=False)
class TrainerState:
    """What a trainer needs to go on as if it had never stopped: flat dotted names -> tensors, and JSON values.

    shards: what it writes by itself, from processes of its own.
    """

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]
    shards: Shards | None = None


class Trainer(Protocol):
    """Turns scored groups into new weights."""

    @property
    def num_updates(self) -> int:
        """Optimizer steps taken."""
        ...

    @property
    def shares_policy(self) -> bool:
        """Whether it trains the very module that the native engine runs, so that there is nothing to send to that."""
        ...

    @property
    def fetches(self) -> bool:
        """Whether it fetches groups itself from where they lie; else it is given `ScoredGroup`s."""
        ...

    def update(self, groups: Sequence[ScoredGroup | ScoredSummary], check: Callable[[], None]) -> tuple[UpdateStats, ...]:
        """One training step: an optimizer step for every mini-batch of the groups.

        groups: summaries only for one that `fetches`. check: called between passes until the first optimizer step; what it
        raises leaves weights and state as they were.

        Raises:
            GroupsLost: some of the groups are gone; weights and state are as they were.
            NonFiniteError: a loss or gradient is NaN or Inf; that step was not applied.
        """
        ...

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """Log-probability of every sampled token under the current weights, [S] float32 a rollout, 0 elsewhere."""
        ...

    def gaps(self, groups: Sequence[ScoredGroup | ScoredSummary]) -> list[np.ndarray]:
        """How far the engine's log-probability of every sampled token is from that under the current weights, a rollout after
        the other.

        groups: as for `update`; of their scores nothing is used.

        Raises:
            GroupsLost: some of the groups are gone.
        """
        ...

    def state(self) -> TrainerState:
        """Weights, float32 masters, optimizer moments, counters; tensors may share memory with the trainer."""
        ...

    def close(self) -> None:
        """End what it has started."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its Hugging Face name, whole, one after the other; a tied LM head comes as the embedding alone.

        A tensor may be the trainer's own memory: it is read before the next update, and never written.
        """
        ...

    def load(self, state: TrainerState, folder: Path) -> None:
        """Take over a saved state, in place. folder: of the checkpoint, where `shards` were written.

        Raises:
            CheckpointError: it belongs to another model, another `model.freeze` or another optimizer.
        """
        ...
