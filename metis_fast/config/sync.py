"""How weights go from the trainer to engines."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from metis_fast.config.section import NonNegative, Positive, Section


class SyncConfig(Section):
    """How weights go from the trainer to vLLM engines (docs/rollouts.md)."""

    transport: Literal["staged", "nccl", "ipc"] = "staged"
    """`staged`: through shared memory, over the workers' connections to other machines; an engine loads only what has arrived
    whole. `nccl`, `ipc`: vLLM's own, between GPUs."""
    mode: Literal["full", "delta"] = "full"
    """`delta`: only what differs from the version that an engine has, without loss. For `staged`."""
    bucket_mb: Positive = 64
    """Bytes that are sent and checked together."""
    retries: NonNegative = 2
    """How often a failed transfer is made again before the engine is started anew."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode == "delta" and self.transport != "staged":
            raise ValueError(f"sync.mode=delta needs sync.transport=staged, got {self.transport}")
        return self
