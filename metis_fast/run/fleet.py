"""The nodes of a run: who plays what, and what is played again where one was lost.

Where batches are deterministic each node gets the same share of them every time, so that a run repeats bit for bit for a
fixed number of nodes. Everywhere else a group goes to the node with the most room, so that a slow one gets less. Whatever a
node leaves unfinished or untrained when it dies is played again elsewhere, from the same seeds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from metis_fast.config import Config
from metis_fast.data.row import BadRowError
from metis_fast.errors import EngineError
from metis_fast.node.node import whole
from metis_fast.node.protocol import Head, NodeClient, NodeLost, Weights
from metis_fast.rollout.engine import SyncReport
from metis_fast.rollout.layers import Layers
from metis_fast.spans import Lane, span
from metis_fast.summary import Data, GroupSummary, Job, ScoredSummary, Scores
from metis_fast.train.protocol import GroupsLost
from metis_fast.types import Group, ScoredGroup

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_WAIT_S = 0.2  # between two looks for a node that came back


def shares(num: int, parts: int) -> list[range]:
    """`num` things in order, cut into even parts."""
    borders = [num * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(borders)]


class Fleet:
    """All nodes of a run, one or many.

    replayed: groups that were played again because a node was lost, since `take_replayed`.
    """

    def __init__(self, nodes: Sequence[NodeClient], config: Config) -> None:
        self.nodes, self._config = list(nodes), config
        self.replayed = 0
        self._load = dict.fromkeys((node.number for node in nodes), 0)
        self._turn, self._changed = asyncio.Lock(), asyncio.Event()
        self._threads = ThreadPoolExecutor(len(self.nodes), "look") if len(self.nodes) > 1 else None
        # the same waves, whatever takes its time; with one node there is nothing to choose
        self._fixed = len(self.nodes) == 1 or (config.rollout.deterministic and config.rollout.engine == "native")

    @property
    def num_replicas(self) -> int:
        """Of the node that has the most."""
        return max(node.num_replicas for node in self.nodes)

    def take_replayed(self) -> int:
        """Groups that were played again since the last call."""
        replayed, self.replayed = self.replayed, 0
        return replayed

    # -- rows ---------------------------------------------------------------------------------------------------------

    def look(self, data: Data, rows: Sequence[int]) -> list[Head | BadRowError]:
        """What stands in rows that will be played together; each node looks at those that it will be given."""
        if self._threads is None:
            return list(self._look_at(self.nodes[0], data, rows))
        parts = [rows[part.start : part.stop] for part in shares(len(rows), len(self.nodes))]
        found = self._threads.map(lambda node, part: self._look_at(node, data, part) if part else (), self.nodes, parts)
        return [one for part in found for one in part]

    def _look_at(self, node: NodeClient, data: Data, rows: Sequence[int]) -> Sequence[Head | BadRowError]:
        while True:
            for one in (node, *self.nodes):
                with suppress(NodeLost):
                    return one.look(data, rows)
            self._check()
            time.sleep(_WAIT_S)

    # -- playing ------------------------------------------------------------------------------------------------------

    async def play_all(self, jobs: Sequence[Job], on_done: Callable[[int], object] = lambda num: None) -> list[GroupSummary]:
        """A batch of groups that follow each other in a stream. on_done: told of rollouts that have ended.

        Raises:
            EngineError: no node is left.
            MetisError: what cannot be played.
        """
        if self._fixed:
            parts = [part for part in shares(len(jobs), len(self.nodes)) if part]
            playing = [self._play_share(self.nodes[i], jobs[part.start : part.stop], on_done) for i, part in enumerate(parts)]
            return [group for share in await _all(playing) for group in share]
        repeats = self._config.rollout.rollouts_per_prompt

        async def one(job: Job) -> GroupSummary:
            group = await self.play(job, lambda: None)
            on_done(repeats)
            return group

        return await _all([one(job) for job in jobs])

    async def _play_share(self, node: NodeClient, jobs: Sequence[Job], on_done: Callable[[int], object]) -> list[GroupSummary]:
        while True:
            done = 0

            def count(num: int) -> None:
                nonlocal done
                done += num
                on_done(num)

            if not node.alive:
                node = await self._somebody()
            self._load[node.number] += len(jobs)
            try:
                with span(Lane.NODES, f"node {node.number}: {len(jobs)} groups"):
                    return await node.play(jobs, count)
            except NodeLost as lost:
                self._tell(lost, len(jobs))
                on_done(-done)
            finally:
                self._load[node.number] -= len(jobs)

    async def play(self, job: Job, started: Callable[[], object]) -> GroupSummary:
        """A group, beside others, on the node with the most room. started: called when its first rollout begins.

        Raises:
            As `play_all`.
        """
        while True:
            node = await self._with_room()
            try:
                with span(Lane.NODES, f"node {node.number}: {job.stream}"):
                    return await node.play_one(job, started)
            except NodeLost as lost:
                self._tell(lost, 1)
            finally:
                self._load[node.number] -= 1
                self._changed.set()

    async def _with_room(self) -> NodeClient:
        """A place on a node, which is taken. First come, first served."""
        async with self._turn:
            while (node := self._roomiest()) is None:
                self._check()
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_WAIT_S):
                        await self._changed.wait()
            self._load[node.number] += 1
        return node

    def _roomiest(self) -> NodeClient | None:
        open_ = [node for node in self.nodes if node.alive and self._load[node.number] < node.room]
        return min(open_, key=lambda node: self._load[node.number] / node.room, default=None)

    async def _somebody(self) -> NodeClient:
        """A living node, the least loaded one; waits for one to come back."""
        while True:
            living = [node for node in self.nodes if node.alive]
            if living:
                return min(living, key=lambda node: self._load[node.number])
            self._check()
            await asyncio.sleep(_WAIT_S)

    def _check(self) -> None:
        """Whether a node is there, or may still come."""
        for node in self.nodes:
            if not node.gone:
                return
        raise EngineError(f"no node is left: {self.nodes[0].gone}")

    def _tell(self, lost: NodeLost, num: int) -> None:
        self.replayed += num
        _LOG.warning("%s; %d of its groups are played elsewhere", lost, num)

    # -- groups -------------------------------------------------------------------------------------------------------

    async def whole(self, groups: Sequence[GroupSummary], lost: Sequence[int] = ()) -> list[GroupSummary]:
        """The groups, those played again that went with their node. lost: places of some that are known to be gone."""
        gone = [i for i, group in enumerate(groups) if i in lost or not self.nodes[group.node].holds(group)]
        if not gone:
            return list(groups)
        self._tell(NodeLost(f"node {groups[gone[0]].node} was lost with groups that were not trained yet"), len(gone))
        found, again = list(groups), await self._play_again([groups[i].job for i in gone])
        for i, group in zip(gone, again, strict=True):
            found[i] = group
        return found

    async def _play_again(self, jobs: Sequence[Job]) -> list[GroupSummary]:
        """Those that follow each other together, as they were played before."""
        repeats, runs = self._config.rollout.rollouts_per_prompt, list[list[Job]]()
        for job in jobs:
            last = runs[-1][-1] if runs else None
            if last is not None and self._fixed and (last.stream, last.order + repeats) == (job.stream, job.order):
                runs[-1].append(job)
            else:
                runs.append([job])
        if not self._fixed:
            return await _all([self.play(job, lambda: None) for job in jobs])
        return [g for run in runs for g in await self._play_share(await self._somebody(), run, lambda num: None)]

    def fetch(self, groups: Sequence[GroupSummary]) -> list[Group]:
        """Into this process: what a trainer here runs on.

        Raises:
            GroupsLost: some are gone with their node.
        """
        found, lost = list[Group](), list[int]()
        for i, group in enumerate(groups):
            try:
                with span(Lane.NODES, f"node {group.node}: fetch"):
                    found += self.nodes[group.node].fetch([group])
            except NodeLost:
                lost.append(i)
        if lost:
            raise GroupsLost(tuple(lost))
        return found

    def fetch_scored(self, scored: Sequence[ScoredSummary]) -> list[ScoredGroup]:
        """As `fetch`, with their scores."""
        return [whole(group, one.scores) for group, one in zip(self.fetch([one.group for one in scored]), scored, strict=True)]

    def drop(self, groups: Sequence[GroupSummary]) -> None:
        """These are trained, or not wanted."""
        for node in self.nodes:
            own = [group for group in groups if group.node == node.number and group.key is not None]
            if own:
                node.drop(own)

    async def write(self, folder: str, name: str, scored: Sequence[ScoredSummary]) -> Path:
        """Have each node store what it keeps of a batch; returns where. Parts of this name from before are gone then."""
        by_node = {node: [one for one in scored if one.group.node == node.number] for node in self.nodes}
        alone = len(self.nodes) == 1
        names = {node: name if alone else f"{name}.node-{node.number}" for node, own in by_node.items() if own}
        written = await _all([self._write(node, folder, own, by_node[node]) for node, own in names.items()])
        place = self._config.run.dir / folder
        for stale in place.glob(f"{name}.*parquet"):
            if stale.name.removesuffix(".parquet") not in written:
                stale.unlink()
        return place / (f"{name}.parquet" if alone else f"{name}.node-*.parquet")

    async def _write(self, node: NodeClient, folder: str, name: str, scored: Sequence[ScoredSummary]) -> str | None:
        """The name, if there is anything under it now. Groups may be gone since they were fetched."""
        kept = [one for one in scored if node.holds(one.group)]
        try:
            if kept:
                with span(Lane.NODES, f"node {node.number}: write"):
                    await node.write(folder, name, [Scores(one.group.key, one.scores) for one in kept])
        except NodeLost as lost:
            _LOG.warning("%s", lost)
            kept = []
        if lacking := len(scored) - len(kept):
            _LOG.warning("%d groups went with node %d and are missing in %s/%s.parquet", lacking, node.number, folder, name)
        return name if kept else None

    # -- engines ------------------------------------------------------------------------------------------------------

    async def probe(self, rows: Sequence[int]) -> list[list[GroupSummary]]:
        """Messages for the truth gate, of every node that is up: all are asked the same."""
        while True:
            asked = await self._of_all(lambda node: node.probe(rows))
            if asked:
                return asked
            await self._somebody()

    async def _of_all(self, ask: Callable[[NodeClient], Coroutine[Any, Any, T]]) -> list[T]:
        """Of every node that is up, and stays so."""

        async def one(node: NodeClient) -> list[T]:
            try:
                return [await ask(node)]
            except NodeLost as lost:
                _LOG.warning("%s", lost)
                return []

        return [found for part in await _all([one(node) for node in self.nodes]) for found in part]

    async def layer_outputs(self, order: int, group: GroupSummary) -> Layers | None:
        """See `RunEngine.layer_outputs`.

        Raises:
            GroupsLost: its node was lost.
        """
        node = self.nodes[group.node]
        try:
            if node.holds(group):
                return await node.layer_outputs(order, group)
        except NodeLost as lost:
            _LOG.warning("%s", lost)
        raise GroupsLost((0,))

    async def update(self, weights: Weights) -> SyncReport:
        """Every engine samples with these weights from here on; a node that comes back later gets them before it plays.

        Raises:
            EngineError: no engine can take them, after retries.
        """

        async def update(node: NodeClient) -> SyncReport:
            with span(Lane.SYNC, f"node {node.number}: version {weights.version}"):
                return await node.update(weights)

        reports = await self._of_all(update)
        if not reports:  # whoever comes back gets them; who plays waits for that
            return SyncReport(weights.version, "full")
        slowest = max(reports, key=lambda report: report.seconds)
        return SyncReport(
            slowest.version,
            slowest.mode,
            max(report.num_bytes for report in reports),
            slowest.seconds,
            max(report.pause_s for report in reports),
            sum(report.retries for report in reports),
        )

    async def rest(self) -> None:
        """See `RunEngine.rest`."""
        await self._of_all(lambda node: node.rest())

    async def resume(self) -> None:
        """See `RunEngine.resume`."""
        await self._of_all(lambda node: node.resume())

    def wait(self, check: Callable[[], None]) -> None:
        """Until all nodes can be asked."""
        for node in self.nodes:
            node.wait(check)

    def close(self) -> None:
        """End its threads; nodes are closed by whoever has opened them."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


async def _all(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; what one raises is raised, once the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one) for one in coroutines]
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None  # the others were cancelled because of the first
    return [task.result() for task in running]
