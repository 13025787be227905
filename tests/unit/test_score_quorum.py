"""Several LLM judges that have to agree, each a real HTTP server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from judge_endpoint import a_prompt, error
from pydantic import ValidationError

from metis_fast.config import Config, LlmJudgeConfig, ScoreConfig, build
from metis_fast.errors import ConfigError, JudgeError
from metis_fast.score.judge import StyleJudge, open_judge
from metis_fast.score.protocol import JudgeUnavailable, Match
from metis_fast.score.scoring import score_groups
from metis_fast.testing.judge import JudgeServer, Reply, by_equality, completion, serving, text_rollout
from metis_fast.types import Group, Outcome

Says = Callable[[dict[str, Any]], Reply]


def right(task: dict[str, Any]) -> Reply:
    return completion("CORRECT")


def wrong(task: dict[str, Any]) -> Reply:
    return completion("INCORRECT")


def down(task: dict[str, Any]) -> Reply:
    return error(503, "down")


def garbage(task: dict[str, Any]) -> Reply:
    return completion("It depends on what you call a city.")


@contextmanager
def judging(*judges: Says, quorum: str = "majority", **changes: object) -> Iterator[tuple[StyleJudge, list[JudgeServer]]]:
    """The judge of style "model", whose models judge-0, judge-1, ... say this."""
    servers = [JudgeServer(one) for one in judges]
    with ExitStack() as stack:
        peers = [{"base_url": stack.enter_context(serving(one)), "model": f"judge-{i}"} for i, one in enumerate(servers)]
        config = LlmJudgeConfig.model_validate({"judges": peers, "quorum": quorum, "retries": 0, **changes})
        judge = open_judge(ScoreConfig(llm=config), {"model"})
        stack.callback(judge.close)
        yield judge, servers


def asked(judge: StyleJudge, answer: str = "Paris") -> Match:
    return asyncio.run(judge.compare(a_prompt("Paris"), answer))


@pytest.mark.parametrize(
    ("quorum", "judges", "correct"),
    [
        ("majority", (right, right, right), True),
        ("majority", (right, wrong, right), True),
        ("majority", (wrong, wrong, right), False),
        ("majority", (right, right, down), True),
        ("majority", (garbage, wrong, wrong), False),
        ("majority", (right, right, right, wrong), True),
        ("majority", (right,), True),
        ("unanimous", (right, right, right), True),
        ("unanimous", (wrong, wrong), False),
    ],
)
def test_enough_judges_that_agree_make_a_verdict(quorum: str, judges: tuple[Says, ...], correct: bool):
    with judging(*judges, quorum=quorum) as (judge, servers):
        match = asked(judge)
    assert match.correct is correct
    agree = [f"llm judge-{i}" for i, one in enumerate(judges) if one is (right if correct else wrong)]
    assert match.judge == " + ".join(agree)
    assert match.reason.startswith(f"{len(agree)} of {len(judges)} say {'CORRECT' if correct else 'INCORRECT'} ({quorum})")
    assert [len(server.tasks) for server in servers] == [1] * len(judges)


@pytest.mark.parametrize(
    ("quorum", "judges", "reason"),
    [
        ("majority", (right, wrong), "the judges disagree"),
        ("majority", (right, right, wrong, wrong), "the judges disagree"),
        ("majority", (right, wrong, down), "too few of the judges gave a verdict"),
        ("majority", (right, down, down), "too few of the judges gave a verdict"),
        ("majority", (right, right, down, down), "too few of the judges gave a verdict"),
        ("majority", (down, garbage, down), "too few of the judges gave a verdict"),
        ("unanimous", (right, right, wrong), "the judges disagree"),
        ("unanimous", (right, wrong, down), "the judges disagree"),  # whatever the third one would have said
        ("unanimous", (right, right, down), "too few of the judges gave a verdict"),
    ],
)
def test_without_enough_of_them_there_is_no_verdict_and_never_a_guess(quorum: str, judges: tuple[Says, ...], reason: str):
    with judging(*judges, quorum=quorum) as (judge, _), pytest.raises(JudgeUnavailable) as caught:
        asked(judge)
    assert caught.value.reason == reason and "\n" not in str(caught.value)
    for i, one in enumerate(judges):
        told = f"llm judge-{i}: " if one in (right, wrong) else f"judge {i + 1}: "
        assert told in caught.value.detail


def test_a_split_is_counted_as_a_judge_error_and_is_no_reward():
    rollouts = tuple(
        text_rollout("p", [f"<answer>{city}</answer>"], index=i) for i, city in enumerate(("Paris", "Rome", "Bonn"))
    )
    groups = [Group(a_prompt("Paris", uid=uid), rollouts) for uid in "pq"]

    def strict(task: dict[str, Any]) -> Reply:
        return completion("CORRECT") if task["candidate_answer"] == "Rome" else by_equality(task)

    with judging(by_equality, strict) as (judge, _):
        config = Config(score=ScoreConfig(max_missing_share=0.5))
        scored = asyncio.run(score_groups(groups, judge, config))
    for group in scored:
        assert [one.outcome for one in group.scores] == [Outcome.ANSWERED, Outcome.JUDGE_ERROR, Outcome.ANSWERED]
        assert [one.verdict and one.verdict.correct for one in group.scores] == [True, None, False]
        split = group.scores[1]
        assert (split.r_acc, split.r_tool, split.adv_acc, split.adv_tool, split.needs_gradient) == (0, 0, 0, 0, False)
        assert split.no_verdict.startswith("the judges disagree (llm judge-0: INCORRECT, llm judge-1: CORRECT")


def test_one_that_fails_while_the_others_agree_is_told_once(caplog: pytest.LogCaptureFixture):
    with judging(right, down, right) as (judge, servers):
        for city in ("Paris", "Rome", "Bonn"):
            assert asked(judge, city).correct
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("LLM judge 'judge-1' at http://127.0.0.1:") and " has no vote: HTTP status 503" in line
    assert len(servers[1].tasks) == 3


def test_what_they_cost_is_added_up_also_of_those_that_failed():
    def counted(task: dict[str, Any]) -> Reply:
        reply = by_equality(task)
        return Reply(
            200, reply.payload.replace(b'{"choices"', b'{"usage": {"prompt_tokens": 30, "completion_tokens": 2}, "choices"')
        )

    with judging(counted, counted, down) as (judge, _):
        asked(judge)
        asked(judge)  # those who voted remember it
        cost = judge.cost
    assert (cost.requests, cost.prompt_tokens, cost.completion_tokens) == (4, 60, 4) and cost.seconds > 0


@pytest.mark.parametrize("answer", ["", "Paris " * 10_000])
def test_what_is_wrong_without_a_request_needs_no_vote(answer: str):
    with judging(down, down) as (judge, servers):
        match = asked(judge, answer)
    assert (match.correct, match.judge) == (False, "") and [server.tasks for server in servers] == [[], []]


def test_what_a_judge_leaves_out_is_that_of_the_section(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAIN_KEY", "main")
    monkeypatch.setenv("OWN_KEY", "own")
    one, other = JudgeServer(), JudgeServer()
    with serving(one) as url, serving(other) as own_url:
        llm = {
            "base_url": url, "model": "large", "api_key_env": "MAIN_KEY", "extra_body": {"seed": 1},
            "judges": [{}, {"model": "small", "extra_body": {}}, {"base_url": own_url, "model": "x", "api_key_env": "OWN_KEY"}],
        }  # fmt: skip
        judge = open_judge(ScoreConfig.model_validate({"llm": llm}), {"model"})
        asked(judge)
        judge.close()
    assert sorted((body["model"], body.get("seed")) for body in one.bodies) == [("large", 1), ("small", None)]
    assert {headers["Authorization"] for headers in one.headers} == {"Bearer main"}
    assert [(body["model"], body["seed"]) for body in other.bodies] == [("x", 1)]
    assert other.headers[0]["Authorization"] == "Bearer own"


def test_a_verdict_that_one_of_them_has_in_a_cache_is_no_vote_of_another(tmp_path):
    with judging(right, wrong, right, cache=tmp_path / "verdicts") as (judge, servers):
        assert asked(judge).correct
        assert asked(judge).correct
    assert [len(server.tasks) for server in servers] == [1, 1, 1]


LOW = {"reasoning_effort": "low"}


@pytest.mark.parametrize(
    "second",
    [
        {"model": "m"},
        {"model": "m", "extra_body": LOW},
        {"model": "m", "extra_body": LOW, "base_url": "http://a/"},
        {"model": "m", "base_url": "http://b/v1"},
    ],
)
def test_the_same_judge_twice_is_refused_when_it_is_named(second: dict[str, Any]):
    with pytest.raises(ValidationError, match="has 'm' twice, which would be one vote counted twice"):
        LlmJudgeConfig.model_validate({"base_url": "http://a/v1", "judges": [{"model": "m"}, {"model": "n"}, second]})


def test_judges_of_other_models_are_several():
    judges = [{"model": "m"}, {"model": "n"}, {"model": "m", "extra_body": LOW, "base_url": "http://b/v1"}]
    assert len(LlmJudgeConfig.model_validate({"base_url": "http://a/v1", "judges": judges}).each()) == 3


def test_a_quorum_without_judges_is_refused():
    with pytest.raises(ConfigError, match=r"score\.llm\.quorum=unanimous is for several judges, .* names none"):
        build({"score": {"llm": {"quorum": "unanimous", "model": "m"}}})


def test_the_same_judge_twice_is_refused_when_it_is_found():
    servers = [JudgeServer(models=("same",)) for _ in range(2)]
    with serving(servers[0]) as one, serving(servers[1]) as other:
        llm = LlmJudgeConfig.model_validate({"judges": [{"base_url": one}, {"base_url": other}]})
        judge = open_judge(ScoreConfig(llm=llm), {"model"})
        with pytest.raises(JudgeError, match=r"judges 1 and 2 of score\.llm\.judges are both 'same', .* remove one"):
            asyncio.run(judge.check())
        judge.close()


def test_the_same_model_at_one_address_is_refused_when_it_is_found_whatever_else_is_asked_of_it():
    with serving(JudgeServer(models=("same",))) as url:
        peers = [{"base_url": url, "extra_body": LOW}, {"base_url": f"{url}/chat/completions", "model": "same"}]
        judge = open_judge(ScoreConfig(llm=LlmJudgeConfig.model_validate({"judges": peers})), {"model"})
        with pytest.raises(JudgeError, match=r"judges 1 and 2 of score\.llm\.judges are both 'same', .* remove one"):
            asyncio.run(judge.check())
        judge.close()


def test_the_check_names_the_judge_that_does_not_work():
    with judging(by_equality, right) as (judge, _), pytest.raises(JudgeError, match=r"'judge-1' at .* says that 7 is CORRECT"):
        asyncio.run(judge.check())


def test_a_judge_without_an_endpoint_is_refused_by_its_number():
    llm = LlmJudgeConfig.model_validate({"judges": [{"base_url": "http://127.0.0.1:1/v1", "model": "a"}, {"model": "b"}]})
    with pytest.raises(JudgeError, match=r"judge 2 of score\.llm\.judges: .*score\.llm\.base_url is empty"):
        open_judge(ScoreConfig(llm=llm), {"model"})


def test_a_wrong_key_of_a_judge_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown key 'score\.llm\.judges\.0\.url'"):
        build({"score": {"llm": {"judges": [{"url": "http://a/v1"}]}}})
