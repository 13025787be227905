"""A node: plays groups with the engine, tools and judge of its machine.

It reads its prompts from the files, by row. What it has played it judges at once, and keeps; the run gets a summary. On a
laptop it is in the run's process, in a cluster in a process of its own on every machine (`cluster.nodes`): the same class.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from metis_fast.config import Config, RolloutConfig
from metis_fast.data.cursor import CheckImages, prompts
from metis_fast.data.parquet import PromptFiles
from metis_fast.data.row import BadRowError
from metis_fast.node.protocol import Head, Weights
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import RunEngine, SyncReport, update
from metis_fast.rollout.episode import SampleKey, collect, play_group
from metis_fast.rollout.gate import probe
from metis_fast.rollout.layers import Layers
from metis_fast.rollout.store import RolloutStore
from metis_fast.score.protocol import Judge
from metis_fast.score.scoring import judge_groups
from metis_fast.summary import Data, GroupSummary, Job, Judged, Scores
from metis_fast.tools.protocol import Toolbox
from metis_fast.types import Group, Prompt, Score, ScoredGroup, Verdict

_AHEAD_BYTES = 1 << 30  # of the images of prompts that were looked at and are not played yet


class Keep(Protocol):
    """Where a node puts its groups."""

    def put(self, group: Group) -> object:
        """Keep a group; returns what it is found by.

        Raises:
            EngineError: there is no room.
        """
        ...

    def get(self, key: object) -> Group:
        """A group that is kept."""
        ...

    def drop(self, key: object) -> None:
        """Forget it."""
        ...


class InMemory:
    """`Keep` for the process that it is in."""

    def __init__(self) -> None:
        self._groups: dict[object, Group] = {}
        self._numbers = itertools.count()

    def put(self, group: Group) -> int:
        """See `Keep`."""
        key = next(self._numbers)
        self._groups[key] = group
        return key

    def get(self, key: object) -> Group:
        """See `Keep`."""
        return self._groups[key]

    def drop(self, key: object) -> None:
        """See `Keep`."""
        self._groups.pop(key, None)


class Node:
    """See `NodeClient`, which it is for its own process.

    files: data -> the run's files. check: of images. engine, toolbox, judge: are closed by whoever has opened them. room:
    groups that it is given at once; the others wait where they can still go to another node.
    """

    alive, gone = True, ""

    def __init__(
        self,
        number: int,
        config: Config,
        chat: Chat,
        engine: RunEngine,
        toolbox: Toolbox,
        judge: Judge,
        files: Mapping[Data, PromptFiles],
        check: CheckImages,
        keep: Keep,
        room: float = math.inf,
    ) -> None:
        self.number, self.room = number, room
        self.chat, self.engine, self.toolbox, self.judge = chat, engine, toolbox, judge
        self.num_replicas = engine.num_replicas
        self._config, self._files, self._keep = config, files, keep
        self._look = {data: prompts(part, check) for data, part in files.items()}
        self._ahead: OrderedDict[tuple[Data, int], Prompt] = OrderedDict()
        self._ahead_lock = threading.Lock()  # one thread looks at rows while others begin to play some
        self._reading = threading.Lock()
        self._benchmark_chat = chat.by_row() if "benchmark" in files else chat
        self._verdicts: dict[object, tuple[Judged, ...]] = {}
        self._places = asyncio.Semaphore(config.rollout.max_concurrent)
        self._stores = {"rollouts": RolloutStore(config.run.dir / "rollouts")} if "train" in files else {}

    # -- rows ---------------------------------------------------------------------------------------------------------

    def look(self, data: Data, rows: Sequence[int]) -> list[Head | BadRowError]:
        """See `NodeClient`. What can be used is kept for when it is played, as long as there is room."""
        found = self._look[data](rows)
        with self._ahead_lock:
            for row, prompt in zip(rows, found, strict=True):
                if isinstance(prompt, Prompt) and data == "train":
                    self._ahead[data, row] = prompt
            size = sum(_size(prompt) for prompt in self._ahead.values())
            while size > _AHEAD_BYTES:
                size -= _size(self._ahead.popitem(last=False)[1])
        return [
            Head(one.uid, row, len(one.images)) if isinstance(one, Prompt) else one
            for row, one in zip(rows, found, strict=True)
        ]

    def _prompts(self, jobs: Sequence[Job]) -> list[Prompt]:
        with self._ahead_lock:
            ahead = [self._ahead.pop((job.data, job.row), None) for job in jobs]
        with self._reading:  # of a benchmark many groups begin at once, and no row was looked at before
            return [one or self._files[job.data].read(job.row) for job, one in zip(jobs, ahead, strict=True)]

    # -- groups -------------------------------------------------------------------------------------------------------

    def _how(self, data: Data) -> tuple[RolloutConfig, int]:
        """Settings, and rollouts of a prompt."""
        rollout, held_out = self._config.rollout, self._config.eval
        if data == "train":
            return rollout, rollout.rollouts_per_prompt
        if data == "benchmark":
            benchmark = self._config.benchmark
            asked = {"temperature": benchmark.temperature, "top_p": benchmark.top_p, "top_k": benchmark.top_k}
            return rollout.model_copy(update=asked), benchmark.rollouts
        greedy = {"temperature": held_out.temperature, "top_p": 1.0, "top_k": 0}
        return rollout.model_copy(update=greedy), held_out.rollouts_per_prompt

    async def play(self, jobs: Sequence[Job], on_done: Callable[[int], object] = lambda num: None) -> list[GroupSummary]:
        """See `NodeClient`."""
        rollout, repeats = self._how(jobs[0].data)
        first = jobs[0].order
        assert [job.order for job in jobs] == [first + i * repeats for i in range(len(jobs))], "these do not follow each other"
        own = await asyncio.to_thread(self._prompts, jobs)
        chat, seed = self._chat_of(jobs[0].data), self._config.run.seed
        groups = await collect(
            own, repeats, chat, self.engine, self.toolbox, rollout, seed, jobs[0].stream,
            lambda: on_done(1), first,
        )  # fmt: skip
        return self._kept(groups, await self._judged(groups, jobs[0].data), jobs)

    def _chat_of(self, data: Data) -> Chat:
        return self._benchmark_chat if data == "benchmark" else self.chat

    async def _judged(self, groups: Sequence[Group], data: Data) -> Sequence[tuple[Judged, ...]]:
        """Replies to a benchmark are scored later, by its own rules."""
        if data == "benchmark":
            return [(None,) * len(group.rollouts) for group in groups]
        return await judge_groups(groups, self.judge)

    async def play_one(
        self, job: Job, started: Callable[[], object], on_done: Callable[[int], object] = lambda num: None
    ) -> GroupSummary:
        """See `NodeClient`. Of all rollouts that are played so, `rollout.max_concurrent` run at once."""
        rollout, repeats = self._how(job.data)
        (prompt,) = await asyncio.to_thread(self._prompts, [job])
        key = SampleKey(self._config.run.seed, job.stream, job.order)
        group = await play_group(
            prompt, repeats, self._chat_of(job.data), self.engine, self.toolbox, rollout, key, self._places, started,
            lambda: on_done(1),
        )  # fmt: skip
        return self._kept([group], await self._judged([group], job.data), [job])[0]

    def _kept(self, groups: Sequence[Group], verdicts: Sequence[tuple[Judged, ...]], jobs: Sequence[Job]) -> list[GroupSummary]:
        kept = []
        for group, own, job in zip(groups, verdicts, jobs, strict=True):
            key = None if job.data == "heldout" else self._keep.put(group)  # of an evaluation only its rates are wanted
            if key is not None:
                self._verdicts[key] = own
            kept.append(GroupSummary.of(group, own, job, self.number, key))
        return kept

    def holds(self, group: GroupSummary) -> bool:
        """See `NodeClient`."""
        return True

    def fetch(self, groups: Sequence[GroupSummary]) -> list[Group]:
        """See `NodeClient`."""
        return [self._keep.get(group.key) for group in groups]

    def drop(self, groups: Sequence[GroupSummary]) -> None:
        """See `NodeClient`."""
        self.forget([group.key for group in groups])

    def forget(self, keys: Sequence[object]) -> None:
        """As `drop`, by what groups are found by."""
        for key in keys:
            self._keep.drop(key)
            self._verdicts.pop(key, None)

    async def write(self, folder: str, name: str, scored: Sequence[Scores]) -> None:
        """See `NodeClient`."""
        if folder not in self._stores:
            self._stores[folder] = RolloutStore(self._config.run.dir / folder)
        groups = [whole(self._keep.get(one.key), one.scores, self._verdicts[one.key]) for one in scored]
        await asyncio.to_thread(self._stores[folder].write, name, groups)

    # -- the engine ---------------------------------------------------------------------------------------------------

    async def probe(self, rows: Sequence[int]) -> list[GroupSummary]:
        """See `NodeClient`."""
        own = await asyncio.to_thread(lambda: [self._files["train"].read(row) for row in rows])
        rollouts = await probe(own, self.chat, self.engine, self._config)
        groups = [Group(prompt, (rollout,)) for prompt, rollout in zip(own, rollouts, strict=True)]
        jobs = [Job("train", row, "gate", order) for order, row in enumerate(rows)]
        return self._kept(groups, [(None,)] * len(groups), jobs)

    async def layer_outputs(self, order: int, group: GroupSummary) -> Layers | None:
        """See `NodeClient`."""
        return await self.engine.layer_outputs(order, self._keep.get(group.key).rollouts[0])

    async def update(self, weights: Weights) -> SyncReport:
        """See `NodeClient`."""
        async with weights.turn:
            return await update(self.engine, weights.tensors, weights.version, self._config.sync.retries)

    async def rest(self) -> None:
        """See `NodeClient`."""
        await self.engine.rest()

    async def resume(self) -> None:
        """See `NodeClient`."""
        await self.engine.resume()

    def wait(self, check: Callable[[], None]) -> None:
        """See `NodeClient`."""
        self.engine.wait(check)


def whole(group: Group, scores: Sequence[Score], verdicts: Sequence[Judged] | None = None) -> ScoredGroup:
    """A group with its scores. verdicts: with whole answers, where these are at hand."""
    if verdicts is not None:
        pairs = zip(scores, verdicts, strict=True)
        scores = [replace(score, verdict=own) if isinstance(own, Verdict) else score for score, own in pairs]
    return ScoredGroup(group.prompt, group.rollouts, tuple(scores))


def _size(prompt: Prompt) -> int:
    return sum(len(image.data) for image in prompt.images)
