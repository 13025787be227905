"""Tools of one's own: what the agent reads of them, whose fault what is, and what is refused when a run starts."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tool_calls import Answer, ask
from tool_servers import serving

from metis_fast import cli
from metis_fast.config import Config, ToolsConfig
from metis_fast.doctor import services
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.rollout.protocols import Compact, Metis
from metis_fast.tools import open_toolbox, other_tools
from metis_fast.tools.protocol import Toolbox
from metis_fast.tools.results import ContentResult, Refusal, Refused
from metis_fast.tools.tool import shorten
from metis_fast.types import Observation, Outcome

TOOLS = '''
import asyncio, sys, threading, time
from metis_fast.tools.tool import ToolFault
from metis_fast.types import Observation, Outcome

class WordCount:
    name = "word_count"
    description = "Counts the words of a text."
    schema = {"type": "object", "properties": {"text": {"type": "string"}, "top": {"type": "integer"}}, "required": ["text"]}

    def call(self, arguments, prompt):
        return f"{len(arguments['text'].split())} words"

class Later(WordCount):
    name = "later"
    async def call(self, arguments, prompt):
        await asyncio.sleep(0)
        return f"{len(prompt.images)} images, index {prompt.extra.get('index')}, seen {prompt.seen}"

class Shows(WordCount):
    name = "shows"
    def call(self, arguments, prompt):
        return Observation("left <image> right", prompt.images[:1])

class Says(WordCount):
    name = "says"
    def call(self, arguments, prompt):
        return arguments["text"]

class Odd(WordCount):
    """Does what its text says."""
    name = "odd"
    def call(self, arguments, prompt):
        match arguments["text"]:
            case "fault":
                raise ToolFault("there is no such street; <image>")
            case "bug":
                raise KeyError("street")
            case "exit":
                sys.exit(3)
            case "stop":
                raise StopIteration
            case "memory":
                raise MemoryError
            case "hang":
                RELEASE.wait(60)
            case "none":
                return None
            case "outcome":
                return Observation("x", outcome=Outcome.ANSWERED)
            case "images":
                return Observation("x", prompt.images[:1] * 9)
        return "fine"

class OddAsync(Odd):
    name = "odd_async"
    async def call(self, arguments, prompt):
        match arguments["text"]:
            case "hang":
                await asyncio.sleep(3600)
            case "stubborn":
                while True:
                    try:
                        await asyncio.sleep(3600)
                    except asyncio.CancelledError:
                        if RELEASE.is_set():
                            raise
            case "cancel":
                raise asyncio.CancelledError
            case "timeout":
                raise TimeoutError
        return super().call(arguments, prompt)

RELEASE = threading.Event()
CLOSED = []

class Counter:
    name = "counter"
    description = "Counts its calls."
    schema = {"type": "object", "properties": {}}

    def open(self, prompt):
        return Count(prompt)

    def close(self):
        CLOSED.append("tool")

class Count:
    def __init__(self, prompt):
        self.num, self.start = 0, int(prompt.extra.get("start", 0))

    async def call(self, arguments):
        self.num += 1
        if "bug" in arguments:
            raise RuntimeError("lost")
        return str(self.start + self.num)

    def close(self):
        CLOSED.append(self.num)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with `its_tools.py`."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "its_tools.py").write_text(TOOLS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield folder
        sys.modules.pop("its_tools", None)


def opened(*names: str, **more: object) -> Toolbox:
    own = [f"its_tools:{name}" for name in names]
    return open_toolbox(ToolsConfig.model_validate({"enabled": [], "own": own, **more}), Path("scratch"))


def read(dialect: Compact | Metis, answer: Answer) -> Observation:
    """As the agent reads it."""
    assert not isinstance(answer, InfrastructureError)
    return dialect.word(answer)


def test_plain_and_async_tools_answer(folder: Path, picture: Any) -> None:
    box = opened("WordCount", "Later", "Shows")
    assert box.names == ("word_count", "later", "shows")
    assert [tool.name for tool in box.tools] == list(box.names) and box.tools[0].schema["required"] == ["text"]
    image = picture(0)
    count, later, shows = ask(
        box,
        ("word_count", {"text": "one two  three"}),
        ("later", {"text": ""}),
        ("shows", {"text": ""}),
        images=[image],
        extra={"index": 7},
    )
    assert count == ContentResult(("3 words",)) and read(Compact(), count) == Observation("3 words")
    assert later == ContentResult(("1 images, index 7, seen ()",))
    assert shows == Observation("left <image> right", (image,))  # as the tool put it
    box.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "'text' is a required property"),
        ({"text": 3}, "text: 3 is not of type 'string'"),
        ({"text": "a", "top": "x"}, "top: 'x' is not of type 'integer'"),
    ],
)
def test_arguments_that_do_not_fit_the_schema_are_the_agents_fault(folder: Path, arguments: dict, said: str) -> None:
    (got,) = ask(opened("WordCount"), ("word_count", arguments))
    assert isinstance(got, Refused) and got.why is Refusal.ARGUMENTS and got.tool == "word_count"
    assert got.text == f'word_count expects {{"text": "...", "top": 1}} (top may be left out): {said}.'
    for dialect in (Compact(), Metis()):
        assert dialect.word(got) == Observation(got.text, outcome=Outcome.TOOL_ERROR)


def test_what_the_agent_wrote_is_not_repeated_at_length(folder: Path) -> None:
    got = ask(opened("WordCount"), ("word_count", {"text": ["x" * 100_000]}), ("word_count", {"text": _nested(900)}))
    assert all(isinstance(one, Refused) and len(one.text) < 600 for one in got)


def _nested(depth: int) -> object:
    return json.loads("[" * depth + "]" * depth)


@pytest.mark.parametrize("tool", ["odd", "odd_async"])
def test_a_tools_own_fault_is_the_agents_and_every_other_error_is_ours(folder: Path, tool: str) -> None:
    box = opened("Odd", "OddAsync")
    fault, *failures, fine = ask(box, *((tool, {"text": text}) for text in ("fault", "bug", "exit", "stop", "memory", "")))
    assert fault == Refused("there is no such street; <image>", Refusal.OTHER, tool)
    for dialect in (Compact(), Metis()):
        said = read(dialect, fault)
        assert said.outcome is Outcome.TOOL_ERROR and "<image>" not in said.text and "no such street" in said.text
    said = ["KeyError: 'street'", "SystemExit", "StopIteration", "MemoryError"]
    for failure, words in zip(failures, said, strict=True):
        assert (
            isinstance(failure, InfrastructureError) and f"tool {tool}: call failed" in str(failure) and words in str(failure)
        )
    assert fine == ContentResult(("fine",))


@pytest.mark.parametrize("text", ["none", "outcome", "images"])
def test_an_answer_that_is_none_is_our_failure(folder: Path, text: str, picture: Any) -> None:
    (got,) = ask(opened("Odd"), ("odd", {"text": text}), images=[picture(0)])
    assert isinstance(got, InfrastructureError) and "expected" in str(got) and "tool odd" in str(got)


@pytest.mark.parametrize(("tool", "text"), [("odd", "hang"), ("odd_async", "hang"), ("odd_async", "stubborn")])
def test_a_call_that_takes_too_long_is_our_failure(folder: Path, tool: str, text: str) -> None:
    box = opened("Odd", "OddAsync", own_timeout_s=0.05)
    release: threading.Event = sys.modules["its_tools"].RELEASE
    release.clear()

    async def story() -> None:
        session = box.session(())
        with pytest.raises(InfrastructureError, match=rf"tool {tool}: call took longer than tools.own_timeout_s=0.05"):
            await session.call(tool, {"text": text})
        assert await session.call("odd", {"text": ""}) == ContentResult(("fine",))  # what hangs keeps nobody
        await session.close()

    async def whole() -> None:
        try:
            await story()
        finally:
            release.set()  # on its loop still, which waits for what is stubborn

    asyncio.run(whole())


@pytest.mark.parametrize("text", ["cancel", "timeout"])
def test_what_a_tool_cancels_does_not_end_the_rollout(folder: Path, text: str) -> None:
    (got,) = ask(opened("OddAsync"), ("odd_async", {"text": text}))
    assert isinstance(got, InfrastructureError) and "tool odd_async: call" in str(got)


def test_a_cancelled_rollout_cancels_the_call(folder: Path) -> None:
    box = opened("OddAsync")

    async def story() -> None:
        session = box.session(())
        task = asyncio.create_task(session.call("odd_async", {"text": "hang"}))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await session.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(story())


def test_a_state_is_of_one_rollout_and_is_closed_with_it(folder: Path) -> None:
    box = opened("Counter")
    closed = sys.modules["its_tools"].CLOSED
    closed.clear()

    async def story() -> None:
        one, other = box.session((), {"start": 10}), box.session(())
        got = [await session.call("counter", {}) for session in (one, other, one, one, other)]
        assert got == [ContentResult((text,)) for text in ("11", "1", "12", "13", "2")]
        with pytest.raises(InfrastructureError, match="lost"):
            await one.call("counter", {"bug": 1})
        assert closed == [4]  # what may be half of something is gone
        assert await one.call("counter", {}) == ContentResult(("11",))
        await one.close()
        await other.close()
        await other.close()
        assert closed == [4, 1, 2]

    asyncio.run(story())
    box.close()
    assert closed == [4, 1, 2, "tool"]


def test_text_from_a_tool_is_no_image_and_of_bounded_length(folder: Path) -> None:
    box = opened("Says", max_output_chars=100)
    short, long, half = ask(box, *(("says", {"text": text}) for text in ("an <image>", "a" * 500 + "z" * 500, "\ud800")))
    assert short == ContentResult(("an <image>",))
    assert isinstance(long, ContentResult) and long.parts == (f"{'a' * 50}\n[900 characters cut]\n{'z' * 50}",)
    assert half == ContentResult(("?",))
    for dialect in (Compact(), Metis()):
        assert "<image>" not in read(dialect, short).text


@pytest.mark.parametrize(("limit", "kept"), [(0, ""), (1, "f"), (3, "aef"), (6, "abcdef"), (7, "abcdef")])
def test_shortened_text_keeps_its_ends(limit: int, kept: str) -> None:
    assert re.sub(r"\n\[\d+ characters cut\]\n", "", shorten("abcdef", limit)) == kept


@pytest.mark.parametrize(
    ("own", "code", "said"),
    [
        ("no_such_module:X", "", "no_such_module cannot be found"),
        ("bad_tools:X", "import no_such_library", "bad_tools cannot be imported (ModuleNotFoundError"),
        ("bad_tools:X", "def f(:", "bad_tools cannot be imported (SyntaxError"),
        ("bad_tools:X", "", "expected a class X in bad_tools, got None"),
        ("bad_tools:X", "class X:\n def __init__(self, a): pass", "made without arguments"),
        ("bad_tools:X", "class X: pass", "bad_tools:X.name: expected a name like word_count, got None"),
        ("bad_tools:X", "class X: name = 'a b'", "got 'a b'"),
        ("bad_tools:X", "class X: name = 'a'", "expected a sentence"),
        ("bad_tools:X", "class X: name = 'a'; description = 'b'; schema = None", "bad_tools:X.schema: got NoneType; expected"),
        ("bad_tools:X", "class X: name = 'a'; description = 'b'; schema = {'type': 'array'}", "\"type\" is 'array'"),
        (
            "bad_tools:X",
            "class X: name = 'a'; description = 'b'; schema = {'type': 'object', 'required': 3}",
            "3 is not of type",
        ),
        ("bad_tools:X", "class X: name = 'a'; description = 'b'; schema = {'type': 'object', 'x': {1}}", "it is no JSON"),
        ("bad_tools:X", "class X: name = 'a'; description = 'b'; schema = {'type': 'object'}", "open(self, prompt)"),
        (
            "bad_tools:X",
            "class X:\n name = 'search'; description = 'b'; schema = {'type': 'object'}\n def call(self, a, p): pass",
            "two tools are called 'search', one of them a built-in tool; rename the other",
        ),
    ],
)
def test_what_is_no_tool_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, code: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "bad_tools", raising=False)
    (tmp_path / "bad_tools.py").write_text(code)
    with pytest.raises(ToolSetupError, match=re.escape(said)) as raised:
        open_toolbox(ToolsConfig.model_validate({"enabled": [], "own": own}), tmp_path / "scratch")
    assert "\n" not in str(raised.value) and not (tmp_path / "scratch").exists()


def test_a_name_twice_is_refused_at_the_start(folder: Path) -> None:
    with pytest.raises(ToolSetupError, match=r"two tools are called 'word_count', one of them of tools\.own"):
        opened("WordCount", "WordCount")


def test_a_schema_that_refers_to_an_address_fetches_nothing(folder: Path) -> None:
    code = (
        "class Far:\n name = 'far'; description = 'b'; schema = {'type': 'object', 'properties': {'a': {'$ref': "
        "'http://127.0.0.1:9/schema.json'}}}\n def call(self, a, p): return 'x'\n"
    )
    (folder / "far_tools.py").write_text(code)
    box = open_toolbox(ToolsConfig.model_validate({"enabled": [], "own": "far_tools:Far"}), Path("scratch"))
    (got,) = ask(box, ("far", {"a": 1}))
    assert isinstance(got, InfrastructureError) and "refers to what is not there" in str(got)


def test_other_tools_are_those_that_are_not_built_in(folder: Path) -> None:
    assert other_tools(ToolsConfig()) == ()
    config = ToolsConfig.model_validate({"own": ["its_tools:Later", "its_tools:Counter"]})
    assert [tool.name for tool in other_tools(config)] == ["later", "counter"]


def test_the_examples_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "own-tools.md").read_text(encoding="utf-8")
    (tmp_path / "my_tools.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_tools", raising=False)
    config = ToolsConfig.model_validate({"enabled": [], "own": ["my_tools:WordCount", "my_tools:Notebook"]})
    box = open_toolbox(config, tmp_path / "scratch")
    count, none, note, more = ask(
        box, ("word_count", {"text": "a b"}), ("word_count", {}), ("note", {"text": "x"}), ("note", {"text": "y"})
    )
    assert [count, note, more] == [ContentResult((text,)) for text in ("2 words", "x", "x\ny")]
    assert isinstance(none, Refused) and f"`{none.text}`" in page


def test_data_check_knows_them(folder: Path, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture) -> None:
    system = "# Tools\n## word_count\nCounts.\n## streets\nFinds.\n"
    row = {
        "prompt": [{"role": "system", "content": system}, {"role": "user", "content": "<answer>?"}],
        "data_source": "set",
        "reward_model": {"ground_truth": "b", "style": "rule"},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (tmp_path / "my.yaml").write_text("tools: {own: [its_tools:WordCount, its_tools:Later]}\n")
    found = {}
    for name, more in (("plain", []), ("own", ["--config", str(tmp_path / "my.yaml")])):
        command = ["data", "check", str(tmp_path / "rows.parquet"), "--model", str(tiny_folder), "--json", *more]
        assert cli.main(command) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert set(found["plain"]["unknown_tools"]) == {"word_count", "streets"}
    assert set(found["own"]["unknown_tools"]) == {"streets"}
    assert "later" in found["own"]["warnings"][0] and "word_count" in found["own"]["warnings"][0]
    assert found["own"]["longest_prompt"] > found["plain"]["longest_prompt"] + 20  # what is told of `later`


def test_data_check_asks_the_tool_server_that_has_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "prompt": [{"role": "user", "content": "<answer>?"}],
        "data_source": "set",
        "reward_model": {"ground_truth": "b", "style": "rule"},
        "extra_info": {"tools": ["word_count", "streets"]},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    tools = {"enabled": [], "own": ["its_tools:WordCount"], "server": {"token_env": ""}, "serve": {"token_env": ""}}
    box = open_toolbox(ToolsConfig.model_validate(tools), tmp_path / "scratch")
    monkeypatch.delitem(sys.modules, "its_tools", raising=False)
    monkeypatch.chdir("/")  # where no such tool can be opened
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(folder))])
    with serving(box, ToolsConfig.model_validate(tools)) as (url, _):
        (tmp_path / "my.yaml").write_text(json.dumps({"tools": {**tools, "server": {"token_env": "", "url": url}}}))
        command = ["data", "check", str(tmp_path / "rows.parquet"), "--json", "--config", str(tmp_path / "my.yaml")]
        assert cli.main(command) == 0
    box.close()
    assert set(json.loads(capsys.readouterr().out)["unknown_listed"]) == {"streets"}


def test_doctor_opens_them(folder: Path) -> None:
    config = Config.model_validate({"tools": {"own": ["its_tools:Counter", "its_tools:Nothing"]}})
    fine, broken = services.others(config)
    assert (fine.state, fine.found) == ("ok", "opens: counter; nothing was asked of it")
    assert broken.state == "error" and "expected a class Nothing in its_tools" in broken.found
