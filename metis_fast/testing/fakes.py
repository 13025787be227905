"""Stand-ins for the two parts of a rollout that cost something: an engine that plays given messages, tools that return given
observations. With them a user can run real episodes over their own prompts, tools or engine, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from metis_fast.errors import EngineFailure, InfrastructureError
from metis_fast.rollout.engine import Completion, Sampling, SyncReport
from metis_fast.rollout.stops import StopStrings
from metis_fast.tools.protocol import NO_EXTRA, ToolSpec
from metis_fast.tools.results import Refusal, Refused, ToolResult
from metis_fast.types import ImageBlob, ImageSpan, Observation, ToolName


class FakeEngine:
    """An `Engine` whose session `order` plays `scripts[order]`, one message a call.

    tokenizer: encodes the messages; control tokens in them (`<|im_end|>`) become control tokens.
    scripts: messages of each rollout, as text or as token ids. One is cut at its first stop token, or where it completes a stop
        string, and at `max_tokens`; the last token is kept. An InfrastructureError in a script is raised when it is reached and
        then used up: the next session of that order starts from the first message and passes it by; after an EngineFailure, it
        goes on where the failed one stood.
    logp: log-probability of every token.
    num_open: sessions that were opened and not closed.
    asked: the tokens of every request, in order.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        scripts: Sequence[Sequence[str | list[int] | InfrastructureError]],
        *,
        logp: float = -1.0,
        weight_version: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.stops = StopStrings.of(tokenizer)
        self.scripts = [list(script) for script in scripts]
        self.logp, self.weight_version = logp, weight_version
        self.num_open = 0
        self.asked: list[tuple[int, ...]] = []
        self.sampling: list[Sampling] = []
        self.failed_at: dict[int, int] = {}  # order -> message at which its last session failed

    def session(self, order: int, prompt: str = "") -> _FakeEngineSession:
        """A place for rollout `order`."""
        self.num_open += 1
        return _FakeEngineSession(self, order)

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """From here on, tokens tell this version; the weights are not looked at."""
        self.weight_version = version
        return SyncReport(version, "full")

    def close(self) -> None:
        """Nothing to free."""


class _FakeEngineSession:
    def __init__(self, engine: FakeEngine, order: int) -> None:
        self._engine, self._script, self._order = engine, engine.scripts[order], order
        self._next, self._open = engine.failed_at.pop(order, 0), True

    async def generate(
        self, tokens: Sequence[int], images: Sequence[ImageBlob], spans: Sequence[ImageSpan], sampling: Sampling
    ) -> Completion:
        """The next message of the script."""
        engine = self._engine
        engine.asked.append(tuple(tokens))
        engine.sampling.append(sampling)
        message = self._script[self._next]
        if isinstance(message, InfrastructureError):
            del self._script[self._next]
            if isinstance(message, EngineFailure):
                engine.failed_at[self._order] = self._next
            raise message
        self._next += 1
        ids = message if isinstance(message, list) else engine.tokenizer.encode(message, add_special_tokens=False)
        watch = engine.stops.watch(sampling.stop)
        ends = [watch.ends(token) or token in sampling.stop_ids for token in ids]
        stop = min(ends.index(True) + 1 if True in ends else len(ids), sampling.max_tokens)
        ids = ids[:stop]
        return Completion(
            tokens=np.asarray(ids, np.int32),
            logp=np.full(len(ids), engine.logp, np.float32),
            weight_version=np.full(len(ids), engine.weight_version, np.int32),
            stopped=ends[stop - 1],
        )

    def close(self) -> None:
        """See `EngineSession`."""
        if self._open:
            self._open = False
            self._engine.num_open -= 1


class FakeToolbox:
    """A `Toolbox` whose sessions return `observations` one after the other, the last one again and again.

    observations: results, or what the agent reads as it stands. An InfrastructureError among them is raised when it is reached
    and then used up, for all sessions.
    names: the enabled tools; a call of another name is `Refused`, as the protocol asks, and uses no observation.
    num_open: sessions that were opened and not closed. calls: name and arguments of every call.
    """

    def __init__(
        self,
        observations: Sequence[ToolResult | Observation | InfrastructureError] = (Observation("ok"),),
        names: Sequence[str] = tuple(ToolName),
    ) -> None:
        self.observations = list(observations)
        self._names = tuple(names)
        self.num_open = 0
        self.calls: list[tuple[str, dict[str, object]]] = []

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
    ) -> _FakeToolSession:
        """Tools for one rollout."""
        self.num_open += 1
        return _FakeToolSession(self)

    def close(self) -> None:
        """Nothing to stop."""


class _FakeToolSession:
    def __init__(self, toolbox: FakeToolbox) -> None:
        self._toolbox, self._next, self._open = toolbox, 0, True

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """The next observation."""
        toolbox = self._toolbox
        toolbox.calls.append((name, dict(arguments)))
        if name not in toolbox.names:
            return Refused(f"There is no tool {name!r}.", Refusal.NO_TOOL, name)
        at = min(self._next, len(toolbox.observations) - 1)
        observation = toolbox.observations[at]
        if isinstance(observation, InfrastructureError):
            del toolbox.observations[at]
            raise observation
        self._next += 1
        return observation

    async def close(self) -> None:
        """See `ToolSession`."""
        if self._open:
            self._open = False
            self._toolbox.num_open -= 1
