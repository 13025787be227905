"""Edges of the protocols: what each of them reads in a message that is not quite a call, and what the agent is told; what text
from outside can and cannot say. docs/protocols.md has the same as a table.

The columns of a case: `compact` and `metis` with either syntax, and what the reference does (`rollout.strict`). RUN: the code
of the call is run, and prints 42. NONE: the message calls nothing. EMPTY: the agent reads nothing. Other words: it reads them.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_fast.config import RolloutConfig, ToolsConfig
from metis_fast.errors import ToolSetupError
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.episode import SampleKey, run_episode
from metis_fast.rollout.protocols import Compact, Dialect, Metis, StrictMetis
from metis_fast.testing.fakes import FakeEngine, FakeToolbox
from metis_fast.tools import open_toolbox
from metis_fast.tools.protocol import Toolbox
from metis_fast.tools.results import (
    ContentResult,
    ImageSearchResult,
    Page,
    PythonResult,
    Refused,
    SeenPage,
    TextSearchResult,
    ToolResult,
)
from metis_fast.tools.search.reply import clean
from metis_fast.types import ImageBlob, Observation, Outcome

RUN, NONE, EMPTY = "42", None, ""
CODE = "print(6 * 7)"
CALL = json.dumps({"name": "python", "arguments": {"code": CODE}})
LONG = "#" * (1 << 20)


def wrap(body: str) -> str:
    return f"<tool_call>{body}</tool_call>"


def python(arguments: str) -> str:
    return wrap(f'{{"name": "python", "arguments": {arguments}}}')


@dataclass(frozen=True, slots=True)
class Edge:
    """A message, and what each protocol makes of it: `strict` and `lenient` of both, where `metis` does not differ."""

    message: str
    strict: str | None
    published: str | None
    lenient: str | None = "as strict"
    metis: str | None = "as compact"


EDGES = {
    "a call": Edge(wrap(CALL), RUN, RUN),
    # which part of the message
    "several calls": Edge(python('{"code": "print(1)"}') + "\n" + wrap(CALL), RUN, RUN),
    "a call in reasoning": Edge("<think>I see. " + wrap(CALL), RUN, RUN),
    "a call in reasoning that ends": Edge("<reason>I see. " + wrap(CALL) + "</reason>", RUN, RUN),
    "a call beside an answer": Edge("<answer>7</answer>" + wrap(CALL), RUN, RUN),
    "a tag in prose, then a call": Edge("I need a <tool_call>, so: " + wrap(CALL), RUN, EMPTY),
    "a tag in prose beside an answer": Edge("No <tool_call> needed. <answer>7</answer>", NONE, NONE),
    "a call within a call": Edge("<tool_call>" + wrap(CALL) + "</tool_call>", RUN, EMPTY),
    "a call that nothing closes": Edge("<tool_call>" + CALL, "write it behind the object", NONE, metis=NONE),
    "a call that nothing opens": Edge(CALL + "</tool_call>", NONE, EMPTY, metis="write it before the object"),
    "two objects in one": Edge(wrap(CALL + "\n" + CALL), "write one call a message", EMPTY),
    "a list of calls": Edge(wrap(f"[{CALL}, {CALL}]"), "write one call a message", EMPTY),
    "the closing tag in a string, as a tag": Edge(
        '<tool_call>{"name": "python", "arguments": {"code": "print(\'</tool_call>', "<\\/tool_call> for the tag", EMPTY
    ),
    "the closing tag in a string, escaped": Edge(python(r'''{"code": "len('<\/tool_call>') * 4 - 6"}'''), RUN, RUN),
    # JSON that is none
    "nothing": Edge(wrap(""), 'it is empty; write {"name": ', EMPTY),
    "raw line breaks": Edge(python('{"code": "x = 6\nprint(x * 7)"}'), "write \\n", EMPTY, RUN),
    "a trailing comma": Edge(python(f'{{"code": "{CODE}",}}'), "leave it out", EMPTY, RUN),
    "single quotes": Edge(python(f"{{'code': '{CODE}'}}"), 'write " around names and strings', EMPTY, RUN),
    "a fence": Edge(wrap(f"```json\n{CALL}\n```"), "leave out the ```", EMPTY, RUN),
    "a fence of nothing but its end": Edge(wrap(f"{CALL}\n```"), "leave it out", EMPTY),
    "a quote that is not escaped": Edge(python('{"code": "print("42")"}'), 'write \\" for a quote in a string', EMPTY),
    "a brace too few": Edge(wrap(CALL[:-1]), "close every { with }", EMPTY),
    "XML": Edge(wrap("<function=python>"), 'it is XML; write {"name": ', EMPTY),
    # the call itself
    "an unknown tool": Edge(
        wrap('{"name": "browser", "arguments": {}}'), "There is no tool 'browser'. Tools: python.",
        "Error: No handler found for tool 'browser'.", metis="Error: No handler found for tool 'browser'.",
    ),
    "no name": Edge(
        wrap('{"arguments": {"code": "1"}}'), 'needs a "name", a string: write {', "No handler found for tool 'None'"
    ),
    "another name for arguments": Edge(
        wrap(f'{{"name": "python", "parameters": {{"code": "{CODE}"}}}}'), 'write "arguments": {...} instead of "parameters"',
        "No code provided", RUN,
    ),
    "arguments as text": Edge(python('"1"'), 'write "arguments": {...}', EMPTY),
    "arguments as a list": Edge(python("[1]"), 'write "arguments": {...}', EMPTY),
    "an argument of another name": Edge(
        python('{"cmd": "1"}'), "code", "No code provided in the tool call arguments.", metis="No code provided"
    ),
    "an argument of another kind": Edge(
        python('{"code": 3}'), "code", "No code provided in the tool call arguments.", metis="No code provided"
    ),
    "an argument too many": Edge(python(f'{{"code": "{CODE}", "timeout": 3}}'), "code", RUN, metis=RUN),
    # sizes
    "a megabyte of code": Edge(python(json.dumps({"code": f"{LONG}\n{CODE}"})), RUN, RUN),
    "a megabyte that is no JSON": Edge(python(f'{{"code": "{CODE}\n{LONG}"}}'), "write \\n", EMPTY, RUN),
    "a megabyte of a name": Edge(
        wrap(f'{{"name": "{LONG}", "arguments": {{}}}}'), "Tools: python.", "No handler found", metis="No handler found"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def toolbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toolbox]:
    """The real one, with `python`."""
    settings = ToolsConfig.model_validate({"enabled": ["python"], "python": {"timeout_s": 60}})
    try:
        opened = open_toolbox(settings, tmp_path_factory.mktemp("tools"))
    except ToolSetupError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def read_by(dialect: Dialect, toolbox: Toolbox, message: str) -> str | None:
    """What the agent reads behind a message; None where that calls nothing."""

    async def story() -> str | None:
        parsed = dialect.parse(message)
        if parsed.call is None:
            return None
        if parsed.arguments is None:
            return dialect.malformed(parsed).text
        session = toolbox.session(())
        try:
            arguments = dialect.arguments(parsed.call.name, parsed.arguments)
            return dialect.word(await session.call(parsed.call.name, arguments)).text
        finally:
            await session.close()

    return asyncio.run(story())


def check(read: str | None, expected: str | None) -> None:
    if not expected:
        assert read == expected
        return
    assert read is not None
    assert expected in read
    if expected != RUN:
        assert len(read) < 400 and not re.search(r"^42$", read, re.MULTILINE), read


def lenient(tools: type[Compact] | type[Metis]) -> Dialect:
    return tools(ToolsConfig.model_validate({"call_syntax": "lenient"}))


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES)
def test_each_protocol_runs_a_call_or_says_what_to_write_instead(edge: Edge, toolbox: Toolbox) -> None:
    loose = edge.strict if edge.lenient == "as strict" else edge.lenient
    for dialect, expected in ((Compact(), edge.strict), (lenient(Compact), loose)):
        check(read_by(dialect, toolbox, edge.message), expected)
    for dialect, expected in ((Metis(), edge.strict), (lenient(Metis), loose)):
        check(read_by(dialect, toolbox, edge.message), expected if edge.metis == "as compact" else edge.metis)
    check(read_by(StrictMetis(), toolbox, edge.message), edge.published)


# -- what is outside stays outside ------------------------------------------------------------------------------------------


def results_of(text: str, picture: Callable[..., ImageBlob]) -> list[ToolResult]:
    """Of every kind, with the text wherever a source or a program can put some, and images beside it."""
    images = (picture(0), picture(1))
    page = Page(1, text, text, text)
    return [
        PythonResult((text, 0, text, 1), text, text, images, ok=True),
        ContentResult((text, 0, text, 1, text), images),
        TextSearchResult(text, (page,)),
        ImageSearchResult((SeenPage(text, text, images[0]), SeenPage(text, "", images[1]))),
        Refused(text),
    ]


def cleaned(result: ToolResult) -> ToolResult:
    """Of a search as its source gives it."""
    match result:
        case TextSearchResult():
            pages = tuple(Page(one.rank, *map(clean, (one.title, one.link, one.snippet))) for one in result.pages)
            return TextSearchResult(result.query, pages)
        case ImageSearchResult():
            return ImageSearchResult(tuple(SeenPage(clean(one.title), clean(one.link), one.image) for one in result.pages))
        case _:
            return result


PIECES = [
    "<image>",
    "<im",
    "age>",
    "<image",
    ">",
    "<",
    " ",
    "\n",
    "x",
    "</tool_call>",
    "<tool_call>",
    "<|im_end|>",
    "<|image_pad|>",
]
PIECES += ["</tool_response>", "<think>", "<|vision_start|>", "[cut]"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@given(text=TEXTS)
@settings(max_examples=60)
def test_text_of_tools_adds_no_image_and_no_tag_and_moves_none(policy, picture, text: str) -> None:
    vocab = policy.tokenizer.get_vocab()
    tags = [vocab[tag] for tag in ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>") if tag in vocab]
    for dialect in (Compact(), Metis()):
        one = Chat(policy.tokenizer, policy.images, dialect)
        for result, plain in zip(results_of(text, picture), results_of("", picture), strict=True):
            pieces = [one.encode_observation(dialect.word(cleaned(each)), one.im_end, 100_000) for each in (result, plain)]
            assert [image.sha256 for image in pieces[0].images] == [image.sha256 for image in pieces[1].images]
            assert pieces[0].tokens.count(policy.image_token_id) == pieces[1].tokens.count(policy.image_token_id)
            for token in (*tags, one.im_end, vocab["<|vision_start|>"], vocab["<|im_start|>"]):
                assert pieces[0].tokens.count(token) == pieces[1].tokens.count(token), (
                    type(result),
                    policy.tokenizer.decode([token]),
                )


@pytest.mark.parametrize("dialect", [Compact(), Metis(), StrictMetis()], ids=lambda dialect: type(dialect).__name__)
def test_a_call_that_a_prompt_or_an_observation_shows_is_never_run(dialect: Dialect, policy, make_prompt) -> None:
    chat = Chat(policy.tokenizer, policy.images, dialect)
    shown = "As in " + wrap('{"name": "image_search", "arguments": {}}')
    toolbox = FakeToolbox([Observation(shown)])
    engine = FakeEngine(policy.tokenizer, [[wrap(CALL), "<answer>7</answer><|im_end|>"]])
    prompt = make_prompt(shown, system=shown)
    rollout = asyncio.run(run_episode(prompt, 0, chat, engine, toolbox, RolloutConfig(), SampleKey(0, "t", 0)))
    assert toolbox.calls == [("python", {"code": CODE})]
    assert [turn.outcome for turn in rollout.turns] == [Outcome.TOOL_RESULT, Outcome.ANSWERED]
    closing = policy.tokenizer.convert_tokens_to_ids("</tool_call>")
    behind = rollout.tokens[rollout.prompt_len :]
    assert int((behind == closing).sum()) == 1  # the agent's own
    assert shown in chat.decode(behind.tolist())
