"""Engines that die, hang, answer garbage or get damaged weights: every rollout is whole, or the run says why it stops.

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
| 11 bucket cut short, with another bit, or with another checksum | sent again; the old version goes on serving | here |
| 12 a byte of the staged version changes | refused; the old version goes on serving; the trainer's is staged again | here |
| 13 the same, and an engine starts | it waits for the next version, others sample; without others the run stops | here |
| 14 a byte of the version that changes are told against | everything is sent | here |
| 15 engine dies, or hangs, while it loads weights | the others have them; it gets them when it is up again | here |
| 15b engine fails to take weights, and lives | it is started again, and gets them then | here |
| 15c engine dies after a direct transfer | the others serve on; it gets the next version | here, with a pretended transfer |
| 15d direct transfer fails | made again, with engines started anew | here, with a pretended transfer |
| 15e direct transfer hangs | the run stops | here, with a pretended transfer |
| 16 engine dies between requests | as 1 | here |
| 16b engine dies before or while it sleeps | started again when it is woken | here |
| 17 engine cannot be started any more | the run stops with a checkpoint, exit code 2; goes on when started again | here |
| 18 the run is killed | its engines end; the same command goes on | here |
| 19 Ctrl-C | checkpoint, exit code 130, no process is left | here |
| 20 judge dead | no verdict, no reward; the run stops if none is left | unit/test_remote_judge.py |
| 21 tool worker killed, stopped, out of memory | its episodes start again; no call, no reward | unit/test_remote_tools.py |
| 22 disk full at a checkpoint | the run stops; the last checkpoint is whole | test_run_disk_full.py |
| 23 Megatron rank killed or stopped | the run stops within its deadline; the last checkpoint is whole | test_megatron_run.py |
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from threading import Event, current_thread
from threading import enumerate as threads
from typing import Any, ClassVar, TypeVar

import pytest
from harness import Command, Ended, Moment, checkpoint_state, rollout_state
from scripted import ForkLauncher, ScriptedEngines, left_running, use
from torch import Tensor

from metis_fast import parts
from metis_fast.checkpoint.resume import CheckpointStore
from metis_fast.config import Config, load
from metis_fast.data.cursor import PromptCursor
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import EngineError, StagingError
from metis_fast.model import Policy, load_policy
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import Completion, update
from metis_fast.rollout.episode import collect
from metis_fast.rollout.gate import choose, probe
from metis_fast.rollout.store import read_rollouts
from metis_fast.rollout.vllm import direct, staged
from metis_fast.rollout.vllm.direct import Ask, Client
from metis_fast.rollout.vllm.engine import VllmEngine
from metis_fast.rollout.vllm.staged import StagedWeights
from metis_fast.score.judge import open_judge
from metis_fast.score.scoring import score_groups
from metis_fast.sync.manifest import Manifest
from metis_fast.sync.segment import tensor_at
from metis_fast.sync.staging import Payload, Staging
from metis_fast.testing.fakes import FakeToolbox
from metis_fast.testing.faults import EngineState, Fault, Faults, Script, flip_staged
from metis_fast.types import Group, Observation, Outcome, Prompt
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import SCRATCH

T = TypeVar("T")

_LIMIT_S = 60.0
_CALL = 'Let me look that up. <tool_call>{"name": "python", "arguments": {"code": "print(%d)"}}</tool_call>'
_ANSWER = "The tool says so. <answer>Paris</answer><|im_end|>"
_GARBAGE = [
    Fault.NAN,
    Fault.POSITIVE,
    Fault.OUTSIDE,
    Fault.PLACEHOLDER,
    Fault.TOO_MANY,
    Fault.NOTHING,
    Fault.SHORT,
    Fault.NO_ARRAY,
    Fault.NO_REPLY,
    Fault.WRONG_END,
    Fault.ABORTED,
    Fault.FUTURE,
]


class Engines:
    """Scripted engines with faults, opened as a run opens them. copy: mode of sending weights, "" for shared memory.
    transport: of weights; those of vLLM's own are `PretendedTransfer`s."""

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        chat: Chat,
        stack: ExitStack,
        copy: str,
        silence_s: float,
        transport: str = "staged",
        **vllm: float,
    ) -> None:
        self.faults = Faults(folder / "faults")
        turns = [[policy.tokenizer.encode(_CALL % n) for n in range(2)], [policy.tokenizer.encode(_ANSWER)]]
        Script(turns, turn_start=policy.tokenizer.convert_tokens_to_ids("<|im_start|>")).write(folder / "faults")  # pyright: ignore[reportArgumentType]
        settings = {"replicas": 2, "request_s": 30.0, "stall_s": 1.0, "arguments": {"faults": str(folder / "faults")}}
        self.config = Config.model_validate(
            {
                "model": {"path": policy.folder, "dtype": "float32"},
                "rollout": {
                    "engine": "vllm",
                    "vllm": settings | vllm,
                    "max_response_tokens": 512,
                    "max_concurrent": 6,
                    "deterministic": False,
                },
                "sync": {"mode": copy or "full", "transport": transport},
                "workers": {"silence_s": silence_s, "start_s": 30.0},
            }
        )
        self.policy, self.chat = policy, chat
        self.toolbox = FakeToolbox([Observation("it is Paris")])
        self.hub = stack.enter_context(Hub(self.config.workers, ForkLauncher(folder / "logs")))
        self.engine = ScriptedEngines(self.config, policy, self.hub, copy_always=bool(copy))
        stack.callback(self.engine.close)
        self.engine.wait(lambda: None)

    def weights(self, version: int) -> Iterator[tuple[str, Tensor]]:
        """Other ones for every version."""
        for name, parameter in self.policy.model.named_parameters():
            yield name, parameter.detach() + version

    async def update(self, version: int) -> int:
        """Push weights as a run does; returns how often one had to be sent again."""
        report = await update(self.engine, lambda: self.weights(version), version, self.config.sync.retries)
        assert report.version == version
        return report.retries

    @property
    def staging(self) -> Staging:
        """The engines' own."""
        assert isinstance(self.engine.weights, StagedWeights) and self.engine.weights.staging is not None
        return self.engine.weights.staging

    def flip(self) -> None:
        """Change a bit of the staged version."""
        assert self.staging.current is not None
        flip_staged(self.staging.current.to_dict())

    def flip_next(self, times: int) -> None:
        """Likewise, of versions that are staged from here on, before an engine sees them."""
        write = self.staging.write
        left = [times]

        def damaged(weights: Iterator[tuple[str, Tensor]], version: int) -> Manifest:
            manifest = write(weights, version)
            if left[0]:
                left[0] -= 1
                self.flip()
            return manifest

        self.staging.write = damaged  # pyright: ignore[reportAttributeAccessIssue]

    async def collect(self, prompts: Sequence[Prompt], repeats: int = 4) -> list[Group]:
        """Play the real episodes."""
        return await collect(prompts, repeats, self.chat, self.engine, self.toolbox, self.config.rollout, 0, "train/0")

    async def states(self) -> list[EngineState]:
        """Of the replicas, once they are all up."""
        return [await worker.call("state") for worker in self.engine.workers()]

    def check(self, groups: Sequence[Group], prompts: Sequence[Prompt], versions: set[int], repeats: int = 4) -> None:
        """Every prompt has all its rollouts, each whole, with its tool called once and a reward that it has earned."""
        assert [group.prompt.uid for group in groups] == [prompt.uid for prompt in prompts]
        assert len(self.toolbox.calls) == repeats * len(prompts) and self.toolbox.num_open == 0
        judge = open_judge(self.config.score, {"rule"})
        scored = asyncio.run(score_groups(groups, judge, self.config))
        for group in scored:
            assert [rollout.index for rollout in group.rollouts] == list(range(repeats))
            for rollout, score in zip(group.rollouts, group.scores, strict=True):
                assert rollout.outcome is Outcome.ANSWERED, rollout.error
                assert rollout.turns[0].text in (_CALL % 0, _CALL % 1)
                assert [turn.text for turn in rollout.turns][1:] == [_ANSWER.removesuffix("<|im_end|>")]
                assert set(rollout.weight_version[rollout.sampled].tolist()) <= versions
                assert (rollout.logp[rollout.sampled] == -1).all()
                assert score.verdict is not None and score.verdict.correct and score.r_tool == 0.5

    async def checked_replicas(self, version: int, restarts: int) -> None:
        """All are up, with the weights that were staged last."""
        states = await self.states()
        assert self.engine.restarts == restarts
        assert {state.version for state in states} == {version}
        assert len({state.digest for state in states}) == 1


