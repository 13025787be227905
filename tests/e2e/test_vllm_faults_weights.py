"""Weights that are damaged on their way to engines, and engines that fail while they take some: see test_vllm_faults.py."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from threading import Event, current_thread
from threading import enumerate as threads

import pytest
from faulty_engines import LIMIT_S, Open, PretendedTransfer, run

from metis_fast.errors import EngineError, StagingError
from metis_fast.rollout.engine import update
from metis_fast.rollout.vllm import direct, staged
from metis_fast.rollout.vllm.staged import StagedWeights
from metis_fast.sync.segment import tensor_at
from metis_fast.sync.staging import Payload
from metis_fast.testing.faults import Fault
from metis_fast.types import Group, Prompt


@pytest.mark.parametrize("mode", ["full", "delta"])
@pytest.mark.parametrize("fault", [Fault.TRUNCATE, Fault.FLIP, Fault.WRONG_CRC])
def test_a_bucket_that_is_damaged_on_the_way_is_sent_again(
    engines: Open, prompts: list[Prompt], fault: Fault, mode: str
) -> None:
    those = engines(copy=mode, replicas=1)

    async def go() -> list[Group]:
        await those.update(1)
        those.faults.arm(fault)
        assert await those.update(2) == 0  # that bucket alone
        those.faults.arm(fault, times=2)
        playing = asyncio.create_task(those.collect(prompts))
        await asyncio.sleep(0.02)
        assert await those.update(3) == 1
        assert not those.faults.armed()
        groups = await playing
        await those.checked_replicas(3, restarts=0)
        return groups

    those.check(run(go()), prompts, {2, 3})


def test_an_engine_that_gets_no_whole_bucket_is_started_again_and_has_them_then(engines: Open, prompts: list[Prompt]) -> None:
    those = engines(copy="full", replicas=1)

    async def go() -> list[Group]:
        await those.update(1)
        those.faults.arm(Fault.FLIP, times=2 * 3)
        await those.update(2)
        groups = await those.collect(prompts)
        assert not those.faults.armed()
        await those.checked_replicas(2, restarts=1)
        return groups

    those.check(run(go()), prompts, {2})


def test_engines_of_a_machine_share_one_copy_and_outlive_the_one_that_holds_it(
    engines: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    those = engines(copy="delta")

    async def go() -> None:
        await those.update(1)
        payloads, sent = those.staging.payloads, []

        def count(base: int | None) -> Iterator[Payload]:
            sent.append(base)
            return payloads(base)

        monkeypatch.setattr(those.staging, "payloads", count)
        await those.update(2)
        assert sent == [1]  # what has changed since version 1, once for both
        assert isinstance(those.engine.weights, StagedWeights)
        (copied,) = those.engine.weights.copies.values()
        await copied.worker.lose("told so")
        await those.checked_replicas(2, restarts=1)
        assert sent == [1, None]
        await those.update(3)
        assert sent == [1, None, 2]
        await those.checked_replicas(3, restarts=1)

    run(go())


@pytest.mark.parametrize("copy", ["", "full", "delta"])
def test_a_version_that_is_damaged_where_it_was_staged_is_staged_again_while_the_old_one_serves(
    engines: Open, prompts: list[Prompt], copy: str
) -> None:
    those = engines(copy=copy)

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


@pytest.mark.parametrize("again", [False, True])
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


def test_changes_that_were_told_against_a_damaged_version_are_sent_in_full(engines: Open, prompts: list[Prompt]) -> None:
    those = engines(copy="delta", replicas=1)

    async def go() -> list[Group]:
        await those.update(1)
        those.flip()
        # the new version is what the old one was damaged to: here it looks as if nothing had changed
        held = those.staging._segments[those.staging._at].data
        weights = {place.name: tensor_at(held, place).clone() for place in those.staging.layout.places}
        report = await update(those.engine, lambda: iter(weights.items()), 2, retries=0)
        assert (report.retries, report.num_bytes) == (1, held.nbytes)
        groups = await those.collect(prompts)
        await those.checked_replicas(2, restarts=0)
        return groups

    those.check(run(go()), prompts, {2})


@pytest.mark.parametrize("fault", [Fault.KILL_LOADING, Fault.HANG_LOADING])
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
    those = engines(copy="full")

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


def test_an_engine_that_dies_between_two_buckets_does_not_hold_up_the_others(engines: Open, prompts: list[Prompt]) -> None:
    those = engines(copy="full")
    one = those.engine.workers()[0]

    async def go() -> list[Group]:
        await those.update(1)
        payloads = those.staging.payloads

        def dying(base: int | None) -> Iterator[object]:
            if one.alive and not one.restarts:
                os.kill(one.hello.pid, signal.SIGKILL)  # pyright: ignore[reportOptionalMemberAccess]
            while one.alive and not one.restarts:
                time.sleep(0.01)
            yield from payloads(base)

        those.staging.payloads = dying  # pyright: ignore[reportAttributeAccessIssue]
        assert await those.update(2) == 0
        groups = await those.collect(prompts)
        await those.checked_replicas(2, restarts=1)
        return groups

    those.check(run(go()), prompts, {2})
