"""A real HTTP server on loopback that plays the providers of web search: it answers, fails and stalls on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from metis_fast.tools.results import Page


@dataclass(frozen=True)
class Reply:
    """cut: the connection ends after half of the body. after_s: seconds until it comes."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    after_s: float = 0.0


@dataclass(frozen=True)
class Received:
    """A request as it came. headers: by names in lower case. time: on the monotonic clock."""

    method: str
    path: str
    params: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    time: float

    @property
    def json(self) -> Mapping[str, object]:
        """The body."""
        return json.loads(self.body)


def some_pages(query: str) -> Sequence[Page]:
    """Twelve pages about any query, the fourth without a snippet."""
    texts = {rank: f"What page {rank} says of {query}." for rank in range(1, 13) if rank != 4}
    return [Page(rank, f"{query}: page {rank}", f"https://example.org/{rank}", texts.get(rank, "")) for rank in range(1, 13)]


class SearchServer:
    """Answers under /serper, /brightdata, /serpapi and /http, each in the protocol of that name.

    find: pages for a query. key: what has to come as the key. replies: used up first, one a request. received: all requests.
    """

    def __init__(self, find: Callable[[str], Sequence[Page]] = some_pages, key: str = "") -> None:
        self.find, self.key = find, key
        self.replies: list[Reply] = []
        self.received: list[Received] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    def answer(self, request: Received) -> Reply:
        """What is sent for a request."""
        with self._lock:
            self.received.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            reply = self.replies.pop(0) if self.replies else None
        try:
            if reply is None:
                reply = self._usual(request)
            time.sleep(reply.after_s)
        finally:
            with self._lock:
                self._at_once -= 1
        return reply

    def _usual(self, request: Received) -> Reply:
        speak = {"/serper": self._serper, "/brightdata": self._brightdata, "/serpapi": self._serpapi, "/http": self._http}
        protocol = speak.get(request.path)
        if protocol is None:
            return Reply(404, b'{"message": "Not Found"}')
        key, value = protocol(request)
        if key != self.key:
            return Reply(403, json.dumps({"message": f"Unauthorized: {key}"}).encode())
        return Reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _serper(self, request: Received) -> tuple[str, object]:
        query, count = str(request.json["q"]), request.json["num"]
        assert isinstance(count, int)
        organic = [
            {"title": page.title, "link": page.link, "position": page.rank}
            | ({"snippet": page.snippet} if page.snippet else {})
            for page in self.find(query)[:count]
        ]
        about = {"q": query, "type": "search", "num": count, "engine": "google"}
        return request.headers.get("x-api-key", ""), {"searchParameters": about, "organic": organic, "credits": 1}

    def _brightdata(self, request: Received) -> tuple[str, object]:
        assert request.json["format"] == "raw"
        asked = {name: values[0] for name, values in parse_qs(urlsplit(str(request.json["url"])).query).items()}
        assert asked["brd_json"] == "1"
        found = self.find(asked["q"])[: int(asked["num"])]
        general = {"search_engine": "google", "results_cnt": len(found), "language": asked["hl"]}
        organic = [{"link": page.link, "title": page.title, "description": page.snippet, "rank": page.rank} for page in found]
        value = {"general": general, "input": {"original_url": request.json["url"]}}
        return request.headers.get("authorization", "").removeprefix("Bearer "), value | ({"organic": organic} if found else {})

    def _serpapi(self, request: Received) -> tuple[str, object]:
        query, count = request.params["q"], int(request.params["num"])
        found = [
            {"position": page.rank, "title": page.title, "link": page.link, "snippet": page.snippet}
            for page in self.find(query)[:count]
        ]
        about = {
            "search_metadata": {"status": "Success"},
            "search_parameters": {"q": query, "engine": request.params["engine"]},
        }
        empty = {
            "search_information": {"organic_results_state": "Fully empty"},
            "error": "Google hasn't returned any results for this query.",
        }
        return request.params["api_key"], about | ({"organic_results": found} if found else empty)

    def _http(self, request: Received) -> tuple[str, object]:
        given = request.params or request.json
        found = [{"name": page.title, "url": page.link, "about": {"text": page.snippet}} for page in self.find(str(given["q"]))]
        return request.headers.get("authorization", "").removeprefix("Token "), {"data": {"items": found}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def serving(server: SearchServer) -> Iterator[str]:
    """The address of a running server; a provider's path comes behind it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            params = {name: values[0] for name, values in parse_qs(address.query).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            self._send(server.answer(Received(self.command, address.path, params, headers, body, time.monotonic())))

        do_POST = do_GET

        def _send(self, reply: Reply) -> None:
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body[: len(reply.body) // 2] if reply.cut else reply.body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # who asked has given up waiting
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    running = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()
