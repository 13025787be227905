"""How an LLM judge is reached, what it takes, and what its failures say; against real HTTP servers."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import threading
import time
from dataclasses import replace
from email.utils import formatdate
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_endpoint import BOMB, a_matcher, a_prompt, error

from metis_fast.config import Config, LlmJudgeConfig, ScoreConfig
from metis_fast.errors import JudgeError
from metis_fast.score.judge import StyleJudge
from metis_fast.score.llm import LlmMatcher
from metis_fast.score.llm_endpoint import Endpoint, parse_address, proxy_of
from metis_fast.score.protocol import JudgeUnavailable, TryAgain
from metis_fast.score.scoring import score_groups
from metis_fast.testing.judge import JudgeServer, Reply, completion, is_right, serving, text_rollout
from metis_fast.types import Group, Outcome, Score, ScoredGroup

PROXIES = [scheme + "_proxy" for scheme in ("http", "https", "all", "no")]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def ask(matcher: LlmMatcher, answer: str = "Paris") -> bool:
    try:
        return asyncio.run(is_right(matcher, a_prompt("Paris"), answer))
    finally:
        matcher.close()


def check_line(matcher: LlmMatcher) -> str:
    """What the check says; one line, on which the address stands."""
    try:
        with pytest.raises(JudgeError) as caught:
            asyncio.run(matcher.check())
    finally:
        matcher.close()
    line = str(caught.value)
    assert "\n" not in line and "LLM judge" in line
    return line


# -- addresses --


@given(
    st.sampled_from(["http://judge:8000", "https://judge.example", "HTTP://127.0.0.1:8000", "http://[::1]:8000"]),
    st.sampled_from(["", "/v1", "/openai/v1", "/openai/deployments/x"]),
    st.sampled_from(["", "/", "//", "/chat/completions", "/chat/completions/", "/completions", "/models"]),
    st.sampled_from(["", "?api-version=2024-10-21"]),
    st.sampled_from(["{}", " {}", "{} \t"]),
)
def test_all_forms_of_an_address_are_the_same_one(host, path, operation, query, blanks):
    expected = httpx2.URL(host + (path or "/") + query)
    assert parse_address(blanks.format(host + path + operation + query)) == expected
    assert parse_address(str(expected)) == expected


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("127.0.0.1:8000/v1", "write http://127.0.0.1:8000/v1"),
        ("localhost:8000", "write http://localhost:8000"),
        ("//judge/v1", "write http://judge/v1"),
        ("http:/judge/v1", "write http://judge/v1"),
        ("$JUDGE_BASE_URL", "write the address itself"),
        ("ftp://judge/v1", "write http://judge/v1"),
        ("http://", "write http://127.0.0.1:8000/v1"),
        ("http://judge:port/v1", "is no address"),
        ("http://judge:99999/v1", "a port is at most 65535"),
        (f"http://{'a' * 64}.example/v1", "is no address"),
        ("http://::1:8000/v1", "is no address"),
    ],
)
def test_what_is_no_address_is_told_before_anything_runs(given, advice):
    with pytest.raises(JudgeError, match=r"score\.llm\.base_url=") as caught:
        a_matcher(given)
    assert advice in str(caught.value)


@pytest.mark.parametrize("at", ["/v1/chat/completions", "/chat/completions", "/api/v1/chat/completions"])
def test_an_address_works_with_and_without_v1_and_is_looked_for_once(at):
    judge = JudgeServer(at=at)
    with serving(judge) as url:
        root = url.removesuffix("/v1") + at.removesuffix("/chat/completions").removesuffix("/v1")
        for form in (root, f"{root}/", f"{root}/v1", f"{root}/v1/", f"{root}{'/v1' * ('v1' in at)}/chat/completions?version=1"):
            matcher = a_matcher(form)
            judge.paths.clear()
            for city in ("Paris", "Rome"):
                assert asyncio.run(is_right(matcher, a_prompt("Paris"), city)) == (city == "Paris")
            matcher.close()
            assert len(judge.paths) <= 3
    assert judge.paths[-1] == f"{at}?version=1"


def test_the_key_and_the_query_of_azure(monkeypatch):
    monkeypatch.setenv("METIS_JUDGE_API_KEY", "secret")
    judge = JudgeServer(at="/openai/deployments/grader/chat/completions")
    with serving(judge) as url:
        assert ask(a_matcher(f"{url[:-3]}/openai/deployments/grader?api-version=2024-10-21"))
    assert judge.paths == ["/openai/deployments/grader/chat/completions?api-version=2024-10-21"]
    assert judge.headers[0]["api-key"] == "secret"


# -- proxies --


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.8.8", "localhost", "LocalHost.", "judge.localhost", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]"]
)
@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_no_proxy_stands_before_this_machine(name, host, monkeypatch):
    monkeypatch.setenv(name, "socks5://127.0.0.1:1")
    assert proxy_of(httpx2.URL(f"http://{host}:8000/v1")) is None
    assert proxy_of(httpx2.URL("http://judge.example/v1")) == (name, "socks5://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "other, .example")
    assert proxy_of(httpx2.URL("http://judge.example/v1")) is None


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1", "nonsense://x"])
def test_a_judge_on_this_machine_is_asked_whatever_the_proxies(proxy, monkeypatch):
    for name in ("HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    with serving(JudgeServer()) as url:
        assert ask(a_matcher(url))


def test_a_judge_elsewhere_is_asked_through_the_proxy(monkeypatch):
    judge = JudgeServer()
    with serving(judge) as url:
        monkeypatch.setenv("HTTP_PROXY", url.removeprefix("http://").removesuffix("/v1"))  # it may lack its scheme
        assert ask(a_matcher("http://judge.invalid/v1"))
    assert judge.headers[0]["Host"] == "judge.invalid"


@pytest.mark.parametrize(
    ("name", "proxy"),
    [
        ("HTTP_PROXY", "http://user:secret@127.0.0.1:1"),
        ("all_proxy", "nonsense://x"),
        ("ALL_PROXY", "socks5://127.0.0.1:1"),
        ("http_proxy", "http://x:y"),
        ("HTTP_PROXY", "http://127.0.0.1:99999"),
        ("HTTP_PROXY", "http://a..b:8080"),
    ],
)
def test_a_proxy_that_fails_is_named(name, proxy, monkeypatch):
    monkeypatch.setenv(name, proxy)
    line = check_line(a_matcher("http://judge.invalid/v1", retries=0))
    assert f"proxy in ${name}" in line and f"mend {name}, or add judge.invalid to NO_PROXY" in line and "secret" not in line


# -- what an endpoint refuses --


def refusing(*names: str, says: str = "Unsupported parameter: '{}' is not supported with this model.", status: int = 400):
    def refuse(body: dict[str, Any]) -> Reply | None:
        roles = {message["role"] for message in body["messages"]}
        found = [name for name in names if name in body or name in roles]
        return error(status, says.format(found[0])) if found else None

    return refuse


@pytest.mark.parametrize(
    ("refuse", "left"),
    [
        (
            refusing("max_tokens", says="Unsupported parameter: '{}'. Use 'max_completion_tokens' instead."),
            {"max_completion_tokens", "temperature"},
        ),
        (refusing("temperature", says="Unsupported value: '{}' does not support 0.0 with this model."), {"max_tokens"}),
        (refusing("max_tokens", "temperature", "max_completion_tokens", status=422), set()),
        (refusing("system", says="{} role not supported"), {"max_tokens", "temperature"}),
        (refusing("system", says="{} role not supported", status=500), {"max_tokens", "temperature"}),
        (refusing("system", says="Developer instruction is not enabled for gemma"), {"max_tokens", "temperature"}),
        (refusing("system", says="Only user and assistant roles are supported!"), {"max_tokens", "temperature"}),
        (refusing("system", says="Input should be 'user' or 'assistant'"), {"max_tokens", "temperature"}),
        (refusing("system", says="System messages are not supported"), {"max_tokens", "temperature"}),
        (
            refusing("max_tokens", says="a maxOutputTokens value of 4096, the range is from 1 to 100"),
            {"max_completion_tokens", "temperature"},
        ),
        (
            refusing(
                "max_tokens",
                "max_completion_tokens",
                says="maximum context length is 2048 tokens. However, you requested 4396 tokens",
            ),
            {"temperature"},
        ),
    ],
)
def test_what_an_endpoint_refuses_is_left_out_from_then_on(refuse, left):
    judge = JudgeServer(refuse=refuse)

    async def run(matcher: LlmMatcher) -> list[bool]:
        return [await is_right(matcher, a_prompt("Paris"), city) for city in ("Paris", "Rome", "Bonn")]

    with serving(judge) as url:
        matcher = a_matcher(url, retries=0)
        assert asyncio.run(run(matcher)) == [True, False, False]
        matcher.close()
    assert all(body.keys() - {"model", "messages"} == left for body in judge.bodies)
    assert judge.tasks[0]["candidate_answer"] == "Paris"
    num_refused = len(judge.paths) - len(judge.bodies)
    assert 1 <= num_refused <= 3


def test_what_the_settings_ask_for_is_sent_and_not_left_out():
    extra = {"temperature": 0.6, "chat_template_kwargs": {"enable_thinking": False}}
    judge = JudgeServer()
    with serving(judge) as url:
        assert ask(a_matcher(url, extra_body=extra, max_tokens=77))
        judge.refuse = refusing("temperature")
        with pytest.raises(JudgeUnavailable, match=r"status 400 .*'temperature'.*score\.llm\.extra_body"):
            ask(a_matcher(url, extra_body=extra))
    assert judge.bodies[0]["temperature"] == 0.6 and judge.bodies[0]["max_tokens"] == 77
    assert judge.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_refusal_that_only_mentions_a_setting_changes_nothing_for_later():
    judge = JudgeServer(refuse=lambda body: error(400, "temperature, max_tokens: the request is malformed"))
    with serving(judge) as url:
        matcher = a_matcher(url, retries=0)
        with pytest.raises(JudgeUnavailable, match="status 400"):
            asyncio.run(is_right(matcher, a_prompt("Paris"), "Paris"))
        assert len(judge.paths) == 3  # without max_tokens, without temperature: no endless loop
        judge.refuse = lambda body: None
        assert ask(matcher)
    assert judge.bodies[0].keys() == {"model", "messages", "max_tokens", "temperature"}


# -- advice --


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (error(401, "no key"), r"HTTP status 401 \(no key\); set the key in \$METIS_JUDGE_API_KEY, which is not set"),
        (error(403, "no"), r"score\.llm\.api_key_env"),
        (error(404, "The model `grader` does not exist."), r"model to one that is served: grader-large, grader-small$"),
        (Reply(404, "404 page not found"), r"set score\.llm\.base_url to what stands before /chat/completions"),
        (Reply(405, "<html><title>Chat</title>"), r"405 \(a web page \(chat\)\); set score\.llm\.base_url"),
        (error(400, "bad\nthing"), r"\(bad thing\); see score\.llm\.model"),
        (Reply(400, "<html><title>The plain HTTP request was sent to HTTPS port</title>"), "write https:// in score"),
        (Reply(302, "", {"Location": "/login"}), r"redirected to http://127\.0\.0\.1:\d+/login .*set score\.llm\.base_url"),
        (Reply(303, "", {"Location": "/v1/models"}), r"redirected to http://\S+/v1/models .*set score\.llm\.base_url"),
        (error(429, "quota"), r"lower score\.llm\.concurrency.* or see the quota of the account"),
        (error(402, "Insufficient balance"), r"\(Insufficient balance\); pay for the account of the key in \$METIS_JUDGE"),
        (Reply(200, "<!DOCTYPE html><title>Sign in</title>"), r"a web page \(sign in\) came instead of a chat completion"),
        (completion("Let me see", "length"), r"raise score\.llm\.max_tokens"),
        (completion("<think>Let me see"), r"CORRECT or INCORRECT and nothing else \(got '<think>Let me see'\)"),
        (completion("They are the same.\nCORRECT"), r"say the word alone with score\.llm\.extra_body"),
    ],
)  # fmt: skip
def test_the_check_gives_the_advice_that_fits(reply, says):
    judge = JudgeServer(refuse=lambda body: reply)
    with serving(judge) as url:
        line = check_line(a_matcher(f"{url}?secret=x", retries=0))
    assert re.search(says, line), line
    assert f"LLM judge 'grader' at {url}: " in line and "secret" not in line


def test_a_refused_key_is_told_from_a_missing_one(monkeypatch):
    monkeypatch.setenv("METIS_JUDGE_API_KEY", "secret")
    with serving(JudgeServer(refuse=lambda body: error(401, "wrong key"))) as url:
        line = check_line(a_matcher(url))
    assert "the key in $METIS_JUDGE_API_KEY is refused" in line and "secret" not in line
    monkeypatch.setenv("METIS_JUDGE_API_KEY", "sécret")
    with pytest.raises(JudgeError, match="METIS_JUDGE_API_KEY has characters that no key has"):
        a_matcher(url)


def test_a_redirect_that_keeps_the_request_is_followed():
    judge = JudgeServer(at="/v2/chat/completions")
    with serving(judge) as url:
        moved = JudgeServer(refuse=lambda body: Reply(307, "", {"Location": f"{url[:-3]}/v2/chat/completions"}))
        with serving(moved) as old:
            assert ask(a_matcher(old))


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://no-such-host.invalid/v1", "no such host"),
        ("https://127.0.0.1:{port}/v1", "write http:// in score.llm.base_url if the server speaks plain HTTP"),
    ],
)
def test_the_advice_on_hosts_and_protocols(address, says):
    with serving(JudgeServer()) as url:
        port = httpx2.URL(url).port
        assert says in check_line(a_matcher(address.format(port=port), retries=0))


# -- a judge that fails half of the time --


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"Retry_After": "7"}, 7, 7),
        ({"Retry_After": "0.5"}, 0.5, 0.5),
        ({"retry_after_ms": "300", "Retry_After": "7"}, 0.3, 0.3),
        ({"Retry_After": formatdate(time.time() + 3600, usegmt=True)}, 60, 60),
        ({"Retry_After": formatdate(time.time() - 3600, usegmt=True)}, 0, 0),
        ({"Retry_After": "86400"}, 60, 60),
        ({"Retry_After": "inf"}, 60, 60),
        ({"Retry_After": "-5"}, 0, 0),
        ({"Retry_After": "nan"}, 0, 0),
        ({"Retry_After": "soon"}, 0, 0),
        ({"retry_after_ms": "soon", "Retry_After": "7"}, 7, 7),
        ({"Retry_After": formatdate(time.time() + 3600)}, 60, 60),  # whose zone is -0000
        ({"Retry_After": "Mon, 99 Foo 2026"}, 0, 0),
        ({"Retry_After": "Mon, 01 Jan 2024 00:00:00 +99999999999999999999"}, 0, 0),
        ({}, 0, 0),
    ],
)
def test_a_pause_that_the_endpoint_asks_for_is_read_and_bounded(headers, least, most):
    async def run(url: str) -> float:
        endpoint = Endpoint(LlmJudgeConfig(base_url=url, model="grader"))
        async with endpoint.client() as client:
            with pytest.raises(TryAgain) as caught:
                await endpoint.complete(client, [{"role": "user", "content": ""}])
        return caught.value.wait_s

    with serving(JudgeServer(refuse=lambda body: error(429, "slow down", **headers))) as url:
        assert least <= asyncio.run(run(url)) <= most


@pytest.mark.parametrize("status", [429, 503])
def test_it_is_honoured(status):
    judge = JudgeServer()
    judge.replies = [error(status, "slow down", retry_after_ms="400")]
    with serving(judge) as url:
        start = time.monotonic()
        assert ask(a_matcher(url, retries=1))  # whose own pause is of 10 ms
    assert time.monotonic() - start >= 0.4


KINDS: dict[str, tuple[Reply, str]] = {
    "500": (error(500, "oops"), "HTTP status 500"),
    "429": (error(429, "slow down", retry_after_ms="1"), "HTTP status 429"),
    "503": (Reply(503, "down"), "HTTP status 503"),
    "reset": (Reply(200, "", reset=True), "the connection was lost"),
    "reset in the body": (Reply(200, '{"choices": [', reset=True), "the connection was lost"),
    "empty": (Reply(200, ""), "nothing came"),
    "html": (Reply(200, "<html>gateway"), "a web page came"),
    "truncated": (Reply(200, completion("CORRECT").text[:-2]), "something else came"),
    "wrong word": (completion("maybe"), "expected CORRECT or INCORRECT"),
    "both words": (completion("CORRECT INCORRECT"), "expected CORRECT or INCORRECT"),
    "no choices": (Reply(200, '{"choices": []}'), "without choices"),
    "filtered": (completion("", "content_filter"), "refused or its reply was filtered"),
    "refused": (completion(None, refusal="CORRECT"), "refused or its reply was filtered"),
    "several choices": (Reply(200, json.dumps({"choices": [{"message": {"content": "CORRECT"}}] * 2})), "several choices"),
    "prose": (completion("It is wrong to say:\nCORRECT"), "expected CORRECT or INCORRECT and nothing else"),
    "error in 200": (Reply(200, '{"error": {"message": "overloaded"}}'), "an error came instead"),
    "damaged gzip": (Reply(200, "CORRECT", {"Content-Encoding": "gzip"}), "HTTP status 200 with a damaged gzip body"),
    "gzip without end": (
        Reply(200, gzip.compress(completion("CORRECT").payload)[:-9], {"Content-Encoding": "gzip"}),
        "HTTP status 200 with a gzip body that is cut off",
    ),
    "packed otherwise": (
        Reply(200, completion("CORRECT").text, {"Content-Encoding": "br"}),
        "HTTP status 200 with Content-Encoding 'br', which was not asked for",
    ),
    "bomb": (BOMB, "HTTP status 200 with more than 8 MiB"),
    "bomb in an error": (replace(BOMB, status=503), "HTTP status 503 with more than 8 MiB"),
    "deep": (Reply(500, "[" * 200_000), "HTTP status 500"),
    "a charset that is none of text": (Reply(500, "no", {"Content-Type": "text/plain; charset=hex"}), "HTTP status 500"),
}


def batch(num_groups: int = 2, size: int = 8) -> list[Group]:
    """Of a group the even answers are right, the odd ones wrong; all differ."""
    groups = []
    for i in range(num_groups):
        prompt = a_prompt("one with an even number", uid=f"p{i}", question=f"Question {i}?")
        texts = [f"<reason>r</reason><answer>city {i} {j}</answer>" for j in range(size)]
        groups.append(Group(prompt, tuple(text_rollout(prompt.uid, [text], index=j) for j, text in enumerate(texts))))
    return groups


def number(task: dict[str, Any]) -> int:
    return int(task["candidate_answer"].split()[-1])


def by_parity(task: dict[str, Any]) -> Reply:
    return completion("INCORRECT" if number(task) % 2 else "CORRECT")


def score(url: str, max_missing_share: float = 0.5, **changes: object) -> list[ScoredGroup]:
    config = Config(score=ScoreConfig(max_missing_share=max_missing_share))
    judge = StyleJudge({"model": a_matcher(url, **changes)})
    try:
        return asyncio.run(score_groups(batch(), judge, config))
    finally:
        judge.close()


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_verdicts_lost_are_a_line_and_never_a_reward(kind, caplog):
    reply, reason = KINDS[kind]
    with serving(JudgeServer(lambda task: reply if number(task) % 4 < 2 else by_parity(task))) as url:
        scored = score(url, retries=0)
    for group in scored:
        for j, score_ in enumerate(group.scores):
            if j % 4 < 2:
                assert score_ == Score(None, Outcome.JUDGE_ERROR, no_verdict=score_.no_verdict) and reason in score_.no_verdict
            else:
                assert score_.verdict is not None and score_.verdict.correct == (j % 2 == 0)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "the judge of style 'model' gave no verdict for 8 of 16 rollouts with an answer (8 x" in line
    assert reason in line and "\n" not in line


def test_a_judge_that_stalls_half_of_the_time(caplog):
    stalls = threading.Event()

    def default(task: dict[str, Any]) -> Reply:
        if number(task) % 4 < 2:
            stalls.wait(20)
        return by_parity(task)

    with serving(JudgeServer(default)) as url:
        scored = score(url, retries=0, timeout_s=2.0)
        stalls.set()
    assert all(s.outcome is Outcome.JUDGE_ERROR for group in scored for j, s in enumerate(group.scores) if j % 4 < 2)
    assert "no answer within 2 s" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_once_is_asked_again(kind, caplog):
    seen: set[str] = set()

    def once(task: dict[str, Any]) -> Reply:
        answer = task["candidate_answer"]
        if answer in seen or number(task) % 2:
            return by_parity(task)
        seen.add(answer)
        return KINDS[kind][0]

    with serving(JudgeServer(once)) as url:
        scored = score(url, retries=1)
    assert len(seen) == 8 and not caplog.records
    assert all(s.verdict and s.verdict.correct == (j % 2 == 0) for group in scored for j, s in enumerate(group.scores))


def test_above_the_stated_share_the_run_stops(caplog):
    replies = [reply for reply, _ in KINDS.values()]

    def default(task: dict[str, Any]) -> Reply:
        return replies[number(task)] if number(task) < 5 else by_parity(task)

    with serving(JudgeServer(default)) as url:
        says = (
            r"no verdict for 10 of 16 rollouts .*more than score\.max_missing_share=0\.5; mend the judge or raise that setting"
        )
        with pytest.raises(JudgeError, match=says) as caught:
            score(url, retries=0)
        assert "\n" not in str(caught.value)
        assert str(caught.value).count("2 x") == 2 and "4 x" in str(caught.value) and "2 for other reasons" in str(caught.value)
        score(url, max_missing_share=0.7, retries=0)
    assert "gave no verdict for 10 of 16" in caplog.text
