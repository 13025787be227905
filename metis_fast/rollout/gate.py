"""Truth gate: does the engine compute what the trainer computes?

A few messages are sampled by the engine as in training, prompts with images first, and their log-probabilities compared with
the trainer's on the same token ids. Reinforcement learning goes on silently, and wrongly, where the two differ: another image
preprocessing, another rotary base, weights that did not arrive. So a run refuses to start above a threshold, and says where to
look: that follows from which prompts differ, from where in the messages, and from a third opinion (`layers`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from metis_fast.config import Config
from metis_fast.errors import EngineError, EngineFailure, InfrastructureError
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import Completion, RunEngine, Sampling
from metis_fast.rollout.episode import SampleKey, Trace
from metis_fast.rollout.layers import Layers, Reference, first_difference
from metis_fast.types import ImageBlob, Outcome, Prompt, Rollout

T = TypeVar("T", bound="Illustrated")
log = logging.getLogger(__name__)
_THRESHOLDS = {"bfloat16": 2e-2, "float32": 1e-4}
_STREAM = "gate"
_FEW = 16
_GROWTH = 4.0  # how much larger the difference is late in a message than early, where positions or caches are to blame


@dataclass(frozen=True, slots=True)
class GateReport:
    """Engine against trainer, absolute difference of log-probabilities.

    mean, max: over all `tokens` sampled tokens. worst: the largest mean of one message, which a single replica has sampled; a
    message of less than 16 tokens counts as if the others agreed, since so few tell rounding from error by chance only.
    with_images, without: means over prompts of a kind, NaN where there is none. early, late: means over the first and the last
    quarter of the messages.
    """

    mean: float
    worst: float
    max: float
    tokens: int
    with_images: float
    without: float
    early: float
    late: float

    def likely(self, threshold: float) -> str:
        """The part of the model to look at first. threshold: what counts as agreement."""
        if self.with_images > threshold >= self.without:
            return "the vision tower, its mergers, or how images are cut up (prompts without images agree)"
        if self.late > _GROWTH * self.early:
            return "rotary positions, attention or the KV cache (the difference grows along a message)"
        if np.isnan(self.without):
            return "unknown, because every prompt had images; add prompts without to tell the vision tower from the decoder"
        return (
            "weights of every token's path: embeddings, norms, MLPs, the LM head or its temperature (the difference is the "
            "same along a message)"
        )


class Illustrated(Protocol):
    """A prompt, or what stands for one."""

    @property
    def images(self) -> Sequence[ImageBlob] | int: ...


def choose(prompts: Sequence[T], count: int, least: int = 1) -> list[T]:
    """Those that tell most: with images, but for the last one, which tells text from images where there are both.

    least: messages that are needed; for more than there are of those, they are repeated.
    """
    with_images = [prompt for prompt in prompts if prompt.images]
    without = [prompt for prompt in prompts if not prompt.images]
    chosen = with_images[: count - 1 if without and count > 1 else count]
    chosen += without[: count - len(chosen)]
    return chosen + [chosen[i % len(chosen)] for i in range(len(chosen), least)]


async def probe(prompts: Sequence[Prompt], chat: Chat, engine: RunEngine, config: Config) -> list[Rollout]:
    """One message of the engine for each prompt, as rollouts that the trainer can take.

    Raises:
        EngineError: the engine failed, `rollout.retries` times in a row.
    """
    last: EngineFailure | None = None
    for attempt in range(config.rollout.retries + 1):
        try:
            return await _probe(prompts, chat, engine, config)
        except EngineFailure as failure:
            log.warning("truth gate, try %d: %s", attempt + 1, failure)
            last = failure
    raise EngineError(f"truth gate: the engine answers nothing: {last}")


async def _probe(prompts: Sequence[Prompt], chat: Chat, engine: RunEngine, config: Config) -> list[Rollout]:
    async def one(order: int, prompt: Prompt) -> Rollout:
        piece = chat.encode_prompt(prompt)
        trace = Trace(len(piece.tokens), list(piece.tokens), list(piece.images), list(piece.spans))
        session = sessions[order]
        sampling = Sampling(
            max_tokens=min(config.gate.tokens, config.rollout.max_response_tokens),
            stop_ids=chat.stop_ids,
            temperature=config.rollout.temperature,
            seed=SampleKey(config.run.seed, _STREAM, order).turn_seed(0),
            stop=chat.stop,
        )
        try:
            message: Completion = await session.generate(trace.tokens, trace.images, trace.spans, sampling)
        finally:
            session.close()
        trace.sampled.append((len(trace.tokens), message))
        trace.tokens += message.tokens.tolist()
        return trace.finish(prompt, 0, Outcome.ANSWERED if message.stopped else Outcome.LENGTH)

    # all are open before one asks: a deterministic engine waits for every open session
    sessions = [engine.probe_session(order, prompt.uid) for order, prompt in enumerate(prompts)]
    return await asyncio.gather(*(one(order, prompt) for order, prompt in enumerate(prompts)))


def compare(gaps: Sequence[npt.NDArray[np.float32]], with_image: Sequence[bool]) -> GateReport:
    """The report. gaps: as `Trainer.gaps` gives them. with_image: whether each of their prompts had one."""

    def mean(parts: Sequence[npt.NDArray[np.float32]]) -> float:
        values = np.concatenate([np.zeros(0, np.float32), *parts])
        return float(values.mean()) if len(values) else float("nan")

    quarter = [max(1, len(gap) // 4) for gap in gaps]
    return GateReport(
        mean=mean(gaps),
        worst=float(np.max([_of_message(gap) for gap in gaps])),  # NaN if one is
        max=max(float(gap.max()) for gap in gaps),
        tokens=sum(map(len, gaps)),
        with_images=mean([gap for has, gap in zip(with_image, gaps, strict=True) if has]),
        without=mean([gap for has, gap in zip(with_image, gaps, strict=True) if not has]),
        early=mean([gap[:num] for gap, num in zip(gaps, quarter, strict=True)]),
        late=mean([gap[-num:] for gap, num in zip(gaps, quarter, strict=True)]),
    )


def worst(gaps: Sequence[npt.NDArray[np.float32]]) -> int:
    """Which message differs most; gaps: see `compare`."""
    return int(np.argmax(np.nan_to_num([_of_message(gap) for gap in gaps], nan=np.inf)))


def _of_message(gaps: npt.NDArray[np.float32]) -> float:
    return float(gaps.sum()) / max(len(gaps), _FEW)


async def locate(
    rollout: Rollout,
    trainer_logp: npt.NDArray[np.float32],
    model: Reference,
    layer_outputs: Coroutine[Any, Any, Layers | None],
    config: Config,
) -> str:
    """In words: who computes something else than transformers' own model, and if that is the engine, in which layer.

    rollout: the message. trainer_logp [S]. model: with the trainer's weights. layer_outputs: see `RunEngine`.
    """
    engines = float(np.abs(rollout.logp[rollout.sampled] - model.logp).mean())
    trainers = float(np.abs(trainer_logp[rollout.sampled] - model.logp).mean())
    found = f"From transformers' own model the engine differs by {engines:.2e} there, the trainer by {trainers:.2e}"
    if not trainers <= _threshold(config):
        found += ": the trainer computes something else (its attention, how rollouts share prompts and packs)"
    if engines <= _threshold(config):
        layer_outputs.close()
        return found
    try:
        layers = await layer_outputs
    except (InfrastructureError, EngineError) as error:
        return f"{found}; the engine's layers could not be compared ({error})"
    if layers is None:
        return found
    return f"{found}; {first_difference(layers, model.layers, config.model.dtype)}"


def _threshold(config: Config) -> float:
    return config.gate.threshold or _THRESHOLDS[config.model.dtype]


def require(report: GateReport, config: Config) -> None:
    """
    Raises:
        EngineError: the difference is above the threshold.
    """
    threshold = _threshold(config)
    if not report.worst <= threshold:  # NaN is above
        raise EngineError(
            f"truth gate: log-probs of engine and trainer differ by {report.mean:.2e} on average, {report.worst:.2e} in the "
            f"worst message (largest {report.max:.2e}, {report.tokens} tokens; with images {report.with_images:.2e}, without "
            f"{report.without:.2e}), allowed is {threshold:g}. Look at: {report.likely(threshold)}. "
            "gate.threshold allows more, gate.prompts=0 all"
        )
