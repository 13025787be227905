"""Whose time and whose death it is: slots, slow machines, sessions that are killed from outside, sessions kept ready."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from python_calls import LIMIT, WORD, serve

from metis_fast.config import PythonToolConfig
from metis_fast.errors import InfrastructureError
from metis_fast.tools import python_server, python_tool
from metis_fast.tools.python_server import PythonServer
from metis_fast.tools.python_tool import PythonTool, longest_s
from metis_fast.tools.sandbox.board import Usage
from metis_fast.tools.sandbox.kernel import SCRATCH
from metis_fast.tools.slots import Lease, Slots
from metis_fast.types import Observation, Outcome


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonServer]:
    yield from serve(tmp_path_factory.mktemp("scratch"))


async def call(tool: PythonTool, code: str) -> Observation:
    return WORD(await tool.call(code))


def sessions(server: PythonServer) -> list[int]:
    """Processes of the server's sessions, which are children of its inner one."""
    inner = psutil.Process(server.pid).children()
    return [session.pid for session in inner[0].children()] if inner else []


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


# -- slots ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["import time\ntime.sleep(60)", "while True: pass", "import os\nos.read(os.pipe()[0], 1)"])
def test_calls_that_sleep_or_loop_hold_up_no_other(server: PythonServer, code: str) -> None:
    async def story() -> float:
        others = [PythonTool(server, (), 60.0, LIMIT) for _ in range(2 * server.slots.num)]
        mine = PythonTool(server, (), 60.0, LIMIT)
        await call(mine, "1")
        running = [asyncio.create_task(call(other, code)) for other in others]
        await until(lambda: len(server._live) == len(others) + 1)
        begun = time.monotonic()
        assert await call(mine, "2") == Observation("2")
        took = time.monotonic() - begun
        assert not any(one.done() for one in running)
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await mine.close()
        return took

    assert asyncio.run(story()) < 15.0  # the others take 60


def test_a_slot_is_lent_by_who_sleeps_or_has_held_it_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    async def story() -> list[int]:
        slots, counts = Slots(2), []
        async with contextlib.AsyncExitStack() as stack:
            sleeper, worker = [await stack.enter_async_context(slots.lease()) for _ in range(2)]
            third = asyncio.create_task(stack.enter_async_context(slots.lease()))
            await asyncio.sleep(0)
            counts.append(third.done())
            worker.look(True)  # not yet long enough
            await asyncio.sleep(0)
            counts.append(third.done())
            sleeper.look(False)
            await third
            fourth = asyncio.create_task(stack.enter_async_context(slots.lease()))
            now[0] = 0.6
            worker.look(True)
            await fourth
            counts += [slots.num_holding, worker.holds, third.result().holds]
        assert slots.num_holding == 0
        return counts

    assert asyncio.run(story()) == [False, False, 2, False, True]


def _past(lease: Lease) -> Lease:
    """It computes, and has had its time."""
    lease._begun = 0.0
    lease.look(True)
    return lease


def test_where_many_wait_each_holds_its_slot_for_a_shorter_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    async def story() -> tuple[int, float]:
        slots, rounds = Slots(4), 0
        async with contextlib.AsyncExitStack() as stack:
            leases: list[Lease] = []

            async def compute() -> None:
                leases.append(await stack.enter_async_context(slots.lease()))

            others = [asyncio.create_task(compute()) for _ in range(64)]
            mine = asyncio.create_task(stack.enter_async_context(slots.lease()))
            while not mine.done():
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                now[0] += min((lease.next_look_s(0.05) for lease in leases if lease.holds), default=0.0)
                for lease in leases:
                    lease.look(True)
                rounds += 1
            await asyncio.gather(*others)
            assert mine.result().crowd == 65 / 4
        return rounds, now[0]

    rounds, took = asyncio.run(story())
    assert rounds > 8 and took < 1.0, "the last of 65 begins within a second, and all slots are held meanwhile"


def test_a_call_that_is_kept_from_the_processor_counts_as_one_that_computes() -> None:
    waits, sleeps = python_tool._Now(10.0, 0.5, 0.3, False), python_tool._Now(10.0, 10.0, 0.3, False)
    assert waits.wanted_s == pytest.approx(9.8) and sleeps.wanted_s == pytest.approx(0.3)


