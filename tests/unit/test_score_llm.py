"""The LLM judge against a real HTTP server that answers, fails, stalls and talks nonsense on demand."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from metis_fast.config import LlmJudgeConfig, ScoreConfig
from metis_fast.errors import JudgeError
from metis_fast.score.judge import JudgeUnavailable, open_judge
from metis_fast.score.llm import LlmMatcher
from metis_fast.testing.judge import text_rollout
from metis_fast.types import Ability, Prompt

Reply = tuple[int, str]


def says(word: str) -> Reply:
    return 200, json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": word}}]})


def by_equality(task: dict) -> Reply:
    return says("CORRECT" if task["candidate_answer"] in task["accepted_answers"] else "INCORRECT")


class Endpoint:
    """One judge server. `replies` are used up first, then `default` decides, after `hold`; what was asked is kept."""

    def __init__(self, default: Callable[[dict], Reply] = by_equality, hold: Callable[[], object] = lambda: None):
        self.default, self.hold = default, hold
        self.replies: list[Reply] = []
        self.tasks: list[dict] = []
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    def answer(self, body: dict, key: str | None) -> Reply:
        task = json.loads(body["messages"][1]["content"].split("\n\n")[0])
        with self._lock:
            self.tasks.append(task)
            self.bodies.append(body)
            self.keys.append(key)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            reply = self.replies.pop(0) if self.replies else None
        self.hold()
        with self._lock:
            self._at_once -= 1
        return reply or self.default(task)


@contextmanager
def serving(endpoint: Endpoint):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = endpoint.answer(body, self.headers["Authorization"])
            payload = text.encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)
            except BrokenPipeError:
                self.close_connection = True  # the client gave up waiting

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def a_prompt(*answers: str, question: str = "Which city?") -> Prompt:
    return Prompt("p", "test", (), (), Ability.SEARCH, answers, "model", question)


def a_matcher(url: str, **changes) -> LlmMatcher:
    settings = {"base_url": url, "model": "grader", "timeout_s": 20.0, **changes}
    return LlmMatcher(LlmJudgeConfig(**settings), backoff_s=0.01)


def ask(matcher: LlmMatcher, *answers: str, prompt: Prompt | None = None) -> list[bool]:
    async def run() -> list[bool]:
        return await asyncio.gather(*(matcher.matches(prompt or a_prompt("Paris", "Lutetia"), answer) for answer in answers))

    try:
        return asyncio.run(run())
    finally:
        matcher.close()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


def test_the_models_word_is_the_verdict_and_it_sees_question_ground_truths_and_answer():
    endpoint = Endpoint()
    with serving(endpoint) as url:
        assert ask(a_matcher(url), "Lutetia", "Rome") == [True, False]
    assert {"question": "Which city?", "accepted_answers": ["Paris", "Lutetia"], "candidate_answer": "Rome"} in endpoint.tasks
    assert {body["model"] for body in endpoint.bodies} == {"grader"}


@pytest.mark.parametrize("word", ["CORRECT", "correct", " Correct.\n", "**CORRECT**"])
def test_the_word_may_be_dressed_up(word):
    with serving(Endpoint(lambda task: says(word))) as url:
        assert ask(a_matcher(url), "Paris") == [True]


def test_server_errors_and_nonsense_are_retried():
    endpoint = Endpoint()
    endpoint.replies = [(500, "{}"), (429, "{}"), (200, "<html>gateway</html>")]
    with serving(endpoint) as url:
        assert ask(a_matcher(url, retries=3), "Paris") == [True]
    assert len(endpoint.tasks) == 4


@pytest.mark.parametrize(
    "reply",
    [
        says("The answer is CORRECT"),
        says("INCORRECT or CORRECT"),
        says("NOT CORRECT"),
        says(""),
        (200, json.dumps({"choices": []})),
        (200, json.dumps({"choices": [{"message": {"content": None}}]})),
        (200, json.dumps(["CORRECT"])),
        (200, "CORRECT"),
        (503, "down"),
    ],
)
def test_what_is_no_clear_word_after_all_tries_is_no_verdict(reply):
    endpoint = Endpoint(lambda task: reply)
    with serving(endpoint) as url, pytest.raises(JudgeUnavailable, match="no verdict after 3 tries"):
        ask(a_matcher(url, retries=2), "Paris")
    assert len(endpoint.tasks) == 3


def test_a_refused_request_is_not_repeated():
    endpoint = Endpoint(lambda task: (401, json.dumps({"error": {"message": "no such key"}})))
    with serving(endpoint) as url, pytest.raises(JudgeUnavailable, match="401"):
        ask(a_matcher(url), "Paris")
    assert len(endpoint.tasks) == 1


def test_a_server_that_stalls_is_given_up_after_the_time_out():
    endpoint = Endpoint(hold=lambda: time.sleep(3))
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

    endpoint = Endpoint(hold=hold_until_three_are_here)
    with serving(endpoint) as url:
        ask(a_matcher(url, concurrency=3), *(f"city {i}" for i in range(12)))
    assert endpoint.most_at_once == 3


def test_an_empty_or_endless_answer_is_wrong_without_a_request():
    endpoint = Endpoint(lambda task: says("CORRECT"))
    with serving(endpoint) as url:
        assert ask(a_matcher(url), "", "Paris " * 10_000) == [False, False]
    assert endpoint.tasks == []


def test_equal_answers_asked_at_once_cost_one_request():
    endpoint = Endpoint()
    with serving(endpoint) as url:
        assert ask(a_matcher(url), *["Paris"] * 8) == [True] * 8
    assert len(endpoint.tasks) == 1


def test_a_cache_file_outlives_the_judge_and_tells_questions_ground_truths_and_models_apart(tmp_path):
    endpoint, cache = Endpoint(), tmp_path / "deep" / "verdicts.sqlite"
    with serving(endpoint) as url:
        assert ask(a_matcher(url, cache=cache), "Paris", "Rome") == [True, False]
        assert ask(a_matcher(url, cache=cache), "Rome", "Paris") == [False, True]
        assert len(endpoint.tasks) == 2
        assert ask(a_matcher(url, cache=cache), "Rome", prompt=a_prompt("Rome")) == [True]
        ask(a_matcher(url, cache=cache), "Paris", prompt=a_prompt("Paris", "Lutetia", question="Which prince?"))
        ask(a_matcher(url, cache=cache, model="other"), "Paris")
    assert len(endpoint.tasks) == 5


def test_failures_are_not_cached():
    endpoint = Endpoint()
    endpoint.replies = [(500, "{}")]

    async def run(matcher: LlmMatcher) -> bool:
        with pytest.raises(JudgeUnavailable):
            await matcher.matches(a_prompt("Paris"), "Paris")
        return await matcher.matches(a_prompt("Paris"), "Paris")

    with serving(endpoint) as url:
        matcher = a_matcher(url, retries=0)
        assert asyncio.run(run(matcher))
        matcher.close()


def test_a_damaged_cache_file_is_named(tmp_path):
    (tmp_path / "verdicts").write_text("no database " * 100)
    with pytest.raises(JudgeError, match=r"score\.llm\.cache=.*verdicts cannot be used"):
        a_matcher("http://127.0.0.1:1/v1", cache=tmp_path / "verdicts")


def test_one_judge_serves_several_event_loops():
    endpoint = Endpoint()
    with serving(endpoint) as url:
        matcher = a_matcher(url, concurrency=1)
        for city in ("Paris", "Lutetia"):
            assert asyncio.run(matcher.matches(a_prompt("Paris", "Lutetia"), city))
        matcher.close()


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("GRADER_KEY", "secret")
    endpoint = Endpoint()
    with serving(endpoint) as url:
        ask(a_matcher(url, api_key_env="GRADER_KEY"), "Paris")
    assert endpoint.keys == ["Bearer secret"]


def test_the_check_passes_on_a_judge_that_answers_with_one_request():
    endpoint = Endpoint()
    with serving(endpoint) as url:
        matcher = a_matcher(url)
        asyncio.run(matcher.check())
        matcher.close()
    assert len(endpoint.tasks) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (says("<think>Let me see"), "expected CORRECT or INCORRECT"),
        ((404, json.dumps({"error": {"message": "model\nnot found"}})), "HTTP status 404"),
    ],
)
def test_the_check_says_in_one_line_what_to_set(reply, reason):
    with serving(Endpoint(lambda task: reply)) as url:
        matcher = a_matcher(url)
        with pytest.raises(JudgeError, match=rf"'grader' at {url}: {reason}.*score\.llm\.base_url") as caught:
            asyncio.run(matcher.check())
        matcher.close()
    assert "\n" not in str(caught.value)


def test_the_check_of_a_dead_server_fails():
    matcher = a_matcher(f"http://127.0.0.1:{closed_port()}/v1")
    with pytest.raises(JudgeError, match="no connection"):
        asyncio.run(matcher.check())
    matcher.close()


def test_the_judge_of_style_model_asks_the_endpoint():
    with serving(Endpoint()) as url:
        judge = open_judge(ScoreConfig(llm=LlmJudgeConfig(base_url=url, model="grader")), {"model"})
        rollout = text_rollout("p", ["<reason>r</reason><answer>Paris</answer>"])
        verdict = asyncio.run(judge.judge(a_prompt("Paris"), rollout))
        judge.close()
    assert verdict.correct and verdict.format_ok