Open = Callable[..., Engines]


@pytest.fixture
def engines(tmp_path: Path, policy: Policy, chat: Chat) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda copy="", silence_s=2.0, **more: Engines(tmp_path, policy, chat, stack, copy, silence_s, **more)


class PretendedTransfer:
    """`DirectTransfer` that asks the engines as vLLM's does, and moves nothing: a scripted engine has no weights.

    opened: all of a test, in order.
    """

    opened: ClassVar[list[PretendedTransfer]] = []

    def __init__(self, transport: str, host: str, ask: Ask, engines: int, ranks: int, largest: int) -> None:
        assert largest > 0
        self.host, self.engines, self.closed = host, engines, False
        self._client = Client(ask, engines, ranks)
        self._client.init_weight_transfer_engine({"rank_offset": 1})
        self.opened.append(self)

    def send(self, pairs: Sequence[tuple[str, Tensor]], version: int) -> None:
        """See `DirectTransfer.send`."""
        assert pairs
        self._client.version = version
        self._client.start_weight_update()
        self.amid()
        self._client.finish_weight_update()

    def amid(self) -> None:
        """Called in the middle of every transfer."""

    def close(self) -> None:
        """See `DirectTransfer.close`."""
        self.closed = True


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[PretendedTransfer]:
    """All that are opened in a test."""
    monkeypatch.setattr(PretendedTransfer, "opened", [])
    monkeypatch.setattr(direct, "check", lambda transport: None)
    monkeypatch.setattr(direct, "DirectTransfer", PretendedTransfer)
    return PretendedTransfer.opened


