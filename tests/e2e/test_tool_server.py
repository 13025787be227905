"""`metis-fast tools serve` with the real sandbox: many clients at once, its end, its death, and a run that uses it."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx2
import psutil
import pytest
from harness import Command, Ended, error_line, run, run_state, succeed
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from PIL import Image

from metis_fast.config import ToolsConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.tools import open_toolbox
from metis_fast.tools.result_tree import images_of
from metis_fast.tools.results import PythonResult
from metis_fast.tools.server.client import ServerToolbox
from metis_fast.types import ImageBlob

TOKEN = "0123456789abcdef0123456789abcdef"
SETTINGS = ["tools.enabled=python", "tools.python.timeout_s=60", "tools.serve.port=0"]
START_S = 120.0


@pytest.fixture(scope="module", autouse=True)
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where there is none."""
    try:
        open_toolbox(ToolsConfig.model_validate({"enabled": ["python"]}), tmp_path_factory.mktemp("probe")).close()
    except ToolSetupError as error:
        pytest.skip(str(error))


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A config that changes nothing."""
    path = tmp_path / "empty.yaml"
    path.write_text("{}\n")
    return path


def set_token(token: str) -> None:
    """In the environment of this process."""
    os.environ["METIS_TOOLS_TOKEN"] = token


class Server:
    """One that runs in a process of its own."""

    def __init__(self, config: Path, folder: Path, *settings: str, token: str = "") -> None:
        self.command = Command(["tools", "serve", config, *SETTINGS, *settings], folder, before=partial(set_token, token))
        latest = time.monotonic() + START_S
        while not (found := re.match(r"tool server: (http://\S+)\n", self.command.read("out"))):
            assert self.command.alive and time.monotonic() < latest, self.command.read("err")
            time.sleep(0.02)
        self.url = found[1]

    def toolbox(self, **server: object) -> ServerToolbox:
        """A client of it."""
        settings = {"url": self.url, "timeout_s": 120, "retries": 0, **server}
        return ServerToolbox(
            ToolsConfig.model_validate({"enabled": ["python"], "python": {"timeout_s": 60}, "server": settings})
        )

    def value(self, metric: str) -> float:
        """Of its metrics."""
        text = httpx2.get(f"{self.url}/metrics", trust_env=False).text
        return sum(float(line.split()[1]) for line in text.splitlines() if re.match(rf"{metric}(\{{| )", line))

    def stop(self) -> Ended:
        """Ask it to end, as a cluster does, and wait."""
        os.kill(self.command.pid, signal.SIGTERM)
        return self.command.wait()

    def kill(self) -> Ended:
        """Without a word."""
        with suppress(ProcessLookupError):
            os.kill(self.command.pid, signal.SIGKILL)
        return self.command.wait()


@contextmanager
def running(config: Path, folder: Path, *settings: str, token: str = "") -> Iterator[Server]:
    server = Server(config, folder, *settings, token=token)
    try:
        yield server
    finally:
        if server.command.alive:
            server.kill()


async def printed(session: object, code: str) -> str:
    result = await session.call("python", {"code": code})  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(result, PythonResult) and result.ok, result
    return result.stdout.strip()


# -- many clients ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What clients saw. wrong: replies that were another client's or of another call."""

    calls: int = 0
    sessions: int = 0
    wrong: list[str] = field(default_factory=list)


