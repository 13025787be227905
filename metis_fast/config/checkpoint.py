"""Checkpoints."""

from __future__ import annotations

from metis_fast.config.section import NonNegative, Positive, Section


class CheckpointConfig(Section):
    """Resume state and exports."""

    every: NonNegative = 10
    """Steps between checkpoints; 0 writes only the last."""
    keep_last: Positive = 2
    """Older ones are deleted; the best one (held-out accuracy, fewer calls on a tie) is kept too."""
