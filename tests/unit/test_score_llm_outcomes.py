"""What becomes of a batch when its judge is down, slow, talks garbage, contradicts itself or thinks aloud: the table in
docs/scoring.md, measured against real HTTP servers. No failure becomes a reward, and no verdict is another one than was said.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from judge_endpoint import a_matcher, a_prompt, error

from metis_fast.config import Config
from metis_fast.errors import JudgeError
from metis_fast.score.judge import StyleJudge
from metis_fast.score.llm import LlmMatcher
from metis_fast.score.scoring import judge_groups, score
from metis_fast.summary import Judged, NoVerdict
from metis_fast.testing.judge import JudgeServer, Reply, completion, serving, text_rollout
from metis_fast.types import Group, Outcome, Rollout, Score, Verdict

PAGE = Path(__file__).parents[2] / "docs" / "scoring.md"
PROMPTS, ROLLOUTS = 8, 8
GARBAGE = (
    Reply(200, "<!DOCTYPE html><title>Log in</title>"),
    Reply(200, b"\x00\xff\xfe CORRECT"),
    Reply(200, '{"choices": [{"message": {"content": "CORR'),
    Reply(200, ""),
    completion("The answer is CORRECT, I think."),
    completion("CORRECT or INCORRECT"),
    Reply(200, "", reset=True),
    completion("CORRECT", finish_reason="content_filter"),
)


def number(task: dict[str, Any]) -> int:
    """Of a rollout in its group; the answers are "0 of p3", "1 of p3", ..."""
    return int(task["candidate_answer"].split()[0])


def word(task: dict[str, Any]) -> str:
    """Of a judge that is right: even answers are."""
    return "INCORRECT" if number(task) % 2 else "CORRECT"


def _sound(task: dict[str, Any]) -> Reply:
    return completion(word(task))


class Faulty(JudgeServer):
    """reply: (task, number of tries of this answer so far, number of all requests so far) -> what it says."""

    def __init__(self, reply: Callable[[dict[str, Any], int, int], Reply]) -> None:
        super().__init__(self._says)
        self.reply = reply
        self.tries = Counter[str]()
        self.first: dict[str, bool] = {}
        self.end = threading.Event()  # until then, late replies are held back
        self._count = threading.Lock()

    def _says(self, task: dict[str, Any]) -> Reply:
        answer = task["candidate_answer"]
        with self._count:
            self.tries[answer] += 1
            reply = self.reply(task, self.tries[answer], self.tries.total())
            self.first.setdefault(answer, b'"CORRECT"' in reply.payload)
        if reply is LATE:
            self.end.wait(60)
        return reply


LATE = completion("CORRECT")


def _for_half(fault: Callable[[dict[str, Any], int], Reply]) -> Callable[[dict[str, Any], int, int], Reply]:
    """For a right and a wrong one of every four answers."""
    return lambda task, attempt, count: fault(task, attempt) if number(task) % 4 < 2 else _sound(task)


def _thinks(task: dict[str, Any]) -> Reply:
    other = "CORRECT" if word(task) == "INCORRECT" else "INCORRECT"
    return completion(f"<think>Is it {other}? {other}. No, wait.</think>\n\n**{word(task)}**")


def _thinks_too_long(task: dict[str, Any], attempt: int) -> Reply:
    return completion(f"<think>Is it {word(task)}?\n\n{word(task)}\n\nOr", finish_reason="length")


CASES: dict[str, Callable[[dict[str, Any], int, int], Reply] | None] = {
    "sound": lambda task, attempt, count: _sound(task),
    "down": None,
    "fails at every first try": lambda task, attempt, count: error(503, "busy") if attempt == 1 else _sound(task),
    "status 503 for half": _for_half(lambda task, attempt: error(503, "down")),
    "slower than its limit for half": _for_half(lambda task, attempt: LATE),
    "garbage for half": _for_half(lambda task, attempt: GARBAGE[(number(task) + 2 * attempt) % len(GARBAGE)]),
    "garbage for all": lambda task, attempt, count: GARBAGE[count % len(GARBAGE)],
    "contradicts itself": lambda task, attempt, count: completion("CORRECT" if count % 2 else "INCORRECT"),
    "thinks aloud": lambda task, attempt, count: _thinks(task),
    "thinks too long for half": _for_half(_thinks_too_long),
}


@dataclass(frozen=True)
class Figures:
    right: int
    wrong: int
    none: int
    requests: int
    ends: str


def batch(twice: bool = False) -> list[Group]:
    """twice: every answer stands twice in its group."""
    groups = []
    for i in range(PROMPTS):
        prompt = a_prompt("even", uid=f"p{i}", question=f"Question {i}?")
        texts = [f"<answer>{j // 2 if twice else j} of p{i}</answer>" for j in range(ROLLOUTS)]
        groups.append(Group(prompt, tuple(text_rollout(prompt.uid, [text], index=j) for j, text in enumerate(texts))))
    return groups


@dataclass(frozen=True)
class Played:
    judge_style: str
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Judged, ...]


def expected() -> dict[str, Figures]:
    """The table on the page, by the judge's fault."""
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return {
        row[0]: Figures(int(row[1]), int(row[2]), int(row[3]), int(row[4]), row[5])
        for row in rows
        if len(row) == 6 and row[0] in CASES
    }


