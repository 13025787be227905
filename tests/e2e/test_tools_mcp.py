"""Tools of MCP servers: one that others wrote, and one that does everything wrong. Whose fault is what, and what is left."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest
from tool_calls import ask

from metis_fast.config import RolloutConfig, ToolsConfig, WorkersConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.model import Policy
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.episode import SampleKey, run_episode
from metis_fast.rollout.offer import Offer
from metis_fast.rollout.protocols import Compact, Metis
from metis_fast.testing.fakes import FakeEngine
from metis_fast.tools import open_toolbox
from metis_fast.tools.protocol import Toolbox
from metis_fast.tools.remote import RemoteToolbox, start_tool_workers
from metis_fast.tools.results import ContentResult, Refusal, Refused
from metis_fast.types import Observation, Outcome
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import LocalLauncher
from metis_fast.workers.worker import wait_ready

pytest.importorskip("mcp")
SERVER, TINY = (str(Path(__file__).with_name(name)) for name in ("mcp_server.py", "tiny_mcp_server.py"))
TIME = [sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC"]


def config(*servers: Mapping[str, object], **more: object) -> ToolsConfig:
    return ToolsConfig.model_validate({"enabled": [], "mcp": servers, **more})


def tiny(folder: Path, **more: object) -> dict[str, object]:
    return {"command": [sys.executable, "-S", TINY, str(folder)], **more}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toolbox]:
    server = {"command": [sys.executable, SERVER], "failures": ["overload(ed)?$"]}
    box = open_toolbox(config(server, max_output_chars=1000), tmp_path_factory.mktemp("server"))
    yield box
    box.close()
    assert not servers(SERVER)


def servers(part: object) -> list[psutil.Process]:
    """Processes with that in their command."""
    mine = psutil.Process().children(recursive=True)
    return [one for one in mine if one.is_running() and one.status() != "zombie" and str(part) in one.cmdline()]


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toolbox]:
    """Of the server that others wrote."""
    box = open_toolbox(config({"command": TIME}), tmp_path_factory.mktemp("clock"))
    yield box
    box.close()
    assert not servers("mcp_server_time")


def test_a_server_that_others_wrote(clock: Toolbox) -> None:
    assert set(clock.names) == {"get_current_time", "convert_time"}
    arguments = {"source_timezone": "Europe/Paris", "time": "12:30", "target_timezone": "Asia/Tokyo"}
    got, none, wrong = ask(
        clock,
        ("convert_time", arguments),
        ("convert_time", {"time": "12:30"}),
        ("convert_time", arguments | {"source_timezone": "Moon/Base"}),
    )
    assert isinstance(got, ContentResult) and got.ok
    (text,) = got.parts
    assert json.loads(str(text))["target"]["datetime"].split("T")[1][:5] in ("19:30", "20:30")
    assert isinstance(none, Refused) and none.why is Refusal.ARGUMENTS and "source_timezone" in none.text
    assert isinstance(wrong, ContentResult) and not wrong.ok and "Moon/Base" in str(wrong.parts)
    assert Compact().word(wrong).outcome is Outcome.TOOL_ERROR


def test_a_rollout_calls_a_server_that_its_prompt_tells_of(policy: Policy, make_prompt: Callable, clock: Toolbox) -> None:
    chat = Chat(policy.tokenizer, policy.images, Metis(), Offer(ToolsConfig(), clock.tools))
    call = json.dumps({"name": "get_current_time", "arguments": {"timezone": "Asia/Tokyo"}})
    engine = FakeEngine(policy.tokenizer, [[f"<tool_call>{call}</tool_call>", "<answer>noon</answer><|im_end|>"]])
    rollout = asyncio.run(run_episode(make_prompt(), 0, chat, engine, clock, RolloutConfig(), SampleKey(0, "a", 0)))
    assert rollout.outcome is Outcome.ANSWERED
    assert [turn.outcome for turn in rollout.turns] == [Outcome.TOOL_RESULT, Outcome.ANSWERED]
    assert "Asia/Tokyo" in rollout.turns[0].observation
    prompt = chat.decode(rollout.tokens[: rollout.prompt_len].tolist())
    assert "<tools>" in prompt and "get_current_time" in prompt and "convert_time" in prompt


def test_each_rollout_has_a_session_of_its_own(tmp_path: Path) -> None:
    box = open_toolbox(config(tiny(tmp_path)), tmp_path)

    async def story() -> None:
        sessions = [box.session(()) for _ in range(3)]
        await asyncio.gather(*(session.call("count", {}) for session in sessions))
        again = await asyncio.gather(*(session.call("count", {}) for session in sessions))
        assert again == [ContentResult(("2",))] * 3
        pids = [await session.call("pid", {}) for session in sessions]
        processes = [psutil.Process(int(str(pid.parts[0]))) for pid in pids if isinstance(pid, ContentResult)]
        assert len(set(processes)) == 3
        await asyncio.gather(*(session.close() for session in sessions))
        assert not [one for one in processes if one.is_running() and one.status() != "zombie"]

    asyncio.run(story())


def test_texts_images_and_resources_in_their_order(box: Toolbox) -> None:
    one, many, resource, long = ask(box, ("draw", {}), ("draw", {"number": 10}), ("resource", {}), ("long", {"size": 5000}))
    assert isinstance(one, ContentResult) and one.parts == ("before", 0, "after\nall") and len(one.images) == 1
    assert Compact().word(one).text == "before\n<image>\nafter\nall" == Metis().word(one).text
    assert isinstance(many, ContentResult) and len(many.images) == 8
    assert many.parts[-1] == "after\nall\n[2 more images are not shown]"
    assert resource == ContentResult(("from a file\nand more",))
    assert isinstance(long, ContentResult) and len(str(long.parts[0])) < 1100 and "characters cut" in str(long.parts[0])
    assert "<image>" not in Compact().word(long).text + Metis().word(long).text


def test_what_the_server_calls_an_error_is_the_agents(box: Toolbox) -> None:
    wrong, refused, kind, fine = ask(
        box, ("wrong", {}), ("refuse", {"inside": False}), ("add", {"a": "x"}), ("add", {"a": 1, "b": 2})
    )
    assert isinstance(wrong, ContentResult) and not wrong.ok and "no such street" in str(wrong.parts)
    assert refused == ContentResult(("not like this",), ok=False)
    assert isinstance(kind, Refused) and 'add expects {"a": 1, "b": 1} (b may be left out): a: ' in kind.text
    assert fine == ContentResult(("3",))


FAILURES = [
    (("refuse", {"inside": True}), "not like this (code -32603)"),
    (("crash", {}), "it failed in the server: Error executing tool crash"),
    (("overloaded", {}), "it failed in the server: Error executing tool overloaded: the database is overloaded"),
    (("bad_image", {"data": "%%%"}), "an image that is no base64"),
    (("bad_image", {"data": "AAAA"}), "an image that cannot be used: cannot identify image file"),
]


def test_every_other_failure_is_ours(box: Toolbox) -> None:
    async def story(call: tuple, said: str) -> None:
        session = box.session(())
        with pytest.raises(InfrastructureError) as raised:
            await session.call(*call)
        assert f"tool {call[0]} of the MCP server {sys.executable}" in str(raised.value) and said in str(raised.value)
        await session.close()

    async def stories() -> None:
        await asyncio.gather(*(story(*failure) for failure in FAILURES))

    asyncio.run(stories())


def test_a_session_that_is_lost_is_our_failure_and_the_next_call_has_a_new_one(tmp_path: Path) -> None:
    box = open_toolbox(config(tiny(tmp_path)), tmp_path)
    first, died, second, odd, third, strange = ask(
        box, ("count", {}), ("die", {}), ("count", {}), ("no_result", {}), ("count", {}), ("garbage", {})
    )
    assert first == second == third == ContentResult(("1",))
    assert isinstance(died, InfrastructureError) and "its last line: Segmentation fault (as asked)" in str(died)
    assert isinstance(odd, InfrastructureError) and "tool no_result of the MCP server" in str(odd), odd
    assert strange == ContentResult(("and still an answer",))  # a line that is no message is passed over
    box.close()


def test_thousands_of_lines_that_are_no_messages_are_one_line_of_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    box = open_toolbox(config(tiny(tmp_path)), tmp_path)
    for _ in range(2):  # sessions
        assert ask(box, ("garbage", {}), ("noise", {})) == [
            ContentResult(("and still an answer",)),
            ContentResult(("after all that",)),
        ]
    box.close()
    (said,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.INFO and "mcp" in record.name)
    assert re.search(r"the MCP server .*: it wrote 2,001 lines to stdout that are no messages; have it write", said)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(
    ("change", "said"), [("fewer", "no longer has sometimes"), ("town", "schema of sometimes is no longer")]
)
def test_an_error_is_not_the_agents_where_the_server_offers_other_tools_than_before(
    tmp_path: Path, change: str, said: str, coded: bool
) -> None:
    box = open_toolbox(config(tiny(tmp_path)), tmp_path)
    if coded:
        (tmp_path / "coded").touch()

    async def story() -> None:
        session = box.session(())
        wrong = await session.call("sometimes", {"street": "none"})
        assert wrong == ContentResult(("no such street",), ok=False)
        assert await session.call("sometimes", {"street": "x"}) == ContentResult(("here",))
        (tmp_path / change).touch()  # while the session is open
        with pytest.raises(InfrastructureError, match=said):
            await session.call("sometimes", {"street": "x"})
        await session.close()

    asyncio.run(story())
    box.close()


def test_a_server_that_hangs_is_our_failure_and_is_gone(tmp_path: Path) -> None:
    box = open_toolbox(config(tiny(tmp_path, timeout_s=0.5)), tmp_path / "scratch")
    hung, fine = ask(box, ("hang", {}), ("count", {}))
    assert isinstance(hung, InfrastructureError) and re.search("timed out|no answer within", str(hung)), hung
    assert fine == ContentResult(("1",))
    assert not servers(tmp_path)
    box.close()


def test_sessions_that_wait_too_long_for_their_turn_are_our_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metis_fast.tools.mcp.num_cores", lambda: 1)
    box = open_toolbox(config(tiny(tmp_path, queue_s=0.01, connect_s=1)), tmp_path)
    (tmp_path / "deaf").touch()

    async def story() -> list[str]:
        sessions = [box.session(()) for _ in range(4)]
        answers = await asyncio.gather(*(session.call("count", {}) for session in sessions), return_exceptions=True)
        await asyncio.gather(*(session.close() for session in sessions))
        return sorted(map(str, answers))

    one, other, *late = asyncio.run(story())
    assert len(late) == 2 and all("no turn to start a session within 0.01 s (queue_s)" in text for text in late)
    assert "timed out" in one and "timed out" in other
    (tmp_path / "deaf").unlink()
    assert ask(box, ("count", {})) == [ContentResult(("1",))]
    box.close()
    assert not servers(tmp_path)


def test_a_rollout_that_is_cancelled_leaves_no_server(tmp_path: Path) -> None:
    box = open_toolbox(config(tiny(tmp_path)), tmp_path / "scratch")

    async def story() -> None:
        session = box.session(())
        await session.call("count", {})
        running = asyncio.create_task(session.call("hang", {}))
        await asyncio.sleep(0.1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await session.close()
        assert not servers(tmp_path)

    asyncio.run(story())
    box.close()


@pytest.mark.parametrize("then", ["pid", "die", "hang"])
def test_what_a_server_has_started_ends_with_its_session(tmp_path: Path, then: str) -> None:
    """Here a daemon whose parent has ended, in a session of its own."""
    box = open_toolbox(config(tiny(tmp_path, timeout_s=2)), tmp_path / "scratch")
    made, _ = ask(box, ("daemon", {}), (then, {}))
    assert isinstance(made, ContentResult), made
    assert not psutil.pid_exists(int(str(made.parts[0])))
    box.close()


def test_a_run_that_is_killed_leaves_no_server(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom metis_fast.config import ToolsConfig\n"
        "from metis_fast.tools import open_toolbox\n"
        f"config = ToolsConfig.model_validate({config(tiny(tmp_path)).model_dump(mode='json')!r})\n"
        f"box = open_toolbox(config, Path({str(tmp_path)!r}))\n"
        "async def story():\n session = box.session(())\n print((await session.call('pid', {})).parts[0], flush=True)\n"
        " await session.call('hang', {})\n"
        "asyncio.run(story())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        server = psutil.Process(int(run.stdout.readline()))
        time.sleep(0.2)  # it hangs, or is about to
        run.kill()
    assert not psutil.wait_procs([server], timeout=30)[1]


def test_closing_the_toolbox_ends_sessions_that_are_open(tmp_path: Path) -> None:
    box = open_toolbox(config(tiny(tmp_path)), tmp_path / "scratch")

    async def story() -> None:
        session = box.session(())
        await session.call("count", {})
        assert servers(tmp_path)
        box.close()
        with pytest.raises(InfrastructureError):
            while True:
                await session.call("count", {})
                await asyncio.sleep(0.01)
        await session.close()

    asyncio.run(story())
    assert not servers(tmp_path)


def test_a_session_that_cannot_start_later_is_our_failure(tmp_path: Path) -> None:
    box = open_toolbox(config(tiny(tmp_path)), tmp_path / "scratch")
    (tmp_path / "broken").touch()
    (broken,) = ask(box, ("count", {}))
    assert isinstance(broken, InfrastructureError) and "no such database (as asked)" in str(broken)
    (tmp_path / "broken").unlink()
    (tmp_path / "fewer").touch()
    (fewer,) = ask(box, ("count", {}))
    assert isinstance(fewer, InfrastructureError) and "no longer has sometimes" in str(fewer)
    (tmp_path / "fewer").unlink()
    assert ask(box, ("count", {})) == [ContentResult(("1",))]
    box.close()


def test_a_command_gets_none_of_our_variables_but_those_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "a-secret-of-ours")
    monkeypatch.setenv("STREETS_KEY", "for the server")
    box = open_toolbox(config(tiny(tmp_path, env={"KEY": "$STREETS_KEY", "PLAIN": "text"})), tmp_path / "scratch")
    (got,) = ask(box, ("environment", {}))
    assert isinstance(got, ContentResult)
    names = set(str(got.parts[0]).split("\n"))
    assert {"KEY", "PLAIN", "PATH"} <= names and not names & {"SERPER_API_KEY", "STREETS_KEY", "PYTHONPATH"}
    box.close()


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (
            {"command": ["no-such-program"]},
            r"tools\.mcp\.0: .*last line: no-such-program: No such file or directory; see",
        ),
        ({"command": [sys.executable, "-c", "import sys; sys.exit('no licence')"]}, "its last line: no licence"),
        ({"command": ["sleep", "60"], "connect_s": 0.2}, "timed out"),
        ({"url": "http://127.0.0.1:9/mcp"}, r"tools\.mcp\.0: ConnectError"),
        ({"command": TIME, "env": {"A": "$NO_SUCH_VARIABLE"}}, "needs the environment variable NO_SUCH_VARIABLE"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(tmp_path: Path, server: dict, said: str) -> None:
    with pytest.raises(ToolSetupError, match=said) as raised:
        open_toolbox(config(server), tmp_path)
    assert "\n" not in str(raised.value)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def serving(port: int, token: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, SERVER, str(port), token])
    try:
        while process.poll() is None:
            try:
                httpx2.get(f"http://127.0.0.1:{port}/mcp")
                break
            except httpx2.TransportError:
                time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_server_with_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = _free_port()
    monkeypatch.setenv("STREETS_TOKEN", "right")
    server = {"url": f"http://127.0.0.1:{port}/mcp", "token_env": "STREETS_TOKEN", "timeout_s": 10, "connect_s": 10}
    with serving(port, "right") as process:
        box = open_toolbox(config(server), tmp_path / "scratch")
        drawn, wrong = ask(box, ("draw", {}), ("wrong", {}))
        assert isinstance(drawn, ContentResult) and drawn.parts == ("before", 0, "after\nall")
        assert isinstance(wrong, ContentResult) and not wrong.ok

        async def story() -> None:
            session = box.session(())
            await session.call("count", {})
            running = asyncio.create_task(session.call("hang", {}))
            await asyncio.sleep(0.2)
            process.kill()
            with pytest.raises(InfrastructureError, match=f"tool hang of the MCP server http://127.0.0.1:{port}"):
                await running
            with pytest.raises(InfrastructureError):
                await session.call("count", {})
            await session.close()

        asyncio.run(story())
    with serving(port, "right"):
        assert ask(box, ("count", {})) == [ContentResult(("1",))]
        monkeypatch.setenv("STREETS_TOKEN", "wrong")
        (refused,) = ask(box, ("count", {}))
        assert isinstance(refused, InfrastructureError)
        with pytest.raises(ToolSetupError, match=r"tools\.mcp\.0: "):
            open_toolbox(config(server), tmp_path / "scratch")
    box.close()


def test_servers_and_own_tools_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "its_worker_tools.py").write_text(
        "import os\nfrom metis_fast.types import Observation, Outcome\nclass Where:\n name = 'where'; description = 'Says.'\n"
        " schema = {'type': 'object'}\n def call(self, arguments, prompt):\n"
        "  return Observation(str(os.getpid()), outcome=Outcome.TOOL_ERROR)\n"
    )
    monkeypatch.setenv("STREETS_KEY", "for the server")
    tools = config(tiny(tmp_path, env={"KEY": "$STREETS_KEY"}), own=["its_worker_tools:Where"])
    with Hub(WorkersConfig(silence_s=5.0, start_s=60.0), LocalLauncher(tmp_path / "logs")) as hub:
        workers = start_tool_workers(hub, tools, 1, tmp_path)
        wait_ready(workers, lambda: None)
        box = RemoteToolbox(tools, workers)
        asyncio.run(box.learn())
        assert box.names[0] == "where" and "count" in box.names and box.tools[0].description == "Says."
        where, one, died, again, none = ask(box, ("where", {}), ("count", {}), ("die", {}), ("count", {}), ("no_such_tool", {}))
        assert isinstance(where, Observation) and where.outcome is Outcome.TOOL_ERROR and where.text != str(os.getpid())
        assert one == again == ContentResult(("1",))
        assert isinstance(died, InfrastructureError) and "Segmentation fault" in str(died)
        assert isinstance(none, Refused) and none.why is Refusal.NO_TOOL and "where, count" in none.text
