"""The cold start."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import model_validator

from metis_fast.config.section import (
    BY_CONTENT,
    MAY_CHANGE,
    FilePath,
    NonNegative,
    OrNone,
    Positive,
    PositiveFloat,
    Section,
    Several,
)
from metis_fast.config.train import OptimConfig


class SftPhase(Section):
    """A stretch of SFT on one set of trajectories."""

    trajectories: Annotated[FilePath, BY_CONTENT]
    """Conversations in the Metis-ColdStart schema (a Parquet file, or a folder of them), or a folder of stored rollouts
    (`metis-fast data demo` writes two). What it is follows from the columns (docs/sft.md)."""
    steps: OrNone[Positive] = None
    """Optimizer steps; this or `epochs`."""
    epochs: OrNone[PositiveFloat] = None
    """Times that the set is gone through: as many steps as all its rows make, those that will be skipped among them."""
    abilities: Several[str] = ()
    """Only trajectories of these; none: all. A curriculum: what is hard to learn amid the rest comes first, by itself. For
    stored rollouts; conversations name no ability."""

    @model_validator(mode="after")
    def _has_a_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("expected either steps or epochs; name how many of one of them")
        return self


class SftConfig(Section):
    """Cold start: supervised training on conversations, with the loss on what the assistant says."""

    backend: Literal["auto", "torch", "megatron"] = "auto"
    """Trainer back end. `auto`: as `train.backend`, but torch where `optim.muon_lr` is set, which needs whole matrices."""
    phases: Several[SftPhase] = ()
    """Run one after the other, under one learning-rate schedule."""
    batch_size: Positive = 64
    """Trajectories in a step."""
    tokens_per_micro_batch: Positive = 32768
    """Tokens in one forward and backward pass, whole trajectories; those with equal prompts share one."""
    max_tokens: NonNegative = 0
    """Tokens of the longest trajectory, images included; 0: as `tokens_per_micro_batch`, which is the most."""
    image_max_pixels: NonNegative = 0
    """Pixels that an image has at most when it is shown to the model; 0: the processor's limit, as in RL. For conversations."""
    on_bad_row: Annotated[Literal["stop", "skip"], MAY_CHANGE] = "stop"
    """What a row of conversations that does not fit the schema does: stop the run, or be skipped and counted."""
    on_long_row: Annotated[Literal["stop", "skip"], MAY_CHANGE] = "stop"
    """As `on_bad_row`, of a row with more than `max_tokens`. Nothing is cut: the end of a conversation is its answer."""
    freeze: Several[Literal["vision", "embeddings"]] = ()
    """Parts that are not trained here, whatever `model.freeze` says: what HDPO freezes may have to be learnt first."""
    heldout: Annotated[OrNone[FilePath], BY_CONTENT] = None
    """As `phases.trajectories`: conversations to measure the loss on, and not to train on."""
    heldout_rows: NonNegative = 0
    """The first so many usable ones of `heldout`; 0: all."""
    eval_every: NonNegative = 0
    """Steps between two measurements of the held-out loss; 0: only before the first step and after the last."""
    optim: OptimConfig = OptimConfig(lr=1e-5)

    @model_validator(mode="after")
    def _longest_fits(self) -> Self:
        if self.max_tokens > self.tokens_per_micro_batch:
            raise ValueError(
                f"max_tokens={self.max_tokens} is more than tokens_per_micro_batch={self.tokens_per_micro_batch}, in which a "
                "trajectory is run whole; raise the latter or lower the former"
            )
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest trajectory."""
        return self.max_tokens or self.tokens_per_micro_batch
