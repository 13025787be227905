"""What a node is to the run, whether it is in the run's process or another machine's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from metis_fast.data.row import BadRowError
from metis_fast.rollout.engine import SyncReport
from metis_fast.rollout.layers import Layers
from metis_fast.summary import Data, GroupSummary, Job, Scores
from metis_fast.types import Group


class NodeLost(Exception):
    """A node died, hangs or cannot be reached: what it was asked for is somebody else's to do, and what it kept is gone."""


@dataclass(frozen=True, slots=True)
class Head:
    """What the run knows of a prompt before it is played."""

    uid: str
    row: int
    images: int


class Weights(Protocol):
    """A version of the weights, on its way to nodes."""

    version: int
    turn: asyncio.Lock
    """Held by whoever reads `tensors`, which can be read by one at a time."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """By Hugging Face names, all of them; none where a node of this process samples with the trainer's own module."""
        ...

    def objects(self) -> object:
        """As objects of a cluster's store, made once (`cluster.weights.Published`)."""
        ...


class NodeClient(Protocol):
    """A node as the run sees it. What waits for it raises `NodeLost` where it is gone.

    number: among those of the run. num_replicas: models behind its engine. room: groups that it takes at once. gone: why it
    will not come back; "" while it is there, or may return.
    """

    number: int
    num_replicas: int
    room: float
    gone: str

    @property
    def alive(self) -> bool:
        """Whether it may be asked."""
        ...

    def holds(self, group: GroupSummary) -> bool:
        """Whether what it keeps is still there, as far as is known."""
        ...

    def look(self, data: Data, rows: Sequence[int]) -> Sequence[Head | BadRowError]:
        """Read rows that will be played soon, and see whether their images can be used. Called from threads."""
        ...

    async def play(self, jobs: Sequence[Job], on_done: Callable[[int], object]) -> list[GroupSummary]:
        """Play groups that follow each other in a stream, as one batch. on_done: told of rollouts that have ended."""
        ...

    async def play_one(self, job: Job, started: Callable[[], object]) -> GroupSummary:
        """Play a group beside others. started: called when its first rollout begins, maybe again."""
        ...

    async def probe(self, rows: Sequence[int]) -> list[GroupSummary]:
        """A message of the engine for each training row, for the truth gate: groups of one rollout, which are kept."""
        ...

    async def layer_outputs(self, order: int, group: GroupSummary) -> Layers | None:
        """See `RunEngine.layer_outputs`. group: one of `probe`."""
        ...

    def fetch(self, groups: Sequence[GroupSummary]) -> list[Group]:
        """What it keeps, into this process."""
        ...

    def drop(self, groups: Sequence[GroupSummary]) -> None:
        """Keep these no longer."""
        ...

    async def write(self, folder: str, name: str, scored: Sequence[Scores]) -> None:
        """Store groups that it keeps, below `run.dir`."""
        ...

    async def update(self, weights: Weights) -> SyncReport:
        """Let its engine sample with these weights."""
        ...

    async def rest(self) -> None:
        """See `RunEngine`."""
        ...

    async def resume(self) -> None:
        """See `RunEngine`."""
        ...

    def wait(self, check: Callable[[], None]) -> None:
        """Until it can be asked. check: called meanwhile; what it raises goes on."""
        ...
