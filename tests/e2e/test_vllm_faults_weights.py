"""Weights that are damaged on their way to engines, and engines that fail while they take some: see test_vllm_faults.py."""

from __future__ import annotations

import asyncio
import os
import signal
from threading import Event, current_thread
from threading import enumerate as threads

import pytest
from faulty_engines import LIMIT_S, Open, PretendedTransfer, run

from metis_fast.errors import EngineError, StagingError
from metis_fast.rollout.vllm import direct, staged
from metis_fast.testing.faults import Fault
from metis_fast.types import Group, Prompt


def test_a_version_that_an_engine_does_not_read_as_it_was_staged_is_given_to_it_again(
    engines: Open, prompts: list[Prompt]
) -> None:
    those = engines(replicas=1)

    async def go() -> list[Group]:
        await those.update(1)
        those.faults.arm(Fault.MISREAD)
        playing = asyncio.create_task(those.collect(prompts))
        await asyncio.sleep(0.02)
        assert await those.update(2) == 1
        assert not those.faults.armed()
        groups = await playing
        await those.checked_replicas(2, restarts=0)
        return groups

    those.check(run(go()), prompts, {1, 2})


def test_an_engine_that_never_reads_it_so_is_started_again_and_has_it_then(engines: Open, prompts: list[Prompt]) -> None:
    those = engines(replicas=1)

    async def go() -> list[Group]:
        await those.update(1)
        those.faults.arm(Fault.MISREAD, times=3)
        await those.update(2)
        groups = await those.collect(prompts)
        assert not those.faults.armed()
        await those.checked_replicas(2, restarts=1)
        return groups

    those.check(run(go()), prompts, {2})


def test_a_version_that_is_damaged_where_it_was_staged_is_staged_again_while_the_old_one_serves(
    engines: Open, prompts: list[Prompt]
) -> None:
    those = engines()

    async def go() -> list[Group]:
        await those.update(1)
        old = [(state.version, state.digest) for state in await those.states()]
        those.flip_next(3)
        with pytest.raises(StagingError, match=r"weight version 2, bucket .*CRC-32"):
            await those.engine.update(those.weights(2), 2)
        assert [(state.version, state.digest) for state in await those.states()] == old
        playing = asyncio.create_task(those.collect(prompts))
        while len(those.toolbox.calls) < 2:  # first messages are whole
            await asyncio.sleep(0.002)
        assert await those.update(2) == 2
        groups = await playing
        await those.checked_replicas(2, restarts=0)
        assert await those.update(3) == 0
        await those.checked_replicas(3, restarts=0)
        return groups

    groups = run(go())
    those.check(groups, prompts, {1, 2})
    versions = {int(one.weight_version[one.sampled][0]) for group in groups for one in group.rollouts}
    assert 1 in versions  # the old one was serving meanwhile


def test_memory_that_damages_every_version_stops_the_run_and_no_engine_is_blamed(engines: Open) -> None:
    those = engines()

    async def go() -> None:
        await those.update(1)
        those.flip_next(100)
        with pytest.raises(EngineError, match="weight version 2 was damaged in shared memory in each of 3 tries"):
            await those.update(2)
        await those.checked_replicas(1, restarts=0)

    run(go())


