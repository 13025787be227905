"""Conversations that call every tool and then answer: a model that nobody has trained would hardly ever do either."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from metis_fast.rollout.engine import Completion, Sampling, SyncReport
from metis_fast.types import ImageBlob, ImageSpan, Prompt, ToolName

_ARGUMENTS: dict[ToolName, dict[str, str]] = {
    ToolName.PYTHON: {"code": "part = image_1.crop((0, 0, 200, 100))\nprint(part.size)\nplt.imshow(part)\nplt.show()"},
    ToolName.TEXT_SEARCH: {"query": "what stands on the sign"},
    ToolName.IMAGE_SEARCH: {},
}


class ScriptedEngine:
    """An `Engine` that calls each of `tools` once; then half of a prompt's rollouts answer right, the others wrong."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], rollouts: int, tools: Sequence[ToolName]
    ) -> None:
        self._tokenizer, self._prompts, self._rollouts, self._tools = tokenizer, prompts, rollouts, tools

    def session(self, order: int, prompt: str = "") -> _Session:
        """A place for one rollout."""
        answer = self._prompts[order // self._rollouts].answers[0]
        right = order % self._rollouts < self._rollouts // 2
        calls = [json.dumps({"name": tool.value, "arguments": _ARGUMENTS[tool]}) for tool in self._tools]
        messages = [f"<reason>I look.</reason><tool_call>{call}</tool_call>" for call in calls]
        messages.append(f"<reason>I know.</reason><answer>{answer if right else 'something else'}</answer><|im_end|>")
        return _Session([self._tokenizer.encode(message, add_special_tokens=False) for message in messages])

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """A script has no weights."""
        return SyncReport(version, "shared")

    def close(self) -> None:
        """Nothing is kept."""


class _Session:
    def __init__(self, messages: Sequence[list[int]]) -> None:
        self._messages = iter(messages)

    async def generate(
        self, tokens: Sequence[int], images: Sequence[ImageBlob], spans: Sequence[ImageSpan], sampling: Sampling
    ) -> Completion:
        """The next message; log-probs and weight versions are 0."""
        ids = np.asarray(next(self._messages), np.int32)
        zeros = np.zeros(len(ids), np.int32)
        return Completion(ids, zeros.astype(np.float32), zeros, stopped=True)

    def close(self) -> None:
        """Nothing is kept."""
