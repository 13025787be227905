"""What a trainer back end is to the spine. `torch_backend` is one; the spine never asks which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from metis_fast.types import Rollout, ScoredGroup, UpdateStats


@dataclass(frozen=True, slots=True, eq=False)
class TrainerState:
    """What a trainer needs to go on as if it had never stopped: flat dotted names -> tensors, and JSON values."""

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]


class Trainer(Protocol):
    """Turns scored groups into new weights."""

    @property
    def num_updates(self) -> int:
        """Optimizer steps taken."""
        ...

    def update(self, groups: Sequence[ScoredGroup], check: Callable[[], None]) -> tuple[UpdateStats, ...]:
        """One training step: an optimizer step for every mini-batch of the groups.

        check: called between passes until the first optimizer step; what it raises leaves weights and state as they were.

        Raises:
            NonFiniteError: a loss or gradient is NaN or Inf; that step was not applied.
        """
        ...

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """Log-probability of every sampled token under the current weights, [S] float32 a rollout, 0 elsewhere."""
        ...

    def state(self) -> TrainerState:
        """Weights, float32 masters, optimizer moments, counters; tensors may share memory with the trainer."""
        ...

    def load(self, state: TrainerState) -> None:
        """Take over a saved state, in place.

        Raises:
            CheckpointError: it belongs to another model, another `model.freeze` or another optimizer.
        """
        ...
