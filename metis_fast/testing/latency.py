"""Simulated tools: they return at once what a function says, after a stated time, and fail as often as stated.

What a rollout loop does while tools are slow or broken can so be tried and measured without tools. Every time and every failure
is a function of (seed, call, how often this call was made before) alone: two runs that make the same calls wait for the same
times, in whatever order and under whatever scheduler.
"""

from __future__ import annotations

import asyncio
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metis_fast.errors import InfrastructureError
from metis_fast.tools.protocol import NO_EXTRA, ToolSpec
from metis_fast.types import ImageBlob, Observation, Outcome, ToolName

_Z99 = 2.3263478740408408
"""The standard normal distribution's 99th percentile."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Lognormal times and independent failures.

    median_s, p99_s: seconds; median_s 0: every call returns at once, without giving up the event loop. failing: share of the
    calls that end in an InfrastructureError, after their time.
    """

    median_s: float = 1.0
    p99_s: float = 20.0
    failing: float = 0.02

    def __post_init__(self) -> None:
        if self.median_s < 0 or (self.median_s and self.p99_s < self.median_s) or not 0 <= self.failing <= 1:
            raise ValueError(
                f"expected 0 <= median_s <= p99_s and failing in [0, 1], got {self.median_s}, {self.p99_s}, {self.failing}"
            )

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm."""
        return math.log(self.p99_s / self.median_s) / _Z99 if self.median_s else 0.0

    @property
    def mean_s(self) -> float:
        """Mean of the times, in seconds; most of it is the tail's."""
        return self.median_s * math.exp(self.sigma**2 / 2)

    def draw(self, seed: int, call: str, attempt: int) -> tuple[float, bool]:
        """(seconds, whether it fails) of the `attempt`-th time, from 0, that `call` is made."""
        if not self.median_s and not self.failing:
            return 0.0, False
        random = np.random.default_rng([seed, zlib.crc32(call.encode()), len(call), attempt])
        return self.median_s * math.exp(self.sigma * random.standard_normal()), bool(random.random() < self.failing)


class SlowToolbox:
    """A `Toolbox` of simulated tools.

    observe: (name, arguments) -> what a call that does not fail returns.
    num_calls, num_failed: calls that ended, and those of them that raised. num_open: sessions that were opened and not closed.
    """

    def __init__(
        self,
        latency: Latency,
        seed: int = 0,
        observe: Callable[[str, Mapping[str, object]], Observation] = lambda _name, _arguments: Observation("ok"),
        names: Sequence[str] = tuple(ToolName),
    ) -> None:
        self.latency, self.seed = latency, seed
        self.num_calls = self.num_failed = self.num_open = 0
        self._observe = observe
        self._names = tuple(names)
        self._made: Counter[str] = Counter()

    @property
    def names(self) -> Sequence[str]:
        """The enabled tools."""
        return self._names

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """They take any arguments."""
        return [ToolSpec(name, "", {"type": "object"}) for name in self._names]

    def session(
        self, images: Sequence[ImageBlob], extra: Mapping[str, object] = NO_EXTRA, seen: Sequence[tuple[int, int]] = ()
    ) -> _SlowSession:
        """Tools for one rollout."""
        self.num_open += 1
        return _SlowSession(self)

    def close(self) -> None:
        """Nothing to stop."""

    async def call(self, name: str, arguments: Mapping[str, object]) -> Observation:
        """See `ToolSession`."""
        if name not in self._names:
            return Observation(f"There is no tool {name!r}.", outcome=Outcome.TOOL_ERROR)
        call = call_text(name, arguments)
        attempt = self._made[call]
        self._made[call] += 1
        seconds, fails = self.latency.draw(self.seed, call, attempt)
        if seconds:
            await asyncio.sleep(seconds)
        self.num_calls += 1
        if fails:
            self.num_failed += 1
            raise InfrastructureError(f"simulated failure of {name}, call {attempt + 1} of {call}")
        return self._observe(name, arguments)


class _SlowSession:
    def __init__(self, toolbox: SlowToolbox) -> None:
        self._toolbox, self._open = toolbox, True

    async def call(self, name: str, arguments: Mapping[str, object]) -> Observation:
        """See `ToolSession`."""
        return await self._toolbox.call(name, arguments)

    async def close(self) -> None:
        """See `ToolSession`."""
        if self._open:
            self._open = False
            self._toolbox.num_open -= 1


def call_text(name: str, arguments: Mapping[str, object]) -> str:
    """How `Latency.draw` knows a call."""
    return json.dumps([name, arguments], sort_keys=True, ensure_ascii=False)
