"""An engine whose messages have prescribed lengths and ends, and the clock that says when it was busy.

The engine behind it really generates every token that the plan prescribes, one after the other, from the real context. Then the
last ones of the message are replaced by a tool call or an answer, and control tokens among the others by a plain one. What the
engine is given later has its own tokens in those places, so that what it has cached is what it would have cached anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from metis_fast.model import Policy
from metis_fast.rollout.engine import Completion, Engine, EngineSession, Sampling, SyncReport
from metis_fast.rollout.native import NativeEngine
from metis_fast.testing.tiny import CONTROL, TAGS
from metis_fast.types import ImageBlob, ImageSpan

from .plan import PlannedMessage, Shape


class Script(Protocol):
    """What prescribes the messages: a `Plan`, or one of images."""

    @property
    def shape(self) -> Shape:
        """Of the work."""
        ...

    @property
    def messages(self) -> Sequence[Sequence[PlannedMessage]]:
        """Of every trajectory."""
        ...

    def order(self, uid: str, index: int) -> int:
        """Which trajectory rollout `index` of a prompt is."""
        ...


@dataclass(slots=True)
class Clock:
    """When the engine was in a step: begins and ends in seconds of `time.perf_counter`, and the rows that each step had.

    cpu_s: CPU seconds of the thread inside of steps.
    """

    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    cpu_s: float = 0.0

    def clear(self) -> None:
        """Forget everything."""
        self.began.clear()
        self.ended.clear()
        self.rows.clear()
        self.cpu_s = 0.0

    def copy(self) -> Clock:
        """As it stands."""
        return Clock(list(self.began), list(self.ended), list(self.rows), self.cpu_s)

    def busy_s(self, start: float, stop: float) -> float:
        """Seconds within [start, stop]; steps do not overlap."""
        begins, ends = np.clip(self.began, start, stop), np.clip(self.ended, start, stop)
        return float((ends - begins).sum())

    def mean_rows(self, start: float, stop: float) -> float:
        """Rows of a step, in the mean over the seconds of steps that decode in [start, stop]."""
        seconds = np.clip(self.ended, start, stop) - np.clip(self.began, start, stop)
        rows = np.asarray(self.rows)
        seconds = np.where(rows > 0, seconds, 0.0)
        return float((rows * seconds).sum() / seconds.sum()) if seconds.any() else 0.0


class ClockedNative(NativeEngine):
    """The native engine, admitting at any time; every prefill and every decoding step goes to `clock`."""

    def __init__(self, policy: Policy, clock: Clock) -> None:
        super().__init__(policy, deterministic=False)
        self._clock = clock

    def _admit(self) -> None:
        self._clocked(super()._admit, decoding=False)

    def _decode(self) -> None:
        self._clocked(super()._decode, decoding=True)

    def _clocked(self, step: Callable[[], None], *, decoding: bool) -> None:
        rows, cpu, began = self._live if decoding else 0, time.thread_time(), time.perf_counter()
        step()
        self._clock.ended.append(time.perf_counter())
        self._clock.began.append(began)
        self._clock.rows.append(rows)
        self._clock.cpu_s += time.thread_time() - cpu


class ClockedRequests:
    """An engine of another process. To `clock` goes the time in which it had a request to work on."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine, self._clock = engine, clock
        self._requests, self._since, self._version = 0, 0.0, 0

    def session(self, order: int, prompt: str = "") -> _ClockedSession:
        """See `Engine`."""
        return _ClockedSession(self, self._engine.session(order, prompt))

    def change(self, by: int) -> None:
        """Of the number of requests."""
        now = time.perf_counter()
        if self._requests:
            self._clock.began.append(self._since)
            self._clock.ended.append(now)
            self._clock.rows.append(self._requests)
        self._requests, self._since = self._requests + by, now

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """See `Engine`. Each job counts its versions from 1; this engine, which serves all jobs, takes rising ones only."""
        self._version += 1
        return await self._engine.update(weights, self._version)

    def close(self) -> None:
        """See `Engine`."""
        self._engine.close()


class _ClockedSession:
    def __init__(self, owner: ClockedRequests, inner: EngineSession) -> None:
        self._owner, self._inner = owner, inner

    async def generate(
        self, tokens: Sequence[int], images: Sequence[ImageBlob], spans: Sequence[ImageSpan], sampling: Sampling
    ) -> Completion:
        """See `EngineSession`."""
        self._owner.change(1)
        try:
            return await self._inner.generate(tokens, images, spans, sampling)
        finally:
            self._owner.change(-1)

    def close(self) -> None:
        """See `EngineSession`."""
        self._inner.close()


@dataclass(slots=True)
class Life:
    """Of one trajectory: from its first session to the end of its last one; num_sessions: how many it had."""

    began: float
    ended: float = 0.0
    num_sessions: int = 0


class ScriptedEngine:
    """See the top of this file. lives: of every trajectory, by its order."""

    def __init__(self, engine: Engine, plan: Script, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine, self.plan = engine, plan
        self.lives: dict[int, Life] = {}
        vocab = tokenizer.get_vocab()
        plain = tokenizer.encode("a", add_special_tokens=False)[0]
        # a message may hold no tag but those of its end
        self._plain = np.arange(len(tokenizer), dtype=np.int32)
        self._plain[[vocab[name] for name in (*CONTROL, *TAGS)]] = plain

    def session(self, order: int, prompt: str = "") -> _ScriptedSession:
        """See `Engine`. prompt: its uid in the plan; `order` modulo the rollouts of a prompt is the rollout's index."""
        number = self.plan.order(prompt, order % self.plan.shape.rollouts)
        life = self.lives.setdefault(number, Life(time.perf_counter()))
        life.num_sessions += 1
        return _ScriptedSession(self, self.engine.session(order, prompt), number, life)

    def spoken(self, tokens: npt.NDArray[np.int32], tail: Sequence[int]) -> npt.NDArray[np.int32]:
        """The message that `tokens` become."""
        message = self._plain[tokens]
        message[len(message) - len(tail) :] = tail
        return message

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """See `Engine`."""
        return await self.engine.update(weights, version)

    def close(self) -> None:
        """See `Engine`."""
        self.engine.close()


class _ScriptedSession:
    def __init__(self, owner: ScriptedEngine, inner: EngineSession, order: int, life: Life) -> None:
        self._owner, self._inner, self._order, self._life = owner, inner, order, life
        self._generated: list[tuple[int, list[int]]] = []  # where each message starts, what the engine sampled there

    async def generate(
        self, tokens: Sequence[int], images: Sequence[ImageBlob], spans: Sequence[ImageSpan], sampling: Sampling
    ) -> Completion:
        """See `EngineSession`."""
        planned = self._owner.plan.messages[self._order][len(self._generated)]
        assert sampling.max_tokens >= planned.num_tokens
        own = list(tokens)
        for start, sampled in self._generated:
            own[start : start + len(sampled)] = sampled
        wanted = replace(sampling, max_tokens=planned.num_tokens, stop_ids=())
        found = await self._inner.generate(own, images, spans, wanted)
        assert len(found.tokens) == planned.num_tokens
        self._generated.append((len(own), found.tokens.tolist()))
        return replace(found, tokens=self._owner.spoken(found.tokens, planned.tail), stopped=True)

    def close(self) -> None:
        """See `EngineSession`."""
        self._life.ended = time.perf_counter()
        self._inner.close()
