"""What is written while training."""

from __future__ import annotations

from metis_fast.config.section import Section


class LogConfig(Section):
    """What is written while training."""

    rollouts: bool = True
    """Store every rollout in Parquet."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    progress: bool = True
    """Progress bars (they also go away by themselves where stderr is not a terminal)."""
