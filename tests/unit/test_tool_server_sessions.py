"""Sessions of a tool server: a call runs once, its answer waits for its client; there are bounds, and idle ones end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from tool_servers import HeldToolbox, printed

from metis_fast.config import ToolServeConfig
from metis_fast.errors import InfrastructureError
from metis_fast.tools.protocol import NO_EXTRA
from metis_fast.tools.server.blobs import BlobStore
from metis_fast.tools.server.metrics import Metrics
from metis_fast.tools.server.sessions import Rejected, SessionTable
from metis_fast.tools.server.wire import Answer, Calling, Fault, Opening
from metis_fast.types import ImageBlob


def table_over(toolbox: HeldToolbox, **serve: object) -> SessionTable:
    settings = ToolServeConfig.model_validate(serve)
    return SessionTable(toolbox, settings, BlobStore(1 << 20), Metrics(toolbox.names))


def calling(number: int, code: str = "x", **more: float) -> Calling:
    return Calling(number, "python", {"code": code}, **{"deadline_s": 20.0, **more})


async def rejection(made: Coroutine[Any, Any, Any]) -> Fault:
    with pytest.raises(Rejected) as caught:
        await made
    return caught.value.failure.fault


def counted(table: SessionTable, name: str, **labels: str) -> float:
    return table._metrics.registry.get_sample_value(name, labels) or 0.0


def test_a_call_that_is_asked_for_again_runs_once_and_has_the_same_answer():
    toolbox = HeldToolbox()

    async def go() -> None:
        table = table_over(toolbox)
        name = table.open(Opening())
        toolbox.held.set()
        assert await table.call(name, calling(1, wait_s=0.01)) is None
        waits = [asyncio.create_task(table.call(name, calling(1))) for _ in range(3)]
        await asyncio.sleep(0.02)
        waits.pop().cancel()  # a client that is gone ends nothing
        toolbox.held.clear()
        answers = await asyncio.gather(*waits)
        assert answers == [Answer(printed("1 x"))] * 2
        assert await table.call(name, calling(1)) == answers[0]
        assert toolbox.ran == ["x"]
        assert await table.call(name, calling(2, "y")) == Answer(printed("2 y"))
        await table.close()

    asyncio.run(go())
    assert toolbox.ran == ["x", "y"] and toolbox.num_open == 0


def test_numbers_that_are_neither_the_last_nor_the_next_are_refused():
    toolbox = HeldToolbox()

    async def go() -> None:
        table = table_over(toolbox)
        name = table.open(Opening())
        assert await rejection(table.call(name, calling(2))) is Fault.ORDER
        await table.call(name, calling(1))
        assert await rejection(table.call(name, calling(1, "another"))) is Fault.ORDER
        assert await rejection(table.call(name, calling(0))) is Fault.ORDER
        toolbox.held.set()
        await table.call(name, calling(2, wait_s=0.01))
        assert await rejection(table.call(name, calling(3))) is Fault.ORDER
        toolbox.held.clear()
        assert await table.call(name, calling(3 - 1)) == Answer(printed("2 x"))
        assert await rejection(table.call("0" * 32, calling(1))) is Fault.NO_SESSION
        await table.close()

    asyncio.run(go())


def test_a_session_that_is_asked_for_again_is_the_same_one():
    toolbox = HeldToolbox()

    async def go() -> None:
        table = table_over(toolbox)
        assert table.open(Opening(key="a")) == table.open(Opening(key="a")) != table.open(Opening(key="b"))
        assert table.open(Opening()) != table.open(Opening())
        assert len(table) == toolbox.num_open == 4
        await table.close()

    asyncio.run(go())
    assert toolbox.num_open == 0


def test_each_image_goes_to_a_client_once_and_to_the_server_once():
    one, two = ImageBlob.of(b"one"), ImageBlob.of(b"two")
    toolbox = HeldToolbox(lambda code: printed(code, [one, two]))

    async def go() -> None:
        table = table_over(toolbox)
        with pytest.raises(Rejected) as caught:
            table.open(Opening((one.sha256, one.sha256), {"index": 3}, ((1, 2), (1, 2))))
        assert caught.value.failure.fault is Fault.IMAGES and caught.value.failure.missing == (one.sha256,)
        table._blobs.put(one)
        name = table.open(Opening((one.sha256, one.sha256), {"index": 3}, ((1, 2), (1, 2))))
        assert toolbox.prompts == [((one, one), {"index": 3}, ((1, 2), (1, 2)))]
        assert await table.call(name, calling(1)) == Answer(printed("x", [one, two]), (two,))
        assert await table.call(name, calling(1)) == Answer(printed("x", [one, two]), (two,))  # its reply may be lost
        assert await table.call(name, calling(2)) == Answer(printed("x", [one, two]))
        await table.close()

    asyncio.run(go())


def test_sessions_and_calls_have_bounds():
    toolbox = HeldToolbox()

    async def go() -> None:
        table = table_over(toolbox, max_sessions=2, queue=1)
        names = [table.open(Opening()) for _ in range(2)]
        with pytest.raises(Rejected) as caught:
            table.open(Opening())
        assert caught.value.failure.fault is Fault.BUSY
        toolbox.held.set()
        await table.call(names[0], calling(1, wait_s=0.01))
        assert await rejection(table.call(names[1], calling(1))) is Fault.BUSY
        assert counted(table, "metis_tools_queue") == 1
        toolbox.held.clear()
        await table.call(names[0], calling(1))
        assert await table.call(names[1], calling(1)) == Answer(printed("1 x"))  # its number was not used up
        await table.end(names[0])
        table.open(Opening())
        assert counted(table, "metis_tools_sessions") == 2
        await table.close()

    asyncio.run(go())


def test_a_call_that_takes_too_long_is_our_failure_and_ends_the_session():
    toolbox = HeldToolbox()

    async def go() -> None:
        table = table_over(toolbox, call_s=0.05)
        name = table.open(Opening())
        toolbox.held.set()
        assert await rejection(table.call(name, calling(1))) is Fault.DEADLINE
        assert await rejection(table.call(name, calling(1))) is Fault.DEADLINE
        assert await rejection(table.call(name, calling(2))) is Fault.NO_SESSION
        other = table.open(Opening())
        assert await rejection(table.call(other, calling(1, deadline_s=0.02))) is Fault.DEADLINE
        assert counted(table, "metis_tools_calls_total", tool="python", outcome="deadline") == 2
        await table.close()

    asyncio.run(go())


def test_a_failure_of_the_tool_is_told_and_a_bug_is_raised_each_time():
    class Bug(Exception):
        pass

    def answer(code: str) -> Any:
        raise InfrastructureError("gone") if code == "gone" else Bug if code == "bug" else TimeoutError

    toolbox = HeldToolbox(answer)

    async def go() -> None:
        table = table_over(toolbox)
        name = table.open(Opening())
        assert await rejection(table.call(name, calling(1, "gone"))) is Fault.TOOL
        for _ in range(2):
            with pytest.raises(Bug):
                await table.call(name, calling(2, "bug"))
        with pytest.raises(TimeoutError):  # of the tool's own, not the deadline's
            await table.call(name, calling(3, "late"))
        assert toolbox.ran == ["gone", "bug", "late"]
        assert counted(table, "metis_tools_calls_total", tool="python", outcome="tool") == 1
        assert counted(table, "metis_tools_calls_total", tool="python", outcome="defect") == 2
        await table.close()

    asyncio.run(go())


def test_names_that_an_agent_invents_are_counted_together():
    toolbox = HeldToolbox()

    async def go() -> None:
        table = table_over(toolbox)
        name = table.open(Opening())
        for number in (1, 2):
            await table.call(name, Calling(number, f"tool {number}", {}, 20.0))
        assert counted(table, "metis_tools_calls_total", tool="unknown", outcome="tool_error") == 2
        await table.close()

    asyncio.run(go())


def test_a_key_of_another_prompts_session_is_refused():
    toolbox = HeldToolbox()

    async def go() -> None:
        table = table_over(toolbox)
        name = table.open(Opening(extra={"index": 1}, key="a"))
        with pytest.raises(Rejected, match="session with another prompt") as caught:
            table.open(Opening(extra={"index": 2}, key="a"))
        assert caught.value.failure.fault is Fault.ORDER
        assert table.open(Opening(extra={"index": 1}, key="a")) == name
        await table.close()

    asyncio.run(go())


class _NoClose(HeldToolbox):
    """Its sessions cannot be closed."""

    def session(self, images: Any, extra: Any = NO_EXTRA, seen: Any = ()) -> Any:
        session = super().session(images, extra, seen)

        async def fail() -> None:
            raise OSError("as the test says")

        session.close = fail
        return session


def test_a_session_that_cannot_be_ended_keeps_no_other_one(caplog: pytest.LogCaptureFixture):
    async def go() -> None:
        table = table_over(_NoClose(), idle_s=0.05)
        watch = asyncio.create_task(table.watch())
        for _ in range(2):
            for _ in range(3):
                table.open(Opening())
            while len(table):
                await asyncio.sleep(0.01)
                assert not watch.done(), watch.exception()
        watch.cancel()
        table.open(Opening())
        await table.close()
        assert len(table) == 0

    asyncio.run(asyncio.wait_for(go(), 20))
    assert caplog.text.count("could not be ended") == 7


def test_idle_sessions_end_and_those_with_a_call_do_not():
    toolbox = HeldToolbox()

    async def go() -> None:
        table = table_over(toolbox, idle_s=0.1)
        watch = asyncio.create_task(table.watch())
        idle, busy = table.open(Opening()), table.open(Opening())
        toolbox.held.set()
        await table.call(busy, calling(1, wait_s=0.01))
        while len(table) == 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert await rejection(table.call(idle, calling(1))) is Fault.NO_SESSION
        toolbox.held.clear()
        assert await table.call(busy, calling(1)) == Answer(printed("1 x"))
        assert counted(table, "metis_tools_sessions_idle_total") == 1
        watch.cancel()
        await table.close()

    asyncio.run(go())
    assert toolbox.num_open == 0


def test_ending_a_session_ends_its_call():
    toolbox = HeldToolbox()

    async def go() -> None:
        table = table_over(toolbox)
        name = table.open(Opening())
        toolbox.held.set()
        waits = asyncio.create_task(table.call(name, calling(1)))
        await asyncio.sleep(0.02)
        await table.end(name)
        await table.end(name)
        assert await rejection(waits) is Fault.NO_SESSION  # pyright: ignore[reportArgumentType]
        assert counted(table, "metis_tools_queue") == 0

    asyncio.run(go())
    assert toolbox.num_open == 0


def test_a_server_that_ends_starts_nothing_more_and_waits_until_answers_are_read():
    toolbox = HeldToolbox()

    async def go() -> None:
        table = table_over(toolbox)
        name, other = table.open(Opening()), table.open(Opening())
        toolbox.held.set()
        assert await table.call(name, calling(1, wait_s=0.01)) is None
        drain = asyncio.create_task(table.drain())
        await asyncio.sleep(0.02)
        assert await rejection(table.call(other, calling(1))) is Fault.DRAINING
        with pytest.raises(Rejected):
            table.open(Opening())
        toolbox.held.clear()
        while table._running:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert not drain.done()  # nobody has the answer yet
        assert await table.call(name, calling(1)) == Answer(printed("1 x"))
        await drain
        await table.close()

    asyncio.run(go())


def test_a_drain_is_bounded():
    toolbox = HeldToolbox()

    async def go() -> None:
        table = table_over(toolbox, drain_s=0.05)
        name = table.open(Opening())
        toolbox.held.set()
        assert await table.call(name, calling(1, wait_s=0.01)) is None
        await table.drain()
        await table.close()

    asyncio.run(go())
    assert toolbox.num_open == 0


def test_images_that_were_not_used_for_the_longest_time_go_first():
    store = BlobStore(10)
    blobs = [ImageBlob.of(bytes([number]) * 4) for number in range(3)]
    store.put(blobs[0])
    store.put(blobs[1])
    store.take([blobs[0].sha256])
    store.put(blobs[2])
    assert store.missing([blob.sha256 for blob in blobs]) == (blobs[1].sha256,) and store.num_bytes == 8
    large = ImageBlob.of(b"x" * 11)
    store.put(large)
    assert store.take([large.sha256]) == (large,) and store.num_bytes == 11
