"""For tests of judges and scores: a judge that decides by a function, an HTTP server that plays a model which judges, and
rollouts made from plain text.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from metis_fast.score.protocol import JudgeUnavailable, Matcher
from metis_fast.score.response import format_ok, last_answer
from metis_fast.types import Outcome, Prompt, Rollout, ToolCall, Turn, Verdict


def literal_match(prompt: Prompt, answer: str) -> bool:
    """Whether the answer is, to the letter, one of the prompt's ground truths."""
    return answer in prompt.answers


async def is_right(matcher: Matcher, prompt: Prompt, answer: str) -> bool:
    """Whether a matcher says that the answer is right."""
    return (await matcher.compare(prompt, answer)).correct


class FakeJudge:
    """Reads the last answer and the format of a rollout like the real judges, then asks `correct`.

    correct: (prompt, answer) -> verdict; None stands for a judge that failed.
    judged: what was judged, in order, as (prompt uid, index of the rollout).
    """

    def __init__(self, correct: Callable[[Prompt, str], bool | None] = literal_match) -> None:
        self._correct = correct
        self.judged: list[tuple[str, int]] = []

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """Judge one rollout.

        Raises:
            JudgeUnavailable: `correct` returned None.
        """
        self.judged.append((prompt.uid, rollout.index))
        answer = last_answer(rollout.response_text)
        correct = self._correct(prompt, answer)
        if correct is None:
            raise JudgeUnavailable("the fake judge was told to fail")
        return Verdict(correct, format_ok(rollout.response_text), answer, "fake", "as the test says")

    async def check(self) -> None:
        """Never fails."""

    def close(self) -> None:
        """Nothing to close."""


@dataclass
class Reply:
    """What a server says. reset: the connection is cut after what there is of the body."""

    status: int
    text: str | bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    reset: bool = False

    @property
    def payload(self) -> bytes:
        """The body."""
        return self.text if isinstance(self.text, bytes) else self.text.encode()


def completion(content: object, finish_reason: str | None = "stop", **message: object) -> Reply:
    """A chat completion."""
    whole = {"role": "assistant", "content": content, **message}
    return Reply(200, json.dumps({"choices": [{"index": 0, "message": whole, "finish_reason": finish_reason}]}))


def by_equality(task: dict[str, Any]) -> Reply:
    """CORRECT where the answer is, to the letter, the ground truth."""
    return completion("CORRECT" if task["candidate_answer"] == task["accepted_answer"] else "INCORRECT")


def packaged_task(body: dict[str, Any]) -> dict[str, Any]:
    """Question, accepted answer and candidate's answer of a request with the packaged prompt, by their names in it."""
    return json.loads(body["messages"][-1]["content"].split("\n\n")[-2])


class JudgeServer:
    """An endpoint of the OpenAI chat-completions protocol, for `serving`. What it was asked is kept.

    `replies` are used up first, then `default` decides, after `hold`.
    at: where completions are; elsewhere there is nothing, but for the list of `models` beside it. refuse: a reply to a whole
    request, None to go on. read: request -> task.
    """

    def __init__(
        self,
        default: Callable[[dict[str, Any]], Reply] = by_equality,
        hold: Callable[[], object] = lambda: None,
        at: str = "/v1/chat/completions",
        refuse: Callable[[dict[str, Any]], Reply | None] = lambda body: None,
        models: Sequence[str] | Reply = ("grader-large", "grader-small"),
        read: Callable[[dict[str, Any]], dict[str, Any]] = packaged_task,
    ) -> None:
        self.default, self.hold, self.at, self.refuse, self.models, self.read = default, hold, at, refuse, models, read
        self.replies: list[Reply] = []
        self.tasks: list[dict[str, Any]] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.paths: list[str] = []
        self.paths_of_gets: list[str] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> Reply:
        """To a POST."""
        with self._lock:
            self.paths.append(path)
            self.headers.append(headers)
        if path.partition("?")[0] != self.at:
            return Reply(404, '{"detail": "Not Found"}')
        refused = self.refuse(body)
        if refused is not None:
            return refused
        task = self.read(body)
        with self._lock:
            self.tasks.append(task)
            self.bodies.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            reply = self.replies.pop(0) if self.replies else None
        self.hold()
        with self._lock:
            self._at_once -= 1
        return reply or self.default(task)

    def listed(self, path: str) -> Reply:
        """To a GET."""
        with self._lock:
            self.paths_of_gets.append(path)
        if path.partition("?")[0] != self.at.removesuffix("/chat/completions") + "/models":
            return Reply(404, "")
        if isinstance(self.models, Reply):
            return self.models
        return Reply(200, json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # a whole batch asks at once


@contextmanager
def serving(judge: JudgeServer, port: int = 0) -> Iterator[str]:
    """The address of a running judge, with /v1; on this machine only, for as long as the block runs. port: 0: any."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(judge.answer(self.path.removeprefix(f"http://{self.headers['Host']}"), body, dict(self.headers)))

        def do_GET(self) -> None:
            self._send(judge.listed(self.path.removeprefix(f"http://{self.headers['Host']}")))

        def _send(self, reply: Reply) -> None:
            payload = reply.payload
            self.close_connection = reply.reset
            try:
                if reply.reset and not payload:
                    return
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload) + reply.reset))
                self.end_headers()
                self.wfile.write(payload)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up waiting

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = _Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def text_rollout(
    prompt_uid: str,
    texts: Sequence[str],
    *,
    index: int = 0,
    observation: str = "",
    outcome: Outcome = Outcome.ANSWERED,
) -> Rollout:
    """A rollout whose turns say `texts`; every turn but the last calls a tool that returns `observation`.

    With outcome TURN_LIMIT the last turn calls one too. Its tokens stand for nothing: a prompt of one, then one a turn, and one
    for each observation that says something.
    """
    turns = []
    sampled_flags = [False]
    for position, text in enumerate(texts, start=1):
        calls = position < len(texts) or outcome is Outcome.TURN_LIMIT
        start, seen = len(sampled_flags), [False] * bool(calls and observation)
        sampled_flags += [True, *seen]
        turns.append(
            Turn(
                text=text,
                start=start,
                stop=start + 1,
                observation_stop=start + 1 + len(seen),
                outcome=Outcome.TOOL_RESULT if calls else outcome,
                call=ToolCall("python", "{}") if calls else None,
                observation=observation if calls else "",
            )
        )
    sampled = np.array(sampled_flags)
    return Rollout(
        prompt_uid=prompt_uid,
        index=index,
        tokens=np.zeros(len(sampled), dtype=np.int32),
        prompt_len=1,
        sampled=sampled,
        logp=np.where(sampled, -1.0, 0.0).astype(np.float32),
        weight_version=np.where(sampled, 0, -1).astype(np.int32),
        images=(),
        image_spans=(),
        turns=tuple(turns),
        outcome=outcome,
    )
