"""The tools of a server over MCP, used by the official client."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, ImageContent, TextContent
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from tool_servers import TOKEN, HeldToolbox, config, printed, serving

from metis_fast.errors import InfrastructureError
from metis_fast.tools.results import (
    ContentResult,
    ImageSearchResult,
    Page,
    PythonResult,
    SeenPage,
    TextSearchResult,
)
from metis_fast.tools.server.sessions import SessionTable
from metis_fast.types import ImageBlob, Observation, Outcome


@asynccontextmanager
async def connected(url: str, mode: str = "auto") -> AsyncIterator[Client]:
    """A session of MCP, which brings the token."""
    http = httpx2.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False, timeout=30)
    async with http, Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as client:
        yield client


def over(own: HeldToolbox, use: Callable[[str, SessionTable], Coroutine[Any, Any, None]], **serve: object) -> None:
    """Run `use` with the address and the sessions of a server."""
    with serving(own, config(serve=serve), TOKEN) as (url, table):
        asyncio.run(use(url, table))


def text_of(result: CallToolResult) -> str:
    return "".join(part.text for part in result.content if isinstance(part, TextContent))


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_session_of_mcp_is_a_session_of_the_tools(mode: str):
    own = HeldToolbox()

    async def use(url: str, table: SessionTable) -> None:
        async with connected(url, mode) as one, connected(url, mode) as two:
            tools = (await one.list_tools()).tools
            assert [(tool.name, tool.description) for tool in tools] == [("python", "Runs code.")]
            assert tools[0].input_schema["properties"] == {"code": {"type": "string"}}
            assert len(table) == 0
            for client, number in ((one, 1), (one, 2), (two, 1), (one, 3)):
                result = await client.call_tool("python", {"code": "x"})
                assert text_of(result) == f"{number} x" and not result.is_error
            assert len(table) == 2
        assert len(table) == own.num_open == 0

    over(own, use)


def test_calls_of_a_session_at_the_same_time_run_one_after_the_other():
    own = HeldToolbox()

    async def use(url: str, table: SessionTable) -> None:
        async with connected(url) as client:
            results = await asyncio.gather(*(client.call_tool("python", {"code": f"{i}"}) for i in range(4)))
            assert sorted(int(text_of(one).split()[0]) for one in results) == [1, 2, 3, 4]

    over(own, use)


def test_what_tools_answer_in_texts_and_images(picture: Callable[..., ImageBlob]):
    image = picture(0)
    jpeg = ImageBlob.of(b"no image")
    answers = {
        "python": PythonResult(("a", 0, "b"), "ab", "", (image,), True),
        "wrong": PythonResult(("oops",), "", "oops", (), False),
        "text": TextSearchResult("q", (Page(1, "title", "link", "what it says"), Page(2, "t", "l", ""))),
        "none": TextSearchResult("q", ()),
        "images": ImageSearchResult((SeenPage("title", "link", image), SeenPage("t", "l", None))),
        "own": ContentResult(("a", 0), (jpeg,), False),
        "observed": Observation("a<image>b", (image, image), Outcome.TOOL_RESULT),
        "half": printed("\ud800"),
    }
    shown = ImageContent(data=base64.b64encode(image.data).decode(), mime_type="image/png")
    other = ImageContent(data=base64.b64encode(jpeg.data).decode(), mime_type="application/octet-stream")
    wanted = {
        "python": (["a", shown, "b"], False),
        "wrong": (["oops"], True),
        "text": (["title\nlink\nwhat it says\n\nt\nl\n"], False),
        "none": (["No results."], False),
        "images": (["title\nlink", shown, "t\nl"], False),
        "own": (["a", other], True),
        "observed": (["a", shown, "b", shown], False),
        "half": (["?"], False),
    }

    async def use(url: str, table: SessionTable) -> None:
        async with connected(url) as client:
            for code, (parts, is_error) in wanted.items():
                result = await client.call_tool("python", {"code": code})
                assert result.content == [TextContent(text=one) if isinstance(one, str) else one for one in parts], code
                assert result.is_error is is_error
            unknown = await client.call_tool("shell", {})
            assert unknown.is_error and "no tool" in text_of(unknown)

    over(HeldToolbox(answers.__getitem__), use)


def test_images_that_are_larger_than_an_event_arrive(picture: Callable[..., ImageBlob]):
    image = picture(0, 1200, 900)
    assert len(image.data) > 2 << 20

    async def use(url: str, table: SessionTable) -> None:
        async with connected(url) as client:
            (part,) = (await client.call_tool("python", {"code": ""})).content
            assert isinstance(part, ImageContent) and base64.b64decode(part.data) == image.data

    over(HeldToolbox(lambda code: printed(code, [image])), use)


def test_a_failure_of_ours_is_an_error_of_the_protocol_and_never_a_result():
    def answer(code: str) -> Observation:
        raise InfrastructureError("the sandbox died")

    async def use(url: str, table: SessionTable) -> None:
        async with connected(url) as client:
            with pytest.raises(MCPError, match="the sandbox died"):
                await client.call_tool("python", {"code": ""})

    over(HeldToolbox(answer), use)


def test_a_session_whose_tools_ended_is_not_empty_but_lost():
    own = HeldToolbox()

    async def use(url: str, table: SessionTable) -> None:
        async with connected(url) as client:
            await client.call_tool("python", {"code": "x = 1"})
            await table.end(next(iter(table._sessions)))
            for _ in range(2):
                with pytest.raises(MCPError, match="no session"):
                    await client.call_tool("python", {"code": "x"})

    over(own, use)
    assert own.ran == ["x = 1"]


def test_a_full_server_says_so():
    async def use(url: str, table: SessionTable) -> None:
        async with connected(url) as one, connected(url) as two:
            await one.call_tool("python", {"code": ""})
            with pytest.raises(MCPError, match="busy"):
                await two.call_tool("python", {"code": ""})
            await table.end(next(iter(table._sessions)))
            assert text_of(await two.call_tool("python", {"code": "x"})) == "1 x"

    with serving(HeldToolbox(), config(serve={"max_sessions": 2}), TOKEN) as (url, table):
        table._config = table._config.model_copy(update={"max_sessions": 1})  # of tools; MCP has room for both
        asyncio.run(use(url, table))


def test_without_the_token_there_is_no_session():
    own = HeldToolbox()

    async def use(url: str, table: SessionTable) -> None:
        http = httpx2.AsyncClient(trust_env=False)
        with pytest.RaisesGroup(MCPError, flatten_subgroups=True):
            async with http, Client(streamable_http_client(f"{url}/mcp", http_client=http)):
                pass
        assert table._metrics.registry.get_sample_value("metis_tools_refused_total", {"fault": "unauthorized"})

    over(own, use)
    assert own.num_open == 0


def test_the_revision_without_sessions_is_not_served():
    headers = {
        "Authorization": f"Bearer {TOKEN}",
        "Accept": "application/json, text/event-stream",
        "Mcp-Protocol-Version": "2026-07-28",
        "Mcp-Method": "tools/call",
        "Mcp-Name": "python",
    }
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {},
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    }
    own = HeldToolbox()
    with serving(own, config(), TOKEN) as (url, _), httpx2.Client(base_url=url, headers=headers, trust_env=False) as http:

        def ask(method: str, **params: object) -> dict[str, Any]:
            body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {**params, "_meta": meta}}
            return http.post("/mcp", json=body, headers={"Mcp-Method": method}).json()

        assert ask("server/discover")["result"]["supportedVersions"] == list(HANDSHAKE_PROTOCOL_VERSIONS)
        assert "initialize" in ask("tools/call", name="python", arguments={"code": ""})["error"]["message"]
    assert own.ran == []