@pytest.mark.parametrize("again", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_engine_that_starts_while_the_staged_version_is_damaged_waits_for_the_next_and_others_sample(
    engines: Open, prompts: list[Prompt], again: bool
) -> None:
    those = engines(restarts=1)
    replica = those.engine.replicas[0]

    async def go() -> list[Group]:
        await those.update(1)
        if again:  # between a failed update and its repetition
            those.flip_next(1)
            with pytest.raises(StagingError):
                await those.engine.update(those.weights(2), 2)
        else:
            those.flip()
        os.kill((await those.states())[0].pid, signal.SIGKILL)
        while not replica.waits:
            await asyncio.sleep(0)
        if not again:
            groups = await those.collect(prompts)
            assert [(state.version, state.asked) for state in await those.states()] == [(0, 0), (1, 2 * 4 * len(prompts))]
            assert all((one.weight_version[one.sampled] == 1).all() for group in groups for one in group.rollouts)
            those.toolbox.calls.clear()
        assert await those.update(2) == 0  # the engine may not be up yet, for the rest of the run
        await those.checked_replicas(2, restarts=1)
        groups = await those.collect(prompts)
        assert min(state.asked for state in await those.states()) > 0
        return groups

    those.check(run(go()), prompts, {2})


def test_an_only_engine_that_starts_while_the_staged_version_is_damaged_is_not_believed_before_the_next(
    engines: Open, prompts: list[Prompt]
) -> None:
    those = engines(replicas=1, restarts=1)

    async def go() -> list[Group]:
        await those.update(1)
        those.flip()
        os.kill((await those.states())[0].pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"no engine has the current weights: .*CRC-32.*; run the same command again"):
            await those.collect(prompts)
        assert those.toolbox.num_open == 0 and not those.toolbox.calls
        assert await those.update(2) == 0
        groups = await those.collect(prompts)
        await those.checked_replicas(2, restarts=1)
        return groups

    those.check(run(go()), prompts, {2})


@pytest.mark.parametrize("fault", [Fault.KILL_LOADING, pytest.param(Fault.HANG_LOADING, marks=pytest.mark.slow)])
def test_an_engine_that_is_lost_while_it_loads_weights_has_them_when_it_is_up_again(
    engines: Open, prompts: list[Prompt], fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "LOAD_S", 2.0)
    those = engines()

    async def go() -> list[Group]:
        await those.update(1)
        those.faults.arm(fault)
        assert await those.update(2) == 0
        groups = await those.collect(prompts)
        assert not those.faults.armed()
        await those.checked_replicas(2, restarts=1)
        return groups

    those.check(run(go()), prompts, {2})


def test_an_engine_that_has_no_room_for_the_weights_does_not_go_on_with_its_old_ones(
    engines: Open, prompts: list[Prompt], caplog: pytest.LogCaptureFixture
) -> None:
    those = engines()

    async def go() -> list[Group]:
        await those.update(1)
        those.faults.arm(Fault.NO_SPACE)
        assert await those.update(2) == 0
        groups = await those.collect(prompts)
        assert not those.faults.armed()
        await those.checked_replicas(2, restarts=1)
        return groups

    those.check(run(go()), prompts, {2})
    assert "it did not take the weights: worker engine-" in caplog.text and "No space left" in caplog.text


def test_after_a_direct_transfer_the_new_versions_tokens_are_believed_and_an_engine_started_later_gets_the_next(
    engines: Open, prompts: list[Prompt], transfers: list[PretendedTransfer]
) -> None:
    those = engines(transport="nccl")

    async def go() -> list[Group]:
        for version in (1, 2):
            assert (await those.update(version)) == 0
        assert len(transfers) == 1
        os.kill((await those.states())[0].pid, signal.SIGKILL)
        groups = await those.collect(prompts)
        assert those.engine.restarts == 1
        await those.states()  # it is up again, without weights
        assert all((one.weight_version[one.sampled] == 2).all() for group in groups for one in group.rollouts)
        those.toolbox.calls.clear()
        assert (await those.update(3)) == 0
        groups = await those.collect(prompts)
        assert {state.version for state in await those.states()} == {3}
        assert those.engine.restarts == 1
        return groups

    those.check(run(go()), prompts, {3})
    assert len(transfers) == 2  # one that was started anew is in no communicator


def test_a_direct_transfer_that_fails_is_made_again_with_new_engines_and_without_one_that_cannot_be_started(
    engines: Open, prompts: list[Prompt], transfers: list[PretendedTransfer], monkeypatch: pytest.MonkeyPatch
) -> None:
    those = engines(transport="nccl", restarts=2)
    one, other = those.engine.workers()
    times: list[int] = []

    def kill() -> None:
        times.append(len(times))
        if len(times) == 2:
            assert other.hello is not None
            os.kill(other.hello.pid, signal.SIGKILL)

    monkeypatch.setattr(PretendedTransfer, "amid", lambda self: kill())

    async def go() -> list[Group]:
        assert await those.update(1) == 0
        assert await those.update(2) == 1
        assert [(each.engines, each.closed) for each in transfers] == [(2, True), (2, False)]
        assert (one.restarts, other.restarts) == (1, 1)
        other._max_restarts = 1
        await other.lose("as asked")
        while other.broken is None:
            await asyncio.sleep(0.01)
        assert await those.update(3) == 0
        assert [(each.engines, each.closed) for each in transfers] == [(2, True), (2, True), (1, False)]
        return await those.collect(prompts)

    those.check(run(go()), prompts, {3})
    assert {each.host for each in transfers} == {"127.0.0.1"}


def test_a_direct_transfer_that_hangs_ends_the_run_and_no_thread_holds_it_back(
    engines: Open, transfers: list[PretendedTransfer], monkeypatch: pytest.MonkeyPatch
) -> None:
    those, hangs = engines(transport="nccl", replicas=1), Event()
    monkeypatch.setattr(direct, "LOAD_S", 0.5)

    def hang() -> None:
        assert hangs.wait(LIMIT_S) and current_thread().daemon

    monkeypatch.setattr(PretendedTransfer, "amid", lambda self: hang())
    try:
        with pytest.raises(EngineError, match=r"version 1 by nccl took longer than 0\.5 s: .*; run the same command again"):
            run(those.update(1))
    finally:
        hangs.set()
        for thread in threads():
            if thread.name == "weights":
                thread.join(LIMIT_S)
    assert len(transfers) == 1
