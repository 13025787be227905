"""The tools of the server over MCP (streamable HTTP): a session of MCP is a session of the tools.

Sessions are what the newest revision of MCP (2026-07-28) has no more. The server says so when it is asked which revisions it
speaks, and clients begin with `initialize` then, as before.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator

import mcp_types as types
from mcp.server import Server, ServerRequestContext
from mcp.server.streamable_http import MCP_SESSION_ID_HEADER
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from metis_fast import __version__
from metis_fast.config import ToolServeConfig
from metis_fast.tools.protocol import Toolbox
from metis_fast.tools.results import ContentResult, ImageSearchResult, PythonResult, Refused, TextSearchResult
from metis_fast.tools.server.metrics import outcome_of
from metis_fast.tools.server.sessions import Rejected, SessionTable
from metis_fast.tools.server.wire import MAX_REQUEST_BYTES, Answer, Calling, Opening, Result
from metis_fast.types import ImageBlob, Observation, Outcome

_MOST_NAMES = 1 << 16  # of sessions of MCP that are remembered; far more than there are at once


class _Session:
    """name: of the tools' session; None before the first call."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.number = 0
        self.turn = asyncio.Lock()


class McpEndpoint:
    """An application of ASGI for one path."""

    def __init__(self, toolbox: Toolbox, table: SessionTable, config: ToolServeConfig) -> None:
        self._toolbox, self._table, self._call_s = toolbox, table, config.call_s
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._server: Server = Server(
            "metis-fast", version=__version__, on_list_tools=self._list_tools, on_call_tool=self._call_tool
        )
        self._server.add_request_handler("server/discover", types.RequestParams, self._discover)
        # JSON and no event streams: a client takes events of 1 MiB only, and an image may be larger
        self._manager = StreamableHTTPSessionManager(
            self._server,
            json_response=True,
            session_idle_timeout=config.idle_s,
            max_request_body_size=MAX_REQUEST_BYTES,
            max_sessions=config.max_sessions,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Takes requests while this is open; once only."""
        async with self._manager.run():
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of ASGI."""
        await self._manager.handle_request(scope, receive, send)
        if scope["method"] == "DELETE":
            session = self._sessions.pop(Headers(scope=scope).get(MCP_SESSION_ID_HEADER, ""), None)
            if session is not None and session.name is not None:
                await self._table.end(session.name)

    async def _discover(self, ctx: ServerRequestContext, params: types.RequestParams) -> types.DiscoverResult:
        return types.DiscoverResult(
            supported_versions=list(HANDSHAKE_PROTOCOL_VERSIONS), capabilities=self._server.get_capabilities()
        )

    async def _list_tools(
        self, ctx: ServerRequestContext, params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(
            tools=[
                types.Tool(name=tool.name, description=tool.description, input_schema=dict(tool.schema))
                for tool in self._toolbox.tools
            ]
        )

    async def _call_tool(self, ctx: ServerRequestContext, params: types.CallToolRequestParams) -> types.CallToolResult:
        """A mistake in the call is a result with `is_error`, a failure of ours an error of the protocol."""
        session_id = ctx.request.headers.get(MCP_SESSION_ID_HEADER) if ctx.request is not None else None
        if session_id is None:
            raise MCPError(types.INVALID_REQUEST, "tools keep state: begin a session with `initialize`")
        session = self._sessions.setdefault(session_id, _Session())
        self._sessions.move_to_end(session_id)
        while len(self._sessions) > _MOST_NAMES:
            self._sessions.popitem(last=False)
        async with session.turn:
            answer = await self._answer(session, params)
            return types.CallToolResult(
                content=[part async for part in _contents(answer.result)],
                is_error=outcome_of(answer.result) is Outcome.TOOL_ERROR,
            )

    async def _answer(self, session: _Session, params: types.CallToolRequestParams) -> Answer:
        arguments = params.arguments or {}
        try:
            if session.name is None:
                session.name = self._table.open(Opening())
            calling = Calling(session.number + 1, params.name, arguments, deadline_s=self._call_s, wait_s=2 * self._call_s)
            answer = await self._table.call(session.name, calling)
        except Rejected as rejected:
            raise MCPError(types.INTERNAL_ERROR, f"{rejected.failure.fault}: {rejected.failure.text}") from None
        finally:
            # a call that its client gave up still runs, and has its number
            if session.name is not None:
                session.number = self._table.last_number(session.name)
        assert answer is not None  # it ends before `wait_s`
        return answer


def _parts(result: Result) -> Iterator[str | ImageBlob]:
    """Texts and images in the order in which they are read."""
    match result:
        case Refused():
            yield result.text
        case PythonResult() | ContentResult():
            for part in result.parts:
                yield result.images[part] if isinstance(part, int) else part
        case TextSearchResult():
            yield "\n\n".join(f"{page.title}\n{page.link}\n{page.snippet}" for page in result.pages) or "No results."
        case ImageSearchResult():
            if not result.pages:
                yield "No results."
            for page in result.pages:
                yield f"{page.title}\n{page.link}"
                if page.image is not None:
                    yield page.image
        case Observation():
            texts = result.text.split("<image>")
            for number, text in enumerate(texts):
                yield text
                if number < len(texts) - 1 and number < len(result.images):
                    yield result.images[number]
            yield from result.images[len(texts) - 1 :]


async def _contents(result: Result) -> AsyncIterator[types.TextContent | types.ImageContent]:
    for part in _parts(result):
        if isinstance(part, str):
            if part:
                yield types.TextContent(text=part.encode("utf-8", "replace").decode("utf-8"))  # it has no half characters
        else:
            yield await asyncio.to_thread(_image_content, part)


def _image_content(image: ImageBlob) -> types.ImageContent:
    try:
        with Image.open(io.BytesIO(image.data)) as opened:
            kind = opened.get_format_mimetype()
    except (UnidentifiedImageError, OSError, ValueError):
        kind = None
    return types.ImageContent(data=base64.b64encode(image.data).decode(), mime_type=kind or "application/octet-stream")
