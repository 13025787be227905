"""Trainer -> engine: after an update, the engine samples with the new weights and says so in every token's version."""

from __future__ import annotations

from metis_fast.rollout.native import NativeEngine


def push_weights(engine: NativeEngine, version: int) -> None:
    """The native engine runs the trainer's own module: nothing is copied, only the version moves.

    version: optimizer-visible training steps done; `Rollout.weight_version` of what is sampled from here on.
    """
    engine.weight_version = version
