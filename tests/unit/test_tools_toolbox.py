"""What the agent is told when it names a tool or its arguments wrongly, and which tool a call reaches."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tool_calls import Call, ask

from metis_fast.config import ToolsConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.rollout.protocols import Compact, Metis
from metis_fast.tools import open_toolbox
from metis_fast.tools.protocol import Toolbox
from metis_fast.tools.results import ImageSearchResult, Refusal, Refused
from metis_fast.tools.toolbox import LocalToolbox
from metis_fast.types import ImageBlob, Observation, Outcome, ToolName

WORD = Compact(ToolsConfig.model_validate({"text_search": {"max_results": 1}, "image_search": {"max_results": 1}})).word


def png() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def search_box(tmp_path: Path) -> Iterator[Toolbox]:
    pq.write_table(pa.table({"title": ["A <image> page"], "link": [""], "text": ["about herons"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"title": ["<image>Gradient"], "link": [""], "image": [png()]}), tmp_path / "image.parquet")
    tree = {
        "enabled": ["text_search", "image_search"],
        "text_search": {"corpus": tmp_path / "text.parquet", "max_results": 1},
        "image_search": {"corpus": tmp_path / "image.parquet", "max_results": 1},
    }
    box = open_toolbox(ToolsConfig.model_validate(tree), tmp_path / "scratch")
    yield box
    box.close()


def call(box: Toolbox, *calls: Call, images: tuple[ImageBlob, ...] = ()) -> list[Observation]:
    """As the agent reads the answers."""
    answers = ask(box, *calls, images=images)
    return [WORD(answer) for answer in answers if not isinstance(answer, InfrastructureError)]


@pytest.mark.parametrize("name", ["python", "browser", "", "Text_Search", "<image>"])
def test_unknown_and_disabled_tools_are_answered_with_the_tools_there_are(search_box: Toolbox, name: str) -> None:
    (got,) = call(search_box, (name, {"code": "1"}))
    assert got.outcome is Outcome.TOOL_ERROR and got.text.endswith("Tools: text_search, image_search.")
    assert "<image>" not in got.text


@pytest.mark.parametrize("arguments", [{}, {"query": 3}, {"query": None}, {"q": "x"}, {"query": "x", "k": 3}])
def test_wrong_arguments_are_answered_with_the_right_ones(search_box: Toolbox, arguments: Mapping[str, object]) -> None:
    (got,) = call(search_box, ("text_search", arguments))
    assert got == Observation('text_search expects one argument, a string: {"query": "..."}.', outcome=Outcome.TOOL_ERROR)


def test_search_is_another_name_of_text_search(search_box: Toolbox) -> None:
    one, other = call(search_box, ("search", {"query": "heron"}), ("text_search", {"query": "heron"}))
    assert one == other and one.outcome is Outcome.TOOL_RESULT and "about herons" in one.text


def test_an_image_mark_in_a_page_does_not_stand_for_an_image(search_box: Toolbox) -> None:
    (got,) = call(search_box, ("text_search", {"query": "page"}))
    assert "<image>" not in got.text and got.text.startswith("A < image > page")


def test_image_search_runs_once_a_rollout(search_box: Toolbox) -> None:
    images = (ImageBlob.of(png()),)
    first, second = call(search_box, ("image_search", {}), ("image_search", {}), images=images)
    assert first.outcome is Outcome.TOOL_RESULT and first.text == "< image >Gradient\n<image>" and len(first.images) == 1
    assert second.outcome is Outcome.TOOL_ERROR and "only once" in second.text
    (again,) = call(search_box, ("image_search", {}), images=images)
    assert again == first


def test_image_search_needs_a_prompt_image_and_no_arguments(search_box: Toolbox) -> None:
    none, extra = call(search_box, ("image_search", {}), ("image_search", {"query": "x"}))
    assert none.outcome is extra.outcome is Outcome.TOOL_ERROR
    assert "no" in none.text and "no arguments" in extra.text


def test_names_are_the_enabled_tools(search_box: Toolbox) -> None:
    assert list(search_box.names) == [ToolName.TEXT_SEARCH, ToolName.IMAGE_SEARCH]


@pytest.mark.parametrize(("tool", "other"), [("text_search", "provider"), ("image_search", "cache")])
def test_a_search_tool_without_a_corpus_is_refused(tmp_path: Path, tool: str, other: str) -> None:
    said = rf"set tools\.{tool}\.corpus, or tools\.{tool}\.{other}, or remove {tool} from tools\.enabled"
    with pytest.raises(ToolSetupError, match=said):
        open_toolbox(ToolsConfig.model_validate({"enabled": [tool]}), tmp_path)


class Source:
    """A search that says what it was asked, and waits until it may answer."""

    def __init__(self, results: list[ImageSearchResult | Refused]) -> None:
        self.results, self.asked, self.closed, self.go = results, [], 0, asyncio.Event()

    async def search(self, images: object, extra: object) -> ImageSearchResult | Refused:
        self.asked.append((images, extra))
        await self.go.wait()
        return self.results.pop(0)

    def close(self) -> None:
        self.closed += 1


def test_a_search_gets_the_whole_prompt_and_holds_no_place_of_python() -> None:
    async def story() -> None:
        source = Source([Refused("no image"), ImageSearchResult(())])
        box = LocalToolbox(ToolsConfig.model_validate({"enabled": ["image_search"]}), None, None, source)
        image, extra = ImageBlob.of(png()), {"index": "source_index_7", "pass8": 0}
        session = box.session((image,), extra, ((64, 64),))
        first = asyncio.create_task(session.call("image_search", {}))
        await asyncio.sleep(0.01)
        assert not box.gate().locked() and source.asked == [((image,), extra)]
        source.go.set()
        assert await first == Refused("no image")
        assert await session.call("image_search", {}) == ImageSearchResult(())  # what was refused was not the one call
        again = await session.call("image_search", {})
        assert isinstance(again, Refused) and again.why is Refusal.REPEATED
        await session.close()
        box.close()
        assert source.closed == 1 and len(source.asked) == 2

    asyncio.run(story())


def test_words_of_compact_and_of_metis_for_the_same_call(search_box: Toolbox) -> None:
    async def asked() -> list[str]:
        session = search_box.session(())
        result = await session.call("search", Metis().arguments("search", {"query": ["herons", "x"]}))
        return [dialect.word(result).text for dialect in (Compact(), Metis())]

    compact, metis = asyncio.run(asked())
    assert compact == "1. A < image > page\nabout herons"
    assert metis == (
        "A Google search for 'herons' found 1 results:\n\n## Web Results\n"
        "Page 1. [Title: A < image > page](Link: )\nSnippet: about herons\n"
    )
