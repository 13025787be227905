"""A rehearsal's script has an example call of every built-in tool: one that the tool takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import jsonschema
import pytest

from metis_fast.model import Policy
from metis_fast.rehearse.script import ScriptedEngine
from metis_fast.rollout.engine import Completion, Sampling
from metis_fast.rollout.protocols import Metis
from metis_fast.tools.builtin import SPECS
from metis_fast.types import Prompt, ToolName


def _messages(policy: Policy, prompt: Prompt, order: int, tools: list[ToolName]) -> list[str]:
    session = ScriptedEngine(policy.tokenizer, [prompt], 4, tools).session(order)

    async def go() -> list[Completion]:
        return [await session.generate((), (), (), Sampling(512, ())) for _ in range(len(tools) + 1)]

    return [str(policy.tokenizer.decode(one.tokens.tolist(), skip_special_tokens=True)) for one in asyncio.run(go())]


@pytest.mark.parametrize("tool", list(ToolName))
def test_every_built_in_tool_has_an_example_call_that_fits_its_schema(
    tool: ToolName, policy: Policy, make_prompt: Callable[..., Prompt]
) -> None:
    message, _ = _messages(policy, make_prompt(), 0, [tool])
    parsed = Metis().parse(message)
    assert parsed.call is not None and parsed.call.name == tool.value
    jsonschema.validate(parsed.arguments, dict(SPECS[tool].schema))


def test_each_tool_is_called_once_and_half_of_the_answers_are_right(policy: Policy, make_prompt: Callable[..., Prompt]) -> None:
    prompt = make_prompt()
    for order in range(4):
        *calls, answer = _messages(policy, prompt, order, list(ToolName))
        assert [call.name for one in calls if (call := Metis().parse(one).call)] == [tool.value for tool in ToolName]
        assert (f"<answer>{prompt.answers[0]}</answer>" in answer) == (order < 2)
