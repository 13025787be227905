"""What counts as a verdict of an LLM judge, and above all what does not."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metis_fast.score.llm_reply import read_reply, verdict_in
from metis_fast.score.protocol import JudgeUnavailable

WORDS = st.sampled_from(["CORRECT", "INCORRECT", "correct", "Incorrect"])
WRAPS = [
    "{}", '"{}"', "'{}'", "“{}”", "„{}“", "«{}»", "`{}`", "**{}**", "_{}_", "({})", "[{}]", "{}.", "**{}.**", '"{}."', "{}!",
    "\\boxed{{{}}}", "$\\boxed{{\\text{{{}}}}}$", "<answer>{}</answer>", "<|begin_of_box|>{}<|end_of_box|>", "\n {} \n",
    "```\n{}\n```", "{}<|im_end|>", "{}</s>", "{}。",
]  # fmt: skip
LABELS = [
    "{}", "Verdict: {}", "**Verdict:** {}", "**Verdict**: {}", "Final answer: {}", "Judgement: {}", "judgment：{}",
    "Answer = {}", "## Verdict\n\n{}", "The final verdict:\n{}",
]  # fmt: skip
OBJECTS = [
    '{{"verdict": "{}"}}', '```json\n{{"verdict": "{}"}}\n```', '{{"final_answer": "{}."}}', '{{"Final Verdict": "{}"}}',
    # thinking in front of the verdict, as servers that hold a model to a schema have it think
    '{{"reasoning": "INCORRECT, is it? \\"CORRECT\\"", "verdict": "{}"}}',
    '{{"analysis": "", "Reasoning": "", "verdict": "{}"}}',
]  # fmt: skip
THOUGHTS = [
    "{0}", "<think>{1}</think>{0}", "<think>\n\n</think>\n\n{0}", "{1}</think>\n{0}", "<thinking>{1}</thinking> {0}",
    "<seed:think>{1}</seed:think>{0}", "[THINK]{1}[/THINK]{0}", "◁think▷{1}◁/think▷{0}", "<|channel>thought\n{1}<channel|>{0}",
    "<|begin_of_thought|>{1}<|end_of_thought|>{0}", "<|START_THINKING|>{1}<|END_THINKING|>{0}",
    "<think>a <think>{1}</think> b</think>{0}",
    "<|channel|>analysis<|message|>{1}<|end|><|start|>assistant<|channel|>final<|message|>{0}<|return|>",
    "analysis{1}assistantfinal{0}",
]  # fmt: skip
THINKING = ["", "The answer is CORRECT.", "INCORRECT", "Is it INCORRECT?\n\nCORRECT\n", 'They wrote "</think> CORRECT" there.']


@given(WORDS, st.sampled_from(WRAPS), st.sampled_from(LABELS), st.sampled_from(THOUGHTS), st.sampled_from(THINKING))
def test_the_one_word_counts_however_it_is_dressed_and_whatever_was_thought(word, wrap, label, thought, thinking):
    reply = thought.format(label.format(wrap.format(word)) if "\n" not in wrap else wrap.format(word), thinking)
    assert verdict_in(reply) is (word.lower() == "correct")


@given(WORDS, st.sampled_from(OBJECTS), st.sampled_from(THOUGHTS))
def test_the_word_may_stand_in_an_object(word, form, thought):
    assert verdict_in(thought.format(form.format(word), "INCORRECT?")) is (word.lower() == "correct")


NONE = [
    "", "PARTIALLY CORRECT", "not CORRECT", "NOT\nCORRECT", "It is not\n\nCORRECT", "isn't **CORRECT**", "CORRECT?",
    "CORRECT or INCORRECT?", "CORRECT INCORRECT", "INCORRECT\nCORRECT", "CORRECT\nCORRECT", "The answer is CORRECT",
    "CORRECT, but not complete", "~~CORRECT~~", "!CORRECT", "¬CORRECT", "IN CORRECT", "IN-CORRECT", "**IN**CORRECT",
    "<answer>IN</answer>CORRECT", "CORRECTLY", "UNCORRECT", "semi-CORRECT", "Verdict: not CORRECT", "Verdict: CORRECT?",
    "Candidate answer: CORRECT", "[CORRECT/INCORRECT]", "CORRECT/INCORRECT", '{"CORRECT": false}', '{"verdict": true}',
    '{"verdict": "CORRECT", "answer": "no"}', '{"verdict": "not CORRECT"}', '{"verdict": ["CORRECT"]}',
    '{"is": "CORRECT"}', "<think>CORRECT", "<think>\nCORRECT\n", "CORRECT</think>", "<think>a</think>",
    "INCORRECT<think>a</think>CORRECT", "The correct city is Paris.\nCORRECT", "CORRECT\nThey name the same city.",
    "CORRECT <think>no, wrong</think> .", "CORRECT<think>hm</think><think>no</think>**", "**<think>no</think>CORRECT**",
    "CORRECT<think>wait, no</think>", "CORRECT\n<think></think><|im_end|>", "```incorrect\nCORRECT\n```",
    "yes", "true", "A", "正确", "<s>CORRECT</s>", "CORRECT: no", "-CORRECT", "> CORRECT", "[ ] CORRECT", "___ CORRECT",
    "CORRECT'", '"CORRECT', "(CORRECT", "ıNCORRECT", "INCORREC\u0422", "<|INCORRECT|>CORRECT", "<|not|>CORRECT",
    "```\nCORRECT\n```\nThat is what they wrote.", "Verdict:\nIN\nCORRECT", "Not the verdict: CORRECT", "verdict != CORRECT",
    '{"verdict": "CORRECT", "is_wrong": true}', '{"verdict": "CORRECT", "why": "not the same city"}',
    '{"verdict": "CORRECT", "reasoning": "Both name the city."}', '{"sure": "no", "verdict": "CORRECT"}',
    '{"reasoning": false, "verdict": "CORRECT"}', '{"reasoning": "", "verdict": "not CORRECT"}', '{"reasoning": "CORRECT"}',
    '[["verdict", "CORRECT"]]', '{"reasoning": {"verdict": "INCORRECT"}, "verdict": "CORRECT"}', '{"reasoning": "a"} CORRECT',
    '{"verdict": "no", "verdict": "CORRECT"}', '{"verdict": {"verdict": "CORRECT"}}', '{"candidate_answer": "CORRECT"}',
]  # fmt: skip
PROSE = [
    "The candidate says:", "I refuse to answer:", "Anything but:", "Do not say!", "The answer is wrong.", "They wrote",
    "Definitely NOT:", "I cannot agree with this verdict:", "In.", "IN:", "Score: 0.", "Das ist falsch.", "答案是错的。",
    "The candidate wrote\nVerdict:", "This is wrong.\n\nThey injected:\n>", "Is it? No!", "It is not right.\n## Verdict",
    "**Not**", "Both name the same city.",
]  # fmt: skip


@pytest.mark.parametrize("word", ["CORRECT", "**CORRECT**", "Verdict: CORRECT", '{"verdict": "CORRECT"}', "INCORRECT"])
@pytest.mark.parametrize("before", PROSE)
def test_prose_beside_the_word_is_no_verdict_whatever_it_means(before, word):
    for reply in (f"{before}\n{word}", f"{before}\n\n{word}\n", f"{before} {word}", f"{word}\n{before}"):
        assert verdict_in(reply) is None
        assert verdict_in(f"<think>hm</think>{reply}") is None


TAGS = ["think", "thinking", "thought", "reasoning", "reason", "reflection", "analysis", "scratchpad", "seed:think"]
MARKS = [(f"<{tag}>", f"</{tag}>") for tag in TAGS] + [
    ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
]  # fmt: skip


@pytest.mark.parametrize("opens", [mark for mark, _ in MARKS])
@pytest.mark.parametrize("closes", [mark for _, mark in MARKS])
def test_only_its_own_mark_ends_a_thought(opens, closes):
    expected = True if (opens, closes) in MARKS else None
    assert verdict_in(f"{opens}They wrote: {closes}\n\nCORRECT\n") is expected
    own = dict(MARKS)[opens]
    assert verdict_in(f"{opens}They wrote: {closes}CORRECT, but no. {own}INCORRECT") is False


@pytest.mark.parametrize("mark", ["</reason>", "</analysis>", "</scratchpad>", "[/THINK]", "<channel|>"])
def test_a_mark_that_closes_what_no_prompt_opens_is_no_thought(mark):
    assert verdict_in(f"The candidate wrote {mark}\nCORRECT") is None


@pytest.mark.parametrize("reply", NONE)
def test_what_is_in_doubt_is_no_verdict(reply):
    assert verdict_in(reply) is None


@given(st.text(max_size=12), st.text(max_size=12))
@example("in", "")
@example("~", "~")
@example("¬ ", "")
@example("</", ">")
def test_other_characters_around_the_word_never_make_it_right(before, after):
    if re.search(r"[\w!?~¬/\\|<>=≠✗❌-]", before) or re.search(r"[\w?~/\\|<>=]", after):
        assert verdict_in(f"{before}CORRECT{after}") in (None, False)


@pytest.mark.parametrize(
    "reply",
    [
        " " * 200_000 + "correct",
        "*" * 200_000 + "correct x",
        "```" + "\n" * 200_000 + "correct x",
        "<think>" * 30_000 + "correct",
        "verdict" + "*" * 200_000 + "correct",
        "<|" * 60_000 + "correct",
        "analysis" * 30_000,
        "Verdict:" + "* " * 90_000 + "x correct",
        '{"reasoning": "' + "a" * 200_000 + '", "verdict": "' + "*" * 200_000 + 'correct x"}',
        '{"reasoning": ' * 60_000,
    ],
    ids=range(10),
)
def test_a_reply_that_runs_wild_is_read_in_linear_time(reply):
    start = time.process_time()
    verdict_in(reply)
    assert time.process_time() - start < 2


def body(content: Any, finish_reason: Any = "stop", **message: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content, **message}, "finish_reason": finish_reason}]}).encode()


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thinking_beside_the_reply_does_not_count(field):
    assert read_reply(body("CORRECT", **{field: "INCORRECT, I think"})).correct is True
    with pytest.raises(JudgeUnavailable, match="the reply has thinking and nothing after it; turn thinking off"):
        read_reply(body(None, **{field: "CORRECT"}))


@pytest.mark.parametrize(
    "thought",
    [
        {"type": "thinking", "thinking": [{"type": "text", "text": "INCORRECT?"}]},
        {"type": "reasoning", "text": "INCORRECT"},
        {"type": "reasoning", "summary": []},
    ],
)
@pytest.mark.parametrize(
    "said", [{"type": "text", "text": "CORRECT"}, {"type": "output_text", "text": "CORRECT"}, {"text": "CORRECT"}, "CORRECT"]
)
def test_of_content_in_parts_only_the_text_counts(thought, said):
    assert read_reply(body([thought, said])).correct is True
    with pytest.raises(JudgeUnavailable):
        read_reply(body([thought]))


def test_a_word_before_a_thought_in_parts_is_no_verdict():
    with pytest.raises(JudgeUnavailable):
        read_reply(body(["CORRECT", {"type": "thinking", "thinking": "no, wrong"}, "."]))


@pytest.mark.parametrize("end", [None, "", "stop", "STOP", "eos_token", "end_turn"])
def test_a_whole_reply_may_end_in_every_servers_word(end):
    assert read_reply(body("INCORRECT", end)).correct is False


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (body("<think>Let me see whether it is CORRECT", "length"), r"cut off .*; raise score\.llm\.max_tokens, or turn"),
        (body('<think>They wrote "</think>CORRECT', "length"), "cut off"),
        (body(None, "length", reasoning_content="Let me see"), "cut off"),
        (body("CORRECT", "content_filter"), "refused or its reply was filtered"),
        (body("CORRECT", refusal="I cannot help with that."), r"refused .* \(I cannot help"),
        (body([{"type": "refusal", "refusal": "No."}]), r"refused .* \(No\.\)"),
        (body(None, "tool_calls", tool_calls=[]), "finish_reason 'tool_calls'"),
        (body("CORRECT", "error"), "finish_reason 'error'"),
        (body({"verdict": "CORRECT"}), "something else came instead of a chat completion"),
        (b'{"choices": []}', "without choices"),
        (b'{"choices": [{"message": {"content": "CORR', r"something else came .* \(\{\"choices\""),
        (b"", "nothing came"),
        (b"<!DOCTYPE html><title>Log in</title>CORRECT", r"a web page \(log in\) came"),
        (b'data: {"choices": []}\n\n', "something else came"),
        (b'{"error": {"message": "overloaded"}}', r"an error came instead of a chat completion \(.*overloaded.*\)\Z"),
        (b'{"choices": null, "error": "no credit"}', r"an error came instead of a chat completion \(.*no credit"),
        (body("CORRECT", function_call={"name": "python"}), "finish_reason 'tool_calls'"),
        (b'"CORRECT"', "something else"),
        (b'{"choices": [{"message": {"content": "INCORRECT", "content": "CORRECT"}}]}', "something else"),
        (b'{"choices": [{"message": {"role": "user", "content": "CORRECT"}}]}', "something else"),
        (b'{"choices": [{"message": {"content": "CORRECT"}}], "error": {"code": 502}}', "an error came beside the reply"),
        (b'{"choices": [{"message": {"content": "CORRECT"}, "error": "lost"}]}', "an error came beside the reply"),
        (b'{"choices": [' + b'{"message": {"content": "CORRECT"}},' * 2 + b"{}]}", "something else"),
        (json.dumps({"choices": [{"message": {"content": "CORRECT"}}] * 2}).encode(), "several choices came; see what"),
        (body("CORRECT", tool_calls=[{"id": "1"}]), "finish_reason 'tool_calls'"),
        (body([{"type": "text", "text": "CORRECT"}, {"type": "audio", "text": "not"}]), "and nothing else"),
        (body([{"type": "text", "text": {"value": "IN"}}, {"type": "text", "text": "CORRECT"}]), "and nothing else"),
        (body("CORRECT", refusal=["no"]), "something else"),
        (body("not \x1b[31m\x00\u202e CORRECT\ud800"), r"got 'not \[31m CORRECT'"),
        (b'{"choices": ' + b"[" * 200_000, "something else"),
        (b'{"error": ' + b"[" * 900 + b"]" * 900 + b', "choices": [{"message": {"content": "CORRECT"}}]}', "error|something"),
        (b"\xff\xfe\x00", "something else"),
    ],
)  # fmt: skip
def test_what_is_no_whole_reply_is_no_verdict_and_says_why_in_one_line(reply, reason):
    with pytest.raises(JudgeUnavailable, match=reason) as caught:
        read_reply(reply)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
