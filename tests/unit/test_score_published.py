"""Judging as the published recipe does it: its answer, its format, and one judge for every row; against a real HTTP server.

Where our default differs, or always does (a failure is no verdict), that is shown, too.
"""

from __future__ import annotations

import asyncio
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_endpoint import error

from metis_fast.config import Config, LlmJudgeConfig, ScoreConfig
from metis_fast.errors import ConfigError, JudgeError
from metis_fast.score.judge import open_judge
from metis_fast.score.protocol import JudgeUnavailable
from metis_fast.score.response import first_answer, last_answer, reference_format_ok, whole_response
from metis_fast.score.scoring import score_groups
from metis_fast.testing.judge import JudgeServer, completion, serving, text_rollout
from metis_fast.types import Group, Outcome, Prompt, Rollout, Verdict

PARITY = {"judge": "llm", "answer": "first", "format": "reference"}
CALL = '<reason>look</reason>\n<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'


def a_prompt(*truths: str, style: str = "rule", question: str = "What share is shaded?") -> Prompt:
    return Prompt("rl.parquet:0", "vthinker-sft", (), (), "math", truths, style, question)


def verdict(config: ScoreConfig, prompt: Prompt, rollout: Rollout) -> Verdict:
    judge = open_judge(config, {prompt.judge_style})
    try:
        return asyncio.run(judge.judge(prompt, rollout))
    finally:
        judge.close()


def config(url: str, **changes: object) -> ScoreConfig:
    llm = LlmJudgeConfig(base_url=url, model="grader", retries=0)
    return ScoreConfig.model_validate({**PARITY, "llm": llm, **changes})


def answered(text: str) -> Rollout:
    return text_rollout("rl.parquet:0", [f"<reason>r</reason><answer>{text}</answer>"])


# -- the text that is judged --


def test_it_is_the_whole_response_with_observations_and_the_role_words_of_the_chat():
    rollout = text_rollout("p", [CALL, "<answer>B</answer>"], observation="Code execution result:\nstdout:\n```\n1\n```")
    assert whole_response(rollout.turns) == (
        f"{CALL}\nuser\nCode execution result:\nstdout:\n```\n1\n```\nassistant\n<answer>B</answer>"
    )


def test_an_observation_that_had_no_room_is_not_part_of_it():
    rollout = text_rollout("p", [CALL], observation="", outcome=Outcome.TURN_LIMIT)
    assert whole_response(rollout.turns) == CALL


def test_an_answer_in_an_observation_counts_in_parity_only():
    rollout = text_rollout("p", [CALL, "<reason>r</reason><answer>1/2</answer>"], observation="<answer>3/8</answer>")
    by_rule = {"judge": "rule"}
    says = verdict(ScoreConfig.model_validate({**PARITY, **by_rule}), a_prompt("3/8"), rollout)
    assert says == Verdict(True, True, "3/8", "rule", "equals the ground truth '3/8'")
    says = verdict(ScoreConfig.model_validate(by_rule), a_prompt("3/8"), rollout)
    assert says == Verdict(False, True, "1/2", "rule", "equals no ground truth")


# -- the answer --


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("<answer>A</answer> no: <answer>B</answer>", "A", "B"),
        ("<answer> A\n</answer>", "A", "A"),
        ("<answer>A <answer>B</answer>", "A <answer>B", "B"),
        ("<answer>A</answer> <answer>B", "A", "A"),
        ("</answer><answer>A</answer>", "A", "A"),
        ("<answer>A", "", ""),
        ("<answer></answer><answer>B</answer>", "", "B"),
        ("none", "", ""),
    ],
)
def test_the_first_answer_counts_in_parity_and_the_last_one_in_ours(text, first, last):
    assert (first_answer(text), last_answer(text)) == (first, last)


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "a", "\n", " "]), max_size=12).map("".join))
def test_the_first_answer_is_what_the_pattern_finds(text):
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert first_answer(text) == (found[1].strip() if found else "")


def test_a_first_answer_may_go_on_into_the_next_message():
    rollout = text_rollout("p", ["<answer>A" + CALL, "B</answer>"], observation="seen")
    assert first_answer(whole_response(rollout.turns)) == f"A{CALL}\nuser\nseen\nassistant\nB"
    assert first_answer("<answer>") == first_answer("</answer><answer>") == ""


