"""Tool servers in a thread of the test's process, and a way to them on which connections break."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import uvicorn

from metis_fast.config import ToolsConfig
from metis_fast.errors import ToolSetupError
from metis_fast.http_serving import address, listen
from metis_fast.tools.protocol import NO_EXTRA, Toolbox, ToolSpec
from metis_fast.tools.results import PythonResult, Refusal, Refused, ToolResult
from metis_fast.tools.server.app import make_app
from metis_fast.tools.server.client import ServerToolbox
from metis_fast.tools.server.sessions import SessionTable
from metis_fast.types import ImageBlob, Observation

TOKEN = "a-token-of-32-signs-0123456789ab"


def config(url: str = "", serve: Mapping[str, object] | None = None, **server: object) -> ToolsConfig:
    """With `python` alone; waits are short."""
    quick = {"url": url, "token_env": "", "timeout_s": 20.0, "connect_s": 5.0, "retries": 2, **server}
    return ToolsConfig.model_validate({"enabled": ["python"], "server": quick, "serve": {"token_env": "", **(serve or {})}})


def printed(text: str, images: Sequence[ImageBlob] = ()) -> PythonResult:
    """Of code that printed a text and showed images."""
    return PythonResult((text, *range(len(images))), text, "", tuple(images), True)


class HeldToolbox:
    """Its one tool, `python`, counts the calls of a session and answers with their number and the code; while `held` it waits.

    ran: the code of every call that began, of all sessions. num_open: sessions that were opened and not closed.
    answer: gives the result instead, or raises.
    """

    def __init__(self, answer: Callable[[str], ToolResult | Observation] | None = None) -> None:
        self.answer = answer
        self.held = threading.Event()
        self.ran: list[str] = []
        self.num_open = 0
        self.prompts: list[tuple[Sequence[ImageBlob], Mapping[str, object], Sequence[tuple[int, int]]]] = []

    @property
    def names(self) -> Sequence[str]:
        """The one tool."""
        return ("python",)

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """The one tool."""
        return (ToolSpec("python", "Runs code.", {"type": "object", "properties": {"code": {"type": "string"}}}),)

    def session(
        self, images: Sequence[ImageBlob], extra: Mapping[str, object] = NO_EXTRA, seen: Sequence[tuple[int, int]] = ()
    ) -> HeldSession:
        """Tools for one rollout."""
        self.prompts.append((images, extra, seen))
        self.num_open += 1
        return HeldSession(self)

    def close(self) -> None:
        """Nothing to stop."""


class HeldSession:
    """Of a `HeldToolbox`."""

    def __init__(self, toolbox: HeldToolbox) -> None:
        self._toolbox, self._calls, self._open = toolbox, 0, True

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """Count, wait, answer."""
        assert self._open
        if name != "python":
            return Refused(f"There is no tool {name!r}.", Refusal.NO_TOOL, name)
        code = str(arguments["code"])
        self._toolbox.ran.append(code)
        self._calls += 1
        while self._toolbox.held.is_set():
            await asyncio.sleep(0.005)
        return self._toolbox.answer(code) if self._toolbox.answer is not None else printed(f"{self._calls} {code}")

    async def close(self) -> None:
        """May be called twice."""
        if self._open:
            self._open = False
            self._toolbox.num_open -= 1


@contextmanager
def serving(toolbox: Toolbox, settings: ToolsConfig, token: str = "") -> Iterator[tuple[str, SessionTable]]:
    """Address of a server over loopback, and its sessions; it ends with the context."""
    with listen("tools.serve", "127.0.0.1", 0, ToolSetupError) as listening:
        app = make_app(toolbox, settings, token)
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=5, loop="asyncio")
        )
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started and thread.is_alive():
                threading.Event().wait(0.005)
            assert server.started
            yield address(listening), app.state.table
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def client_of(toolbox: Toolbox) -> Iterator[ServerToolbox]:
    """A client of a server over `toolbox`."""
    with serving(toolbox, config()) as (url, _):
        yield ServerToolbox(config(url))


async def run_code(session: object, code: str) -> str:
    """What a call of `python` printed."""
    result = await session.call("python", {"code": code})  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(result, PythonResult), result
    return result.stdout


class BrokenWay:
    """A way to a server on which connections are lost. Of the next request to a path that ends as `path` does:

    cut: "request": it does not arrive; "reply": it arrives, and its reply does not; "": all goes through.
    """

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target = host, int(port)
        self.cut = ""
        self.path = "/calls"
        self.num_cut = 0

    @contextmanager
    def open(self) -> Iterator[str]:
        """Its address."""
        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(asyncio.start_server(self._pass_on, "127.0.0.1", 0))
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            loop.call_soon_threadsafe(server.close)
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
            loop.call_soon_threadsafe(loop.call_later, 0.05, loop.stop)
            thread.join()
            loop.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            back, upstream = await asyncio.open_connection(*self._target)
            while True:
                request = await _message(reader)
                path = request.split(b" ", 2)[1].decode()
                cut, self.cut = (self.cut, "") if path.endswith(self.path) else ("", self.cut)
                self.num_cut += cut != ""
                if cut == "request":
                    return
                upstream.write(request)
                reply = await _message(back)
                if cut == "reply":
                    return
                writer.write(reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # one of both ends is gone
        finally:
            for end in (writer, upstream):
                if end is not None:
                    end.close()


async def _message(reader: asyncio.StreamReader) -> bytes:
    """Head and body of a request or reply, which states its length."""
    head = await reader.readuntil(b"\r\n\r\n")
    sizes = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head + await reader.readexactly(int(sizes[0]) if sizes else 0)
