"""Tools in workers, with the real sandbox: what they answer, and every way in which a worker is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from metis_fast.config import RolloutConfig, ToolsConfig, WorkersConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.rollout.episode import SampleKey, run_episode
from metis_fast.rollout.protocols import Compact
from metis_fast.testing.fakes import FakeEngine
from metis_fast.tools import open_toolbox
from metis_fast.tools.remote import RemoteToolbox, SessionLost, start_tool_workers
from metis_fast.types import Observation, Outcome
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import LocalLauncher
from metis_fast.workers.worker import Worker, WorkerError, wait_ready

CONFIG = ToolsConfig.model_validate({"enabled": ["python"], "python": {"timeout_s": 1.5}})
WORD = Compact().word
FRAGILE = "metis_fast.testing.fragile:FragileTools"


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Worker]]:
    """Two, in which a sandbox works."""
    folder = tmp_path_factory.mktemp("tools")
    try:
        open_toolbox(CONFIG, folder / "probe").close()
    except ToolSetupError as error:
        pytest.skip(str(error))
    with Hub(WorkersConfig(silence_s=2.0, start_s=60.0), LocalLauncher(folder / "logs")) as hub:
        workers = start_tool_workers(hub, CONFIG, 2, folder, FRAGILE)
        wait_ready(workers, lambda: None)
        yield workers
    assert not list(folder.glob("metis-tools-*"))  # those of killed ones went when they were started again


@pytest.fixture
def toolbox(workers: list[Worker]) -> Iterator[RemoteToolbox]:
    wait_ready(workers, lambda: None)
    toolbox = RemoteToolbox(CONFIG, workers)
    yield toolbox
    assert toolbox.num_sessions == [0, 0]
    for worker in workers:
        if worker.alive:
            assert asyncio.run(worker.call("open_sessions", deadline_s=60.0)) == 0


async def ask(session: object, code: str) -> Observation:
    return WORD(await session.call("python", {"code": code}))  # pyright: ignore[reportAttributeAccessIssue]


def test_sessions_keep_their_state_on_one_of_the_workers(toolbox: RemoteToolbox, picture: Callable) -> None:
    async def go() -> None:
        sessions = [toolbox.session((picture(0, 32, 32),)) for _ in range(4)]
        try:
            for i, session in enumerate(sessions):
                await ask(session, f"x = {i}")
            assert toolbox.num_sessions == [2, 2]
            got = await asyncio.gather(*(ask(session, "print(x, image_1.size)") for session in sessions))
            assert [one.text for one in got] == [f"{i} (32, 32)" for i in range(4)]
            wrong = await ask(sessions[0], "1 / 0")
            assert wrong.outcome is Outcome.TOOL_ERROR and "ZeroDivisionError" in wrong.text
            unknown = WORD(await sessions[0].call("shell", {}))
            assert unknown.outcome is Outcome.TOOL_ERROR and "no tool" in unknown.text
            slow = await ask(sessions[0], "while True: pass")
            assert slow.outcome is Outcome.TOOL_ERROR and "Timed out after 1.5 s" in slow.text
        finally:
            for session in sessions:
                await session.close()
                await session.close()

    asyncio.run(go())


@pytest.mark.parametrize("fault", ["kill", "stop", "memory", "hang", "bug", pytest.param("garbage", marks=pytest.mark.slow)])
def test_a_call_that_breaks_its_worker_is_our_failure_and_the_session_can_be_used_again(
    toolbox: RemoteToolbox, workers: list[Worker], fault: str
) -> None:
    if fault == "hang":
        toolbox.call_s = 0.5
    before = sum(worker.restarts for worker in workers)

    async def go() -> None:
        session, other = toolbox.session(()), toolbox.session(())
        try:
            await ask(session, "x = 1")
            await ask(other, "y = 2")  # on the other worker
            with pytest.raises(WorkerError):
                await ask(session, f"# {fault}")
            toolbox.call_s = 60.0
            assert (await ask(other, "print(y)")).text == "2"
            assert "NameError" in (await ask(session, "print(x)")).text  # opened anew, on a worker that lives
        finally:
            await session.close()
            await other.close()

    asyncio.run(go())
    wait_ready(workers, lambda: None)
    assert sum(worker.restarts for worker in workers) == before + (fault != "bug")


def test_a_session_whose_worker_was_lost_between_two_calls_is_lost(toolbox: RemoteToolbox, workers: list[Worker]) -> None:
    async def go() -> None:
        session = toolbox.session(())
        await ask(session, "x = 1")
        pid = int((await ask(session, "# pid")).text)
        sandbox = [child.pid for child in psutil.Process(pid).children(recursive=True)]
        os.kill(pid, 9)
        while all(worker.alive for worker in workers):
            await asyncio.sleep(0.02)
        with pytest.raises((SessionLost, WorkerError)):
            await ask(session, "print(x)")
        await session.close()
        deadline = time.monotonic() + 60
        while left := [each for each in sandbox if psutil.pid_exists(each)]:
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.05)
        assert sandbox

    asyncio.run(go())


def test_a_cancelled_call_ends_its_session_in_the_worker(toolbox: RemoteToolbox) -> None:
    async def go() -> None:
        session = toolbox.session(())
        await ask(session, "x = 1")
        running = asyncio.create_task(ask(session, "import time; time.sleep(600)"))
        await asyncio.sleep(0.3)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.wait_for(session.close(), 120)  # raises; not when the call would have ended
        after = toolbox.session(())
        assert "2" in str(await ask(after, "print(1 + 1)"))
        await after.close()

    asyncio.run(go())


@pytest.mark.parametrize("once", [True, False])
def test_an_episode_whose_worker_dies_starts_again_or_has_no_verdict(
    toolbox: RemoteToolbox, policy, chat, make_prompt, tmp_path: Path, once: bool
) -> None:
    code = f"# kill once {tmp_path / 'mark'}" if once else "# kill"
    calls = [f'<tool_call>{{"name": "python", "arguments": {{"code": "{code}"}}}}</tool_call>' for code in ("print(7)", code)]
    engine = FakeEngine(policy.tokenizer, [[*calls, "<answer>Paris</answer><|im_end|>"]])
    config = RolloutConfig(retries=1)
    rollout = asyncio.run(run_episode(make_prompt(), 0, chat, engine, toolbox, config, SampleKey(0, "train/0", 0)))
    if once:
        assert rollout.outcome is Outcome.ANSWERED and rollout.num_tool_calls == 2
        assert [turn.observation for turn in rollout.turns] == ["7", "(no output)", ""]
    else:
        assert rollout.outcome is Outcome.INFRASTRUCTURE_ERROR and "was lost" in rollout.error
        assert rollout.num_tool_calls == 1  # the one that ran


def test_what_cannot_run_is_told_at_start(tmp_path: Path) -> None:
    config = ToolsConfig.model_validate({"enabled": ["text_search"], "text_search": {"corpus": tmp_path / "none.parquet"}})
    with Hub(WorkersConfig(), LocalLauncher(tmp_path)) as hub:
        workers = start_tool_workers(hub, config, 1, tmp_path)
        with pytest.raises(
            ToolSetupError, match=r"the corpus of text_search, .*none.parquet, is not there; set tools.text_search.corpus"
        ):
            wait_ready(workers, lambda: None)


def test_a_run_whose_tool_workers_were_all_given_up_stops(tmp_path: Path) -> None:
    config = ToolsConfig(enabled=())
    with Hub(WorkersConfig(start_s=60.0), LocalLauncher(tmp_path)) as hub:
        toolbox = RemoteToolbox(config, start_tool_workers(hub, config, 1, None, FRAGILE, max_restarts=0))

        async def go() -> None:
            session = toolbox.session(())
            with pytest.raises(WorkerError):
                await session.call("python", {"code": "# kill"})
            while True:  # it is being buried
                with contextlib.suppress(InfrastructureError):
                    await session.call("python", {"code": "1"})
                await asyncio.sleep(0.05)

        with pytest.raises(ToolSetupError, match="no tool worker is left"):
            asyncio.run(asyncio.wait_for(go(), 30))
        toolbox.close()
        with pytest.raises(InfrastructureError, match="closed"):
            asyncio.run(toolbox.session(()).call("python", {"code": "1"}))
