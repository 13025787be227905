"""The `compact` protocol says, token for token, what it said when there was no other; see `golden_cases`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from golden_cases import CODES, EPISODES, OBSERVATIONS, SLOW
from PIL import Image

from metis_fast.config import PythonToolConfig, RolloutConfig
from metis_fast.errors import ToolSetupError
from metis_fast.rollout.episode import SampleKey, run_episode
from metis_fast.rollout.protocols import Compact
from metis_fast.testing.fakes import FakeEngine, FakeToolbox
from metis_fast.tools.python_tool import PythonServer, PythonTool
from metis_fast.types import ImageBlob, Observation, Outcome

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "compact.json").read_text())


@pytest.mark.parametrize("number", range(len(OBSERVATIONS)))
def test_an_observation_has_the_tokens_that_it_had(chat, picture, number):
    text, sizes, limit, ended = OBSERVATIONS[number]
    images = tuple(picture(i, *size) if size else ImageBlob.of(b"no image") for i, size in enumerate(sizes))
    observation = asyncio.run(chat.fit(Observation(text, images), limit))
    piece = chat.encode_observation(observation, chat.im_end if ended else chat.stop_ids[0], limit)
    expected = GOLDEN["observations"][number]
    assert piece.tokens == expected["tokens"]
    assert [[span.start, span.stop, *span.grid] for span in piece.spans] == expected["spans"]
    assert [span.sha256 for span in piece.spans] == [image.sha256 for image in piece.images]


@pytest.mark.parametrize("number", range(len(EPISODES)))
def test_a_conversation_has_the_tokens_that_it_had(chat, policy, make_prompt, number):
    messages, observations, limits = EPISODES[number]
    engine = FakeEngine(policy.tokenizer, [list(messages)])
    toolbox = FakeToolbox([Observation(text, outcome=Outcome(kind)) for text, kind in observations])
    config = RolloutConfig.model_validate(limits)
    rollout = asyncio.run(run_episode(make_prompt(), 0, chat, engine, toolbox, config, SampleKey(0, "t", 0)))
    expected = GOLDEN["episodes"][number]
    assert rollout.tokens.tolist() == expected["tokens"]
    assert (rollout.num_tool_calls, rollout.outcome) == (expected["calls"], expected["outcome"])
    assert [[turn.outcome, turn.observation] for turn in rollout.turns] == expected["turns"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonServer]:
    try:
        opened = PythonServer(PythonToolConfig(max_output_chars=2000), tmp_path_factory.mktemp("python"))
    except ToolSetupError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def said(server: PythonServer, image: ImageBlob, codes: list[str], timeout_s: float) -> list[Any]:
    async def story() -> list[Observation]:
        tool = PythonTool(server, (image,), timeout_s, 2000)
        try:
            return [Compact().word(await tool.call(code)) for code in codes]
        finally:
            await tool.close()

    def size(image: ImageBlob) -> list[int]:
        return list(Image.open(BytesIO(image.data)).size)

    return [[one.text, [size(image) for image in one.images], one.outcome] for one in asyncio.run(story())]


@pytest.mark.parametrize("number", range(len(CODES)))
def test_python_says_what_it_said(server, picture, number):
    assert said(server, picture(0, 40, 30), CODES[number], 60.0) == GOLDEN["python"][number]


def test_python_says_what_it_said_of_a_call_that_takes_too_long(server, picture):
    assert said(server, picture(0, 40, 30), SLOW, 0.7) == GOLDEN["slow"]
