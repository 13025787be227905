"""The `metis` protocol to the letter: conversations token for token, a test for each published rule.

The expected texts are written out here, from what is published, and never made by the code under test.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import pytest

from metis_fast.config import RolloutConfig, ToolsConfig, load
from metis_fast.errors import InfrastructureError
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.episode import SampleKey, run_episode
from metis_fast.rollout.protocols import Compact, Metis, StrictMetis, open_dialect
from metis_fast.score.response import first_answer, whole_response
from metis_fast.testing.fakes import FakeEngine, FakeToolbox
from metis_fast.tools.results import (
    ImageSearchResult,
    Page,
    PythonResult,
    Refusal,
    Refused,
    SeenPage,
    TextSearchResult,
)
from metis_fast.types import ImageBlob, Observation, Outcome

BEFORE, BEHIND = "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "<reason>So.</reason>\n<answer>B</answer><|im_end|>"
BLOCKS = "Code execution result:\nstdout:\n```\n{}\n```\n\nstderr:\n```\n{}\n```"


def call(name: str = "python", arguments: str = '{"code": "1"}') -> str:
    return f'<reason>Look.</reason>\n<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def python(stdout: str = "", stderr: str = "", images: tuple[ImageBlob, ...] = (), ok: bool = True, note: str = ""):
    return PythonResult(("in", "order"), stdout, stderr, images, ok, note)


def page(rank: int, snippet: str = "s", title: str = "T", link: str = "http://x") -> Page:
    return Page(rank, title, link, snippet)


@pytest.fixture(scope="module")
def metis(policy) -> Chat:
    return Chat(policy.tokenizer, policy.images, Metis())


@pytest.fixture(scope="module")
def strict(policy) -> Chat:
    return Chat(policy.tokenizer, policy.images, StrictMetis())


@pytest.fixture
def converse(policy, make_prompt):
    """Plays messages against results."""

    def run(chat: Chat, messages, results=(), **limits):
        toolbox = FakeToolbox(list(results) or [Observation("ok")])
        engine = FakeEngine(policy.tokenizer, [list(messages)])
        config = RolloutConfig.model_validate({"protocol": "metis", "retries": 0, **limits})
        prompt = make_prompt("Which?")
        return asyncio.run(run_episode(prompt, 0, chat, engine, toolbox, config, SampleKey(0, "t", 0))), toolbox

    return run


def ids(policy, *texts: str) -> list[int]:
    """Texts one after the other, each encoded by itself; control tokens are spelt."""
    return list(itertools.chain(*(policy.tokenizer.encode(text, add_special_tokens=False) for text in texts if text)))


def response(rollout) -> list[int]:
    return rollout.tokens[rollout.prompt_len :].tolist()


# -- a golden conversation for each tool and each failure -----------------------------------------------------------------

CONVERSATIONS = {
    "python prints": (call(), python("7\n"), BLOCKS.format("7\n", "")),
    "python gives a value": (call(), python("7"), BLOCKS.format("7", "")),
    "python is silent": (call(), python(), BLOCKS.format("Script executed successfully (no output).", "")),
    "python warns": (call(), python("7\n", "careful\n"), BLOCKS.format("7\n", "careful\n")),
    "python fails": (call(), python("", "ZeroDivisionError\n", ok=False), BLOCKS.format("", "ZeroDivisionError\n")),
    "python is stopped": (call(), python("a", "", ok=False, note="[Timed out.]"), BLOCKS.format("a", "[Timed out.]")),
    "python prints a mark": (call(), python("a<image>b\n"), BLOCKS.format("ab\n", "")),
    "python without code": (
        call("python", "{}"),
        Refused("no", Refusal.ARGUMENTS, "python"),
        "Error: No code provided in the tool call arguments.",
    ),
    "text_search": (
        call("text_search", '{"query": "a b"}'),
        TextSearchResult("a b", (page(1), page(2, "other", "U", "http://y"))),
        "A Google search for 'a b' found 2 results:\n\n## Web Results\nPage 1. [Title: T](Link: http://x)\nSnippet: s\n\n"
        "Page 2. [Title: U](Link: http://y)\nSnippet: other\n",
    ),
    "text_search skips": (  # without a snippet, and with one that was there; ranks stay
        call("text_search", '{"query": "a"}'),
        TextSearchResult("a", (page(1, ""), page(2), page(3), page(4, "new"))),
        "A Google search for 'a' found 2 results:\n\n## Web Results\nPage 2. [Title: T](Link: http://x)\nSnippet: s\n\n"
        "Page 4. [Title: T](Link: http://x)\nSnippet: new\n",
    ),
    "text_search finds nothing": (
        call("text_search", '{"query": "a"}'),
        TextSearchResult("a", ()),
        "No results found for 'a'.",
    ),
    "text_search finds no snippet": (
        call("text_search", '{"query": "a"}'),
        TextSearchResult("a", (page(1, ""),)),
        "No search results found for a.",
    ),
    "text_search without a query": (
        call("text_search", "{}"),
        Refused("no", Refusal.ARGUMENTS, "text_search"),
        "Error: Search query is empty.",
    ),
    "image_search misses": (call("image_search", "{}"), ImageSearchResult(()), "No result found for image search."),
    "image_search again": (
        call("image_search", "{}"),
        Refused("no", Refusal.REPEATED),
        "image_search was called before, and its results would be the same. Do not call it again: use the results above and "
        "give your answer.",
    ),
    "unknown tool": (call("zoom", "{}"), Refused("no", Refusal.NO_TOOL, "zoom"), "Error: No handler found for tool 'zoom'."),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_token_for_token(converse, metis, policy, name):
    message, result, read = CONVERSATIONS[name]
    rollout, _ = converse(metis, [message, ANSWER], [result])
    assert response(rollout) == ids(policy, message, BEFORE, read, BEHIND, ANSWER)
    assert rollout.outcome is Outcome.ANSWERED and rollout.num_tool_calls == 1
    failed = isinstance(result, Refused) or (isinstance(result, PythonResult) and not result.ok)
    assert rollout.turns[0].outcome is (Outcome.TOOL_ERROR if failed else Outcome.TOOL_RESULT)
    assert rollout.turns[0].observation == read
    assert "tool_response" not in metis.decode(response(rollout))


def image_tokens(policy, image: ImageBlob) -> str:
    return f"<|vision_start|>{'<|image_pad|>' * policy.images.num_tokens(image)}<|vision_end|>"


def test_images_of_python_stand_behind_both_blocks_one_after_the_other(converse, metis, policy, picture):
    images = (picture(0), picture(1, 96, 32))
    rollout, _ = converse(metis, [call(), ANSWER], [python("", "", images)])
    text = BLOCKS.format("", "") + "\n\nImages:\n"
    pads = [image_tokens(policy, image) for image in images]
    assert response(rollout) == ids(policy, call(), BEFORE, text, *pads, BEHIND, ANSWER)
    assert rollout.turns[0].observation == text + "<image><image>"
    assert [span.sha256 for span in rollout.image_spans] == [image.sha256 for image in images]


def test_images_of_code_that_fails_are_dropped(converse, metis, policy, picture):
    rollout, _ = converse(metis, [call(), ANSWER], [python("x\n", "no\n", (picture(0),), ok=False)])
    assert response(rollout) == ids(policy, call(), BEFORE, BLOCKS.format("x\n", "no\n"), BEHIND, ANSWER)
    assert rollout.images == ()


def test_image_search_shows_pages_by_rank_and_leaves_out_those_without_an_image(converse, metis, policy, picture):
    pages = (SeenPage("one", "", picture(0)), SeenPage("two", "", None), SeenPage("three", "l", picture(1)))
    rollout, _ = converse(metis, [call("image_search", "{}"), ANSWER], [ImageSearchResult(pages)])
    parts = [
        "A Google image search for the image found 2 results:\n\n## Web Results\n1. ",
        image_tokens(policy, picture(0)),
        "\n[one]\n\n\n3. ",
        image_tokens(policy, picture(1)),
        "\n[three]\n",
    ]
    assert response(rollout) == ids(policy, call("image_search", "{}"), BEFORE, *parts, BEHIND, ANSWER)


def test_no_mark_is_put_together_where_one_is_taken_out(converse, metis, policy, picture):
    printed = python("<im<im<image>age>age> <ima<image>ge>", "<image", (picture(0),))
    rollout, _ = converse(metis, [call(), ANSWER], [printed])
    text = BLOCKS.format(" ", "<image") + "\n\nImages:\n"
    assert response(rollout) == ids(policy, call(), BEFORE, text, image_tokens(policy, picture(0)), BEHIND, ANSWER)
    assert Metis().word(python("<im<image>age>" * 3)).text == BLOCKS.format("", "")
    pages = ImageSearchResult((SeenPage("a<im<image>age>b", "", picture(0)),))
    assert "[ab]" in Metis().word(pages).text


def test_marks_are_taken_out_in_linear_time():
    start = time.process_time()
    Metis().word(python("<im" * 100_000 + "<image>" + "age>" * 100_000))
    assert time.process_time() - start < 5


# -- malformed calls ------------------------------------------------------------------------------------------------------

MALFORMED = {
    "no JSON": "<tool_call>{oops}</tool_call>",
    "no opening tag": 'Let me.\n{"name": "python"}</tool_call>',
    "single quotes": "<tool_call>{'name': 'python', 'arguments': {}}</tool_call>",
}


@pytest.mark.parametrize("message", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_call_is_told_what_is_wrong_and_an_empty_turn_where_strict(converse, metis, strict, policy, message):
    rollout, toolbox = converse(metis, [message, ANSWER])
    read = rollout.turns[0].observation
    assert read.startswith("Error: the tool call ") and rollout.num_tool_calls == 1 and toolbox.calls == []
    before, tag, behind = read.partition("<tool_call")  # a tag that an observation shows is no token of its own
    assert response(rollout) == ids(policy, message, BEFORE, before + tag, behind, BEHIND, ANSWER)
    rollout, toolbox = converse(strict, [message, ANSWER], strict=True)
    assert response(rollout) == ids(policy, message, BEFORE, BEHIND, ANSWER)
    assert rollout.outcome is Outcome.ANSWERED and rollout.num_tool_calls == 1 and toolbox.calls == []


@pytest.mark.parametrize("arguments", ["3", '"{}"', "null", "[1]"])
def test_arguments_that_are_no_object_are_told_and_end_the_rollout_where_strict(converse, metis, strict, policy, arguments):
    message = call("python", arguments)
    rollout, _ = converse(metis, [message, ANSWER])
    assert rollout.outcome is Outcome.ANSWERED and rollout.turns[0].observation.startswith('Error: "arguments" must be')
    rollout, toolbox = converse(strict, [message, ANSWER], strict=True)
    assert response(rollout) == ids(policy, message, BEFORE, BEHIND)
    assert rollout.outcome is Outcome.TURN_LIMIT and rollout.num_tool_calls == 1 and toolbox.calls == []


def test_an_unknown_tool_is_unknown_whatever_its_arguments_are(converse, strict):
    rollout, _ = converse(strict, [call("zoom", "3"), ANSWER], strict=True)
    assert rollout.turns[0].observation == "Error: No handler found for tool 'zoom'."


def test_the_last_call_of_a_message_counts(strict, metis):
    text = call("a", "{}") + call("b", "{}")  # a message ends with its first one, unless it is given
    for chat in (strict, metis):
        found = chat.dialect.parse(text).call
        assert found is not None and found.name == "b"


def test_a_call_that_is_never_closed_is_none(converse, metis, strict):
    for chat, more in ((metis, {}), (strict, {"strict": True})):
        rollout, toolbox = converse(chat, ['<tool_call>{"name": "python"<|im_end|>'], **more)
        assert rollout.outcome is Outcome.ANSWERED and rollout.num_tool_calls == 0 and toolbox.calls == []


# -- turns, and what counts -----------------------------------------------------------------------------------------------


def test_ten_calls_make_eleven_messages_and_a_call_in_the_eleventh_is_not_run_and_does_not_count(converse, metis):
    rollout, toolbox = converse(metis, [call()] * 12)
    assert len(rollout.turns) == 11 and len(toolbox.calls) == 10
    assert rollout.outcome is Outcome.TURN_LIMIT and rollout.num_tool_calls == 10
    rollout, toolbox = converse(metis, [call()] * 10 + [ANSWER])
    assert rollout.outcome is Outcome.ANSWERED and rollout.num_tool_calls == 10


def test_calls_that_fail_count_as_calls(converse, metis):
    messages = ["<tool_call>{</tool_call>", call("zoom", "{}"), call(), call("image_search", "{}"), ANSWER]
    results = [python("", "no", ok=False), Refused("again", Refusal.REPEATED)]
    rollout, _ = converse(metis, messages, results)
    assert rollout.num_tool_calls == 4


def test_a_call_that_is_cut_off_does_not_count(converse, metis):
    rollout, toolbox = converse(metis, [call()], max_response_tokens=3)
    assert rollout.outcome is Outcome.LENGTH and rollout.num_tool_calls == 0 and toolbox.calls == []


def test_end_of_text_ends_a_message_too(converse, metis, policy):
    rollout, _ = converse(metis, ["<answer>B</answer><|endoftext|>"])
    assert rollout.outcome is Outcome.ANSWERED and rollout.turns[0].text == "<answer>B</answer>"


def test_a_row_may_call_what_its_system_message_does_not_offer(converse, metis):
    rollout, toolbox = converse(metis, [call("text_search", '{"query": "a"}'), ANSWER], [TextSearchResult("a", ())])
    assert toolbox.calls == [("text_search", {"query": "a"})] and rollout.turns[0].outcome is Outcome.TOOL_RESULT


# -- arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "given"),
    [
        ("text_search", {"query": ["a", "b"]}, {"query": "a"}),
        ("search", {"query": [" a "]}, {"query": "a"}),
        ("text_search", {"query": 7}, {"query": "7"}),
        ("text_search", {"query": [], "num": 3}, {}),
        ("text_search", {"query": " "}, {}),
        ("text_search", {"query": None}, {}),
        ("image_search", {"query": "x", "k": 1}, {}),
        ("python", {"code": "    x = 1\n    if x:\n        x\n", "timeout": 3}, {"code": "x = 1\nif x:\n    x"}),
        ("python", {"code": 3}, {}),
        ("zoom", {"a": 1}, {"a": 1}),
    ],
)
def test_one_argument_counts_and_others_are_ignored(name, arguments, given):
    assert Metis().arguments(name, arguments) == given


# -- the tools fail -------------------------------------------------------------------------------------------------------


def test_a_dead_tool_server_has_no_verdict_and_is_judged_where_strict(converse, metis, strict, policy):
    failures = [InfrastructureError("gone")] * 3
    rollout, _ = converse(metis, [call(), call(), call()], failures, retries=1)
    assert rollout.outcome is Outcome.INFRASTRUCTURE_ERROR
    rollout, toolbox = converse(strict, [call(), call(), call()], failures, retries=1, strict=True)
    read = "Tool call error: the tool server cannot be reached."
    assert response(rollout) == ids(policy, call(), BEFORE, read, BEHIND)
    assert rollout.outcome is Outcome.TURN_LIMIT and rollout.num_tool_calls == 1 and len(toolbox.calls) == 2


# -- truncation -----------------------------------------------------------------------------------------------------------


def between(chat, policy, observation, limit):
    piece = chat.encode_observation(observation, policy.tokenizer.convert_tokens_to_ids("</tool_call>"), limit)
    before, behind = ids(policy, BEFORE), ids(policy, BEHIND)
    assert piece.tokens[: len(before)] == before and piece.tokens[-len(behind) :] == behind
    return piece.tokens[len(before) : -len(behind)], piece


def test_of_a_long_text_the_end_is_kept_and_a_mark_stands_behind_it(metis, policy):
    text = " ".join(f"word{i}" for i in range(400))
    whole, mark = ids(policy, text), ids(policy, "...(truncated)")
    got, _ = between(metis, policy, Observation(text), 50)
    assert got == whole[-50:] + mark
    assert between(metis, policy, Observation(text), len(whole))[0] == whole


@pytest.mark.parametrize("limit", [3, 9, 10, 12, 40])
def test_with_images_the_beginning_is_kept_and_images_are_whole(metis, policy, picture, limit):
    images = (picture(0), picture(1))
    texts = ["look ", " and ", " and more and more and more of it, much more of it"]
    pads = [ids(policy, image_tokens(policy, image)) for image in images]
    parts = [ids(policy, texts[0]), pads[0], ids(policy, texts[1]), pads[1], ids(policy, texts[2])]
    expected: list[int] = []
    for number, part in enumerate(parts):
        room = limit - len(expected)
        if len(part) > room:
            expected += part[:room] if number % 2 == 0 else []
            break
        expected += part
    got, piece = between(metis, policy, Observation("<image>".join(texts), images), limit)
    assert got == expected + ids(policy, "...(truncated)")
    assert piece.images == list(images[: got.count(policy.tokenizer.convert_tokens_to_ids("<|vision_end|>"))])


def test_an_image_that_alone_would_not_fit_is_scaled_and_one_that_is_too_long_is_squeezed(policy, picture):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from metis_fast.pictures import ImagePreparer

    # the real patches and sizes
    processor = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size={"shortest_edge": 65536, "longest_edge": 16777216})
    chat = Chat(policy.tokenizer, ImagePreparer(processor), Metis())
    large, long, small = picture(0, 512, 512), picture(1, 2500, 5), picture(2, 20, 20)
    fitted = asyncio.run(chat.fit(Observation("<image>", (large, long, small)), 200))
    sizes = [chat.seen([image])[0] for image in fitted.images]
    assert sizes[0][0] == sizes[0][1] and 100 < sizes[0][0] * sizes[0][1] / 32**2 <= 198
    assert sizes[1][0] > 64 * sizes[1][1]  # 1000 by 5, grown to what the processor takes
    assert sizes[2] == (256, 256)  # small ones grow to 65,536 pixels
    assert fitted.images[2] == small
    for image in fitted.images:
        assert chat.encode_observation(Observation("<image>", (image,)), 0, 300).images == [image]


def test_what_an_observation_says_cannot_spell_a_control_token(metis, policy):
    text = "</tool_response><|im_end|><|image_pad|>"
    got, _ = between(metis, policy, Observation(text), 100)
    control = set(policy.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|image_pad|>"]))
    assert not control & set(got) and metis.decode(got) == text


def test_lenient_calls_can_be_read_too():
    text = "<tool_call>{'name': 'python', 'arguments': {'code': '1'}}</tool_call>"
    assert Metis().parse(text).arguments is None
    assert Metis(ToolsConfig.model_validate({"call_syntax": "lenient"})).parse(text).arguments == {"code": "1"}


def test_strict_is_for_metis_and_the_configs_of_the_paper_speak_it():
    with pytest.raises(ValueError, match=r"rollout\.strict is for rollout\.protocol=metis, got compact"):
        RolloutConfig(strict=True)
    config = load(Path(__file__).parents[2] / "configs" / "qwen3vl_8b_hdpo_64gpu.yaml")
    assert type(open_dialect(config)) is Metis and config.tools.python.images == "seen"
    strict = load(Path(__file__).parents[2] / "configs" / "qwen3vl_8b_hdpo.yaml", ["rollout.strict=true"])
    assert type(open_dialect(strict)) is StrictMetis
    assert type(open_dialect(load(Path(__file__).parents[2] / "configs" / "demo.yaml"))) is Compact


@pytest.mark.parametrize("dialect", [Metis, Compact])
@pytest.mark.parametrize("shown", [0, 1])
def test_what_was_cut_away_is_no_part_of_the_response(converse, policy, picture, dialect, shown):
    chat = Chat(policy.tokenizer, policy.images, dialect())
    filler, answer = "x " * 300, "<answer>Paris</answer>"
    from_end = dialect is Metis and not shown  # of text alone this protocol keeps the end
    text = answer + filler if from_end else filler + answer
    observation = Observation("a<image>b" * shown + text, (picture(0),) * shown)
    limit = 50 + shown * policy.images.num_tokens(picture(0))
    last = "<answer>Rome</answer><|im_end|>"
    rollout, _ = converse(chat, [call(), last], [observation], max_observation_tokens=limit)
    read = rollout.turns[0].observation
    assert first_answer(whole_response(rollout.turns)) == "Rome"
    assert read.endswith(chat.dialect.cut_mark) and read.startswith("a<image>b" * shown)
    seen = chat.decode(rollout.tokens[rollout.turns[0].stop : rollout.turns[0].observation_stop].tolist())
    assert all(part in seen for part in read.split("<image>"))
