"""Every verdict says who gave it and why, and keeps that on the way through caches, workers and the store."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest
from judge_endpoint import a_matcher, a_prompt

from metis_fast.config import ScoreConfig
from metis_fast.score.judge import StyleJudge, open_judge
from metis_fast.score.llm_reply import tokens_in
from metis_fast.score.protocol import Match
from metis_fast.testing.judge import JudgeServer, Reply, completion, serving, text_rollout
from metis_fast.types import Prompt, Verdict


def judged(style: str, answer: str, *truths: str, question: str = "Which?\nA. cat\nB. dog") -> Verdict:
    judge = open_judge(ScoreConfig(), {style})
    prompt = Prompt("p", "test", (), (), "math", truths, style, question)
    try:
        return asyncio.run(judge.judge(prompt, text_rollout("p", [f"<answer>{answer}</answer>"])))
    finally:
        judge.close()


@pytest.mark.parametrize(
    ("style", "answer", "truths", "judge", "reason"),
    [
        ("rule", "four", ("5", "4"), "rule", "equals the ground truth '4'"),
        ("rule", "4", ("5", "6"), "rule", "equals no ground truth"),
        ("rule", "", ("5",), "", "no answer"),
        ("mcq", "(B)", ("B",), "choice", "equals the ground truth 'B'"),
        ("mcq", "(B)", ("A",), "choice", "equals no ground truth"),
        ("math", r"\frac{2}{4}", ("7", "1/2"), "math", "equals the ground truth '1/2'"),
        ("math", r"\sqrt{2}", ("7",), "math", "equals no ground truth"),
        ("rule", "x" * 200, ("x" * 200,), "rule", f"equals the ground truth {'x' * 80!r}..."),
        ("rule", "a\nb", ("a\nb",), "rule", r"equals the ground truth 'a\nb'"),
    ],
)
def test_rules_say_what_the_answer_equals(style: str, answer: str, truths: tuple[str, ...], judge: str, reason: str):
    verdict = judged(style, answer, *truths)
    assert (verdict.judge, verdict.reason) == (judge, reason)
    assert verdict.correct == reason.startswith("equals the")


def said(reply: Reply, *truths: str, answer: str = "Paris", **changes: object) -> Match:
    with serving(JudgeServer(lambda task: reply)) as url:
        matcher = a_matcher(url, **changes)
        match = asyncio.run(matcher.compare(a_prompt(*truths), answer))
        matcher.close()
    return match


@pytest.mark.parametrize(
    ("reply", "thought"),
    [
        (completion("CORRECT"), ""),
        (completion("**Verdict:** CORRECT"), ""),
        (completion("<think>It is\nthe same.</think>CORRECT"), ", having thought: <think>It is the same.</think>"),
        (completion("CORRECT", reasoning_content="It is\x1b[0m the same."), ", having thought: It is [0m the same."),
        (completion("CORRECT", reasoning="It is the same."), ", having thought: It is the same."),
        (completion("CORRECT", reasoning={"text": "what"}), ""),
    ],
)
def test_a_model_s_verdict_has_its_word_and_the_end_of_its_thought(reply: Reply, thought: str):
    match = said(reply, "Paris")
    assert match == Match(True, "llm grader", f"says CORRECT for the ground truth 'Paris'{thought}")


def test_of_a_long_thought_the_end_is_kept():
    match = said(completion("INCORRECT", reasoning="because " * 1000 + "Rome is no Paris."), "Paris")
    assert match.reason.endswith("because Rome is no Paris.") and len(match.reason) < 300


def test_of_several_ground_truths_the_reason_names_the_one_that_counts():
    with serving(JudgeServer()) as url:
        matcher = a_matcher(url)
        right = asyncio.run(matcher.compare(a_prompt("Rome", "Paris", "Bonn"), "Paris"))
        wrong = asyncio.run(matcher.compare(a_prompt("Rome", "Bonn", "Oslo"), "Paris"))
        matcher.close()
    assert right.reason == "says CORRECT for the ground truth 'Paris'"
    assert wrong.reason == "says INCORRECT for the ground truth 'Rome' and for 2 more"


@pytest.mark.parametrize(
    ("answer", "truths", "reason"),
    [("", ("a",), "no answer"), ("x" * 5000, ("a",), "an answer of 5000 characters, more"), ("x", ("",), "there is no ground")],
)
def test_what_is_wrong_without_a_request_says_so_and_nobody_is_to_blame(answer: str, truths: tuple[str, ...], reason: str):
    match = said(Reply(500, "never asked"), *truths, answer=answer)
    assert not match.correct and match.judge == "" and match.reason.startswith(reason)


def test_a_verdict_from_the_cache_has_the_reason_that_it_was_given(tmp_path: Path):
    reply = completion("CORRECT", reasoning="It is the same.")
    first = said(reply, "Paris", cache=tmp_path / "verdicts")
    assert said(Reply(500, "never asked"), "Paris", cache=tmp_path / "verdicts", retries=0) == first
    assert "It is the same." in first.reason


def test_a_cache_of_an_earlier_version_has_verdicts_without_thoughts(tmp_path: Path):
    path = tmp_path / "verdicts"
    said(completion("INCORRECT", reasoning="No."), "Paris", cache=path)
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE thoughts")
    database.close()
    match = said(Reply(500, "never asked"), "Paris", cache=path, retries=0)
    assert match == Match(False, "llm grader", "says INCORRECT for the ground truth 'Paris'")


def test_what_a_server_says_of_tokens_is_counted_and_nonsense_is_not():
    def body(usage: object) -> bytes:
        return json.dumps({"usage": usage}).encode()

    assert tokens_in(body({"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9})) == (7, 2)
    assert tokens_in(body({"prompt_tokens": 7})) == (7, 0)
    for nonsense in (body("many"), body({"prompt_tokens": "x"}), body({"prompt_tokens": -5}), body(None), b"[]", b"\xff", b""):
        assert tokens_in(nonsense) == (0, 0)


def test_tries_that_failed_cost_a_request_each_and_cached_verdicts_none():
    server = JudgeServer()
    server.replies = [Reply(500, ""), completion("CORRECT or not")]
    with serving(server) as url:
        judge = StyleJudge({"model": a_matcher(url, retries=2)})
        for _ in range(3):
            assert asyncio.run(judge.compare(a_prompt("Paris"), "Paris")).correct
        cost = judge.cost
        judge.close()
    assert (cost.requests, len(server.tasks)) == (3, 3) and cost.seconds > 0
