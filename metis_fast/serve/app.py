"""The agent's HTTP interface (docs/serve.md): chat completions, models, health, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from metis_fast import __version__
from metis_fast.config import Config
from metis_fast.http_serving import HEALTH, METRICS_TYPE, BodyError, TokenGate, read_body
from metis_fast.node.opening import Agent
from metis_fast.serve.episodes import DEFECT, Episodes, Place, outcome_of
from metis_fast.serve.metrics import GONE, Metrics
from metis_fast.serve.refusal import STATUS, Fault, Refusal, Refused
from metis_fast.serve.reply import Head, Json, closing_chunks, completion, opening_chunks
from metis_fast.serve.request import ChatRequest, read_request
from metis_fast.serve.system import SystemText
from metis_fast.types import Rollout

_JSON = "application/json"
_LARGE = 1 << 18  # bytes; what is larger is not decoded on the event loop
_SEND_S = 60.0  # for a client to take a piece of a stream

Task = asyncio.Task[list[Rollout]]


def _json(tree: Mapping[str, object]) -> bytes:
    # as ASCII: what an agent writes may hold half a pair of surrogates, which UTF-8 does not
    return json.dumps(tree, separators=(",", ":")).encode()


def _refused(refusal: Refusal) -> Response:
    status = refusal.status or STATUS[refusal.fault]
    return Response(_json(refusal.body), status, refusal.headers, media_type=_JSON)


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def _watched(receive: Receive, task: Task, place: Place) -> AsyncIterator[asyncio.Task[None]]:
    """Gives a task that ends when the client goes; at the end the episode has ended, too, and its place is free."""
    gone = asyncio.create_task(_gone(receive))
    try:
        yield gone
    finally:
        for one in (gone, task):
            one.cancel()
        await asyncio.wait([gone, task])
        if not task.cancelled():
            task.exception()  # whoever wants it has asked; asyncio would complain where nobody has
        place.leave()


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that is being played. raw: whether all that the agent writes is its content."""

    request: ChatRequest
    head: Head
    raw: bool
    task: Task
    place: Place


