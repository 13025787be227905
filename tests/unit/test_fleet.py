"""Who plays what: shares that repeat, room, nodes that die, come back or are slow. Nodes are fakes; time is short sleeps."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from metis_fast.config import Config
from metis_fast.data.row import BadRow, BadRowError
from metis_fast.errors import DataError, EngineError
from metis_fast.node.protocol import Head, NodeClient, NodeLost, Weights
from metis_fast.rollout.engine import SyncReport
from metis_fast.run.fleet import Fleet, shares
from metis_fast.summary import Data, GroupSummary, Job, ScoredSummary, Scores
from metis_fast.train.protocol import GroupsLost
from metis_fast.types import Group, Prompt

T = TypeVar("T")
G = 4


@dataclass(eq=False)
class FakeNode:
    """seconds: of a group. dies: after so many groups that it was asked for, once. kept: keys of its groups."""

    number: int
    seconds: float = 0.001
    dies: int = 10**9
    room: float = 2.0
    comes_back_s: float = 0.01
    alive: bool = True
    gone: str = ""
    num_replicas: int = 1
    played: list[Job] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    kept: set[object] = field(default_factory=set)
    at_once: int = 0
    most: int = 0
    updates: list[int] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def lose(self) -> None:
        self.alive, self.dies = False, 10**9
        self.kept.clear()
        if not self.gone:
            asyncio.get_running_loop().call_later(self.comes_back_s, setattr, self, "alive", True)
        raise NodeLost(f"node {self.number} was lost: killed")

    def _summary(self, job: Job) -> GroupSummary:
        key = (self.number, len(self.played))
        self.played.append(job)
        self.kept.add(key)
        return GroupSummary(job, "math", None, "rule", (), (), self.number, key)

    async def _one(self, job: Job) -> GroupSummary:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(self.seconds)
        self.at_once -= 1
        self.dies -= 1
        if self.dies < 0:
            self.lose()
        return self._summary(job)

    async def play(self, jobs: Sequence[Job], on_done: Callable[[int], object]) -> list[GroupSummary]:
        self.together.append(len(jobs))
        found = []
        for job in jobs:
            found.append(await self._one(job))
            on_done(G)
        return found

    async def play_one(self, job: Job, started: Callable[[], object]) -> GroupSummary:
        if not self.alive:
            raise NodeLost("not there")
        started()
        return await self._one(job)

    def holds(self, group: GroupSummary) -> bool:
        return group.key in self.kept

    def look(self, data: Data, rows: Sequence[int]) -> list[Head | BadRowError]:
        if not self.alive:
            raise NodeLost("not there")
        bad = BadRowError(BadRow("f", 7, "images", "an image", "half of one"))
        return [bad if row == 7 else Head(f"{self.number}:{row}", row, 0) for row in rows]

    def fetch(self, groups: Sequence[GroupSummary]) -> list[Group]:
        if not all(self.holds(group) for group in groups):
            raise NodeLost("gone")
        prompt = Prompt("p", "s", (), (), "math", (), "rule", "")
        return [Group(prompt, ()) for _ in groups]

    def drop(self, groups: Sequence[GroupSummary]) -> None:
        self.kept.difference_update(group.key for group in groups)

    async def write(self, folder: str, name: str, scored: Sequence[Scores]) -> None:
        if not self.alive:
            raise NodeLost("not there")
        assert {one.key for one in scored} <= self.kept, "nobody has them any more"
        self.written.append(name)

    async def layer_outputs(self, order: int, group: GroupSummary) -> None:
        if not self.alive:
            raise NodeLost("not there")

    async def update(self, weights: Weights) -> SyncReport:
        if not self.alive:
            raise NodeLost("not there")
        self.updates.append(weights.version)
        return SyncReport(weights.version, "full", 10 + self.number, float(self.number))


def config(**rollout: Any) -> Config:
    return Config.model_validate({"rollout": {"rollouts_per_prompt": G, **rollout}})


def fleet_of(*nodes: FakeNode, **rollout: Any) -> Fleet:
    clients: list[Any] = list(nodes)
    made: list[NodeClient] = clients
    return Fleet(made, config(**rollout))


def jobs(num: int, stream: str = "train/0") -> list[Job]:
    return [Job("train", 100 + i, stream, i * G) for i in range(num)]


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_shares_are_even_and_in_order() -> None:
    assert [list(part) for part in shares(7, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [len(part) for part in shares(2, 3)] == [0, 1, 1]


def test_a_deterministic_batch_is_cut_the_same_way_whoever_is_slow() -> None:
    async def go() -> None:
        nodes = [FakeNode(0, seconds=0.02), FakeNode(1), FakeNode(2)]
        done: list[int] = []
        groups = await fleet_of(*nodes).play_all(jobs(9), done.append)
        assert [group.job for group in groups] == jobs(9)
        assert [node.together for node in nodes] == [[3], [3], [3]] and sum(done) == 9 * G

    run(go())


def test_a_share_whose_node_dies_is_played_as_one_elsewhere_and_counted() -> None:
    async def go() -> None:
        nodes = [FakeNode(0), FakeNode(1, dies=2), FakeNode(2)]
        fleet, done = fleet_of(*nodes), list[int]()
        groups = await fleet.play_all(jobs(9), done.append)
        assert [group.job for group in groups] == jobs(9)
        assert sorted(node.together for node in nodes) == [[3], [3], [3, 3]]  # in the waves that it would have been played in
        assert sum(done) == 9 * G and fleet.take_replayed() == 3 and fleet.take_replayed() == 0

    run(go())


def test_a_node_that_is_not_there_is_passed_over_and_nothing_counts_as_lost() -> None:
    async def go() -> None:
        nodes = [FakeNode(0), FakeNode(1, alive=False)]
        fleet = fleet_of(*nodes)
        await fleet.play_all(jobs(4))
        assert nodes[0].together == [2, 2] and fleet.take_replayed() == 0

    run(go())


def test_a_slow_node_gets_less() -> None:
    async def go() -> None:
        nodes = [FakeNode(0, seconds=0.1), FakeNode(1, seconds=0.005)]
        groups = await fleet_of(*nodes, deterministic=False).play_all(jobs(60))
        assert [group.job for group in groups] == jobs(60)
        assert len(nodes[0].played) < len(nodes[1].played) / 3 and max(node.most for node in nodes) <= 2

    run(go())


@pytest.mark.parametrize("dies", [0, 3, 8])
def test_of_a_node_that_dies_amid_others_every_group_is_played_once(dies: int) -> None:
    async def go() -> None:
        nodes = [FakeNode(0, 0.005), FakeNode(1, 0.005, dies), FakeNode(2, 0.005)]
        fleet = fleet_of(*nodes, deterministic=False)
        groups = await fleet.play_all(jobs(90))
        assert [group.job for group in groups] == jobs(90)
        again = await fleet.whole(groups)  # what it had finished went with it
        assert [group.job for group in again] == jobs(90)
        assert all(nodes[group.node].holds(group) for group in again)
        assert Counter(group.job for group in again) == Counter(jobs(90))
        assert fleet.take_replayed() >= 1 and len(nodes[1].played) > dies, [len(node.played) for node in nodes]

    run(go())


def test_groups_of_a_batch_that_went_with_their_node_are_played_again_together() -> None:
    async def go() -> None:
        nodes = [FakeNode(0), FakeNode(1), FakeNode(2)]
        fleet = fleet_of(*nodes)
        groups = await fleet.play_all(jobs(9))
        nodes[1].kept.clear()
        again = await fleet.whole(groups)
        assert [group.job for group in again] == jobs(9) and again[:3] == groups[:3] and again[6:] == groups[6:]
        assert [num for node in nodes for num in node.together] == [3, 3, 3, 3] and fleet.take_replayed() == 3
        with pytest.raises(GroupsLost) as lost:  # found when they are fetched
            fleet.fetch(groups)
        assert lost.value.numbers == (3, 4, 5)
        assert [group.job for group in await fleet.whole(again, lost=(0,))] == jobs(9)

    run(go())


def test_where_no_node_is_left_the_run_ends_and_where_one_comes_back_it_waits() -> None:
    async def go() -> None:
        node = FakeNode(0, dies=0, comes_back_s=0.5)
        assert len(await fleet_of(node).play_all(jobs(2))) == 2
        node = FakeNode(0, alive=False, gone="out of memory, 20 times")
        for rollout in ({}, {"deterministic": False, "engine": "vllm"}):
            with pytest.raises(EngineError, match="no node is left: out of memory, 20 times"):
                await fleet_of(node, FakeNode(1, alive=False, gone="x"), **rollout).play_all(jobs(2))

    run(go())


def test_what_a_node_raises_ends_the_batch() -> None:
    class Broken(FakeNode):
        async def play(self, jobs: Sequence[Job], on_done: Callable[[int], object]) -> list[GroupSummary]:
            raise DataError("row 3 is none")

    with pytest.raises(DataError, match="row 3"):
        run(fleet_of(FakeNode(0), Broken(1)).play_all(jobs(4)))


def test_rows_are_looked_at_by_who_will_play_them_or_by_another() -> None:
    nodes = [FakeNode(0), FakeNode(1), FakeNode(2)]
    fleet = fleet_of(*nodes)
    assert [one.uid for one in fleet.look("train", [3, 4, 5]) if isinstance(one, Head)] == ["0:3", "1:4", "2:5"]
    nodes[1].alive = False
    found = fleet.look("train", [3, 7, 5])
    assert isinstance(found[1], BadRowError) and [one.uid for one in found if isinstance(one, Head)] == ["0:3", "2:5"]
    fleet.close()


def test_weights_go_to_all_who_are_there_and_parts_are_written_by_who_keeps_them(tmp_path: Any) -> None:
    async def go() -> None:
        nodes = [FakeNode(0), FakeNode(1), FakeNode(2, alive=False)]
        own = config().model_copy(update={"run": config().run.model_copy(update={"dir": tmp_path})})
        clients: list[Any] = list(nodes)
        fleet = Fleet(clients, own)

        class Sent:
            version = 5

        sent: Any = Sent()
        report = await fleet.update(sent)
        assert (report.version, report.num_bytes, report.seconds) == (5, 11, 1.0)
        assert [node.updates for node in nodes] == [[5], [5], []]
        groups = await fleet.play_all(jobs(4))
        scored = [ScoredSummary(group, ()) for group in groups]
        (tmp_path / "rollouts").mkdir()
        stale = tmp_path / "rollouts" / "step-000001.node-2.parquet"
        stale.touch()
        await fleet.write("rollouts", "step-000001", scored)
        names = {name for node in nodes for name in node.written}
        assert names == {f"step-000001.node-{number}" for number in {group.node for group in groups}}
        assert not stale.exists()  # of a try before
        fleet.drop(groups)
        assert not any(node.kept for node in nodes)

    run(go())


@pytest.mark.parametrize("back", [True, False])
def test_of_a_node_that_was_lost_before_it_wrote_nothing_is_asked_and_no_older_part_stays(tmp_path: Any, back: bool) -> None:
    async def go() -> None:
        nodes: list[Any] = [FakeNode(0), FakeNode(1)]
        fleet = Fleet(nodes, config().model_copy(update={"run": config().run.model_copy(update={"dir": tmp_path})}))
        groups = await fleet.play_all(jobs(4))
        (tmp_path / "rollouts").mkdir()
        parts = [tmp_path / "rollouts" / f"step-000001.node-{number}.parquet" for number in (0, 1)]
        for part in parts:
            part.touch()  # of a try before
        if back:
            nodes[1].kept.clear()
        else:
            nodes[1].alive = False
        await fleet.write("rollouts", "step-000001", [ScoredSummary(group, ()) for group in groups])
        assert nodes[0].written and not nodes[1].written
        assert [part.exists() for part in parts] == [True, False]

    run(go())


@pytest.mark.parametrize("back", [True, False])
def test_layers_of_a_message_that_went_with_its_node_are_lost_as_groups_are(back: bool) -> None:
    async def go() -> None:
        nodes = [FakeNode(0), FakeNode(1)]
        fleet = fleet_of(*nodes)
        groups = await fleet.play_all(jobs(2))
        assert await fleet.layer_outputs(0, groups[1]) is None
        if back:
            nodes[1].kept.clear()
        else:
            nodes[1].alive = False
        with pytest.raises(GroupsLost):
            await fleet.layer_outputs(0, groups[1])

    run(go())


def test_weights_wait_for_no_node_since_only_playing_can_be_broken_off() -> None:
    async def go() -> None:
        sent: Any = SimpleNamespace(version=5)
        report = await asyncio.wait_for(fleet_of(FakeNode(0, alive=False)).update(sent), 2)
        assert report == SyncReport(5, "full")

    run(go())
