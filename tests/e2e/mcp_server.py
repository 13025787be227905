"""An MCP server made with the official SDK, with every kind of answer, on its standard streams or, with a port, over HTTP.

Run as: mcp_server.py [PORT TOKEN].
"""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import Any

from mcp import MCPError
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import INTERNAL_ERROR, INVALID_PARAMS, EmbeddedResource, ImageContent, TextContent, TextResourceContents

server = MCPServer("faults")
calls = 0


def png(size: int = 20) -> bytes:
    from PIL import Image as Picture

    buffer = BytesIO()
    Picture.new("RGB", (size, size), "red").save(buffer, "PNG")
    return buffer.getvalue()


@server.tool()
def count() -> str:
    """Counts the calls of its process."""
    global calls
    calls += 1
    return str(calls)


@server.tool()
def add(a: int, b: int = 1) -> int:
    """Adds."""
    return a + b


@server.tool()
def long(size: int) -> str:
    return "a" * size + "<image>"


@server.tool(structured_output=False)
def draw(number: int = 1) -> list[Any]:
    return ["before", *[Image(data=png(), format="png") for _ in range(number)], "after", "all"]


@server.tool(structured_output=False)
def resource() -> list[Any]:
    text = TextResourceContents(uri="file:///a.txt", text="from a file")
    return [EmbeddedResource(type="resource", resource=text), TextContent(type="text", text="and more")]


@server.tool(structured_output=False)
def bad_image(data: str) -> list[Any]:
    return [ImageContent(type="image", data=data, mime_type="image/png")]


@server.tool()
def wrong() -> str:
    raise ToolError("there is no such street")


@server.tool()
def crash() -> str:
    raise KeyError("street")


@server.tool()
def overloaded() -> str:
    raise ToolError("the database is overloaded")


@server.tool()
def refuse(inside: bool) -> str:
    raise MCPError(INTERNAL_ERROR if inside else INVALID_PARAMS, "not like this")


@server.tool()
def hang() -> str:
    time.sleep(3600)
    return ""


class _Guarded:
    """Lets nobody in without the token."""

    def __init__(self, app: Callable[..., Awaitable[None]], token: str) -> None:
        self.app, self.token = app, token.encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and dict(scope["headers"]).get(b"authorization") != b"Bearer " + self.token:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, send)


def main(port: int = 0, token: str = "") -> None:
    if port:
        import uvicorn  # here, for the sessions that do without

        uvicorn.run(_Guarded(server.streamable_http_app(), token), port=port, log_level="warning")
    else:
        server.run("stdio")


if __name__ == "__main__":
    if sys.argv[1:]:
        main(int(sys.argv[1]), sys.argv[2])
    else:
        main()
