"""The LLM judge against a real HTTP server: requests, tries, cache and check."""

import asyncio
import gc
import hashlib
import json
import socket
import sqlite3
import threading
import time

import pytest
from judge_endpoint import a_matcher, a_prompt, error

from metis_fast.config import LlmJudgeConfig, ScoreConfig
from metis_fast.errors import JudgeError
from metis_fast.score.judge import JudgeUnavailable, open_judge
from metis_fast.score.llm import LlmMatcher
from metis_fast.score.llm_reply import Said
from metis_fast.score.verdict_cache import VerdictCache
from metis_fast.testing.judge import JudgeServer, Reply, completion, is_right, serving, text_rollout
from metis_fast.types import Prompt


def ask(matcher: LlmMatcher, *answers: str, prompt: Prompt | None = None) -> list[bool]:
    async def run() -> list[bool]:
        return await asyncio.gather(*(is_right(matcher, prompt or a_prompt("Paris"), answer) for answer in answers))

    try:
        return asyncio.run(run())
    finally:
        matcher.close()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


def test_the_models_word_is_the_verdict_and_it_sees_question_ground_truth_and_answer():
    endpoint = JudgeServer()
    with serving(endpoint) as url:
        assert ask(a_matcher(url), "Paris", "Rome") == [True, False]
    assert {"question": "Which city?", "accepted_answer": "Paris", "candidate_answer": "Rome"} in endpoint.tasks
    assert {body["model"] for body in endpoint.bodies} == {"grader"}


def test_server_errors_and_nonsense_are_retried():
    endpoint = JudgeServer()
    endpoint.replies = [error(500, ""), error(429, ""), Reply(200, "<html>gateway</html>")]
    with serving(endpoint) as url:
        assert ask(a_matcher(url, retries=3), "Paris") == [True]
    assert len(endpoint.tasks) == 4


@pytest.mark.parametrize(
    "reply",
    [
        completion("The answer is CORRECT"),
        completion("INCORRECT or CORRECT"),
        completion("NOT CORRECT"),
        completion(""),
        Reply(200, json.dumps({"choices": []})),
        Reply(200, json.dumps({"choices": [{"message": {"content": None}}]})),
        Reply(200, json.dumps(["CORRECT"])),
        Reply(200, "CORRECT"),
        Reply(503, "down"),
    ],
)
def test_what_is_no_clear_word_after_all_tries_is_no_verdict(reply):
    endpoint = JudgeServer(lambda task: reply)
    with serving(endpoint) as url, pytest.raises(JudgeUnavailable, match="no verdict after 3 tries"):
        ask(a_matcher(url, retries=2), "Paris")
    assert len(endpoint.tasks) == 3


def test_a_refused_request_is_not_repeated():
    endpoint = JudgeServer(lambda task: error(401, "no such key"))
    with serving(endpoint) as url, pytest.raises(JudgeUnavailable, match="401"):
        ask(a_matcher(url), "Paris")
    assert len(endpoint.tasks) == 1


def test_a_server_that_stalls_is_given_up_after_the_time_out():
    endpoint = JudgeServer(hold=lambda: time.sleep(3))
    with serving(endpoint) as url, pytest.raises(JudgeUnavailable, match=r"no answer within 1 s"):
        ask(a_matcher(url, timeout_s=1.0, retries=1), "Paris")
    assert len(endpoint.tasks) == 2


def test_a_dead_server_is_no_verdict():
    with pytest.raises(JudgeUnavailable, match="no connection"):
        ask(a_matcher(f"http://127.0.0.1:{closed_port()}/v1", retries=1), "Paris")


def test_as_many_requests_are_in_flight_as_allowed_and_no_more():
    three = threading.Barrier(3, timeout=100)

    def hold_until_three_are_here():
        three.wait()
        time.sleep(0.05)  # time for a fourth to show up

    endpoint = JudgeServer(hold=hold_until_three_are_here)
    with serving(endpoint) as url:
        ask(a_matcher(url, concurrency=3), *(f"city {i}" for i in range(12)))
    assert endpoint.most_at_once == 3


