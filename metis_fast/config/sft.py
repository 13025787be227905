"""The cold start."""

from __future__ import annotations

from typing import Annotated

from metis_fast.config.section import BY_CONTENT, FilePath, Positive, Section, Several
from metis_fast.config.train import OptimConfig
from metis_fast.types import Ability


class SftPhase(Section):
    """A stretch of SFT on one set of trajectories."""

    trajectories: Annotated[FilePath, BY_CONTENT]
    """Folder of stored rollouts (`metis-fast data demo` writes two)."""
    steps: Positive
    """Optimizer steps."""
    abilities: Several[Ability] = ()
    """Only trajectories of these; none: all. A curriculum: what is hard to learn amid the rest comes first, by itself."""


class SftConfig(Section):
    """Cold start on played trajectories."""

    phases: Several[SftPhase] = ()
    """Run one after the other, under one learning-rate schedule."""
    batch_size: Positive = 64
    """Trajectories in a step."""
    tokens_per_micro_batch: Positive = 32768
    """Tokens in one forward and backward pass."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
