"""The run's process, in one of its own: the verbs of `run.pipeline` over scripted nodes, each on a Ray node of this machine.

What it asks of them, hears, plans, scores and hands to the ranks goes the run's own way. Ranks are their keepers alone, which
fetch the groups of each rank's packs; what ranks would be told is pickled and goes no further.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.cluster_utils import Cluster

from metis_fast import config as config_module
from metis_fast.cluster.nodes import RemoteNode, together_s
from metis_fast.cluster.ranks import RankKeepers
from metis_fast.cluster.room import Room
from metis_fast.config import Config
from metis_fast.data.cursor import RowCursor
from metis_fast.data.parquet import Layout
from metis_fast.node.protocol import Head
from metis_fast.report.slices import slices
from metis_fast.rollout.schedule import Pending, Rules, Schedule
from metis_fast.run.fleet import Fleet
from metis_fast.run.parts import training_job
from metis_fast.run.weights import TrainerWeights
from metis_fast.score.scoring import score
from metis_fast.summary import GroupSummary, RolloutSummary, ScoredSummary, Scores
from metis_fast.train.flops import FlopModel
from metis_fast.train.megatron import shared
from metis_fast.train.megatron.task import Outlined
from metis_fast.train.megatron.wire import Call, pack
from metis_fast.train.minibatch import Trained, plans, prunes
from metis_fast.train.savings import deal

from .groups import Work
from .player import ScriptedPlayer, ScriptedSetup
from .process import Meter, arrays, found, memory

_WARM = 2  # steps that are not counted, and as many at the end, where less is begun
_IDLE_S = 3.0
_AT_ONCE = 4  # groups of a node
_MOST_RANKS = 4
_STORE = 1 << 30  # bytes of a Ray node's object store, at most
_FLOPS = FlopModel(1.4e10, 5.9e5, 1.2e9, 1.1e9, 1.2e5, 2.5e8, 2)  # about those of Qwen3-VL-8B
_NO_CHECK = lambda: None  # noqa: E731


@dataclass(frozen=True, slots=True)
class Asked:
    """nodes: that play. prompts: of a step. steps: that are counted."""

    nodes: int
    prompts: int
    steps: int
    work: Work

    @property
    def ranks(self) -> int:
        """Of the trainer, data-parallel ones, each on the machine of a node; few, since they have this one's memory."""
        return min(self.nodes, _MOST_RANKS)


@dataclass(frozen=True, slots=True)
class Step:
    """What a step took from the run's process. bytes_in, bytes_out: over TCP, Ray's own included. resident: at its end."""

    wall_s: float
    cpu_s: float
    bytes_in: int
    bytes_out: int
    resident: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes a rollout, pickled: of summaries, which come in; of jobs and of scores, which go to nodes; of what ranks are
    told."""

    summaries: float = 0.0
    jobs: float = 0.0
    scored: float = 0.0
    told: float = 0.0


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured. wrong: what is not as it should be; nothing else counts then. idle: the process, for a second in
    which nothing is played. resident: bytes before and after the steps. shares: bytes that a rank fetched in a step, over an
    even share of all groups: in the mean, and of the rank and step with most."""

    nodes: int
    idle: Step
    steps: list[Step] = field(default_factory=list)
    sizes: Sizes = Sizes()
    resident: tuple[int, int] = (0, 0)
    shares: tuple[float, float] = (0.0, 0.0)
    wrong: list[str] = field(default_factory=list)


def settings(asked: Asked, address: str, folder: Path) -> Config:
    """Of a run with so many nodes and ranks. With its engine a node fills all but a slot of its machine."""
    each = asked.work.rollouts
    return config_module.build(
        {
            "run": {"dir": str(folder)},
            "rollout": {
                "engine": "vllm",
                "mode": "async",
                "max_staleness": 1,
                "prompts_per_step": asked.prompts,
                "rollouts_per_prompt": each,
                "max_concurrent": asked.nodes * _AT_ONCE * each,
                "vllm": {"replicas": asked.nodes},
            },
            "loss": {"tis_cap": 2.0},
            "train": {
                "backend": "megatron",
                "prompts_per_mini_batch": asked.prompts,
                "megatron": {"data_parallel": asked.ranks},
            },
            "workers": {"launcher": "ray", "ray_address": address, "nodes": asked.nodes, "wait_s": 120},
        }
    )


