"""What a prompt tells of tools that are not built in, and which tools a row has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from metis_fast.config import McpServerConfig, RolloutConfig, ToolsConfig
from metis_fast.data.row import parse_prompt
from metis_fast.errors import ToolSetupError
from metis_fast.model import Policy
from metis_fast.prompt_tools import offered_tools, with_tools
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.episode import SampleKey, run_episode
from metis_fast.rollout.offer import Offer
from metis_fast.standin.words import system_message
from metis_fast.testing.fakes import FakeEngine, FakeToolbox
from metis_fast.tools.protocol import ToolSpec
from metis_fast.tools.toolbox import LocalToolbox
from metis_fast.types import Message, Observation, Outcome, Prompt

STREETS = ToolSpec(
    "streets",
    "Finds streets.\n# Careful\nNever </tools> nor <image>.",
    {"type": "object", "properties": {"town": {"type": "string"}, "top": {"type": "integer"}}, "required": ["town"]},
)
CLOCK = ToolSpec("clock", "Tells the time.", {"type": "object", "properties": {}})
TEMPLATE = """You are helpful.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "python", "description": "Runs code.", "parameters": {"type": "object"}}}
</tools>

For each function call, return a json object."""


def prompt_of(*messages: Message, tools: tuple[str, ...] | None = None, images: Sequence = ()) -> Prompt:
    return Prompt("a:0", "set", messages, tuple(images), "search", ("yes",), "rule", "What?", tools=tools)


USER = Message("user", "What time is it?")


def test_a_published_row_gets_a_heading_behind_its_own() -> None:
    before = system_message(["python", "image_search"])
    after = with_tools(prompt_of(Message("system", before), USER), [STREETS, CLOCK])
    text = after.messages[0].content
    assert offered_tools(after) == ("python", "image_search", "streets", "clock")
    assert after.messages[1:] == (USER,)
    added = text.replace(before[before.index("\n\n# Decision") :], "").removeprefix(before[: before.index("\n\n# Decision")])
    assert added == (
        "\n\n## streets\nFinds streets.\n # Careful\nNever < /tools> nor < image>.\n"
        f"Arguments: {json.dumps(STREETS.schema)}\n"
        'Format: <tool_call>{"name": "streets", "arguments": {"town": "...", "top": 1}}</tool_call>'
        "\n\n## clock\nTells the time.\n"
        'Arguments: {"type": "object", "properties": {}}\nFormat: <tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    )
    assert text.index("## clock") < text.index("# Decision Guidelines") and "</tool_call>\n\n# Decision" in text
    assert with_tools(after, [STREETS, CLOCK]) is after


def test_a_row_with_a_template_of_schemas_gets_schemas() -> None:
    after = with_tools(prompt_of(Message("system", TEMPLATE), USER), [STREETS, CLOCK])
    lines = after.messages[0].content.split("\n")
    assert offered_tools(after) == ("python", "streets", "clock")
    assert lines[:9] == TEMPLATE.split("\n")[:9] and lines[11] == "</tools>"
    streets = json.loads(lines[9])["function"]
    assert streets["name"] == "streets" and streets["parameters"] == STREETS.schema and "< /tools>" in streets["description"]
    assert "\n".join(lines[11:]) == TEMPLATE[TEMPLATE.index("</tools>\n\n") :]


@pytest.mark.parametrize("system", ["", "You are helpful.\n"])
def test_a_row_without_tools_gets_a_section(system: str) -> None:
    before = [Message("system", system)] if system else []
    after = with_tools(prompt_of(*before, USER), [CLOCK])
    assert [message.role for message in after.messages] == ["system", "user"]
    assert after.messages[0].content.startswith("You are helpful.\n\n# Tools\n" if system else "# Tools\n")
    assert offered_tools(after) == ("clock",) and after.messages[-1] is USER


def test_images_stay_where_they_are(picture: Callable) -> None:
    spelt = Message(
        "system", "a <image> b\n# Tools\n## python\nx\n# End\n<image> c", ("a <image> b\n# Tools\n## python\nx\n# End\n", " c")
    )
    after = with_tools(prompt_of(spelt, USER, images=[picture(0)]), [STREETS])
    texts = after.messages[0].texts
    assert len(texts) == 2 and texts[1] == " c" and texts[0].startswith("a <image> b\n# Tools\n## python\nx\n\n## streets\n")
    plain = with_tools(prompt_of(Message("system", "see <image>"), USER, images=[picture(0)]), [STREETS])
    assert plain.messages[0].around_images[0] == "see " and "<tools>" in plain.messages[0].around_images[1]


@pytest.mark.parametrize(
    ("system", "listed", "offer", "allowed"),
    [
        (system_message(["python"]), None, "all", None),
        (system_message(["python"]), None, "row", {"python"}),
        (system_message(["python"]), ("search", "streets"), "row", {"text_search", "streets"}),
        (system_message(["python"]), (), "row", set()),
        ("Be brief.", None, "row", None),
        (system_message(["python"]), ("streets",), "all", None),
    ],
)
def test_which_tools_a_row_has(system: str, listed: tuple[str, ...] | None, offer: str, allowed: set[str] | None) -> None:
    made = Offer(ToolsConfig.model_validate({"offer": offer}), [STREETS, CLOCK])
    prompt = prompt_of(Message("system", system), USER, tools=listed)
    assert made.allowed(prompt) == allowed
    told = [name for name in offered_tools(made.described(prompt)) if name != "python"]
    assert told == [name for name in ("streets", "clock") if allowed is None or name in allowed]
    silent = Offer(ToolsConfig.model_validate({"offer": offer, "describe": False}), [STREETS, CLOCK])
    assert silent.described(prompt) is prompt


def test_a_call_of_a_tool_that_the_row_does_not_have_is_the_agents_fault(policy: Policy) -> None:
    names = ["python", "text_search", "streets"]
    box = FakeToolbox([Observation("ran")], names)
    chat = Chat(policy.tokenizer, policy.images, None, Offer(ToolsConfig.model_validate({"offer": "row"}), box.tools))
    calls = [f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in ("python", "nothing", "text_search")]
    engine = FakeEngine(policy.tokenizer, [[*calls, "<answer>yes</answer><|im_end|>"]])
    prompt = prompt_of(USER, tools=("text_search", "streets", "not_there"))
    rollout = asyncio.run(run_episode(prompt, 0, chat, engine, box, RolloutConfig(), SampleKey(0, "a", 0)))
    first, unknown, third, _ = rollout.turns
    assert first.observation == "There is no tool 'python' here. Tools: text_search, streets."
    assert unknown.observation == "There is no tool 'nothing' here. Tools: text_search, streets."
    assert [turn.outcome for turn in (first, unknown, third)] == [Outcome.TOOL_ERROR] * 2 + [Outcome.TOOL_RESULT]
    assert box.calls == [("text_search", {})] and box.num_open == 0
    assert rollout.num_tool_calls == 3
    text = chat.decode(rollout.tokens[: rollout.prompt_len].tolist())
    assert '"streets"' in text and '"python"' not in text


@pytest.mark.parametrize(
    ("listed", "read"),
    [(["python", "streets"], ("python", "streets")), ([], ()), (None, None), ("python", None), ([{"name": "python"}], None)],
)
def test_the_list_of_a_row(listed: object, read: tuple[str, ...] | None) -> None:
    row = {
        "prompt": [{"role": "user", "content": "a"}],
        "data_source": "set",
        "reward_model": {"ground_truth": "b", "style": "rule"},
        "extra_info": {"index": 3, "tools": listed},
    }
    assert parse_prompt(row, "a:0", Path()).tools == read


def test_the_tools_of_a_server_and_their_names() -> None:
    pytest.importorskip("mcp")
    from mcp.types import Tool

    from metis_fast.tools.mcp import McpSource

    listed = [Tool(name=name, description=f" {name}s. ", input_schema={"type": "object"}) for name in ("road", "town")]

    def source(**more: object) -> McpSource:
        server = McpServerConfig.model_validate({"command": ["x"], **more})
        return McpSource(server, "tools.mcp.0", Path(), 100, listed)

    assert source().tools == (
        ToolSpec("road", "roads.", {"type": "object"}),
        ToolSpec("town", "towns.", {"type": "object"}),
    )
    assert [tool.name for tool in source(tools=["town"], prefix="my_").tools] == ["my_town"]
    with pytest.raises(
        ToolSetupError, match=r"tools\.mcp\.0\.tools names 'sea', which the server does not have; it has road, town"
    ):
        source(tools=["sea"])
    with pytest.raises(ToolSetupError, match=r"two tools are called 'road'.*prefix"):
        LocalToolbox(ToolsConfig(), None, None, None, [source(), source()])
    both = LocalToolbox(ToolsConfig(), None, None, None, [source(), source(prefix="b_")])
    assert both.names == ("road", "town", "b_road", "b_town")
    listed.append(Tool(name="a b", input_schema={"type": "object"}))
    with pytest.raises(ToolSetupError, match=r"expected names of tools .*, got 'a b'"):
        source()
    assert [tool.name for tool in source(tools=["road"]).tools] == ["road"]
    listed[-1] = Tool(name="odd", input_schema={"type": "object", "properties": 3})
    with pytest.raises(ToolSetupError, match=r"the schema of odd cannot be used"):
        source()
    listed.clear()
    with pytest.raises(ToolSetupError, match=r"the MCP server x has no tools; remove it"):
        source()
