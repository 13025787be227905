"""Nodes of other machines that die, start and rest at bad moments. Ray is threads; a node plays without a model."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

from ray_threads import Actor, Rays

from metis_fast.cluster import nodes as nodes_module
from metis_fast.cluster import player as player_module
from metis_fast.cluster.nodes import RemoteNode
from metis_fast.cluster.player import ObjectStore, Player, Setup
from metis_fast.cluster.weights import Published
from metis_fast.config import Config
from metis_fast.data.row import BadRowError
from metis_fast.errors import EngineError
from metis_fast.node.node import Node
from metis_fast.node.protocol import Head, Weights
from metis_fast.rollout.engine import SyncReport
from metis_fast.run import pipeline
from metis_fast.run.fleet import Fleet
from metis_fast.run.interrupt import Interrupts
from metis_fast.run.parts import Parts
from metis_fast.summary import Data, GroupSummary, Job, ScoredSummary, Scores
from metis_fast.train.protocol import GroupsLost
from metis_fast.types import Group, Outcome, Prompt, Rollout, Verdict

G = 2
SLEEPS = {"engine": "vllm", "deterministic": False, "vllm": {"sleep": True, "replicas": 2}}


@dataclass
class Script:
    """What happens on nodes. opens: seconds of the coming starts, or what they fail with; after these they are quick. nodes: by
    number, those started last."""

    opens: list[float | Exception] = field(default_factory=list)
    update_s: float = 0.0
    together_s: float = 0.01
    starts: int = 0
    nodes: dict[int, Playing] = field(default_factory=dict)


SCRIPT = Script()


class Playing(Node):
    """Its groups are of two tokens a rollout."""

    def __init__(self, number: int, config: Config) -> None:
        none: Any = SimpleNamespace(num_replicas=1)
        super().__init__(number, config, none, none, none, none, {}, lambda images: {}, ObjectStore(), 4)
        self.asleep = False

    def _group(self, job: Job) -> Group:
        assert not self.asleep, "a node at rest was asked to sample"
        uid = f"rows:{job.row}"
        sampled = np.array([False, True])
        tokens, logp, version = np.array([1, 2], np.int32), np.array([0, -1], np.float32), np.array([-1, 0], np.int32)
        rollouts = [Rollout(uid, i, tokens, 1, sampled, logp, version, (), (), (), Outcome.ANSWERED) for i in range(G)]
        return Group(Prompt(uid, "s", (), (), "math", (), "rule", "q"), tuple(rollouts))

    async def play(self, jobs: Sequence[Job], on_done: Callable[[int], object] = lambda num: None) -> list[GroupSummary]:
        groups = [self._group(job) for job in jobs]
        return self._kept(groups, [(Verdict(True, True, "a"),) * G] * len(groups), jobs)

    async def play_one(
        self, job: Job, started: Callable[[], object], on_done: Callable[[int], object] = lambda num: None
    ) -> GroupSummary:
        return (await self.play([job]))[0]

    def look(self, data: Data, rows: Sequence[int]) -> list[Head | BadRowError]:
        return [Head(f"rows:{row}", row, 0) for row in rows]

    async def update(self, weights: Weights) -> SyncReport:
        await asyncio.sleep(SCRIPT.update_s)
        return SyncReport(weights.version, "full")

    async def rest(self) -> None:
        self.asleep = True

    async def resume(self) -> None:
        self.asleep = False


class Scripted(Player):
    """Opens such a node."""

    async def open(self, setup: Setup) -> int:
        SCRIPT.starts += 1
        happens = SCRIPT.opens.pop(0) if SCRIPT.opens else 0.0
        if isinstance(happens, Exception):
            raise happens
        await asyncio.sleep(happens)
        self._loop = asyncio.get_running_loop()
        self._together_s, self._node = SCRIPT.together_s, Playing(setup.number, setup.config)
        SCRIPT.nodes[setup.number] = self._node
        return 1


class Sent:
    """Weights of a version."""

    def __init__(self, version: int = 0) -> None:
        self.version, self.turn = version, asyncio.Lock()

    def objects(self) -> Published:
        return Published(())

    def tensors(self) -> Iterator[Any]:
        return iter(())


@pytest.fixture
def rays(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rays]:
    made = Rays()
    for module in (nodes_module, player_module):
        monkeypatch.setattr(module, "ray", made)
    monkeypatch.setattr(nodes_module, "_POLL_S", 0.2)
    monkeypatch.setattr(nodes_module, "_PAUSE_S", 0.05)
    SCRIPT.__init__()
    yield made
    made.close()


@pytest.fixture
def start(rays: Rays, tmp_path: Path) -> Iterator[Callable[..., list[RemoteNode]]]:
    """Nodes, of which all are up unless `wait` is false."""
    made: list[RemoteNode] = []

    def go(num: int = 1, wait: bool = True, workers: dict[str, Any] | None = None, **rollout: Any) -> list[RemoteNode]:
        tree = {"run": {"dir": tmp_path / "run"}, "workers": {"nodes": num, **(workers or {})}}
        config = Config.model_validate({**tree, "rollout": {"rollouts_per_prompt": G, **rollout}})
        for i in range(num):
            setup = Setup(i, config, {}, (), Path.cwd(), {}, True, 4)
            made.append(RemoteNode(setup, {}, config.workers, Scripted))
        if wait:
            until(lambda: all(node.alive for node in made))
        return made

    yield go
    for node in made:
        node.close()


def until(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it has not come to that"
        time.sleep(0.01)


def lose(rays: Rays, node: RemoteNode) -> None:
    """Kill its actor, and let the run know."""
    node._actor.die()
    until(lambda: not node.alive)


def fleet_of(nodes: Sequence[RemoteNode]) -> Fleet:
    return Fleet(nodes, nodes[0]._setup.config)


def jobs(num: int) -> list[Job]:
    return [Job("train", row, "train/0", row * G) for row in range(num)]


# -- rows -------------------------------------------------------------------------------------------------------------------


def test_rows_are_looked_at_while_the_loop_stands_still_whatever_it_has_asked_for(start: Callable[..., Any]) -> None:
    (node,) = start()
    with asyncio.Runner() as runner, ThreadPoolExecutor(1) as thread:

        async def ask() -> list[asyncio.Task[GroupSummary]]:
            # they ask in the last turn of the loop, and what sends that would run in the next one
            return [asyncio.ensure_future(node.play_one(job, lambda: None)) for job in jobs(2)]

        asked = runner.run(ask())
        assert len(node._asked) == 2
        looking = thread.submit(node.look, "train", [7])
        try:
            assert looking.result(10) == [Head("rows:7", 7, 0)]
        except TimeoutError:
            node.close()  # else its thread waits for ever
            raise

        async def played() -> list[GroupSummary]:
            return await asyncio.wait_for(asyncio.gather(*asked), 10)

        assert [group.job for group in runner.run(played())] == jobs(2)


def test_rows_can_be_looked_at_on_the_loop_itself(start: Callable[..., Any]) -> None:
    (node,) = start()
    too_late = threading.Timer(10, node.close)  # else it would wait for ever
    too_late.start()

    async def look() -> object:
        return node.look("train", [7])

    try:
        assert asyncio.run(look()) == [Head("rows:7", 7, 0)]
    finally:
        too_late.cancel()


# -- what is kept -----------------------------------------------------------------------------------------------------------


def test_of_a_group_that_is_cancelled_while_its_end_is_on_the_way_nothing_is_kept(start: Callable[..., Any]) -> None:
    SCRIPT.together_s = 0.5
    (node,) = start()
    (playing,) = SCRIPT.nodes.values()

    async def go() -> None:
        task = asyncio.ensure_future(node.play_one(jobs(1)[0], lambda: None))
        while not playing._verdicts:  # it is played; the news waits for more
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    until(lambda: not playing._verdicts and not node._kept and not node._tickets)


def test_of_a_group_that_is_cancelled_as_it_comes_nothing_is_kept(start: Callable[..., Any]) -> None:
    (node,) = start()
    (playing,) = SCRIPT.nodes.values()

    async def go() -> None:
        task = asyncio.ensure_future(node.play_one(jobs(1)[0], lambda: None))
        await asyncio.sleep(0)
        (ticket,) = node._tickets.values()
        node._send()
        until(ticket.future.done)  # and the loop has not been told
        assert node._kept
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    until(lambda: not playing._verdicts and not node._kept)


def test_what_a_lost_node_kept_is_not_asked_of_its_successor(
    start: Callable[..., Any], rays: Rays, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = start(2)
    fleet, written = fleet_of(nodes), list[tuple[int, int]]()

    async def write(self: Playing, folder: str, name: str, scored: Sequence[Scores]) -> None:
        for one in scored:
            self._keep.get(one.key)  # raises where its owner is dead
        written.append((self.number, len(scored)))

    monkeypatch.setattr(Playing, "write", write)

    async def go() -> None:
        groups = await fleet.play_all(jobs(4))
        lose(rays, nodes[1])
        until(lambda: nodes[1].alive)
        await fleet.write("rollouts", "step-000000", [ScoredSummary(group, ()) for group in groups])
        with pytest.raises(GroupsLost):
            await fleet.layer_outputs(0, groups[3])

    asyncio.run(go())
    assert written == [(0, 2)]


def test_what_is_asked_for_upon_news_goes_with_the_next_poll(
    start: Callable[..., Any], rays: Rays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes_module, "_RIDE_S", 1.0)
    (node,) = start()
    called, call = Counter[str](), Actor.call
    monkeypatch.setattr(Actor, "call", lambda self, name, given: (called.update([name]), call(self, name, given))[1])

    async def go() -> None:
        for job in jobs(10):
            assert (await node.play_one(job, lambda: None)).job == job

    asyncio.run(go())
    assert called["submit"] == 1 and called["poll"] >= 9


def test_a_job_that_is_cancelled_before_its_node_began_it_is_not_begun(start: Callable[..., Any], rays: Rays) -> None:
    start()
    player = rays.actors[-1].one

    async def go() -> None:
        await player.cancel(77)
        await player.submit([(77, "play", (jobs(1),)), (78, "play", (jobs(1),))])
        assert set(player._tasks) == {78}
        await player._tasks[78]

    asyncio.run(go())


def test_only_the_latest_cancelled_jobs_are_remembered(
    start: Callable[..., Any], rays: Rays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metis_fast.cluster.player._REMEMBERED", 3)
    start()
    player = rays.actors[-1].one

    async def go() -> None:
        for number in range(70, 80):
            await player.cancel(number)
        await player.submit([(number, "play", (jobs(1),)) for number in range(76, 81)])
        assert set(player._tasks) == {76, 80} and not player._cancelled
        await asyncio.gather(*player._tasks.values())

    asyncio.run(go())


# -- starts -----------------------------------------------------------------------------------------------------------------


def test_a_node_that_cannot_be_started_is_said_at_every_try_and_ends_the_wait(
    start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    SCRIPT.opens += [RuntimeError("CUDA error: out of memory")] * 100
    (node,) = start(wait=False, workers={"wait_s": 0.3})
    end = time.monotonic() + 20

    def check() -> None:
        assert time.monotonic() < end, "it waits for ever"

    with pytest.raises(EngineError, match="node 0 cannot be started: RuntimeError: CUDA error: out of memory"):
        node.wait(check)
    assert "node 0 did not start: RuntimeError: CUDA error: out of memory; starting it again" in caplog.messages


def test_weights_have_their_own_time_after_a_start_that_waited_for_room(start: Callable[..., Any], rays: Rays) -> None:
    (node,) = start(workers={"start_s": 1.5})
    node._weights, SCRIPT.update_s = Sent(1), 0.7
    SCRIPT.opens += [2.0]
    lose(rays, node)
    until(lambda: node.alive)
    assert SCRIPT.starts == 2 and not node._tickets


def test_a_start_that_is_under_way_ends_when_engines_are_to_rest(start: Callable[..., Any], rays: Rays) -> None:
    nodes = start(2, **SLEEPS)
    fleet = fleet_of(nodes)
    SCRIPT.opens += [60.0]
    lose(rays, nodes[1])
    until(lambda: SCRIPT.starts == 3)
    asyncio.run(fleet.rest())
    until(lambda: rays.actors[2].dead)
    time.sleep(0.5)
    assert SCRIPT.starts == 3 and not nodes[1].alive and SCRIPT.nodes[0].asleep
    asyncio.run(fleet.resume())
    until(lambda: nodes[1].alive)
    assert not any(node.asleep for node in SCRIPT.nodes.values())


def test_an_engine_that_keeps_its_memory_is_started_amid_an_update(start: Callable[..., Any], rays: Rays) -> None:
    (node,) = start()
    asyncio.run(fleet_of([node]).rest())
    lose(rays, node)
    until(lambda: node.alive)
    assert SCRIPT.starts == 2


def test_the_time_in_which_a_node_may_come_back_begins_with_the_end_of_an_update(
    start: Callable[..., Any], rays: Rays, monkeypatch: pytest.MonkeyPatch
) -> None:
    (node,) = start(**SLEEPS)
    fleet, later = fleet_of([node]), 0.0
    monkeypatch.setattr(nodes_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later))
    asyncio.run(fleet.rest())
    lose(rays, node)
    time.sleep(0.3)
    later = 1000.0  # more than workers.wait_s
    SCRIPT.opens += [RuntimeError("a port was taken"), 60.0]
    asyncio.run(fleet.resume())
    until(lambda: SCRIPT.starts == 3)
    assert not node.gone


# -- an update --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2])
def test_groups_that_are_lost_as_an_update_begins_are_played_again_by_engines_that_are_awake(
    start: Callable[..., Any], rays: Rays, monkeypatch: pytest.MonkeyPatch, num: int
) -> None:
    nodes: list[RemoteNode] = start(num, **SLEEPS)
    fleet = fleet_of(nodes)
    begun = list[int]()

    def update(scored: Sequence[ScoredSummary], check: Callable[[], None]) -> tuple[str, ...]:
        begun.append(len(scored))
        assert all(SCRIPT.nodes[i].asleep for i, node in enumerate(nodes) if node.alive)
        lost = tuple(i for i, one in enumerate(scored) if one.group.node == num - 1)
        if len(begun) == 1:
            lose(rays, nodes[-1])
            raise GroupsLost(lost)
        return ("done",)

    def score(parts: Parts, groups: Sequence[GroupSummary], step: int) -> list[ScoredSummary]:
        return [ScoredSummary(group, ()) for group in groups]

    monkeypatch.setattr(pipeline, "_score", score)
    too_late = threading.Timer(20, lambda: [setattr(node, "gone", "too late") for node in nodes])
    too_late.start()
    none: Any = None
    with Interrupts() as interrupts:
        parts = Parts(fleet._config, interrupts, none, fleet, none, none, none, publish=lambda version: Published(()))
        parts.trainer = trainer = SimpleNamespace(fetches=True, update=update)  # pyright: ignore[reportAttributeAccessIssue]
        parts.checkpoints = SimpleNamespace(finish=lambda: None)  # pyright: ignore[reportAttributeAccessIssue]
        interrupts.run(fleet.update(Sent()))
        groups = interrupts.run(fleet.play_all(jobs(4)))
        clock = pipeline._Clock()
        scored, updates = pipeline._trained(parts, groups, 3, clock)
    too_late.cancel()
    assert begun == [4, 4] and updates == ("done",) and trainer.fetches
    assert [one.group.job for one in scored] == jobs(4) and fleet.take_replayed() == 4 // num
    assert set(clock.seconds) == {"rollout", "score", "update", "sync"}


def test_a_node_says_what_it_played_with_each_version(start: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fleet = fleet_of(start())

    async def go() -> None:
        await fleet.update(Sent(4))
        await fleet.play_all(jobs(3))
        await fleet.update(Sent(5))

    asyncio.run(go())
    said = [message for message in caplog.messages if message.startswith("weights ")]
    assert said[0].startswith("weights 4 came in ") and said[0].endswith("before: none")
    assert said[1].startswith("weights 5 came in ") and said[1].endswith("before: {'train/0': 3}")
