"""An engine that does sums: what it says is a function of what it reads, so that an answer tells whose it is."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from metis_fast.errors import InfrastructureError
from metis_fast.model import Policy
from metis_fast.node import opening
from metis_fast.rollout.engine import Completion, Sampling, SyncReport
from metis_fast.rollout.stops import StopStrings
from metis_fast.types import ImageBlob, ImageSpan

_SUM = re.compile(r"What is (\d+) \+ (\d+)\?")
_SEEN = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)


def sum_by_tool(text: str) -> str:
    """Asks python for the last sum in a text; once that has answered, gives what it printed."""
    question = list(_SUM.finditer(text))[-1]
    seen = _SEEN.search(text, question.end())
    if seen is None:
        call = f'{{"name": "python", "arguments": {{"code": "print({question[1]} + {question[2]})"}}}}'
        return f"<reason>Better be sure.</reason>\n<tool_call>{call}</tool_call>"
    return f"<reason>The tool says so.</reason>\n<answer>{seen[1].strip()}</answer><|im_end|>"


class AnsweringEngine:
    """A native engine in all but its model. answer: text so far -> next message, or the failure of the engine.

    asked: text and sampling of every request. num_open: sessions that were opened and not closed.
    """

    num_replicas = 1

    def __init__(self, policy: Policy, deterministic: bool = False, answer: Callable[[str], Any] = sum_by_tool) -> None:
        self._tokenizer, self._stops = policy.tokenizer, StopStrings.of(policy.tokenizer)
        self.answer = answer
        self.asked: list[tuple[str, Sampling]] = []
        self.num_open = 0
        self.longest_s = 0.0
        self._random = random.Random(0)

    def session(self, order: int, prompt: str = "") -> _Session:
        """See `Engine`."""
        self.num_open += 1
        return _Session(self)

    def wait(self, check: Callable[[], None]) -> None:
        """See `RunEngine`; it is ready."""

    async def update(self, weights: object, version: int) -> SyncReport:
        """See `Engine`; it has no weights."""
        return SyncReport(version, "shared")

    def held(self) -> Mapping[str, Any]:
        """See `RunEngine`."""
        return {}

    def close(self) -> None:
        """Nothing to free."""

    async def say(self, tokens: Sequence[int], sampling: Sampling) -> Completion:
        """The next message."""
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        self.asked.append((str(text), sampling))
        await asyncio.sleep(self._random.uniform(0, self.longest_s))
        message = self.answer(str(text))
        if isinstance(message, InfrastructureError):
            raise message
        ids = self._tokenizer.encode(message, add_special_tokens=False)
        watch = self._stops.watch(sampling.stop)
        ends = [watch.ends(token) or token in sampling.stop_ids for token in ids]
        stop = min(ends.index(True) + 1 if True in ends else len(ids), sampling.max_tokens)
        sampled = np.asarray(ids[:stop], np.int32)
        return Completion(sampled, np.full(stop, -1, np.float32), np.zeros(stop, np.int32), ends[stop - 1])


class _Session:
    def __init__(self, engine: AnsweringEngine) -> None:
        self._engine, self._open = engine, True

    async def generate(
        self, tokens: Sequence[int], images: Sequence[ImageBlob], spans: Sequence[ImageSpan], sampling: Sampling
    ) -> Completion:
        """See `EngineSession`."""
        return await self._engine.say(tokens, sampling)

    def close(self) -> None:
        """See `EngineSession`."""
        if self._open:
            self._open = False
            self._engine.num_open -= 1


def use() -> None:
    """Let whole runs of this process have such an engine in place of the native one."""
    opening.NativeEngine = AnsweringEngine  # pyright: ignore[reportAttributeAccessIssue]