@pytest.fixture
def prompts(make_prompt: Callable[..., Prompt]) -> list[Prompt]:
    return [make_prompt(uid=f"p{i}") for i in range(3)]


def run(awaitable: Awaitable[T]) -> T:
    """Nothing waits for ever."""

    async def limited() -> T:
        return await asyncio.wait_for(awaitable, _LIMIT_S)

    return asyncio.run(limited())


_IN_A_STEP = [Fault.KILL, Fault.STOP, Fault.RAISE, Fault.EXIT, Fault.HANG, Fault.BLOCK]


@pytest.mark.parametrize("fault", [*_IN_A_STEP, Fault.REFUSE, *_GARBAGE])
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
        assert hangs.wait(_LIMIT_S) and current_thread().daemon

    monkeypatch.setattr(PretendedTransfer, "amid", lambda self: hang())
    try:
        with pytest.raises(EngineError, match=r"version 1 by nccl took longer than 0\.5 s: .*; run the same command again"):
            run(those.update(1))
    finally:
        hangs.set()
        for thread in threads():
            if thread.name == "weights":
                thread.join(_LIMIT_S)
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


class Run:
    """The demo's main job with scripted engines."""

    def __init__(self, demo: Path, folder: Path) -> None:
        self.folder, self._demo, self._number = folder, demo, 0
        self.faults = Faults(folder.parent / "faults")
        settings = f"{{replicas: 2, restarts: 1, arguments: {{faults: {folder.parent / 'faults'}}}}}"
        self._command = ["train", demo / "config.yaml", f"run.dir={folder}", "rollout.engine=vllm", f"rollout.vllm={settings}"]
        self._command += ["data.heldout=[]", "eval.every=0", "log.progress=false", "gate.prompts=0", "checkpoint.every=0"]
        tokenizer = load_policy(load(demo / "config.yaml").model).tokenizer
        calls = [
            '<tool_call>{"name": "python", "arguments": {"code": "print(6 * 7)"}}</tool_call>',
            "<answer>42</answer><|im_end|>",
        ]
        answers = ["<reason>Seen.</reason><answer>42</answer><|im_end|>", "42<|im_end|>"]
        turns = [[tokenizer.encode(text) for text in texts] for texts in (calls, answers)]
        Script(turns, tokenizer.convert_tokens_to_ids("<|im_start|>")).write(folder.parent / "faults")  # pyright: ignore[reportArgumentType]

    def begin(self, moment: Moment | None = None) -> Command:
        """The same command, once more."""
        self._number += 1
        return Command(self._command, self.folder.parent / f"{self.folder.name}-{self._number}", moment, use)

    def end(self, moment: Moment | None = None) -> Ended:
        """Begin, and wait for its end; nothing of it is left."""
        return self.ended(self.begin(moment))

    def ended(self, command: Command) -> Ended:
        """Wait for its end; nothing of it is left."""
        ended = command.wait()
        assert not ended.orphans and not left_running(self.folder / "workers"), ended
        return ended

    def steps(self) -> list[int]:
        """That are logged."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    def saved(self) -> tuple[int, ...]:
        """Steps of the last checkpoint."""
        return CheckpointStore(self.folder / "checkpoints", 1).steps()[-1:]

    def check(self, steps: int, per_step: int = 4) -> None:
        """Every prompt was trained once, with all its rollouts, none of them failed."""
        assert self.steps() == list(range(steps))
        drawn = PromptCursor(PromptFiles([self._demo / "data" / "train.parquet"]), 0).next(steps * per_step)
        for step in range(steps):
            stored = list(read_rollouts(self.folder / "rollouts" / f"step-{step:06d}.parquet"))
            uids = [one.rollout.prompt_uid for one in stored]
            assert uids == [prompt.uid for prompt in drawn[step * per_step : (step + 1) * per_step] for _ in range(4)]
            for one in stored:
                assert one.score.verdict is not None and one.rollout.outcome is Outcome.ANSWERED, one.rollout.error
                assert set(one.rollout.weight_version[one.rollout.sampled].tolist()) == {step}


def test_a_run_goes_on_after_ctrl_c_kill_and_the_loss_of_all_its_engines_as_if_nothing_had_been(
    demo: Path, tmp_path: Path
) -> None:
    whole, broken = Run(demo, tmp_path / "whole"), Run(demo, tmp_path / "broken")
    assert whole.end().code == 0
    whole.check(steps=5)

    ended = broken.end(Moment("pipeline._rollout", signal.SIGINT, entry=2, delay_s=0.1))
    assert ended.hit and ended.code == 130 and ended.after_s < 10, ended
    assert ended.err.splitlines()[-1] == "metis-fast: stopped; run the same command again to go on"
    assert broken.steps() == [0] and broken.saved() == (1,)

    ended = broken.end(Moment("pipeline._update", signal.SIGKILL, entry=2))
    assert ended.hit and ended.code == -signal.SIGKILL, ended
    assert broken.saved() == (1,)

    running = broken.begin()
    while len(broken.steps()) < 3:
        assert running.alive, running.read("err")
        time.sleep(0.005)
    broken.faults.arm(Fault.NO_START, times=10)
    broken.faults.arm(Fault.KILL, times=2)
    ended = broken.ended(running)
    assert ended.code == 2, ended
    assert "metis-fast: no engine is left: its process ended with 3" in ended.err.splitlines()[-1]
    done = len(broken.steps())
    assert 3 <= done < 5 and broken.saved() == (done,)

    broken.faults.clear()
    broken.faults.arm(Fault.KILL)  # one that can be started again does not end the run
    broken.faults.arm(Fault.DAMAGE)  # nor does a version that can be staged again
    assert broken.end().code == 0
    retries = [json.loads(line)["sync_retries"] for line in (broken.folder / "metrics.jsonl").read_text().splitlines()]
    assert retries[done:] == [1] + [0] * (4 - done), retries
    broken.check(steps=5)
    for state, name in ((checkpoint_state, "checkpoints"), (rollout_state, "rollouts")):
        assert state(broken.folder / name) == state(whole.folder / name)


def _use_faulty() -> None:
    class FaultyEngines(VllmEngine):
        def __init__(self, config: Config, policy: Policy, hub: Hub) -> None:
            super().__init__(config, policy, hub, "metis_fast.testing.faults:FaultyVllm")

    parts.VllmEngine = FaultyEngines


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_a_real_engine_goes_on_with_the_trainers_weights_after_each_fault_and_leaves_no_files(
    demo: Path, tmp_path: Path
) -> None:
    folder, faults, scratch = tmp_path / "run", Faults(tmp_path / "faults"), set[Path]()
    vllm = f"{{cpu_threads: 1, arguments: {{faults: {tmp_path / 'faults'}}}}}"
    command = ["train", demo / "config.yaml", f"run.dir={folder}", "rollout.engine=vllm", f"rollout.vllm={vllm}"]
    command += ["rollout.deterministic=false", "model.dtype=float32", "train.steps=6", "data.heldout=[]", "eval.every=0"]
    running = Command([*command, "log.progress=false", "log.tensorboard=false"], tmp_path / "process", before=_use_faulty)

    def records() -> list[dict[str, Any]]:
        path = folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    for fault in ((Fault.FORGET, Fault.REFUSE, Fault.DAMAGE), (Fault.RAISE,), (Fault.NAN,)):
        done = len(records())
        while len(records()) <= done:  # the start, and the gate, are over; an engine is up
            assert running.alive, running.read("err")
            time.sleep(0.02)
        (engine,) = [one for one in running.family() if "engine-0" in one.cmdline()]
        scratch.add(Path(engine.environ()[SCRATCH]))
        assert any(path.name.startswith("vllm_dist_") for folder in scratch if folder.exists() for path in folder.iterdir())
        for one in fault:
            faults.arm(one)
        while faults.armed():
            assert running.alive, running.read("err")
            time.sleep(0.02)
    ended = running.wait()
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended
    assert ended.err.count("; starting it again (") == 2 and "answered garbage" in ended.err, ended.err
    assert len(scratch) >= 2 and not any(folder.exists() for folder in scratch)
    assert sum(record["sync_retries"] for record in records()) == 1
    assert max(update["engine_gap"] for record in records() for update in record["updates"]) < 1e-4
    for step in range(6):
        stored = list(read_rollouts(folder / "rollouts" / f"step-{step:06d}.parquet"))
        assert len(stored) == 4 * 4
        for one in stored:
            assert one.score.verdict is not None, one.rollout.error
            assert set(one.rollout.weight_version[one.rollout.sampled].tolist()) == {step}