@pytest.mark.parametrize(
    ("truths", "question", "text"),
    [
        (("3/8",), "Which?", "no answer"),
        (("3/8",), "Which?", "<answer> </answer>"),
        (("3/8",), "", "<answer>3/8</answer>"),
        (("3/8",), "\n", "<answer>3/8</answer>"),
        (("",), "Which?", "<answer>3/8</answer>"),
        ((), "Which?", "<answer>3/8</answer>"),
        (("", " "), "Which?", "<answer>3/8</answer>"),
    ],
)
def test_without_answer_question_or_truth_it_is_wrong_and_no_judge_is_asked(truths, question, text):
    server = JudgeServer(lambda task: completion("CORRECT"))
    with serving(server) as url:
        assert not verdict(config(url), a_prompt(*truths, question=question), text_rollout("p", [text])).correct
    assert server.paths == []


def test_ours_asks_about_a_question_that_may_stand_in_the_picture():
    server = JudgeServer()
    with serving(server) as url:
        assert verdict(config(url, answer="last"), a_prompt("3/8", question=""), answered("3/8")).correct
    assert server.tasks[0]["question"] == ""


# -- the judge --


@pytest.mark.parametrize("style", ["rule", "math", "choice", "llm", "exact_match", "whatever the data calls it"])
def test_every_row_is_judged_by_the_model_whatever_its_style(style):
    server = JudgeServer(lambda task: completion("CORRECT"))
    with serving(server) as url:
        assert verdict(config(url), a_prompt("3/8", style=style), answered("0.375")).correct
    assert [task["candidate_answer"] for task in server.tasks] == ["0.375"]


@pytest.mark.parametrize(
    ("name", "truth", "answer", "correct"),
    [
        ("rule", "x(x + 1)", "x^2 + x", False),
        ("math", "x(x + 1)", "x^2 + x", True),
        ("rule", "B", "(b) three", False),
        ("choice", "B", "(b) three", True),
    ],
)
def test_any_judge_can_take_every_row_and_none_needs_an_endpoint_but_the_model(name, truth, answer, correct):
    settings = ScoreConfig.model_validate({"judge": name})
    prompt = a_prompt(truth, style="llm", question="Which?\nA. two\nB. three")
    assert verdict(settings, prompt, answered(answer)).correct is correct


def test_by_row_is_the_default_and_refuses_a_style_that_nobody_knows():
    assert ScoreConfig().judge == "by_row"
    with pytest.raises(ConfigError, match="judge style 'whatever'"):
        open_judge(ScoreConfig(), {"whatever"})


def test_the_override_without_an_endpoint_is_told_at_start():
    with pytest.raises(JudgeError, match=r"\(score\.judge, or .*score\.llm\.base_url is empty; set score\.llm\.base_url"):
        open_judge(ScoreConfig(judge="llm"), {"rule"})


def test_the_request_is_a_system_and_a_user_message_at_temperature_0():
    server = JudgeServer()
    with serving(server) as url:
        verdict(config(url), a_prompt("3/8"), answered("3/8"))
    (body,) = server.bodies
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["temperature"] == 0.0 and body["model"] == "grader"


@pytest.mark.parametrize(
    ("reply", "correct"),
    [("CORRECT", True), (" correct\n", True), ("Correct", True), ("INCORRECT", False), ("\tincorrect ", False)],
)
def test_the_word_counts_after_strip_and_in_any_case(reply, correct):
    with serving(JudgeServer(lambda task: completion(reply))) as url:
        assert verdict(config(url), a_prompt("3/8"), answered("3/8")).correct is correct


def test_of_several_truths_each_is_one_request_and_one_match_is_enough():
    server = JudgeServer()
    with serving(server) as url:
        assert verdict(config(url), a_prompt("Paris", "Lutetia", "", "Paris"), answered("Lutetia")).correct
        assert sorted(task["accepted_answer"] for task in server.tasks) == ["Lutetia", "Paris"]
        assert not verdict(config(url), a_prompt("Paris", "Lutetia"), answered("Rome")).correct
    assert len(server.tasks) == 4


def test_a_failure_is_no_verdict_also_in_parity():
    """The reference takes it for INCORRECT."""
    for reply in (completion("It depends."), error(500, "down")):
        with serving(JudgeServer(lambda task, reply=reply: reply)) as url, pytest.raises(JudgeUnavailable):
            verdict(config(url), a_prompt("3/8"), answered("3/8"))


def test_of_several_truths_one_that_failed_matters_unless_another_is_right():
    def default(task):
        return error(500, "down") if task["accepted_answer"] == "Paris" else completion("CORRECT" if right else "INCORRECT")

    right = True
    with serving(JudgeServer(default)) as url:
        assert verdict(config(url), a_prompt("Paris", "Lutetia"), answered("Lutetia")).correct
        right = False
        with pytest.raises(JudgeUnavailable, match="HTTP status 500"):
            verdict(config(url), a_prompt("Paris", "Lutetia"), answered("Lutetia"))


