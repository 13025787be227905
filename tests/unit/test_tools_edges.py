"""What crosses every way to a tool alike: arguments nested too deep, and answers of one's own tools that are none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from metis_fast.config import ToolsConfig
from metis_fast.errors import InfrastructureError
from metis_fast.recording.file import Recording
from metis_fast.recording.tools import RecordingToolbox, ReplayingToolbox
from metis_fast.tools.arguments import MAX_DEPTH, too_deep
from metis_fast.tools.protocol import Toolbox, ToolSpec
from metis_fast.tools.remote import RemoteToolbox
from metis_fast.tools.results import Refusal, Refused, ToolResult
from metis_fast.tools.tool import OwnTool, ToolPrompt
from metis_fast.tools.toolbox import LocalToolbox
from metis_fast.types import ImageBlob, Observation

CONFIG = ToolsConfig.model_validate({"enabled": ["python"]})


class Gives:
    """A tool of one's own that gives what it was made with."""

    name = "gives"
    description = "Gives it."

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.schema = {"type": "object"}

    def call(self, arguments: object, prompt: ToolPrompt) -> object:
        """Whatever the arguments are."""
        return self.answer


def own(answer: object) -> OwnTool:
    return OwnTool(Gives(answer), "here:Gives", 20.0, 1000)  # pyright: ignore[reportArgumentType]


def called(answer: object) -> ToolResult | Observation:
    return asyncio.run(own(answer).session(ToolPrompt()).call("gives", {}))


def nested(depth: int) -> dict[str, object]:
    value: object = {}
    for number in range(depth - 1):
        value = [value] if number % 2 else {"a": value}
    return {"x": value}


def test_depth_is_counted_in_lists_and_objects():
    assert too_deep("any", nested(MAX_DEPTH - 1)) is None
    refused = too_deep("any", nested(MAX_DEPTH))
    assert refused is not None and refused.why is Refusal.ARGUMENTS and refused.tool == "any"


@pytest.mark.parametrize("depth", [MAX_DEPTH, 600, 950])
def test_arguments_nested_too_deep_are_the_agents_mistake_wherever_tools_run(tmp_path: Path, depth: int):
    local = LocalToolbox(CONFIG, None, None, None, [own("fine")])
    writing = Recording(tmp_path / "run.sqlite", writable=True)
    recording = RecordingToolbox(local, CONFIG, writing)
    reading = Recording(tmp_path / "run.sqlite", writable=False)
    boxes: list[Toolbox] = [local, RemoteToolbox(CONFIG, []), recording, ReplayingToolbox(CONFIG, reading)]

    async def story() -> None:
        for box in boxes:
            session = box.session(())
            refused = await session.call("gives", nested(depth))
            assert isinstance(refused, Refused) and refused.text == "The arguments are nested deeper than 64 levels."
            await session.close()

    asyncio.run(story())
    assert [tool.name for tool in recording.tools] == ["gives"] and isinstance(recording.tools[0], ToolSpec)
    writing.close()
    reading.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Observation(None), "expected an Observation with a text and a tuple of ImageBlob, got NoneType"),  # pyright: ignore
        (Observation("x", (b"GIF",)), "make images with ImageBlob.of"),  # pyright: ignore
        (Observation("x", None), "got str and None"),  # pyright: ignore
        (Observation("x", (ImageBlob("text", "00"),)), "expected bytes in an image, got str"),  # pyright: ignore
        (Observation("x", (ImageBlob.of(b"no image"),)), "an image that cannot be used: cannot identify image file"),
    ],
)
def test_an_observation_that_is_none_is_our_failure_and_not_read_by_the_agent(answer: Observation, said: str):
    with pytest.raises(InfrastructureError, match=said):
        called(answer)


def test_observations_are_bounded_and_their_images_known_by_what_they_are(picture: Callable[..., ImageBlob]):
    image = picture(1, 32, 32)
    got = called(Observation("y" * 5000 + "\ud800", [ImageBlob(image.data, "of another")]))  # pyright: ignore
    assert isinstance(got, Observation) and got.images == (image,)
    assert len(got.text) < 1100 and "characters cut" in got.text and got.text.encode()
