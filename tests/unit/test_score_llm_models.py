"""Which model judges where none is named: the one that the endpoint serves; against real HTTP servers."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from pathlib import Path

import pytest
from judge_endpoint import a_matcher, a_prompt, error

from metis_fast.errors import JudgeError
from metis_fast.score.llm import LlmMatcher
from metis_fast.score.protocol import JudgeUnavailable
from metis_fast.testing.judge import JudgeServer, Reply, is_right, serving


def check_line(judge: JudgeServer, **changes: object) -> str:
    with serving(judge) as url:
        matcher = a_matcher(url, model="", retries=0, **changes)
        with pytest.raises(JudgeError) as caught:
            asyncio.run(matcher.check())
        matcher.close()
    line = str(caught.value)
    assert line.startswith(f"LLM judge at {url}: ") and "\n" not in line and judge.bodies == []
    return line


async def ask(matcher: LlmMatcher, *cities: str) -> list[bool]:
    return await asyncio.gather(*(is_right(matcher, a_prompt("Paris"), city) for city in cities))


def test_the_one_that_is_served_is_taken_with_one_request():
    judge = JudgeServer(models=("Qwen3-235B-A22B-Instruct-2507",))

    async def run(matcher: LlmMatcher) -> list[bool]:
        await matcher.check()
        return await ask(matcher, "Paris", "Rome")

    with serving(judge) as url:
        matcher = a_matcher(url, model="")
        assert asyncio.run(run(matcher)) == [True, False]
        assert asyncio.run(ask(matcher, "Bonn")) == [False]  # on another event loop
        matcher.close()
    assert judge.paths_of_gets == ["/v1/models"]
    assert {body["model"] for body in judge.bodies} == {"Qwen3-235B-A22B-Instruct-2507"}


def test_a_named_model_is_taken_without_asking():
    judge = JudgeServer(models=("other",))
    with serving(judge) as url:
        matcher = a_matcher(url)
        asyncio.run(matcher.check())
        matcher.close()
    assert judge.paths_of_gets == [] and {body["model"] for body in judge.bodies} == {"grader"}


def test_a_worker_that_was_started_again_finds_it_without_a_check_and_asks_once_for_all_rollouts():
    judge = JudgeServer(models=("grader",))
    with serving(judge) as url:
        matcher = a_matcher(url, model="")
        assert asyncio.run(ask(matcher, "Paris", *(f"city {i}" for i in range(6)))) == [True, *[False] * 6]
        matcher.close()
    assert len(judge.paths_of_gets) == 1


@pytest.mark.parametrize("at", ["/v1/chat/completions", "/chat/completions", "/api/v1/chat/completions"])
def test_the_list_is_beside_the_completions_with_and_without_v1(at: str):
    judge = JudgeServer(at=at, models=("grader",))
    with serving(judge) as url:
        root = url.removesuffix("/v1") + at.removesuffix("/chat/completions").removesuffix("/v1")
        for form in (root, f"{root}/v1", f"{root}/v1/models"):
            matcher = a_matcher(form, model="")
            assert asyncio.run(ask(matcher, "Paris")) == [True]
            matcher.close()


def test_of_several_none_is_guessed_and_they_are_listed():
    line = check_line(JudgeServer(models=("grader", "policy")))
    assert line.endswith("2 models are served (grader, policy); set score.llm.model to one of them")
    assert "m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, ...)" in check_line(JudgeServer(models=[f"m{i}" for i in range(99)]))


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ((), r"score\.llm\.model is empty and no models are served; serve one, or set score\.llm\.model"),
        (Reply(404, "404 page not found"), r"no list of models \(HTTP status 404\).*; set score\.llm\.model, or mend score"),
        (Reply(405, ""), r"no list of models \(HTTP status 405\).*; set score\.llm\.model"),
        (error(401, "no key"), r"HTTP status 401 \(no key\); set the key in \$METIS_JUDGE_API_KEY, which is not set"),
        (
            Reply(200, "<!DOCTYPE html><title>Sign in</title>"),
            r"a web page \(sign in\) came instead .*set score\.llm\.model",
        ),
        (Reply(200, json.dumps(["grader"])), r"something else came instead of a list of models .*set score\.llm\.model"),
        (Reply(200, json.dumps({"data": [{"name": "grader"}]})), "something else came instead of a list of models"),
        (Reply(200, ""), "nothing came instead of a list of models"),
        (Reply(500, "down"), r"HTTP status 500 \(down\); see the log of the server"),
        (Reply(200, '{"data": [', reset=True), "the connection was lost"),
        (Reply(302, "", {"Location": "/login"}), "redirected to .*|no list of models"),
        (Reply(200, " " * (9 << 20)), "more than 8 MiB"),
    ],
)
def test_what_is_no_list_of_models_is_told_at_start(models: Reply | tuple[str, ...], says: str):
    line = check_line(JudgeServer(models=models))
    assert re.search(says, line), line


def test_an_endpoint_that_is_down_is_tried_again():
    judge = JudgeServer(models=Reply(503, "starting"))

    async def run(matcher: LlmMatcher) -> list[bool]:
        asked = asyncio.create_task(ask(matcher, "Paris"))
        while not judge.paths_of_gets:
            await asyncio.sleep(0.01)
        judge.models = ("grader",)
        return await asked

    with serving(judge) as url:
        matcher = a_matcher(url, model="", retries=9)
        assert asyncio.run(run(matcher)) == [True]
        matcher.close()


def test_none_found_is_no_verdict_in_the_middle_of_a_run_and_it_is_looked_for_again():
    judge = JudgeServer(models=("grader", "policy"))
    with serving(judge) as url:
        matcher = a_matcher(url, model="", retries=0)
        with pytest.raises(JudgeUnavailable, match="2 models are served"):
            asyncio.run(ask(matcher, "Paris"))
        judge.models = ("grader",)
        assert asyncio.run(ask(matcher, "Paris")) == [True]
        matcher.close()
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    matcher = a_matcher(f"http://127.0.0.1:{port}/v1", model="", retries=0)
    with pytest.raises(JudgeUnavailable, match="no connection"):
        asyncio.run(ask(matcher, "Paris"))
    matcher.close()


def test_verdicts_in_a_cache_are_of_the_model_that_was_found(tmp_path: Path):
    for name, num in (("first", 1), ("second", 1), ("first", 0)):
        judge = JudgeServer(models=(name,))
        with serving(judge) as url:
            matcher = a_matcher(url, model="", cache=tmp_path / "verdicts")
            assert asyncio.run(ask(matcher, "Paris")) == [True]
            matcher.close()
        assert len(judge.tasks) == num