def coloured(number: int) -> ImageBlob:
    """An image that no other client has."""
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (number % 256, number // 256, 77)).save(buffer, "PNG")
    return ImageBlob.of(buffer.getvalue())


async def client(toolbox: ServerToolbox, number: int, until: float, tally: Tally) -> None:
    """Sessions of ten calls, one after the other. Each call's answer is known beforehand and is nobody else's."""
    colour = (number % 256, number // 256, 77)
    while time.monotonic() < until:
        session = toolbox.session((coloured(number),))
        try:
            await printed(session, f"me, count = {number}, 0")
            for count in range(1, 10):
                result = await session.call("python", {"code": "count += 1; print(me, count); show(image_1)"})
                tally.calls += 1
                colours = [Image.open(io.BytesIO(image.data)).getpixel((5, 5)) for image in images_of(result)]
                text = result.stdout if isinstance(result, PythonResult) else ""
                if (text, colours) != (f"{number} {count}\n", [colour]):
                    tally.wrong.append(f"client {number}, call {count}: {result}")
                if time.monotonic() >= until:
                    break
        finally:
            await session.close()
        tally.sessions += 1


def many_clients(server: Server, num: int, seconds: float) -> Tally:
    tally = Tally()
    toolbox = server.toolbox()

    async def go() -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(client(toolbox, number, until, tally) for number in range(num)))

    asyncio.run(go())
    return tally


@pytest.mark.parametrize(("num", "seconds"), [(24, 2.0), pytest.param(256, 120.0, marks=pytest.mark.slow)])
def test_many_clients_at_once_lose_no_reply_and_see_nothing_of_each_other(
    tmp_path: Path, empty: Path, num: int, seconds: float
) -> None:
    with running(empty, tmp_path / "server") as server:
        tally = many_clients(server, num, seconds)
        assert not tally.wrong, tally.wrong[:3]
        assert tally.calls >= num and tally.sessions >= num  # else this shows nothing
        assert server.value("metis_tools_calls_total") == tally.calls + tally.sessions
        assert server.value("metis_tools_sessions") == server.value("metis_tools_queue") == 0
        print(f"{num} clients, {seconds:g} s: {tally.calls} calls in {tally.sessions} sessions")
        ended = server.stop()
    assert ended.code == 0 and not ended.orphans and not ended.scratch and not ended.err, ended


# -- its end --------------------------------------------------------------------------------------------------------------


def test_calls_that_run_when_it_is_asked_to_end_are_answered(tmp_path: Path, empty: Path) -> None:
    with running(empty, tmp_path / "server") as server:
        toolbox = server.toolbox()

        async def go() -> Ended:
            sessions = [toolbox.session(()) for _ in range(12)]
            for number, session in enumerate(sessions):
                await printed(session, f"me = {number}")
            calls = [
                asyncio.create_task(printed(session, "import time; time.sleep(0.5); print(me)")) for session in sessions[:10]
            ]
            while await asyncio.to_thread(server.value, "metis_tools_queue") < 10:
                await asyncio.sleep(0.01)
            os.kill(server.command.pid, signal.SIGTERM)
            while (await asyncio.to_thread(httpx2.get, f"{server.url}/health", trust_env=False)).json()["status"] == "ok":
                await asyncio.sleep(0.01)
            for late in (sessions[10], toolbox.session(())):
                with pytest.raises(InfrastructureError, match="draining"):
                    await printed(late, "print(1)")
            assert await asyncio.gather(*calls) == [str(number) for number in range(10)]
            ended = await asyncio.to_thread(server.command.wait)
            for session in sessions:
                await session.close()
            return ended

        ended = asyncio.run(go())
    assert ended.code == 0 and not ended.orphans and not ended.scratch and not ended.err, ended


def test_it_ends_while_sessions_of_mcp_are_open(tmp_path: Path, empty: Path) -> None:
    with running(empty, tmp_path / "server") as server:

        async def go() -> Ended:
            http = httpx2.AsyncClient(trust_env=False, timeout=60)
            async with http, Client(streamable_http_client(f"{server.url}/mcp", http_client=http)) as client:
                await client.call_tool("python", {"code": "x = 20"})
                shown = await client.call_tool("python", {"code": "print(x); show(Image.new('RGB', (8, 8)))"})
                assert [part.type for part in shown.content] == ["text", "image"] and not shown.is_error
                wrong = await client.call_tool("python", {"code": "1 / 0"})
                assert wrong.is_error
                return await asyncio.to_thread(server.stop)

        ended = asyncio.run(go())
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended


@pytest.mark.parametrize("again", [False, True])
def test_its_end_is_bounded_whatever_runs(tmp_path: Path, empty: Path, again: bool) -> None:
    """again: a second signal; else `drain_s` is over."""
    limit = "tools.serve.drain_s=600" if again else "tools.serve.drain_s=0.5"
    with running(empty, tmp_path / "server", limit) as server:
        toolbox = server.toolbox()

        async def go() -> Ended:
            session = toolbox.session(())
            call = asyncio.create_task(printed(session, "while True: pass"))
            while await asyncio.to_thread(server.value, "metis_tools_queue") < 1:
                await asyncio.sleep(0.01)
            os.kill(server.command.pid, signal.SIGTERM)
            if again:
                while (await asyncio.to_thread(httpx2.get, f"{server.url}/health", trust_env=False)).json()["status"] == "ok":
                    await asyncio.sleep(0.01)
                os.kill(server.command.pid, signal.SIGTERM)
            ended = await asyncio.to_thread(server.command.wait)
            with pytest.raises(InfrastructureError):
                await call
            await session.close()
            return ended

        ended = asyncio.run(go())
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended


def test_a_server_that_is_killed_is_our_failure_and_sessions_go_on_with_the_next_one(tmp_path: Path, empty: Path) -> None:
    with running(empty, tmp_path / "first") as server:
        toolbox = server.toolbox(retries=20)
        family: list[psutil.Process] = []

        async def one(number: int, dead: asyncio.Event) -> list[str]:
            """What a client sees: calls before, the failure, a call in the server that comes after."""
            session = toolbox.session(())
            seen = [await printed(session, f"me = {number}; print(me)")]
            try:
                for count in range(10_000):
                    assert await printed(session, f"print(me, {count})") == f"{number} {count}"
            except InfrastructureError as error:
                seen.append(type(error).__name__)
            await dead.wait()
            seen.append(await printed(session, f"print('me' in globals(), {number})"))
            await session.close()
            return seen

        async def go(again: Callable[[], Server]) -> list[list[str]]:
            dead = asyncio.Event()
            clients = [asyncio.create_task(one(number, dead)) for number in range(32)]
            while await asyncio.to_thread(server.value, "metis_tools_calls_total") < 100:
                await asyncio.sleep(0.01)
            family.extend(server.command.family())
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(again)
            dead.set()
            return await asyncio.gather(*clients)

        port = server.url.rpartition(":")[2]
        second: list[Server] = []

        def again() -> Server:
            second.append(Server(empty, tmp_path / "second", f"tools.serve.port={port}"))
            return second[0]

        try:
            seen = asyncio.run(go(again))
        finally:
            ended = second[0].stop()
    # a lost connection is tried again, and whoever answers then does not know the session
    assert seen == [[str(number), "SessionLost", f"False {number}"] for number in range(32)]
    assert ended.code == 0 and not ended.orphans, ended
    assert family and not [process for process in family if process.is_running() and process.status() != "zombie"]


# -- its start ------------------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_where_one_is_set(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(empty, tmp_path / "server", "tools.serve.host=0.0.0.0", token=TOKEN) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        for wrong in ("", TOKEN[::-1]):
            monkeypatch.setenv("METIS_TOOLS_TOKEN", wrong)
            with pytest.raises(ToolSetupError, match="refuses the token"):
                server.toolbox()
        monkeypatch.setenv("METIS_TOOLS_TOKEN", TOKEN)
        toolbox = server.toolbox()

        async def go() -> str:
            session = toolbox.session(())
            try:
                return await printed(session, "import os; print(sorted(os.environ))")
            finally:
                await session.close()

        assert "METIS" not in asyncio.run(go())
        ended = server.stop()
    assert ended.code == 0 and TOKEN not in ended.out + ended.err


def test_what_keeps_it_from_serving_is_said_in_one_line(tmp_path: Path, empty: Path) -> None:
    command = ["tools", "serve", empty, *SETTINGS]
    assert "no token is set" in error_line(run([*command, "tools.serve.host=0.0.0.0"], tmp_path / "token"))
    with running(empty, tmp_path / "server") as server:
        port = server.url.rpartition(":")[2]
        assert "Address already in use" in error_line(run([*command, f"tools.serve.port={port}"], tmp_path / "port"))
    assert "tools.text_search.corpus" in error_line(run([*command, "tools.enabled=text_search"], tmp_path / "corpus"))


# -- a run ----------------------------------------------------------------------------------------------------------------


def test_a_run_with_a_tool_server_gives_the_numbers_of_one_with_its_own_tools(demo: Path, tmp_path: Path) -> None:
    serve = Command(["tools", "serve", demo / "config.yaml", "tools.serve.port=0"], tmp_path / "server")
    try:
        while not (found := re.match(r"tool server: (http://\S+)\n", serve.read("out"))):
            assert serve.alive, serve.read("err")
            time.sleep(0.02)
        both = ["workers.tools=1", f"tools.server.url={found[1]}"]
        said = error_line(run(["train", demo / "config.yaml", f"run.dir={tmp_path / 'none'}", *both], tmp_path / "both"))
        assert "choose one" in said
        succeed(["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", both[1]], tmp_path / "process")
        os.kill(serve.pid, signal.SIGTERM)
        assert serve.wait().code == 0
    finally:
        if serve.alive:
            os.kill(serve.pid, signal.SIGKILL)
            serve.wait()
    assert run_state(tmp_path / "run") == run_state(demo)
