"""Tools of MCP servers, through the official SDK. The only module that imports it.

Each rollout has a session of its own with each server whose tools it calls: a process for a command, a session of the protocol
for an address. What a server reports as an error of the call (`isError`) is the agent's; a server that dies, hangs or sends
what is no answer is a failure of ours, and the next session starts anew.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import httpx2
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import (
    INVALID_PARAMS,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
    Tool,
)

from metis_fast import pixels
from metis_fast.config import McpServerConfig
from metis_fast.errors import InfrastructureError, ToolSetupError, one_line
from metis_fast.machine import num_cores
from metis_fast.redaction import redact
from metis_fast.tools.arguments import Arguments, schema_problem
from metis_fast.tools.mcp_noise import Noise, count_in
from metis_fast.tools.protocol import MAX_CALL_IMAGES, ToolSpec
from metis_fast.tools.results import ContentResult
from metis_fast.tools.tool import ToolPrompt, shorten
from metis_fast.types import ImageBlob

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[\w./-]{1,128}", re.ASCII)  # of the specification
_MAX_PAGES = 100  # of a list of tools; a server that never ends it is at fault
_SLACK_S = 5.0  # beyond the SDK's own time-outs, which do not count what it waits to write
_CLOSE_S = 10.0  # the SDK gives a process about 6 s to end before it is killed
_SSE_READ_S = 300.0  # a stream of events may be silent so long before it is opened anew
_LONGEST_ERROR = 300  # characters


class _Failed(Exception):
    """A session that cannot go on; says why, in one line."""


class McpSource:
    """The tools of one server. A `ToolSource`."""

    def __init__(self, config: McpServerConfig, key: str, folder: Path, max_chars: int, tools: Sequence[Tool]) -> None:
        """key: dotted, of the setting. folder: in which a command is run. tools: as the server lists them.

        Raises:
            ToolSetupError: one that `config` names is not there, or one cannot be offered.
        """
        self.config, self.key, self.folder, self.max_chars = config, key, folder, max_chars
        listed = {tool.name: tool for tool in tools}
        if missing := [name for name in config.tools if name not in listed]:
            raise ToolSetupError(
                f"{key}.tools names {missing[0]!r}, which the server does not have; it has {', '.join(listed)}"
            )
        if not listed:
            raise ToolSetupError(f"{key}: {self.what} has no tools; remove it")
        self.theirs = {config.prefix + name: name for name in (config.tools or listed)}
        self._specs = tuple(_spec(key, name, listed[theirs]) for name, theirs in self.theirs.items())
        self._lock = threading.Lock()
        self._connections: dict[_Connection, asyncio.AbstractEventLoop] = {}
        self._gate: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None  # a semaphore belongs to its loop
        self._told_of_noise = False

    @staticmethod
    def open(config: McpServerConfig, key: str, folder: Path, max_chars: int) -> McpSource:
        """Start a session, ask for the tools and end it.

        Raises:
            ToolSetupError: no session, a variable that is not set, or see above.
        """
        environment(config, key)
        found: list[Tool] = []
        failed: list[str] = []

        def ask() -> None:
            try:
                found.extend(asyncio.run(_tools(config, folder)))
            except _Failed as error:
                failed.append(str(error))

        thread = threading.Thread(target=ask, name="mcp", daemon=True)  # the caller's may run an event loop
        thread.start()
        thread.join()
        if failed:
            raise ToolSetupError(f"{key}: {failed[0]}; see that {_name(config)} runs and speaks MCP")
        return McpSource(config, key, folder, max_chars, found)

    @property
    def what(self) -> str:
        """The server, for errors."""
        return _name(self.config)

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """As the server listed them when the run started."""
        return self._specs

    def session(self, prompt: ToolPrompt) -> McpSession:
        """See `ToolSource`. Nothing of the prompt goes to a server."""
        return McpSession(self)

    def close(self) -> None:
        """End the sessions that are open."""
        with self._lock:
            opened = list(self._connections.items())
        for connection, loop in opened:
            with contextlib.suppress(RuntimeError):  # a loop that is closed has ended its tasks
                loop.call_soon_threadsafe(connection.abandon)

    def gate(self) -> asyncio.Semaphore:
        """Limits the sessions that start at the same time: a step's rollouts together would start none in time."""
        loop = asyncio.get_running_loop()
        if self._gate is None or self._gate[0] is not loop:
            self._gate = (loop, asyncio.Semaphore(2 * num_cores()))
        return self._gate[1]

    def keep(self, connection: _Connection) -> None:
        """Remember one that is open."""
        with self._lock:
            self._connections[connection] = asyncio.get_running_loop()

    def forget(self, connection: _Connection) -> None:
        """It has ended."""
        with self._lock:
            self._connections.pop(connection, None)
            tells = connection.noise.lines > 0 and not self._told_of_noise
            self._told_of_noise = self._told_of_noise or tells
        if tells:  # of one session: each would say the same
            _LOG.warning("%s: %s; have it write them to stderr", self.what, connection.noise)