def test_an_empty_or_endless_answer_is_wrong_without_a_request():
    endpoint = JudgeServer(lambda task: completion("CORRECT"))
    with serving(endpoint) as url:
        assert ask(a_matcher(url), "", "Paris " * 10_000) == [False, False]
    assert endpoint.tasks == []


def test_equal_answers_asked_at_once_cost_one_request():
    endpoint = JudgeServer()
    with serving(endpoint) as url:
        assert ask(a_matcher(url), *["Paris"] * 8) == [True] * 8
    assert len(endpoint.tasks) == 1


@pytest.mark.parametrize("model", ["grader", ""])
def test_one_that_gives_up_does_not_take_the_request_from_the_others(model):
    came, go_on = threading.Event(), threading.Event()

    def hold():
        came.set()
        go_on.wait(30)

    async def run(matcher: LlmMatcher) -> bool:
        late, kept = (asyncio.create_task(is_right(matcher, a_prompt("Paris"), "Paris")) for _ in range(2))
        if model:
            await asyncio.to_thread(came.wait, 30)
        else:
            await asyncio.sleep(0)  # both wait for the name of the model
        late.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await late
        return await kept

    endpoint = JudgeServer(hold=hold, models=("grader",))
    with serving(endpoint) as url:
        matcher = a_matcher(url, model=model)
        assert asyncio.run(run(matcher))
        matcher.close()
    assert len(endpoint.tasks) == 1


def test_a_request_that_nobody_waits_for_fails_in_silence():
    told = []

    async def run(matcher: LlmMatcher) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        asked = asyncio.create_task(is_right(matcher, a_prompt("Paris"), "Paris"))
        while not endpoint.tasks:
            await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.sleep(0.5)
        gc.collect()

    endpoint = JudgeServer(lambda task: error(401, "no such key"), hold=lambda: time.sleep(0.2))
    with serving(endpoint) as url:
        matcher = a_matcher(url)
        asyncio.run(run(matcher))
        matcher.close()
    assert told == []


def test_a_cache_file_outlives_the_judge_and_tells_questions_ground_truths_models_and_requests_apart(tmp_path):
    endpoint, cache = JudgeServer(), tmp_path / "deep" / "verdicts.sqlite"
    with serving(endpoint) as url:
        assert ask(a_matcher(url, cache=cache), "Paris", "Rome") == [True, False]
        assert ask(a_matcher(url, cache=cache), "Rome", "Paris") == [False, True]
        assert len(endpoint.tasks) == 2
        assert ask(a_matcher(url, cache=cache), "Rome", prompt=a_prompt("Rome")) == [True]
        ask(a_matcher(url, cache=cache), "Paris", prompt=a_prompt("Paris", question="Which prince?"))
        ask(a_matcher(url, cache=cache, model="other"), "Paris")
        ask(a_matcher(url, cache=cache, extra_body={"chat_template_kwargs": {"enable_thinking": False}}), "Paris")
        assert len(endpoint.tasks) == 6
        ask(a_matcher(url, cache=cache, max_tokens=9, timeout_s=9.0), "Paris")
    assert len(endpoint.tasks) == 6


def test_a_cache_that_holds_no_verdict_is_asked_past_and_a_broken_one_is_named(tmp_path):
    endpoint, cache = JudgeServer(), tmp_path / "verdicts"
    with serving(endpoint) as url:
        assert ask(a_matcher(url, cache=cache), "Rome") == [False]
        with sqlite3.connect(cache) as database:
            database.execute("UPDATE verdicts SET correct = 7")
        assert ask(a_matcher(url, cache=cache), "Rome") == [False]
        database.execute("DROP TABLE verdicts")
        database.execute("CREATE TABLE verdicts (other TEXT)")
        database.close()
        with pytest.raises(JudgeError, match=r"score\.llm\.cache=.*verdicts cannot be used: no such column"):
            ask(a_matcher(url, cache=cache), "Rome")
    assert len(endpoint.tasks) == 2


