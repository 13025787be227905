"""The door to inference engines: token ids and images in, token ids and log-probs out.

One rollout opens one `EngineSession`, so that an engine can keep what it computed for the turns before (a KV cache, a replica).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from metis_fast.types import ImageBlob, ImageSpan


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one message is sampled.

    temperature 0 is greedy (log-probs then are those at temperature 1). stop_ids end the message and are kept. seed makes the
    noise of one message a function of (seed, position) alone, whatever else is in the batch.
    """

    max_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled message.

    tokens [n] int32, logp [n] float32 of the full distribution at the sampling temperature (before top-p and top-k, and before
    placeholders are excluded), weight_version [n] int32. stopped: the last token is one of `stop_ids`; otherwise the token
    limit was reached.
    """

    tokens: npt.NDArray[np.int32]
    logp: npt.NDArray[np.float32]
    weight_version: npt.NDArray[np.int32]
    stopped: bool


class EngineSession(Protocol):
    """One rollout's place in an engine."""

    async def generate(
        self, tokens: Sequence[int], images: Sequence[ImageBlob], spans: Sequence[ImageSpan], sampling: Sampling
    ) -> Completion:
        """Continue `tokens` (the whole rollout so far; what this session saw before is its prefix).

        Raises:
            InfrastructureError: the engine failed; the same call may be made again.
        """
        ...

    def close(self) -> None:
        """Free what the engine keeps for this rollout."""
        ...


class Engine(Protocol):
    """Samples from the current policy. Never emits image or video placeholder tokens."""

    def session(self, order: int) -> EngineSession:
        """A place for one rollout. `order` fixes its row in a batch, so that runs repeat."""
        ...

    def close(self) -> None:
        """Free memory and processes."""
        ...
