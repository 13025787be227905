"""A toolbox over a tool server: what it answers, and every way in which the server is lost."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import pytest
from tool_servers import BrokenWay, HeldToolbox, client_of, config, printed, run_code, serving

from metis_fast.config import RolloutConfig, ToolsConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.model import Policy
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.episode import SampleKey, run_episode
from metis_fast.testing.fakes import FakeEngine
from metis_fast.tools.protocol import NO_EXTRA, ToolSpec
from metis_fast.tools.results import Refusal, Refused, ToolResult
from metis_fast.tools.server.client import ServerToolbox, ServerToolSession, SessionLost
from metis_fast.tools.server.link import ServerAddress
from metis_fast.tools.server.sessions import SessionTable
from metis_fast.types import ImageBlob, Message, Observation, Outcome, Prompt

FRESH = ImageBlob.of(b"shown")


def test_a_session_keeps_its_state_and_ends_on_the_server():
    own = HeldToolbox()
    with client_of(own) as toolbox:
        assert toolbox.names == ("python",) and toolbox.tools[0].description == "Runs code."

        async def go() -> None:
            sessions = [toolbox.session(()) for _ in range(4)]
            assert own.num_open == 0  # nothing is opened before the first call
            for number in (1, 2):
                got = await asyncio.gather(*(run_code(one, f"{i}") for i, one in enumerate(sessions)))
                assert got == [f"{number} {i}" for i in range(4)]
            assert await sessions[0].call("shell", {}) == Refused("There is no tool 'shell'.", Refusal.NO_TOOL, "shell")
            for session in sessions:
                await session.close()
                await session.close()

        asyncio.run(go())
        assert own.num_open == 0
        asyncio.run(go())  # another event loop


def test_images_go_to_the_server_once_and_come_back_once(picture: Callable[..., ImageBlob]):
    first, second = picture(1, 64, 64), picture(2, 64, 64)
    own = HeldToolbox(lambda code: printed(code, [first, FRESH]))
    with client_of(own) as toolbox:

        async def go() -> None:
            for images, sizes in (((first, second), ((1, 2), (3, 4))), ((second,), ())):
                session = toolbox.session(images, {"index": 7}, sizes)
                for _ in range(2):
                    result = await session.call("python", {"code": "a"})
                    assert result == printed("a", [first, FRESH])
                await session.close()

        asyncio.run(go())
    assert own.prompts == [((first, second), {"index": 7}, ((1, 2), (3, 4))), ((second,), {"index": 7}, ())]


@pytest.mark.parametrize("changed", [{"enabled": ["text_search"]}, {"python": {"timeout_s": 3}}])
def test_a_server_that_was_started_again_with_other_tools_ends_the_run(
    changed: dict[str, object],
):
    with serving(HeldToolbox(), config()) as (url, _):
        toolbox = ServerToolbox(config(url))
    other, again = HeldToolbox(), ToolsConfig.model_validate({"enabled": ["python"], **changed})
    with serving(other, again) as (url, _), serving(other, config()) as (same, _):

        async def go(where: str) -> str:
            toolbox.address = ServerAddress(config(where).server)
            session = toolbox.session(())
            try:
                return await run_code(session, "a")
            finally:
                await session.close()

        with pytest.raises(ToolSetupError, match="has other tools or settings, or is of another release"):
            asyncio.run(go(url))
        assert asyncio.run(go(same)) == "1 a"
    assert other.ran == ["a"]


def test_half_pairs_of_surrogates_arrive_as_they_are():
    with client_of(HeldToolbox()) as toolbox:

        async def go() -> None:
            session = toolbox.session((), {"question": "\ud800"})
            assert await run_code(session, "print('\udfff \U0001f600')") == "1 print('\udfff \U0001f600')"
            await session.close()

        asyncio.run(go())


def test_arguments_that_are_nested_too_deep_are_the_agents_mistake():
    own = HeldToolbox()
    deep: object = []
    for _ in range(900):
        deep = [deep]
    with client_of(own) as toolbox:

        async def go() -> None:
            session = toolbox.session(())
            refused = await session.call("python", {"code": deep})
            assert isinstance(refused, Refused) and refused.why is Refusal.ARGUMENTS
            await session.close()

        asyncio.run(go())
    assert own.ran == []


def test_256_clients_at_once_lose_no_reply_and_see_nothing_of_each_other():
    """With the real sandbox, and longer: tests/e2e/test_tool_server.py."""
    own = HeldToolbox(lambda code: printed(code, [ImageBlob.of(code.encode())]))
    until = time.monotonic() + 2.0

    async def one(toolbox: ServerToolbox, number: int) -> int:
        """Sessions of four calls; how many calls."""
        calls = 0
        while time.monotonic() < until or not calls:
            session = toolbox.session((ImageBlob.of(f"prompt {number}".encode()),), {"row": number})
            for count in range(4):
                code = f"client {number}, call {calls + count}"
                assert await session.call("python", {"code": code}) == printed(code, [ImageBlob.of(code.encode())])
            await session.close()
            calls += 4
        return calls

    with serving(own, config()) as (url, table):
        toolbox = ServerToolbox(config(url, timeout_s=120))

        async def go() -> list[int]:
            return await asyncio.gather(*(one(toolbox, number) for number in range(256)))

        calls = asyncio.run(go())
        assert len(table) == own.num_open == 0
    assert len(own.ran) == len(set(own.ran)) == sum(calls)
    for images, extra, _ in own.prompts:
        assert [image.data for image in images] == [f"prompt {extra['row']}".encode()]


# -- connections that break -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["request", "reply"])
@pytest.mark.parametrize("path", ["/calls", "/sessions"])
def test_a_lost_connection_runs_nothing_twice_and_loses_nothing(cut: str, path: str):
    own = HeldToolbox()
    with serving(own, config()) as (url, table):
        way = BrokenWay(url)
        with way.open() as through:
            toolbox = ServerToolbox(config(through))

            async def go() -> None:
                session = toolbox.session(())
                way.cut, way.path = cut, path
                assert await run_code(session, "a") == "1 a"
                if path == "/calls":
                    way.cut = cut
                assert await run_code(session, "b") == "2 b"
                await session.close()

            asyncio.run(go())
        assert way.num_cut == (2 if path == "/calls" else 1)
        assert own.ran == ["a", "b"] and len(own.prompts) == 1 and len(table) == 0


def test_a_reply_that_takes_long_is_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("metis_fast.tools.server.client.WAIT_S", 0.05)
    own = HeldToolbox()
    own.held.set()
    threading.Timer(0.4, own.held.clear).start()
    with client_of(own) as toolbox:

        async def go() -> None:
            session = toolbox.session(())
            assert await run_code(session, "a") == "1 a"
            await session.close()

        asyncio.run(go())
    assert own.ran == ["a"]


def test_a_call_that_takes_longer_than_the_client_waits_is_our_failure():
    own = HeldToolbox()
    own.held.set()
    with serving(own, config()) as (url, table):
        toolbox = ServerToolbox(config(url, timeout_s=0.3))

        async def go() -> None:
            session = toolbox.session(())
            with pytest.raises(InfrastructureError):
                await run_code(session, "a")
            own.held.clear()
            assert await run_code(session, "b") == "1 b"  # in another session
            await session.close()

        asyncio.run(go())
        assert len(table) == own.num_open == 0


def test_a_cancelled_call_ends_on_the_server():
    own = HeldToolbox()
    own.held.set()
    with serving(own, config()) as (url, table):
        toolbox = ServerToolbox(config(url))

        async def go() -> None:
            session = toolbox.session(())
            call = asyncio.create_task(run_code(session, "a"))
            while not own.ran:
                await asyncio.sleep(0.005)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert len(table) == own.num_open == 0
            await session.close()

        asyncio.run(go())


def test_a_server_that_is_gone_is_our_failure_and_closing_is_none():
    own = HeldToolbox()
    with ExitStack() as stack:
        url, _ = stack.enter_context(serving(own, config()))
        toolbox = ServerToolbox(config(url, retries=1))

        async def go() -> None:
            session = toolbox.session(())
            assert await run_code(session, "a") == "1 a"
            await asyncio.to_thread(stack.close)
            for _ in range(2):
                with pytest.raises(InfrastructureError, match="does not serve"):
                    await run_code(session, "b")
            await session.close()

        asyncio.run(go())
    assert own.ran == ["a"]


def test_a_server_that_says_nothing_is_our_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("metis_fast.tools.server.link.WAIT_S", 0.1)
    monkeypatch.setattr("metis_fast.tools.server.link._SLACK_S", 0.1)
    with serving(HeldToolbox(), config()) as (url, _), socket.create_server(("127.0.0.1", 0)) as deaf:
        toolbox = ServerToolbox(config(url))
        toolbox.address = ServerAddress(config(f"http://127.0.0.1:{deaf.getsockname()[1]}", retries=1).server)

        async def go() -> None:
            session = toolbox.session(())
            with pytest.raises(InfrastructureError, match="no reply in time"):
                await run_code(session, "a")
            await session.close()

        asyncio.run(go())


def test_a_session_that_the_server_does_not_know_any_more_is_lost_and_begins_anew():
    own = HeldToolbox()
    with serving(own, config()) as (url, table):
        toolbox = ServerToolbox(config(url))

        async def go() -> None:
            session = toolbox.session(())
            await run_code(session, "a")
            await table.end(next(iter(table._sessions)))
            with pytest.raises(SessionLost):
                await run_code(session, "b")
            assert await run_code(session, "c") == "1 c"
            await session.close()

        asyncio.run(go())
    assert own.ran == ["a", "c"]


def test_failures_of_the_tool_and_bugs_of_the_server_are_ours(caplog: pytest.LogCaptureFixture):
    class Bug(Exception):
        pass

    def answer(code: str) -> Observation:
        raise InfrastructureError("the sandbox died") if code == "gone" else Bug("secret")

    with client_of(HeldToolbox(answer)) as toolbox:

        async def go() -> None:
            session = toolbox.session(())
            with pytest.raises(InfrastructureError, match="the sandbox died"):
                await run_code(session, "gone")
            with pytest.raises(InfrastructureError, match="Bug; see the server's log") as caught:
                await run_code(session, "bug")
            assert "secret" not in str(caught.value)
            await session.close()

        asyncio.run(go())
    assert any(record.exc_info and record.exc_info[0] is Bug for record in caplog.records)  # the server's log has all of it


def test_a_full_server_makes_clients_wait_and_loses_none():
    own = HeldToolbox()
    own.held.set()
    with serving(own, config(serve={"queue": 2, "max_sessions": 6})) as (url, table):
        toolbox = ServerToolbox(config(url, retries=0, timeout_s=60))

        async def one(number: int) -> str:
            session = toolbox.session(())
            try:
                return await run_code(session, f"{number}")
            finally:
                await session.close()

        async def go() -> list[str]:
            calls = [asyncio.create_task(one(number)) for number in range(10)]
            while _refused(table) < 4:
                await asyncio.sleep(0.01)
            own.held.clear()
            return await asyncio.gather(*calls)

        assert asyncio.run(go()) == [f"1 {number}" for number in range(10)]
    assert sorted(own.ran) == [str(number) for number in range(10)]


def _refused(table: object) -> float:
    return table._metrics.registry.get_sample_value("metis_tools_refused_total", {"fault": "busy"}) or 0.0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_full_server_is_our_failure_when_the_time_is_over():
    own = HeldToolbox()
    with serving(own, config(serve={"max_sessions": 1})) as (url, _):
        toolbox = ServerToolbox(config(url, timeout_s=0.5))

        async def go() -> None:
            first, second = toolbox.session(()), toolbox.session(())
            await run_code(first, "a")
            with pytest.raises(InfrastructureError, match="max_sessions=1 are open"):
                await run_code(second, "b")
            await first.close()
            await second.close()

        asyncio.run(go())


class Losing:
    """Sessions of `toolbox` of which one is lost on the server before its second call."""

    def __init__(self, toolbox: ServerToolbox, table: SessionTable) -> None:
        self.toolbox, self.table = toolbox, table
        self.num_calls = 0

    @property
    def names(self) -> Sequence[str]:
        return self.toolbox.names

    @property
    def tools(self) -> Sequence[ToolSpec]:
        return self.toolbox.tools

    def session(
        self, images: Sequence[ImageBlob], extra: Mapping[str, object] = NO_EXTRA, seen: Sequence[tuple[int, int]] = ()
    ) -> LosingSession:
        return LosingSession(self, self.toolbox.session(images, extra, seen))

    def close(self) -> None:
        self.toolbox.close()


class LosingSession:
    def __init__(self, losing: Losing, session: ServerToolSession) -> None:
        self.losing, self.session = losing, session

    async def close(self) -> None:
        await self.session.close()

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        self.losing.num_calls += 1
        if self.losing.num_calls == 2:
            await self.losing.table.end(next(iter(self.losing.table._sessions)))
        return await self.session.call(name, arguments)


def test_a_rollout_whose_session_is_lost_begins_again_with_its_prompt(chat: Chat, policy: Policy):
    own = HeldToolbox()
    call = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call><|im_end|>'
    prompt = Prompt("row", "set", (Message("user", "two and two?"),), (), "math", ("4",), "rule", "two and two?")
    with serving(own, config()) as (url, table):
        toolbox = Losing(ServerToolbox(config(url)), table)
        engine = FakeEngine(policy.tokenizer, [[call, call, "done<|im_end|>"]])
        rollout = asyncio.run(run_episode(prompt, 0, chat, engine, toolbox, RolloutConfig(retries=2), SampleKey(0, "t", 0)))
    assert rollout.outcome is Outcome.ANSWERED and rollout.num_tool_calls == 2
    assert [turn.observation for turn in rollout.turns[:2]] == ["1 1", "2 1"]  # nobody saw half a session
    assert len(own.ran) == 3 and own.num_open == 0
