"""A real HTTP server that plays an LLM judge: it answers, fails, stalls and talks nonsense on demand."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from metis_fast.config import LlmJudgeConfig
from metis_fast.score.llm import LlmMatcher
from metis_fast.types import Ability, Prompt


@dataclass
class Reply:
    """reset: the connection is cut after what there is of the body."""

    status: int
    text: str | bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    reset: bool = False

    @property
    def payload(self) -> bytes:
        return self.text if isinstance(self.text, bytes) else self.text.encode()


BOMB = Reply(200, gzip.compress(b" " * (64 << 20), 6), {"Content-Encoding": "gzip"})
"""64 MiB in 64 KiB."""


def completion(content: object, finish_reason: str | None = "stop", **message: object) -> Reply:
    whole = {"role": "assistant", "content": content, **message}
    return Reply(200, json.dumps({"choices": [{"index": 0, "message": whole, "finish_reason": finish_reason}]}))


def error(status: int, message: str, **headers: str) -> Reply:
    return Reply(
        status, json.dumps({"error": {"message": message}}), {name.replace("_", "-"): headers[name] for name in headers}
    )


def by_equality(task: dict[str, Any]) -> Reply:
    return completion("CORRECT" if task["candidate_answer"] in task["accepted_answers"] else "INCORRECT")


class JudgeServer:
    """`replies` are used up first, then `default` decides, after `hold`; what was asked is kept.

    at: where completions are; elsewhere there is nothing. refuse: a reply to a whole request, None to go on.
    """

    def __init__(
        self,
        default: Callable[[dict[str, Any]], Reply] = by_equality,
        hold: Callable[[], object] = lambda: None,
        at: str = "/v1/chat/completions",
        refuse: Callable[[dict[str, Any]], Reply | None] = lambda body: None,
    ) -> None:
        self.default, self.hold, self.at, self.refuse = default, hold, at, refuse
        self.replies: list[Reply] = []
        self.tasks: list[dict[str, Any]] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.paths: list[str] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> Reply:
        with self._lock:
            self.paths.append(path)
            self.headers.append(headers)
        if path.partition("?")[0] != self.at:
            return Reply(404, '{"detail": "Not Found"}')
        refused = self.refuse(body)
        if refused is not None:
            return refused
        task = json.loads(body["messages"][-1]["content"].split("\n\n")[-2])
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # a whole batch asks at once


@contextmanager
def serving(judge: JudgeServer) -> Iterator[str]:
    """The address of a running judge, with /v1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(judge.answer(self.path.removeprefix(f"http://{self.headers['Host']}"), body, dict(self.headers)))

        def do_GET(self) -> None:
            models = {"data": [{"id": "grader-large"}, {"id": "grader-small"}]}
            self._send(Reply(200, json.dumps(models)) if self.path.partition("?")[0] == "/v1/models" else Reply(404, ""))

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

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def a_prompt(*answers: str, uid: str = "p", question: str = "Which city?") -> Prompt:
    return Prompt(uid, "test", (), (), Ability.SEARCH, answers, "model", question)


def a_matcher(url: str, **changes: object) -> LlmMatcher:
    settings = {"base_url": url, "model": "grader", "timeout_s": 20.0, **changes}
    return LlmMatcher(LlmJudgeConfig.model_validate(settings), backoff_s=0.01)