def test_a_call_may_take_as_long_as_all_that_compute_need_together() -> None:
    assert longest_s(20.0, 0.5) == longest_s(20.0, 8.0) == 330.0  # sixteen times its own time
    assert longest_s(20.0, 32.0) == longest_s(20.0) == 1290.0  # where 64 a core compute


def test_calls_that_compute_are_not_without_number() -> None:
    async def story() -> bool:
        slots = Slots(1)
        async with contextlib.AsyncExitStack() as stack:
            leases = [_past(await stack.enter_async_context(slots.lease())) for _ in range(slots.busiest)]
            waiting = asyncio.create_task(stack.enter_async_context(slots.lease()))
            await asyncio.sleep(0)
            waited = not waiting.done()
            leases[0].look(False)  # now it sleeps
            await waiting
            return waited

    assert asyncio.run(story())


def test_who_gives_up_waiting_leaves_no_gap() -> None:
    async def story() -> int:
        slots = Slots(1)
        async with slots.lease():
            waiting = [asyncio.create_task(slots._wait()) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.sleep(0)
        waiting[1].cancel()  # whose turn it is
        await asyncio.gather(*waiting, return_exceptions=True)
        assert not waiting[2].cancelled()
        return slots.num_holding

    assert asyncio.run(story()) == 1


# -- time -----------------------------------------------------------------------------------------------------------------


def test_an_answer_that_came_while_the_trainer_stood_still_is_an_answer(server: PythonServer) -> None:
    async def story() -> Observation:
        tool = PythonTool(server, (), 1.0, LIMIT)
        await call(tool, "1")
        running = asyncio.create_task(call(tool, "print('x' * 1500)\n'in time'"))
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        time.sleep(3.0)  # the loop
        got = await running
        await tool.close()
        return got

    assert asyncio.run(story()).text.endswith("'in time'")


def test_a_call_that_gets_no_processor_has_more_time(server: PythonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server says that it was kept from running for half of the time."""
    begun = time.monotonic_ns()

    def usage(process: object) -> Usage:
        now = time.monotonic_ns()
        return Usage(0, (now - begun) // 2, 0, 1, now)

    monkeypatch.setattr(server, "usage", usage)

    async def story() -> list[Observation]:
        tool = PythonTool(server, (), 2.0, LIMIT)
        seen = [await call(tool, "import time\ntime.sleep(2.6)\n'done'"), await call(tool, "time.sleep(60)")]
        await tool.close()
        return seen

    late, never = asyncio.run(story())
    assert late == Observation("'done'") and "Timed out after 2 s" in never.text


def test_a_call_that_never_gets_the_processor_is_our_failure(server: PythonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic_ns()

    def usage(process: object) -> Usage:
        now = time.monotonic_ns()
        return Usage(0, now - begun, 0, 1, now)

    monkeypatch.setattr(server, "usage", usage)
    monkeypatch.setattr(python_tool, "_LONGEST", 2)
    monkeypatch.setattr(python_tool, "_LATE_S", 0.0)

    async def story() -> Observation:
        tool = PythonTool(server, (), 1.0, LIMIT)
        with pytest.raises(InfrastructureError, match=r"of 2\.\d s on the processor: the machine has too much to do"):
            await call(tool, "import time\ntime.sleep(60)")
        got = await call(tool, "2")
        await tool.close()
        return got

    assert asyncio.run(story()).text.endswith("2")


def test_the_server_sees_that_a_session_cannot_run(tmp_path: Path) -> None:
    """On one core with others that compute, it waits for its turn most of the time; alone it does not."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with contextlib.closing(PythonServer(PythonToolConfig(max_output_chars=LIMIT), tmp_path)) as server:

            async def story() -> tuple[float, float]:
                tools = [PythonTool(server, (), 60.0, LIMIT) for _ in range(4)]
                for tool in tools:
                    await call(tool, "1")
                running = [asyncio.create_task(call(tool, "while True: pass")) for tool in tools]
                process = tools[0]._process
                assert process is not None
                await until(lambda: server.usage(process).at_ns > 0)
                before = server.usage(process)
                await asyncio.sleep(2.0)
                after = server.usage(process)
                for one in running:
                    one.cancel()
                await asyncio.gather(*running, return_exceptions=True)
                passed = after.at_ns - before.at_ns
                return (after.delay_ns - before.delay_ns) / passed, (after.cpu_ns - before.cpu_ns) / passed

            delayed, computed = asyncio.run(story())
            assert delayed > 0.4 and computed < 0.6 and delayed + computed < 1.2
    finally:
        os.sched_setaffinity(0, cores)


# -- death ----------------------------------------------------------------------------------------------------------------


def test_a_session_that_is_killed_from_outside_is_not_the_agents_error(server: PythonServer) -> None:
    async def story() -> Observation:
        tool = PythonTool(server, (), 60.0, LIMIT)
        await call(tool, "import os")
        name = f"{SCRATCH}/{os.getpid()}-mine"
        await call(tool, f"open({name!r}, 'w').close()")
        (session,) = [pid for pid in sessions(server) if os.path.exists(f"/proc/{pid}/root{name}")]
        running = asyncio.create_task(call(tool, "import time\ntime.sleep(60)"))
        await asyncio.sleep(0.2)
        os.kill(session, signal.SIGKILL)  # as the kernel does where memory is short
        with pytest.raises(InfrastructureError, match="killed from outside: the machine ran out of memory"):
            await running
        got = await call(tool, "'os' in globals()")
        await tool.close()
        return got

    assert asyncio.run(story()) == Observation("[new Python session: earlier variables are gone]\nTrue")


OWN_ENDS = {
    "exit": "import os\nos._exit(9)",
    "a fault": "import ctypes\nctypes.string_at(0)",
    "a signal of its child": "import os\nif not os.fork(): os.kill(os.getppid(), 9); os._exit(0)\nos._exit(1)",
    "CPU time": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
    "its first thread and its socket": "import ctypes, os, threading, time\nlibc = ctypes.CDLL(None)\n"
    "threading.Thread(target=time.sleep, args=(60,)).start()\nos.close(3)\n"
    "libc.syscall(60 if os.uname().machine == 'x86_64' else 93, 0)",
    "its socket": "import os, time\nos.close(3)\ntime.sleep(60)",
    "a forged message": "import os, time\nos.write(3, b'garbage!!')\ntime.sleep(60)",
}


OWN_SIGNALS = {
    "of a child that ends": "pid = libc.syscall(56 if os.uname().machine == 'x86_64' else 220, 9, 0, 0, 0, 0)\n"
    "if not pid: os._exit(0)\nos.waitid(os.P_ALL, 0, os.WEXITED | 0x40000000)",
    "of a socket": "import fcntl, socket\na, b = socket.socketpair()\nfcntl.fcntl(a, 10, 9)\n"
    "fcntl.fcntl(a, fcntl.F_SETOWN, os.getpid())\nfcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nb.send(b'x')",
    "of a grandchild": "if not os.fork():\n    if not os.fork(): os.kill(1, 9); os._exit(0)\n"
    "    os.wait(); os._exit(0)\nos.wait()",
    "of a handle": "import signal\nfd = os.pidfd_open(1)\nif not os.fork(): signal.pidfd_send_signal(fd, 9); os._exit(0)\n"
    "os.wait()",
    "of its parent's end": "libc.prctl(1, 9, 0, 0, 0)",
}


@pytest.mark.parametrize("name", OWN_SIGNALS)
def test_no_signal_of_its_own_looks_as_if_it_came_from_outside(server: PythonServer, name: str) -> None:
    async def story() -> list[Observation]:
        tool = PythonTool(server, (), 60.0, LIMIT)
        code = f"import ctypes, os\nlibc = ctypes.CDLL(None)\n{OWN_SIGNALS[name]}\nprint('here')"
        got = [await call(tool, code), await call(tool, "2")]
        await tool.close()
        return got

    got, after = asyncio.run(story())
    assert got.text.endswith("here") and after == Observation("2")


@pytest.mark.parametrize("name", OWN_ENDS)
def test_a_session_that_ends_itself_is_the_agents_error(server: PythonServer, name: str) -> None:
    async def story() -> Observation:
        tool = PythonTool(server, (), 60.0, LIMIT)
        got = await call(tool, OWN_ENDS[name])
        await tool.close()
        return got

    got = asyncio.run(story())
    assert got.outcome is Outcome.TOOL_ERROR and "The Python session ended (" in got.text


# -- sessions kept ready --------------------------------------------------------------------------------------------------

LOOK = (
    "import os, random\nprint(os.getpid(), os.listdir('.'), hash('a'), set('abcdef'), random.random(), "
    "np.random.rand(), sorted(globals()), os.listdir('/proc/self/fd'))"
)


def test_a_session_that_was_ready_is_as_a_fresh_one(tmp_path: Path) -> None:
    def look(pool: int) -> list[str]:
        config = PythonToolConfig(max_output_chars=LIMIT, pool=pool)

        async def story() -> list[str]:
            tools = [PythonTool(server, (), 60.0, LIMIT) for _ in range(3)]
            seen = [(await call(tool, LOOK)).text for tool in tools]
            for tool in tools:
                await tool.close()
            return seen

        with contextlib.closing(PythonServer(config, tmp_path)) as server:
            return asyncio.run(story())

    (fresh,) = set(look(0))
    assert set(look(2)) == {fresh}  # the third one was not ready


def test_a_ready_session_that_died_is_replaced(tmp_path: Path) -> None:
    with contextlib.closing(PythonServer(PythonToolConfig(max_output_chars=LIMIT, pool=3), tmp_path)) as server:

        async def story() -> Observation:
            await until(lambda: len(sessions(server)) == 3)
            for session in sessions(server):
                os.kill(session, signal.SIGKILL)
            await until(lambda: not sessions(server))
            tool = PythonTool(server, (), 60.0, LIMIT)
            got = await call(tool, "2")
            await tool.close()
            await until(lambda: len(sessions(server)) == 3)
            return got

        assert asyncio.run(story()) == Observation("2")


async def _many(server: PythonServer, num: int, at_a_time: int) -> None:
    gate = asyncio.Semaphore(at_a_time)

    async def rollout(number: int) -> None:
        async with gate:
            tool = PythonTool(server, (), 60.0, LIMIT)
            try:
                assert await call(tool, f"open('f', 'w').write('x')\n{number}") == Observation(str(number))
            finally:
                await tool.close()

    await asyncio.gather(*(rollout(number) for number in range(num)))


@pytest.mark.slow
def test_thousands_of_sessions_leave_nothing(tmp_path: Path) -> None:
    with contextlib.closing(PythonServer(PythonToolConfig(max_output_chars=LIMIT, pool=2), tmp_path)) as server:
        inner = psutil.Process(server.pid).children()[0]

        def held() -> tuple[int, int, int]:
            return (
                len(os.listdir("/proc/self/fd")),
                len(os.listdir(f"/proc/{inner.pid}/fd")),
                len(inner.children(recursive=True)),
            )

        async def story(num: int) -> None:
            await _many(server, num, 64)
            await until(lambda: len(sessions(server)) == 2)

        asyncio.run(story(200))
        before, memory = held(), inner.memory_info().rss
        asyncio.run(story(3000))
        assert held() == before
        assert inner.memory_info().rss - memory < 4 << 20
        assert not list((tmp_path).rglob("tmp*"))


# -- control groups -------------------------------------------------------------------------------------------------------


def _unified() -> Path | None:
    """Where version 2 of the control groups is mounted, with or without controllers."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next((Path(line.split()[4]) for line in lines if line.partition(" - ")[2].startswith("cgroup2 ")), None)


def test_sessions_are_in_groups_of_their_own_which_go_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _unified()
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("no control groups of version 2 that this user may make")
    group = root / f"metis-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    monkeypatch.setattr(python_server, "make_group", lambda name: group)
    with contextlib.closing(PythonServer(PythonToolConfig(max_output_chars=LIMIT, pool=1), tmp_path)) as server:
        assert server.layers.limits == "cgroup"

        async def story() -> list[list[str]]:
            tools = [PythonTool(server, (), 60.0, LIMIT) for _ in range(3)]
            for tool in tools:
                assert await call(tool, "import os\nos.fork() or __import__('time').sleep(60)\n1") == Observation("1")
            inside = [(inner / "cgroup.procs").read_text().split() for inner in group.iterdir() if inner.is_dir()]
            for tool in tools:
                await tool.close()
            await until(lambda: sum(inner.is_dir() for inner in group.iterdir()) <= 2)  # the pool, and one that is late
            return inside

        inside = asyncio.run(story())
        assert sorted(map(len, inside)) == [*[1] * (len(inside) - 3), 2, 2, 2]  # with their children
    assert not group.exists()
