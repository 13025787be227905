"""Engines that die, hang, answer garbage or get damaged weights: every rollout is whole, or the run says why it stops.

weights: test_vllm_faults_weights.py, run: test_vllm_faults_run.py.

| fault | what happens | where it is tested |
| --- | --- | --- |
| 1 engine killed amid messages | started again; others take its rollouts from their last whole message | here |
| 2 engine stopped (SIGSTOP) | silent for `workers.silence_s`: killed, then as 1 | here |
| 3 a step raises | the engine ends itself, then as 1 | here |
| 4 the engine's process ends | as 1 | here |
| 5 a step hangs | the engine ends itself after `rollout.vllm.stall_s`, then as 1 | here |
| 6 a step hangs and keeps Python's lock | as 2; without a run, as 5 | here |
| 7 a request raises | asked again elsewhere | here |
| 8 garbage answers, of twelve kinds | not believed; the engine is started again, then as 1 | here |
| 9 a slow replica | gets fewer rollouts; one over `rollout.vllm.request_s` counts as hung | here |
| 10 images forgotten | sent again | here |
| 11 bucket cut short, with another bit, or with another checksum | sent again; the old version goes on serving | weights |
| 12 a byte of the staged version changes | refused; the old version goes on serving; the trainer's is staged again | weights |
| 13 the same, and an engine starts | it waits for the next version, others sample; without others the run stops | weights |
| 14 a byte of the version that changes are told against | everything is sent | weights |
| 15 engine dies, or hangs, while it loads weights | the others have them; it gets them when it is up again | weights |
| 15b engine fails to take weights, and lives | it is started again, and gets them then | weights |
| 15c engine dies after a direct transfer | the others serve on; it gets the next version | weights, with a pretended transfer |
| 15d direct transfer fails | made again, with engines started anew | weights, with a pretended transfer |
| 15e direct transfer hangs | the run stops | weights, with a pretended transfer |
| 16 engine dies between requests | as 1 | here |
| 16b engine dies before or while it sleeps | started again when it is woken | here |
| 17 engine cannot be started any more | the run stops with a checkpoint, exit code 2; goes on when started again | here, run |
| 18 the run is killed | its engines end; the same command goes on | run |
| 19 Ctrl-C | checkpoint, exit code 130, no process is left | run |
| 20 judge dead | no verdict, no reward; the run stops if none is left | unit/test_remote_judge.py |
| 21 tool worker killed, stopped, out of memory | its episodes start again; no call, no reward | unit/test_remote_tools.py |
| 22 disk full at a checkpoint | the run stops; the last checkpoint is whole | test_run_disk_full.py |
| 23 Megatron rank killed or stopped | the run stops within its deadline; the last checkpoint is whole | test_megatron_run.py |
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from faulty_engines import Open, run

from metis_fast.errors import EngineError
from metis_fast.rollout.engine import Completion
from metis_fast.rollout.gate import choose, probe
from metis_fast.testing.faults import Fault
from metis_fast.types import Group, Prompt

# The quick ones: numbers, tokens, a length, a reply, a version.
_GARBAGE = [Fault.NAN, Fault.PLACEHOLDER, Fault.SHORT, Fault.NO_REPLY, Fault.FUTURE]
_MORE_GARBAGE = [
    Fault.POSITIVE, Fault.OUTSIDE, Fault.TOO_MANY, Fault.NOTHING, Fault.NO_ARRAY, Fault.WRONG_END, Fault.ABORTED,
]  # fmt: skip
_IN_A_STEP = [Fault.KILL, Fault.STOP, Fault.RAISE, Fault.EXIT, Fault.HANG, Fault.BLOCK]


@pytest.mark.parametrize(
    "fault", [*_IN_A_STEP, Fault.REFUSE, *_GARBAGE, *(pytest.param(one, marks=pytest.mark.slow) for one in _MORE_GARBAGE)]
)
def test_rollouts_of_an_engine_that_fails_go_on_elsewhere_from_their_last_whole_message(
    engines: Open, prompts: list[Prompt], fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    those = engines()

    async def arm() -> None:  # most rollouts are at their second message then, and their tools must not be called again
        while len(those.toolbox.calls) < 5:
            await asyncio.sleep(0.002)
        those.faults.arm(fault)

    async def go() -> list[Group]:
        await those.update(1)
        groups, _ = await asyncio.gather(those.collect(prompts), arm())
        assert not those.faults.armed()
        await those.checked_replicas(1, restarts=fault is not Fault.REFUSE)
        return groups

    those.check(run(go()), prompts, {1})
    assert fault not in _IN_A_STEP or "message 2, try 1: worker engine-" in caplog.text


@pytest.mark.slow
def test_an_engine_whose_step_keeps_pythons_lock_ends_itself(
    engines: Open, prompts: list[Prompt], caplog: pytest.LogCaptureFixture
) -> None:
    those = engines(silence_s=50.0)  # nobody else would end it

    async def go() -> list[Group]:
        await those.update(1)
        those.faults.arm(Fault.BLOCK)
        groups = await those.collect(prompts)
        await those.checked_replicas(1, restarts=1)
        return groups

    those.check(run(go()), prompts, {1})
    assert "its process ended with 1 " in caplog.text


def test_rollouts_of_a_prompt_share_a_replica_and_prompts_are_spread(engines: Open, make_prompt: Callable[..., Prompt]) -> None:
    those = engines()
    prompts = [make_prompt(f"City {i}?", uid=f"p{i}") for i in range(6)]
    asked: dict[str, set[str]] = {}
    generate = those.engine.generate

    async def noted(replica: Any, tokens: Sequence[int], *more: Any) -> Completion:
        asked.setdefault(those.chat.decode(tokens).split("assistant")[0], set()).add(replica.worker.name)
        return await generate(replica, tokens, *more)

    those.engine.generate = noted  # pyright: ignore[reportAttributeAccessIssue]

    async def go() -> list[Group]:
        await those.update(1)
        return await those.collect(prompts)

    those.check(run(go()), prompts, {1})
    assert len(asked) == 6 and all(len(names) == 1 for names in asked.values())
    assert set.union(*asked.values()) == {"engine-0", "engine-1"}


def test_the_gate_asks_every_engine_that_is_up(engines: Open, prompts: list[Prompt]) -> None:
    those = engines(replicas=3)

    async def go() -> None:
        await those.update(1)
        probes = choose(prompts[:2], 2, least=3)
        rollouts = await probe(probes, those.chat, those.engine, those.config)
        assert [one.prompt_uid for one in rollouts] == ["p0", "p1", "p0"]
        assert [state.asked for state in await those.states()] == [1, 1, 1]
        one = those.engine.workers()[0]
        await one.lose("as asked")
        while one.alive:
            await asyncio.sleep(0)
        await probe(probes, those.chat, those.engine, those.config)
        assert sorted(state.asked for state in await those.states()) == [0, 2, 3]
        assert all(replica.sessions == 0 for replica in those.engine.replicas) and not those.engine.homes

    run(go())


def test_an_only_engine_that_fails_again_and_again_is_waited_for(engines: Open, prompts: list[Prompt]) -> None:
    those = engines(replicas=1)

    async def go() -> list[Group]:
        await those.update(1)
        for fault in (Fault.KILL, Fault.NAN, Fault.NO_START):
            those.faults.arm(fault)
        groups = await those.collect(prompts)
        assert not those.faults.armed()
        await those.checked_replicas(1, restarts=3)
        return groups

    those.check(run(go()), prompts, {1})


def test_a_slow_replica_gets_fewer_rollouts(engines: Open, make_prompt: Callable[..., Prompt]) -> None:
    those, many = engines(), [make_prompt(uid=f"p{i}") for i in range(12)]

    async def go() -> list[Group]:
        await those.update(1)
        those.faults.arm(Fault.SLOW)
        groups = await those.collect(many, repeats=2)
        asked = sorted([state.asked for state in await those.states()])
        assert sum(asked) == 12 * 2 * 2 and asked[0] < asked[1] / 2, asked
        assert those.engine.restarts == 0
        return groups

    those.check(run(go()), many, {1}, repeats=2)


def test_a_replica_that_misses_the_deadline_is_started_again(engines: Open, prompts: list[Prompt]) -> None:
    those = engines(request_s=1.5)

    async def go() -> list[Group]:
        await those.update(1)
        those.faults.arm(Fault.SLOW)  # a message takes 2 s and more then
        groups = await those.collect(prompts)
        await those.checked_replicas(1, restarts=1)
        return groups

    those.check(run(go()), prompts, {1})


def test_a_request_that_waits_for_room_in_an_engine_has_its_whole_time_when_it_gets_some(
    engines: Open, make_prompt: Callable[..., Prompt]
) -> None:
    those, most = engines(replicas=1, max_num_seqs=2, request_s=1.5), 0
    prompts = [make_prompt(uid=f"p{i}") for i in range(6)]
    (worker,) = those.engine.workers()
    call, asked = worker.call, 0

    async def counted(method: str, *arguments: object, **more: Any) -> Any:
        nonlocal most, asked
        asked += method == "generate"
        most = max(most, asked)
        try:
            return await call(method, *arguments, **more)
        finally:
            asked -= method == "generate"

    worker.call = counted  # pyright: ignore[reportAttributeAccessIssue]

    async def go() -> list[Group]:
        await those.update(1)
        groups = await those.collect(prompts, repeats=2)
        await those.checked_replicas(1, restarts=0)
        return groups

    those.check(run(go()), prompts, {1}, repeats=2)
    assert most == 2


def test_images_that_an_engine_has_forgotten_are_sent_again(
    engines: Open, make_prompt: Callable[..., Prompt], picture: Callable
) -> None:
    those = engines()
    prompts = [make_prompt("Which city? <image>", images=[picture(i)], uid=f"p{i}") for i in range(3)]

    async def go() -> list[Group]:
        await those.update(1)
        await those.collect(prompts)
        those.toolbox.calls.clear()
        those.faults.arm(Fault.FORGET, times=4)
        groups = await those.collect(prompts)
        assert not those.faults.armed()
        await those.checked_replicas(1, restarts=0)
        return groups

    those.check(run(go()), prompts, {1})


def test_an_engine_that_dies_between_requests_is_noticed_before_the_next(engines: Open, prompts: list[Prompt]) -> None:
    those = engines()

    async def go() -> list[Group]:
        await those.update(1)
        os.kill((await those.states())[0].pid, signal.SIGKILL)
        groups = await those.collect(prompts)
        await those.checked_replicas(1, restarts=1)
        return groups

    those.check(run(go()), prompts, {1})


def test_an_engine_that_is_lost_while_the_trainer_has_its_memory_starts_when_it_is_given_back(
    engines: Open, prompts: list[Prompt], tmp_path: Path
) -> None:
    those = engines(sleep=True)
    one, other = those.engine.workers()

    def started() -> int:
        return sum(path.suffix != ".log" for path in (tmp_path / "logs").glob("engine-*.*"))

    async def go() -> list[Group]:
        await those.update(1)
        assert one.hello is not None and other.hello is not None
        os.kill(one.hello.pid, signal.SIGKILL)
        while one.alive:
            await asyncio.sleep(0)
        await those.engine.sleep()  # one is lost already
        os.kill(other.hello.pid, signal.SIGKILL)
        while not other.restarts:
            await asyncio.sleep(0.01)
        before = started()
        await asyncio.sleep(0.5)
        assert started() == before and not one.alive and not other.alive
        await those.engine.wake()
        await those.update(2)
        groups = await those.collect(prompts)
        await those.checked_replicas(2, restarts=2)
        return groups

    those.check(run(go()), prompts, {2})


def test_engines_of_which_none_can_be_started_any_more_are_not_put_to_sleep(engines: Open) -> None:
    those = engines(sleep=True, replicas=1, restarts=0)
    (one,) = those.engine.workers()

    async def go() -> None:
        await one.lose("as asked")
        while one.broken is None:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="no engine is left: as asked, and it was started 1 times"):
            await those.engine.sleep()

    run(go())


def test_engines_that_cannot_be_started_any_more_stop_the_run(engines: Open, prompts: list[Prompt]) -> None:
    those = engines(restarts=2)

    async def go() -> None:
        await those.update(1)
        those.faults.arm(Fault.NO_START, times=100)
        those.faults.arm(Fault.KILL, times=2)
        with pytest.raises(EngineError, match=r"no engine is left: its process ended with 3 .* started 3 times \(log: "):
            await those.collect(prompts)
        with pytest.raises(EngineError, match="no engine took weight version 2"):
            await those.update(2)

    run(go())
    assert those.toolbox.num_open == 0
