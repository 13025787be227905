"""What the run and its ranks hand each other. Needs no megatron."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from metis_fast.config import Config, OptimConfig
from metis_fast.summary import RolloutSummary
from metis_fast.types import Score


@dataclass(frozen=True, slots=True)
class Task:
    """What ranks are started with. folder: the model's; total_steps: optimizer steps of the run, for the schedule.
    image_max_pixels: see `limited`."""

    config: Config
    folder: Path
    optim: OptimConfig
    total_steps: int
    image_max_pixels: int = 0


@dataclass(frozen=True, slots=True)
class Outlined:
    """A group as all ranks are told of it: enough to plan with."""

    rollouts: tuple[RolloutSummary, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step. table: a row of `pack_loss` for every pack of all replicas, with the rollouts it is of."""

    table: list[tuple[list[float], str]]
    norm: float
    lr: float
