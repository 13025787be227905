"""How weights go from the trainer to engines."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from metis_fast.config.section import NonNegative, Positive, Section


class SyncConfig(Section):
    """How weights go from the trainer to engines (docs/rollouts.md)."""

    transport: Literal["staged", "nccl", "ipc"] = "staged"
    """`staged`: through shared memory of the engines' machine; an engine loads only what has arrived whole. `nccl`, `ipc`:
    vLLM's own, between GPUs of one machine."""
    mode: Literal["full", "delta"] = "full"
    """What a machine pulls of a new version from Ray: all of it, or (`delta`) only what differs from the version that it has,
    without loss. For `staged`, and native engines. On one machine without Ray nothing is pulled, and `delta` has no effect."""
    bucket_mb: Positive = 64
    """MiB that are pulled and checked together."""
    retries: NonNegative = 2
    """How often a version is given again to an engine that did not take it, before that is started anew."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode == "delta" and self.transport != "staged":
            raise ValueError(f"sync.mode=delta needs sync.transport=staged, got {self.transport}")
        return self