class _Stream(Response):
    """Server-sent events: who speaks, comments while nothing is to be said, the answer in pieces; or an error event."""

    media_type = "text/event-stream"

    def __init__(self, asked: _Asked, keep_alive_s: float, metrics: Metrics) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._asked, self._keep_alive_s, self._metrics = asked, keep_alive_s, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of ASGI."""
        asked = self._asked
        status: int | str = GONE
        try:
            async with _watched(receive, asked.task, asked.place) as gone:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                for chunk in opening_chunks(asked.head, asked.request.n):
                    await _send(send, _event(chunk))
                while not (asked.task.done() or gone.done()):
                    await asyncio.wait([asked.task, gone], timeout=self._keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
                    if not (asked.task.done() or gone.done()):
                        await _send(send, b": the agent is at work\n\n")
                if not gone.done():
                    status = await self._end(send)
        except TimeoutError:  # nobody reads it
            status = GONE
        finally:
            self._metrics.request(status)

    async def _end(self, send: Send) -> int:
        asked = self._asked
        outcome = outcome_of(asked.task)
        if isinstance(outcome, Refusal):
            await _send(send, b"event: error\n" + _event(outcome.body), more=False)
            return STATUS[outcome.fault]
        request = asked.request
        for chunk in closing_chunks(asked.head, outcome, asked.raw, request.stop, request.include_usage):
            await _send(send, _event(chunk))
        await _send(send, b"data: [DONE]\n\n", more=False)
        return 200


def _event(tree: Json) -> bytes:
    return b"data: " + _json(tree) + b"\n\n"


async def _send(send: Send, body: bytes, more: bool = True) -> None:
    """Raises TimeoutError where the client does not read."""
    async with asyncio.timeout(_SEND_S):
        await send({"type": "http.response.body", "body": body, "more_body": more})


class _Routes:
    """The handlers of requests."""

    def __init__(self, agent: Agent, config: Config, episodes: Episodes, metrics: Metrics) -> None:
        self._serve, self._episodes, self._metrics = config.serve, episodes, metrics
        self._name = config.serve.model or config.model.path.resolve().name
        self._created = Head(self._name).created

    async def health(self) -> Response:
        """Whether requests are taken, and whether the last one failed of the server."""
        draining, failing = self._episodes.draining, self._episodes.failing
        status = "draining" if draining else "failing" if failing else "ok"
        return Response(_json({"status": status}), 503 if draining or failing else 200, media_type=_JSON)

    async def metrics(self) -> Response:
        """In the format of Prometheus."""
        return Response(self._metrics.text(), media_type=METRICS_TYPE)

    async def models(self) -> Response:
        """The one model."""
        return Response(_json({"object": "list", "data": [self._model()]}), media_type=_JSON)

    async def model(self, name: str) -> Response:
        """The one model, by its name."""
        self._check_name(name)
        return Response(_json(self._model()), media_type=_JSON)

    def _model(self) -> Json:
        return {"id": self._name, "object": "model", "created": self._created, "owned_by": "metis-fast"}

    def _check_name(self, name: str | None) -> None:
        if name not in (None, "", self._name):
            text = f"model: expected {self._name!r}, which is served here, got {name[:200]!r}"
            raise Refused(Refusal(Fault.MODEL, text, "model", "model_not_found"))

    async def complete(self, request: Request) -> Response:
        """A chat completion."""
        place = self._episodes.enter()  # before its body is read: those of all who wait are in memory
        try:
            asked = await self._begin(request, place)
        except BaseException:  # a client that left, too: the place is free again, and it goes on
            place.leave()
            raise
        if asked.request.stream:
            return _Stream(asked, self._serve.keep_alive_s, self._metrics)
        async with _watched(request.receive, asked.task, place) as gone:
            await asyncio.wait([asked.task, gone], return_when=asyncio.FIRST_COMPLETED)
            if not asked.task.done():
                raise ClientDisconnect
            outcome = outcome_of(asked.task)
        if isinstance(outcome, Refusal):
            raise Refused(outcome)
        self._metrics.request(200)
        return Response(_json(completion(asked.head, outcome, asked.raw, asked.request.stop)), media_type=_JSON)

    async def _begin(self, request: Request, place: Place) -> _Asked:
        try:
            body = await read_body(request, self._serve.max_request_mb << 20)
        except BodyError as error:
            text = f"{error} (serve.max_request_mb)" if error.too_large else str(error)
            raise Refused(Refusal(Fault.REQUEST, text, status=413 if error.too_large else 408)) from None
        large = len(body) > _LARGE
        chat = await asyncio.to_thread(read_request, body, self._serve) if large else read_request(body, self._serve)
        del body
        self._check_name(chat.model)
        if chat.n > 1:
            place.take(chat.n)
        ready = await self._episodes.ready(chat)
        raw = self._serve.raw if chat.raw is None else chat.raw
        return _Asked(chat, Head(self._name), raw, self._episodes.start(ready), place)

    async def rejected(self, request: Request, error: Exception) -> Response:
        """What a client is told of a request that is not done."""
        refusal = DEFECT
        match error:
            case Refused():
                refusal = error.refusal
            case HTTPException():
                text = f"{error.detail}; POST /v1/chat/completions and GET /v1/models are here"
                refusal = Refusal(Fault.REQUEST, text, status=error.status_code)
            case ClientDisconnect():
                self._metrics.request(GONE)
                return Response(status_code=400)  # nobody reads it
        response = _refused(refusal)
        if request.url.path.endswith("/completions"):
            self._metrics.request(response.status_code)
        return response


def make_app(agent: Agent, config: Config, system: SystemText, token: str = "") -> FastAPI:
    """Serves `agent`, which whoever calls this closes. Its `state.episodes` are those that run.

    config: see `serving.agent_config`. token: empty: none is asked for.
    """
    metrics = Metrics(agent.toolbox.names)
    episodes = Episodes(agent, config, system, metrics)
    routes = _Routes(agent, config, episodes, metrics)
    app = FastAPI(title="Agent server of metis-fast", version=__version__, docs_url=None, redoc_url=None)
    app.state.episodes = episodes
    app.add_api_route(HEALTH, routes.health, methods=["GET"])
    app.add_api_route("/metrics", routes.metrics, methods=["GET"])
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", routes.model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", routes.complete, methods=["POST"])
    for error in (Refused, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(error, routes.rejected)
    app.add_middleware(TokenGate, token=token, refuse=lambda text: _refused(Refusal(Fault.UNAUTHORIZED, text)))
    return app