class McpSession:
    """One rollout's session with a server, from its first call on. See `ToolSession`."""

    def __init__(self, source: McpSource) -> None:
        self._source = source
        self._connection: _Connection | None = None

    async def call(self, name: str, arguments: Mapping[str, object]) -> ContentResult:
        """See `ToolSession.call`."""
        source = self._source
        try:
            if self._connection is None:
                await self._start()
            connection = self._connection
            assert connection is not None
            await connection.ready()  # a call before this one may have been cancelled meanwhile
            result = await connection.call(source.theirs[name], arguments)
            if crash := _crash(result, source.theirs[name], source.config.failures):
                raise _Failed(f"it failed in the server: {_redacted(crash, source.config)}{connection.last_words()}")
            if result.is_error:
                await connection.check_offer(source.theirs[name], arguments)
            return await _content(result, source.max_chars)
        except _Failed as error:
            await self.close()  # what it keeps is lost, or not to be trusted
            raise InfrastructureError(f"tool {name} of {source.what}: {error}") from error

    async def _start(self) -> None:
        gate, limit = self._source.gate(), self._source.config.queue_s
        try:
            async with asyncio.timeout(limit):
                await gate.acquire()
        except TimeoutError:
            raise _Failed(f"no turn to start a session within {limit:g} s (queue_s)") from None
        try:
            self._connection = _Connection(self._source)
            await self._connection.ready()
        finally:
            gate.release()

    async def close(self) -> None:
        """End the session; a process is gone when this returns."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


class _Connection:
    """An open session. The SDK's client has to be opened and closed by one and the same task, which runs here; calls come from
    any."""

    def __init__(self, source: McpSource) -> None:
        self._source = source
        self._ending = asyncio.Event()
        self._client: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._log = _stderr()
        self.noise = Noise()
        self._task = asyncio.create_task(self._serve(), name=f"session with {source.what}")
        source.keep(self)

    async def _serve(self) -> None:
        try:
            count_in(self.noise)
            async with _client(self._source.config, self._source.folder, self._log) as client:
                names = {tool.name for tool in await _listed(client)}
                if gone := [name for name in self._source.theirs.values() if name not in names]:
                    raise _Failed(f"the server no longer has {gone[0]}, which prompts offer")
                self._client.set_result(client)
                await self._ending.wait()
        except Exception as error:  # of the server, the network or the SDK, of many kinds and in groups
            if self._client.done():
                _LOG.debug("session with %s: %s", self._source.what, _said(error, self._source.config))
            else:
                self._client.set_exception(_Failed(f"no session ({_said(error, self._source.config)}){self.last_words()}"))
                self._client.exception()  # nobody may be waiting any more; that is no defect to be logged
        finally:
            self._client.cancel()
            self._log.close()
            self._source.forget(self)

    async def ready(self) -> None:
        """Raises: _Failed: there is no session."""
        limit = self._source.config.connect_s
        await asyncio.wait([self._client], timeout=limit + _SLACK_S)
        if not self._client.done():
            raise _Failed(f"no session within {limit:g} s (connect_s){self.last_words()}")
        if self._client.cancelled():
            raise _Failed("its session was ended")
        self._client.result()

    async def call(self, name: str, arguments: Mapping[str, object]) -> CallToolResult:
        """name: as the server knows it. Raises: _Failed: it did not answer."""
        limit = self._source.config.timeout_s
        if self._task.done():
            raise _Failed("its session has ended")
        client = self._client.result()
        try:
            async with asyncio.timeout(limit + _SLACK_S):
                return await client.session.call_tool(name, dict(arguments), read_timeout_seconds=limit)
        except MCPError as error:
            if error.code == INVALID_PARAMS:
                # older servers refuse so what their schema allows; they have listed the tool, so it is the arguments
                return CallToolResult(content=[TextContent(text=error.message)], is_error=True)
            raise _Failed(f"{_said(error, self._source.config)} (code {error.code}){self.last_words()}") from error
        except TimeoutError:
            raise _Failed(f"no answer within {limit:g} s (timeout_s){self.last_words()}") from None
        except Exception as error:  # as above: an answer that is none, or does not fit the tool's output schema
            raise _Failed(f"{_said(error, self._source.config)}{self.last_words()}") from error

    async def check_offer(self, name: str, arguments: Mapping[str, object]) -> None:
        """Whether the server still offers what prompts tell of, so that an error of a call can be the agent's.

        Raises:
            _Failed: it has no such tool any more, or one that does not take these arguments, which the schema of before does.
        """
        limit = self._source.config.connect_s
        try:
            async with asyncio.timeout(limit + _SLACK_S):
                listed = {tool.name: tool for tool in await _listed(self._client.result())}
        except TimeoutError:
            raise _Failed(f"no list of tools within {limit:g} s (connect_s) after an error") from None
        except Exception as error:  # as above
            raise _Failed(
                f"no list of tools after an error ({_said(error, self._source.config)}){self.last_words()}"
            ) from error
        if name not in listed:
            raise _Failed(f"the server no longer has {name}, which prompts offer")
        schema = dict(listed[name].input_schema)
        if schema_problem(schema) or Arguments(ToolSpec(name, "", schema)).problem(arguments):
            raise _Failed(f"the schema of {name} is no longer the one that prompts tell of; start the run again")

    def last_words(self) -> str:
        """What the server wrote last to stderr, and whether it wrote there what belongs there, for errors."""
        noise = f"; {self.noise}" if self.noise.lines else ""
        return noise + ("" if self._log.closed else _last_words(self._log, self._source.config))

    def abandon(self) -> None:
        """End it, from its loop, without waiting."""
        self._task.cancel()

    async def close(self) -> None:
        """End it; what does not end by itself is cancelled."""
        self._ending.set()
        if not self._client.done():  # still being opened
            self._task.cancel()
        await asyncio.wait([self._task], timeout=_CLOSE_S)
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CLOSE_S)
            _LOG.warning("the session with %s did not end by itself", self._source.what)


def environment(config: McpServerConfig, key: str) -> dict[str, str]:
    """What `config.env` stands for. key: dotted, of the setting.

    Raises:
        ToolSetupError: a variable that it or `token_env` names is not set.
    """
    for name in config.variables():
        if not os.environ.get(name):
            raise ToolSetupError(f"{key} needs the environment variable {name}, which is not set; set it")
    return {name: os.environ[text[1:]] if text.startswith("$") else text for name, text in config.env.items()}


@contextlib.asynccontextmanager
async def _client(config: McpServerConfig, folder: Path, log: TextIO) -> AsyncIterator[Client]:
    """A session that is open. log: takes what a command writes to stderr."""
    # "legacy": the handshake that every server knows, and the only one that gives a session
    if config.command:
        program, *rest = _tethered(config.command)
        own = environment(config, "tools.mcp")
        transport = stdio_client(StdioServerParameters(command=program, args=rest, env=own, cwd=folder), log)
        async with Client(transport, mode="legacy", read_timeout_seconds=config.connect_s) as client:
            yield client
        return
    headers = {"Authorization": f"Bearer {os.environ[config.token_env]}"} if config.token_env else {}
    timeout = httpx2.Timeout(config.connect_s, read=max(_SSE_READ_S, config.timeout_s + _SLACK_S))
    async with (
        httpx2.AsyncClient(headers=headers, timeout=timeout) as http,
        Client(
            streamable_http_client(config.url, http_client=http), mode="legacy", read_timeout_seconds=config.connect_s
        ) as client,
    ):
        yield client


def _tethered(command: Sequence[str]) -> Sequence[str]:
    """The command, with an end when this process dies without closing anything: a server that hangs would live on."""
    if not sys.platform.startswith("linux"):
        return command
    return (sys.executable, "-I", "-S", str(Path(__file__).with_name("tether.py")), str(os.getpid()), *command)


async def _tools(config: McpServerConfig, folder: Path) -> list[Tool]:
    """Of a session for this alone. Raises: _Failed: there is none."""
    count_in(Noise())  # a session of the run will tell
    with _stderr() as log:
        try:
            async with asyncio.timeout(config.connect_s + _SLACK_S), _client(config, folder, log) as client:
                return await _listed(client)
        except TimeoutError:
            raise _Failed(f"no list of tools within {config.connect_s:g} s (connect_s){_last_words(log, config)}") from None
        except Exception as error:  # of the server, the network or the SDK, of many kinds and in groups
            raise _Failed(f"{_said(error, config)}{_last_words(log, config)}") from error


async def _listed(client: Client) -> list[Tool]:
    tools: list[Tool] = []
    cursor: str | None = None
    for _ in range(_MAX_PAGES):
        page = await client.list_tools(cursor=cursor, cache_mode="bypass")
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return tools
    raise _Failed(f"its list of tools has more than {_MAX_PAGES} pages")


def _spec(key: str, name: str, tool: Tool) -> ToolSpec:
    if not _NAME.fullmatch(name):
        raise ToolSetupError(
            f"{key}: expected names of tools of letters, digits, _, -, . and /, got {name[:100]!r}; name those that you want "
            f"in {key}.tools"
        )
    if problem := schema_problem(tool.input_schema):
        raise ToolSetupError(
            f"{key}: the schema of {name} cannot be used: {problem}; name the tools that you want in {key}.tools"
        )
    return ToolSpec(name, (tool.description or tool.title or name).strip(), dict(tool.input_schema))


def _crash(result: CallToolResult, name: str, failures: Sequence[str]) -> str:
    """An error that is the server's own, not the agent's; empty where there is none. name: as the server knows the tool."""
    text = "\n".join(map(_text, result.content)) if result.is_error else ""
    # with this text and no more the SDK's servers report that the code of a tool has crashed
    ours = text == f"Error executing tool {name}" or any(re.search(pattern, text) for pattern in failures)
    return one_line(text)[:_LONGEST_ERROR] if text and ours else ""


async def _content(result: CallToolResult, max_chars: int) -> ContentResult:
    """Raises: _Failed: an image that is none."""
    parts: list[str | int] = []
    images: list[ImageBlob] = []
    left_out, cut, room = 0, 0, max_chars

    def say(text: str) -> None:
        nonlocal cut, room
        if not room:
            cut += len(text)
            return
        text = shorten(text, room)
        room = max(0, room - len(text))
        put(text)

    def put(text: str) -> None:
        if parts and isinstance(parts[-1], str):
            parts[-1] += f"\n{text}"
        else:
            parts.append(text)

    for block in result.content:
        if not isinstance(block, ImageContent):
            say(_text(block))
        elif len(images) == MAX_CALL_IMAGES:
            left_out += 1
        else:
            parts.append(len(images))
            images.append(await _image(block))
    if not parts and result.structured_content is not None:
        say(json.dumps(result.structured_content, ensure_ascii=False))
    if cut:
        put(f"[{cut} more characters cut]")
    if left_out:
        put(f"[{left_out} more images are not shown]")
    return ContentResult(tuple(parts), tuple(images), ok=not result.is_error)


def _text(block: ContentBlock) -> str:
    match block:
        case TextContent():
            return block.text
        case EmbeddedResource(resource=TextResourceContents() as resource):
            return resource.text
        case ResourceLink():
            return f"[{block.name}]({block.uri})"
        case _:
            return f"[{block.type} cannot be shown]"


async def _image(block: ImageContent) -> ImageBlob:
    try:
        data = base64.b64decode(block.data, validate=True)
    except binascii.Error:
        raise _Failed("it sent an image that is no base64") from None
    if problem := await asyncio.to_thread(pixels.problem, data):
        raise _Failed(f"it sent an image that cannot be used: {problem}")
    return ImageBlob.of(data)


def _name(config: McpServerConfig) -> str:
    return f"the MCP server {config.url or ' '.join(config.command)}"[:_LONGEST_ERROR]


def _stderr() -> TextIO:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _redacted(text: str, config: McpServerConfig) -> str:
    """Without what the server was given of the environment."""
    for name in config.variables():
        text = redact(text, os.environ.get(name, "").strip())
    return text


def _last_words(log: TextIO, config: McpServerConfig) -> str:
    """The last line that a command wrote to stderr."""
    size = os.fstat(log.fileno()).st_size
    lines = _redacted(os.pread(log.fileno(), 4096, max(0, size - 4096)).decode(errors="replace"), config).split("\n")
    last = next((one_line(line) for line in reversed(lines) if line.strip()), "")
    return f"; its last line: {last[:_LONGEST_ERROR]}" if last else ""


def _said(error: BaseException, config: McpServerConfig) -> str:
    """The first error in groups of them, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, _Failed):
        return str(error)
    said = _redacted(one_line(error), config)
    return (said if isinstance(error, MCPError) and said else f"{type(error).__name__}: {said}")[:_LONGEST_ERROR]