@contextmanager
def _machines(num: int) -> Iterator[str]:
    """A Ray of so many nodes with three CPU slots each, beside the one that this process is on; gives its address."""
    each = {"object_store_memory": _STORE}
    head = {"num_cpus": 0, "include_dashboard": False, **each}
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=True)
    try:
        for _ in range(num):
            cluster.add_node(wait=False, num_cpus=3, **each)
        cluster.wait_for_nodes(timeout=300)
        yield str(cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()


class _Update:
    """What `MegatronTrainer.update` does in the run's process, but for calling the ranks. sizes: of what each rank fetched, in
    every step."""

    def __init__(self, config: Config, keepers: RankKeepers) -> None:
        self._config, self._keepers = config, keepers
        self._prunes, self._trained = prunes(config), Trained(_FLOPS, vision=True, head=True)
        self.shares: list[list[float]] = []
        self.wrong: list[str] = []

    def __call__(self, scored: Sequence[ScoredSummary], check: bool) -> int:
        """check: what was fetched, too. Returns the bytes that ranks are told."""
        groups = [Outlined(one.rollouts, one.scores) for one in scored]
        needed = self._needed(groups)
        with self._keepers.fetched([one.group.key for one in scored], needed, _NO_CHECK) as files:
            told = len(pack(Call("update", (groups, files), streams=False)).raw())
            self._count(
                needed, [{number: own[number] for number in numbers} for numbers, own in zip(needed, files, strict=True)]
            )
            if check:
                self.wrong += ray.get(ray.remote(num_cpus=0)(_differing).remote(groups, files))
        return told

    def _needed(self, groups: Sequence[Outlined]) -> list[set[int]]:
        which = {id(rollout): number for number, group in enumerate(groups) for rollout in group.rollouts}
        ranks = self._config.train.megatron.data_parallel
        needed: list[set[int]] = [set() for _ in range(ranks)]
        for batch in plans(groups, self._config, self._prunes, self._trained):
            for own, share in zip(needed, deal(batch.packs, _FLOPS, ranks), strict=True):
                own |= {which[id(s.rollout)] for i in share for family in batch.packs[i] for s in family.samples}
        return needed

    def _count(self, needed: Sequence[set[int]], files: Sequence[dict[int, str]]) -> None:
        sizes = {number: Path(path).stat().st_size for own in files for number, path in own.items()}
        share = sum(sizes.values()) / len(files)
        self.shares.append([sum(sizes[number] for number in numbers) / share for numbers in needed])


def _differing(groups: Sequence[Outlined], files: Sequence[Mapping[int, str]]) -> list[str]:
    """In a process beside the run's: whether what ranks fetched is what the run was told of."""
    wrong = []
    for own in files:
        for number, path in own.items():
            if tuple(map(RolloutSummary.of, shared.read(path).rollouts)) != groups[number].rollouts:
                wrong.append(f"{path} is not the group that its summary tells of")
    return wrong


def _sizes(scored: Sequence[ScoredSummary], jobs: Sequence[object], told: int) -> Sizes:
    """What crosses in a step, without Ray's keys and envelopes."""
    bare = [replace(one.group, key=None) for one in scored]
    scores = [Scores(None, one.scores) for one in scored]
    rollouts = sum(len(one.rollouts) for one in scored)

    def each(things: Sequence[object]) -> float:
        return sum(len(pickle.dumps(one, 5)) for one in things) / rollouts

    return Sizes(each(bare), each(jobs), each(scores), told / rollouts)


class _Run:
    """The spine. played: (stream, order) of every job that was trained."""

    def __init__(self, asked: Asked, config: Config, fleet: Fleet, update: _Update) -> None:
        self._asked, self._config, self._fleet, self._update = asked, config, fleet, update
        self._total = asked.steps + 2 * _WARM
        layout = Layout(((self._total * asked.prompts * 4, 1),), 1)
        cursor: RowCursor[Head] = RowCursor(layout, 0, lambda rows: fleet.look("train", rows), shuffle=False)
        self._schedule: Schedule[Head, GroupSummary] = Schedule(Rules.of(config.rollout, self._total), cursor, self._play)
        self._meter, self._known = Meter(), arrays()
        self._played: set[tuple[str, int]] = set()

    async def _play(self, head: Head, place: Pending, started: Any) -> GroupSummary:
        return await self._fleet.play(training_job(place, self._asked.prompts, self._asked.work.rollouts), started)

    async def __call__(self) -> Found:
        """All steps."""
        mark = self._meter.mark()
        await asyncio.sleep(_IDLE_S)
        idle = self._since(mark, 1 / _IDLE_S)
        steps, before, sizes = list[Step](), 0, Sizes()
        for number in range(self._total):
            mark = self._meter.mark()
            before = memory()[0] if number == _WARM else before
            scored, told = await self._step(number)
            if _WARM <= number < self._total - _WARM:
                steps.append(self._since(mark))
            if number == self._total - 1:
                sizes = _sizes(scored, [one.group.job for one in scored], told)
        await self._schedule.close()
        every = [one for step in self._update.shares for one in step]
        return Found(
            self._asked.nodes,
            idle,
            steps,
            sizes,
            (before, steps[-1].resident),
            (sum(every) / len(every), max(every)),
            self._wrong(),
        )

    def _since(self, mark: Any, times: float = 1.0) -> Step:
        now = self._meter.mark()
        return Step(
            (now.wall_s - mark.wall_s) * times,
            (now.cpu_s - mark.cpu_s) * times,
            round((now.bytes_in - mark.bytes_in) * times),
            round((now.bytes_out - mark.bytes_out) * times),
            memory()[0],
        )

    async def _step(self, number: int) -> tuple[list[ScoredSummary], int]:
        fleet = self._fleet
        await fleet.update(TrainerWeights(number, lambda: iter(()), tuple))
        taken = await self._schedule.batch(number)
        groups = await fleet.whole(taken.groups)
        scored = [ScoredSummary(group, own) for group, own in zip(groups, score(groups, self._config), strict=True)]
        told = await asyncio.to_thread(self._update, scored, number == self._total - 1)
        await fleet.write("rollouts", f"step-{number:06d}", scored)
        fleet.drop(groups)
        slices(scored)
        jobs = {(one.job.stream, one.job.order) for one in groups}
        if jobs & self._played or len(jobs) < len(groups):
            self._update.wrong.append(f"step {number} trains a group again")
        self._played |= jobs
        return scored, told

    def _wrong(self) -> list[str]:
        wrong = [*self._update.wrong]
        expected = {
            (job.stream, job.order)
            for n in range(self._total * self._asked.prompts)
            for job in [training_job(Pending(n, n), self._asked.prompts, self._asked.work.rollouts)]
        }
        if self._played != expected:
            wrong.append(f"{len(self._played)} groups were trained, {len(expected)} should be")
        if self._fleet.replayed:
            wrong.append(f"{self._fleet.replayed} groups were played again")
        wrong += [f"the run's process holds {what} of another node" for what in found(self._known)]
        return wrong


def measure(asked: Asked, folder: Path) -> Found:
    """Start nodes, play, and end them. folder: scratch, of a short path."""
    os.environ["RAY_TMPDIR"] = str(folder)
    os.environ.pop("RAY_ADDRESS", None)
    with ExitStack() as stack:
        config = settings(asked, stack.enter_context(_machines(asked.nodes)), folder / "run")
        room = Room(config, ranks=True, check=_NO_CHECK)
        stack.callback(room.close)
        nodes = []
        for number, index in enumerate(room.of("node")):
            setup = ScriptedSetup(
                number, config, {}, (), Path.cwd(), {}, False, 1 + _AT_ONCE, (), together_s(asked.nodes), work=asked.work
            )
            nodes.append(RemoteNode(setup, room.options(index), config.workers, ScriptedPlayer))
            stack.callback(nodes[-1].close)
        keepers = RankKeepers(room, folder, config.train.megatron.timeout_s)
        stack.callback(keepers.close)
        fleet = Fleet(nodes, config)
        stack.callback(fleet.close)
        fleet.wait(_NO_CHECK)
        return asyncio.run(_Run(asked, config, fleet, _Update(config, keepers))())


def main(argv: Sequence[str]) -> None:
    """Arguments: nodes, prompts, steps, `Work` as JSON."""
    nodes, prompts, steps = map(int, argv[:3])
    fields = json.loads(argv[3])
    work = Work(**fields | {name: tuple(fields[name]) for name in ("image", "crop")})
    with TemporaryDirectory(prefix="ms-") as scratch:
        print(json.dumps(asdict(measure(Asked(nodes, prompts, steps, work), Path(scratch)))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