def test_missing_verdicts_are_told_under_the_judge_that_took_every_row():
    prompts = [a_prompt("3/8", style=style) for style in ("rule", "math")]
    groups = [Group(prompt, (answered("3/8"), answered("1/2"))) for prompt in prompts]
    with serving(JudgeServer(lambda task: error(500, "down"))) as url:
        settings = config(url)
        judge = open_judge(settings, {"rule", "math"})
        with pytest.raises(JudgeError, match="judge of style 'llm' gave no verdict for any of 4 rollouts"):
            asyncio.run(score_groups(groups, judge, Config(score=settings)))
        judge.close()


def test_the_variables_of_the_reference_are_not_read(monkeypatch):
    server = JudgeServer()
    with serving(server) as url:
        monkeypatch.setenv("JUDGE_BASE_URL", url)
        monkeypatch.setenv("JUDGE_API_KEY", "secret")
        with pytest.raises(JudgeError, match="base_url is empty"):
            open_judge(ScoreConfig(judge="llm"), {"rule"})
        verdict(config(url), a_prompt("3/8"), answered("3/8"))
        assert "Authorization" not in server.headers[-1]
        named = LlmJudgeConfig(base_url=url, model="grader", api_key_env="JUDGE_API_KEY")
        verdict(ScoreConfig(judge="llm", llm=named), a_prompt("3/8"), answered("3/8"))
        assert server.headers[-1]["Authorization"] == "Bearer secret"


# -- the format --


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<reason>r</reason><answer>B</answer>", True),
        ("<answer>B</answer>", True),  # <reason> is not required
        ("</reason><reason><answer>B</answer>", True),  # nor is any order
        ("<reason>r</reason></answer>B<answer>", True),
        ("<reason>r</reason><answer>A</answer><answer>B</answer>", True),
        ("<answer><reason>r</reason><answer>B</answer>", True),  # what stands before the last </reason> is not counted
        (f"{CALL}<reason>r</reason><answer>B</answer>", True),
        ("</tool_call><tool_call><answer>B</answer>", True),
        ("<reason>r<answer>B</answer>", False),
        ("r</reason><answer>B</answer>", False),
        ("<tool_call><answer>B</answer>", False),
        ("<answer>B</answer></tool_call>", False),
        ("<reason>r</reason><answer>B", False),
        ("<reason>r</reason>B</answer>", False),
        ("<answer>B</answer><reason>r</reason>", False),
        ("<reason>r</reason>B", False),
        ("", False),
    ],
)
def test_the_format_of_the_reference_counts_tags(text, right):
    assert reference_format_ok(text) is right


TAGS = [f"<{slash}{name}>" for name in ("reason", "tool_call", "answer") for slash in ("", "/")]


@given(st.lists(st.sampled_from([*TAGS, "x", " <answer"]), max_size=14))
def test_the_format_of_the_reference_is_a_matter_of_counts_behind_the_last_reason(parts):
    behind = parts[len(parts) - parts[::-1].index("</reason>") :] if "</reason>" in parts else parts
    right = (
        parts.count("<reason>") == parts.count("</reason>")
        and parts.count("<tool_call>") == parts.count("</tool_call>")
        and behind.count("<answer>") == behind.count("</answer>") >= 1
    )
    assert reference_format_ok("".join(parts)) is right


def test_tags_in_observations_count_in_parity_only():
    rollout = text_rollout("p", [CALL, "<reason>r</reason><answer>B</answer>"], observation="printed: <reason>")
    by_rule = {"judge": "rule"}
    assert not verdict(ScoreConfig.model_validate({**by_rule, "format": "reference"}), a_prompt("B"), rollout).format_ok
    assert verdict(ScoreConfig.model_validate(by_rule), a_prompt("B"), rollout).format_ok


def test_format_and_answer_are_chosen_apart():
    rollout = text_rollout("p", ["<answer>A</answer><answer>B</answer>"])
    found = {
        (answer, form): verdict(ScoreConfig.model_validate({"answer": answer, "format": form}), a_prompt("B"), rollout)
        for answer in ("last", "first")
        for form in ("ours", "reference")
    }
    assert {key: (one.answer, one.format_ok) for key, one in found.items()} == {
        ("last", "ours"): ("B", False),
        ("last", "reference"): ("B", True),
        ("first", "ours"): ("A", False),
        ("first", "reference"): ("A", True),
    }
