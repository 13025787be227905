"""What is written while training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from metis_fast.config.section import NonNegative, Section, Several, Text


class LogConfig(Section):
    """What is written while training."""

    rollouts: bool = True
    """Store every rollout in Parquet."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    trackers: Several[Literal["tensorboard", "wandb", "trackio"]] = ()
    """Where curves and rollouts go besides: `wandb` or `trackio` (extras of these names), or `tensorboard`, which
    `log.tensorboard` already turns on. Addresses, keys and offline modes are in their own environment variables."""
    project: Annotated[Text, Field(min_length=1)] = "metis-fast"
    """Name under which trackers file the run; the run's own name is that of its folder."""
    rollouts_every: NonNegative = 20
    """Steps from one that shows trackers some of its rollouts, with images, to the next; 0: none does. Needs `log.rollouts`."""
    progress: bool = True
    """Progress bars (they also go away by themselves where stderr is not a terminal)."""
    panel: Literal["auto", "off"] = "auto"
    """A panel with curves below the lines of training, where stdout is a terminal; `off`: lines and bars alone."""

    @field_validator("trackers")
    @classmethod
    def _once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"expected each tracker once, got {', '.join(names)}")
        return names