def test_the_page_has_a_line_for_every_fault():
    assert expected().keys() == CASES.keys()


@contextmanager
def judging(fault: str) -> Iterator[tuple[LlmMatcher, Faulty | None]]:
    reply = CASES[fault]
    server = Faulty(reply) if reply else None
    with serving(server or JudgeServer()) as url:
        if server:
            yield a_matcher(url, retries=1, timeout_s=3.0 if fault.startswith("slow") else 20.0), server
            server.end.set()
    if server is None:  # its port answers no more
        yield a_matcher(url, retries=1), None


@pytest.mark.parametrize("fault", CASES)
def test_what_becomes_of_a_batch(fault: str):
    groups = batch(twice=fault == "contradicts itself")
    with judging(fault) as (matcher, server):
        judge = StyleJudge({"model": matcher})
        verdicts = asyncio.run(judge_groups(groups, judge))
        requests = matcher.cost.requests
        judge.close()
    flat = [one for found in verdicts for one in found]
    given = Counter(one.correct for one in flat if isinstance(one, Verdict))
    none = [one for one in flat if isinstance(one, NoVerdict)]
    played = [Played("model", group.rollouts, own) for group, own in zip(groups, verdicts, strict=True)]
    ends, scores = "goes on", list[Score]()
    try:
        scores = [one for own in score(played, Config()) for one in own]
    except JudgeError:
        ends = "stops"
    assert Figures(given[True], given[False], len(none), requests, ends) == expected()[fault]
    assert given.total() + len(none) == PROMPTS * ROLLOUTS and len(scores) in (0, len(flat))
    for one in flat:
        if isinstance(one, Verdict):
            even = int(one.answer.split()[0]) % 2 == 0
            assert one.correct == (server.first[one.answer] if server and fault == "contradicts itself" else even)
    for one, own in zip(flat, scores, strict=False):
        if isinstance(one, NoVerdict):
            assert own == Score(None, Outcome.JUDGE_ERROR, no_verdict=one.text)  # every number in it is 0
        else:
            assert own.verdict is one and own.r_acc == pytest.approx(0.9 * own.qualifies)


def test_equal_answers_of_a_group_have_one_verdict_whatever_the_judge_says_next():
    with judging("contradicts itself") as (matcher, server):
        judge = StyleJudge({"model": matcher})
        verdicts = asyncio.run(judge_groups(batch(twice=True), judge))
        judge.close()
    for found in verdicts:
        for one, other in zip(found[::2], found[1::2], strict=True):
            assert isinstance(one, Verdict) and one == other
    assert server is not None and set(server.tries.values()) == {1}
