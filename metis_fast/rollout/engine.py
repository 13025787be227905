"""The door to inference engines: token ids and images in, token ids and log-probs out.

One rollout opens one `EngineSession`, so that an engine can keep what it computed for the turns before (a KV cache, a replica).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from metis_fast.errors import EngineError, StagingError
from metis_fast.types import ImageBlob, ImageSpan, Rollout

if TYPE_CHECKING:
    from metis_fast.model import Policy
    from metis_fast.rollout.layers import Layers

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one message is sampled.

    temperature 0 is greedy (log-probs then are those at temperature 1). stop_ids end the message and are kept. So do the tokens
    that complete one of the strings `stop` (ASCII), however it is cut into tokens; the last of them is kept whole, with what
    else it says. seed makes the noise of one message a function of (seed, position) alone, whatever else is in the batch.
    """

    max_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled message.

    tokens [n] int32, logp [n] float32 of the full distribution at the sampling temperature (before top-p and top-k, and before
    placeholders are excluded), weight_version [n] int32. stopped: the last token is one of `stop_ids`, or completes one of
    `stop`; otherwise the token limit was reached.
    """

    tokens: npt.NDArray[np.int32]
    logp: npt.NDArray[np.float32]
    weight_version: npt.NDArray[np.int32]
    stopped: bool


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one weight update took. num_bytes: moved to the slowest engine; seconds: until all engines sample with it, of which
    they stood still for pause_s; retries: transfers that had to be made again."""

    version: int
    mode: str  # "shared" (the trainer's own module), "full" or "delta"
    num_bytes: int = 0
    seconds: float = 0.0
    pause_s: float = 0.0
    retries: int = 0


class EngineSession(Protocol):
    """One rollout's place in an engine."""

    async def generate(
        self, tokens: Sequence[int], images: Sequence[ImageBlob], spans: Sequence[ImageSpan], sampling: Sampling
    ) -> Completion:
        """Continue `tokens` (the whole rollout so far; what this session saw before is its prefix).

        Raises:
            EngineFailure: the engine failed; the same call may be made again, on another session.
        """
        ...

    def close(self) -> None:
        """Free what the engine keeps for this rollout."""
        ...


class Engine(Protocol):
    """Samples from the current policy. Never emits image or video placeholder tokens."""

    def session(self, order: int, prompt: str = "") -> EngineSession:
        """A place for one rollout.

        order fixes its row in a batch, so that runs repeat. prompt: rollouts with the same one share what is computed for it.
        """
        ...

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """From here on, sample with these weights. Requests in flight go on with them; every token tells its version.

        weights: by Hugging Face names, all of them; none where the engine runs the trainer's own module.

        Raises:
            EngineError: no engine can take them, after retries.
            StagingError: they were damaged after they had been read; the same version may be given again (see `update`).
        """
        ...

    def close(self) -> None:
        """Free memory and processes."""
        ...


class RunEngine(Engine, Protocol):
    """What a run asks of its engine besides sampling, whichever it is."""

    num_replicas: int
    """Models behind it, each of which the gate asks."""

    def runs(self, policy: Policy) -> bool:
        """Whether it samples with this very module, so that new weights need not be sent."""
        ...

    def wait(self, check: Callable[[], None]) -> None:
        """Until it can be asked. check: called meanwhile; what it raises goes on.

        Raises:
            EngineError, ModelError: it does not start.
        """
        ...

    async def rest(self) -> None:
        """Give its memory on the trainer's device to the trainer, where that is set; until `resume`, nothing is sampled.

        Raises:
            EngineError: no engine can be started any more.
        """
        ...

    async def resume(self) -> None:
        """After `rest`: take the memory back. An update of the weights must follow.

        Raises:
            EngineError: no engine can be started any more.
        """
        ...

    def held(self) -> Mapping[str, Tensor]:
        """Tensors of the last version that `update` was given, by Hugging Face names, to be read while the next one comes; none
        where it does not have them at hand."""
        ...

    def probe_session(self, order: int, prompt: str) -> EngineSession:
        """A session for the gate: as many in a row as there are replicas reach all that are up."""
        ...

    async def layer_outputs(self, order: int, rollout: Rollout) -> Layers | None:
        """What its layers make of a rollout's tokens but the last; None where they are the trainer's own.

        order: of the session (`probe_session`).

        Raises:
            InfrastructureError, EngineError: it failed, or none is up.
        """
        ...


async def update(engine: Engine, weights: Callable[[], Iterator[tuple[str, Tensor]]], version: int, retries: int) -> SyncReport:
    """`Engine.update`, with the weights read anew where they were damaged on the way.

    weights: called for every try. retries: tries after the first; those made are in the report.

    Raises:
        EngineError: no engine can take them, after retries.
    """
    began = time.perf_counter()
    for attempt in range(retries + 1):
        try:
            report = await engine.update(weights(), version)
        except StagingError as error:
            _LOG.warning("weights, try %d: %s", attempt + 1, error)
            continue
        return replace(report, seconds=time.perf_counter() - began, retries=report.retries + attempt)
    raise EngineError(
        f"weight version {version} was damaged in shared memory in each of {retries + 1} tries (the log has them); see that "
        "nothing else writes there and that this machine's memory is sound, then run the same command again"
    )
