"""The tool server's HTTP interface (docs/tool-server.md): sessions, images, health, metrics, and the tools over MCP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from metis_fast import __version__
from metis_fast.config import ToolsConfig
from metis_fast.http_serving import HEALTH, METRICS_TYPE, BodyError, TokenGate, read_body
from metis_fast.tools.protocol import Toolbox
from metis_fast.tools.server.blobs import BlobStore, is_hash
from metis_fast.tools.server.mcp_endpoint import McpEndpoint
from metis_fast.tools.server.metrics import Metrics
from metis_fast.tools.server.sessions import Rejected, SessionTable
from metis_fast.tools.server.settings import contents_of, settings_of
from metis_fast.tools.server.wire import (
    MAX_REQUEST_BYTES,
    PROTOCOL,
    STATUS,
    Failure,
    Fault,
    WireError,
    decode_calling,
    decode_opening,
    encode_answer,
    encode_failure,
    offer_of,
    to_json,
)
from metis_fast.types import ImageBlob

_RETRY_AFTER_S = 1
_LARGE = 1 << 18  # bytes; what is larger is not handled on the event loop
_JSON = "application/json"


def _failure(failure: Failure, metrics: Metrics) -> Response:
    metrics.refused(failure.fault)
    headers = {}
    if failure.fault in (Fault.BUSY, Fault.DRAINING):
        headers["Retry-After"] = str(_RETRY_AFTER_S)
    return Response(encode_failure(failure), STATUS[failure.fault], headers, media_type=_JSON)


async def _body(request: Request, limit: int) -> bytes:
    """Raises Rejected where it is longer than `limit` bytes, or does not come."""
    try:
        return await read_body(request, limit)
    except BodyError as error:
        raise Rejected(Fault.TOO_LARGE if error.too_large else Fault.REQUEST, str(error)) from None


class _Routes:
    """The handlers of requests."""

    def __init__(self, toolbox: Toolbox, config: ToolsConfig, table: SessionTable, blobs: BlobStore, metrics: Metrics) -> None:
        self._config, self._table, self._blobs, self._metrics = config, table, blobs, metrics
        tools = [{"name": one.name, "description": one.description, "schema": one.schema} for one in toolbox.tools]
        told = {"protocol": PROTOCOL, "version": __version__, "tools": tools, "settings": settings_of(config)}
        self._told = to_json({**told, "contents": contents_of(config)})
        self._offer = offer_of(self._told)

    async def health(self) -> Response:
        """Whether new sessions are taken."""
        status = 503 if self._table.draining else 200
        return Response(to_json({"status": "draining" if self._table.draining else "ok"}), status, media_type=_JSON)

    async def metrics(self) -> Response:
        """In the format of Prometheus."""
        return Response(self._metrics.text(), media_type=METRICS_TYPE)

    async def tools(self) -> Response:
        """The tools, and the settings and contents of files that decide what they answer."""
        return Response(self._told, media_type=_JSON)

    async def has_blob(self, sha256: str) -> Response:
        """Whether an image is here."""
        return Response(status_code=200 if sha256 in self._blobs else 404)

    async def put_blob(self, sha256: str, request: Request) -> Response:
        """Take an image."""
        if not is_hash(sha256):
            raise Rejected(Fault.REQUEST, "expected a SHA-256 in 64 hexadecimal digits behind /blobs/")
        data = await _body(request, self._config.serve.blob_mb << 20)
        blob = await asyncio.to_thread(ImageBlob.of, data) if len(data) > _LARGE else ImageBlob.of(data)
        if blob.sha256 != sha256:
            raise Rejected(Fault.REQUEST, "the image is not the one that its hash says; send it again")
        self._blobs.put(blob)
        self._metrics.blob_bytes.set(self._blobs.num_bytes)
        return Response(status_code=204)

    async def open(self, request: Request) -> Response:
        """Open a session."""
        opening = decode_opening(await _body(request, MAX_REQUEST_BYTES))
        if opening.offer and opening.offer != self._offer:
            raise Rejected(Fault.TOOLS, "the server was started again with other tools, settings or another release")
        return Response(to_json({"session": self._table.open(opening)}), 201, media_type=_JSON)

    async def call(self, session: str, request: Request) -> Response:
        """Run a tool, or go on waiting for it."""
        body = await _body(request, MAX_REQUEST_BYTES)
        calling = await asyncio.to_thread(decode_calling, body) if len(body) > _LARGE else decode_calling(body)
        answer = await self._table.call(session, calling)
        if answer is None:
            return Response(to_json({"running": calling.number}), 202, media_type=_JSON)
        is_large = sum(len(image.data) for image in answer.fresh) > _LARGE
        encoded = await asyncio.to_thread(encode_answer, answer) if is_large else encode_answer(answer)
        return Response(encoded, media_type=_JSON)

    async def end(self, session: str) -> Response:
        """End a session, if there is one."""
        await self._table.end(session)
        return Response(status_code=204)

    async def rejected(self, request: Request, error: Exception) -> Response:
        """What a client is told of a request that is not done."""
        match error:
            case Rejected():
                return _failure(error.failure, self._metrics)
            case WireError():
                return _failure(Failure(Fault.REQUEST, str(error)), self._metrics)
            case ClientDisconnect():
                return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it
        return _failure(Failure(Fault.DEFECT, f"{type(error).__name__}; see the server's log"), self._metrics)


def make_app(toolbox: Toolbox, config: ToolsConfig, token: str = "") -> FastAPI:
    """Serves `toolbox`, which whoever calls this closes. Its `state.table` is the table of sessions.

    config: `config.serve` has the limits; clients are told the rest. token: empty: none is asked for.

    Raises:
        ToolSetupError: a file of the tools cannot be read.
    """
    serve = config.serve
    metrics, blobs = Metrics(toolbox.names), BlobStore(serve.blobs_mb << 20)
    table = SessionTable(toolbox, serve, blobs, metrics)
    routes, mcp = _Routes(toolbox, config, table, blobs, metrics), McpEndpoint(toolbox, table, serve)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(table.watch())
        try:
            async with mcp.running():
                yield
        finally:
            watch.cancel()
            await table.close()

    app = FastAPI(title="Tool server of metis-fast", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.table = table
    app.add_api_route(HEALTH, routes.health, methods=["GET"])
    app.add_api_route("/metrics", routes.metrics, methods=["GET"])
    app.add_api_route("/tools", routes.tools, methods=["GET"])
    app.add_api_route("/blobs/{sha256}", routes.has_blob, methods=["HEAD"])
    app.add_api_route("/blobs/{sha256}", routes.put_blob, methods=["PUT"], status_code=204)
    app.add_api_route("/sessions", routes.open, methods=["POST"], status_code=201)
    app.add_api_route("/sessions/{session}/calls", routes.call, methods=["POST"])
    app.add_api_route("/sessions/{session}", routes.end, methods=["DELETE"], status_code=204)
    app.router.routes.append(Route("/mcp", endpoint=mcp))
    for error in (Rejected, WireError, ClientDisconnect, Exception):
        app.add_exception_handler(error, routes.rejected)
    app.add_middleware(TokenGate, token=token, refuse=lambda text: _failure(Failure(Fault.UNAUTHORIZED, text), metrics))
    return app