def test_a_verdict_that_was_cached_under_another_way_to_read_replies_is_asked_for_anew(tmp_path):
    endpoint, cache = JudgeServer(), tmp_path / "verdicts"
    with serving(endpoint) as url:
        ask(a_matcher(url), "Rome")
        asked = json.dumps(["grader", {}, endpoint.bodies[0]["messages"]], sort_keys=True)
        store = VerdictCache(cache)
        store.put(hashlib.sha256(asked.encode()).hexdigest(), Said(True, ""))
        store.close()
        assert ask(a_matcher(url, cache=cache), "Rome") == [False]
    assert len(endpoint.tasks) == 2


def test_failures_are_not_cached():
    endpoint = JudgeServer()
    endpoint.replies = [error(500, "")]

    async def run(matcher: LlmMatcher) -> bool:
        with pytest.raises(JudgeUnavailable):
            await is_right(matcher, a_prompt("Paris"), "Paris")
        return await is_right(matcher, a_prompt("Paris"), "Paris")

    with serving(endpoint) as url:
        matcher = a_matcher(url, retries=0)
        assert asyncio.run(run(matcher))
        matcher.close()


def test_a_damaged_cache_file_is_named(tmp_path):
    (tmp_path / "verdicts").write_text("no database " * 100)
    with pytest.raises(JudgeError, match=r"score\.llm\.cache=.*verdicts cannot be used"):
        a_matcher("http://127.0.0.1:1/v1", cache=tmp_path / "verdicts")


def test_one_judge_serves_several_event_loops():
    endpoint = JudgeServer()
    with serving(endpoint) as url:
        matcher = a_matcher(url, concurrency=1)
        for city in ("Paris", "Lutetia"):
            assert asyncio.run(is_right(matcher, a_prompt("Paris", "Lutetia"), city))
        matcher.close()


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("GRADER_KEY", "secret\n")  # as a file that an editor wrote
    endpoint = JudgeServer()
    with serving(endpoint) as url:
        ask(a_matcher(url, api_key_env="GRADER_KEY"), "Paris")
    assert [headers["Authorization"] for headers in endpoint.headers] == ["Bearer secret"]


@pytest.mark.parametrize(("word", "answer"), [("CORRECT", "7"), ("INCORRECT", "2")])
def test_the_check_refuses_a_judge_that_always_says_the_same(word: str, answer: str):
    with serving(JudgeServer(lambda task: completion(word))) as url:
        matcher = a_matcher(url)
        with pytest.raises(JudgeError, match=f"says that {answer} is {word} for 1"):
            asyncio.run(matcher.check())
        matcher.close()


def test_the_check_passes_on_a_judge_that_knows_right_from_wrong():
    endpoint = JudgeServer()
    with serving(endpoint) as url:
        matcher = a_matcher(url)
        asyncio.run(matcher.check())
        matcher.close()
    assert len(endpoint.tasks) == 2


def test_the_check_of_a_dead_server_fails():
    matcher = a_matcher(f"http://127.0.0.1:{closed_port()}/v1")
    with pytest.raises(JudgeError, match="no connection"):
        asyncio.run(matcher.check())
    matcher.close()


def test_the_judge_of_style_model_asks_the_endpoint():
    with serving(JudgeServer()) as url:
        judge = open_judge(ScoreConfig(llm=LlmJudgeConfig(base_url=url, model="grader")), {"model"})
        rollout = text_rollout("p", ["<reason>r</reason><answer>Paris</answer>"])
        verdict = asyncio.run(judge.judge(a_prompt("Paris"), rollout))
        judge.close()
    assert verdict.correct and verdict.format_ok
