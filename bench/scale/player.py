"""A node that computes nothing: the actor and all that it says to the run are real, its groups come from a script."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from metis_fast.cluster.player import ObjectStore, Player, Setup
from metis_fast.errors import EngineError
from metis_fast.node.node import Node
from metis_fast.node.protocol import Head, Weights
from metis_fast.rollout.engine import SyncReport
from metis_fast.summary import Data, GroupSummary, Job, RolloutSummary, Scores

from .groups import Script, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedSetup(Setup):
    """work: what its groups are like."""

    work: Work


class ScriptedPlayer(Player):
    """The actor, with a `ScriptedNode` in it."""

    def _open(self, setup: Setup) -> int:
        assert isinstance(setup, ScriptedSetup)
        self._node = cast(Node, ScriptedNode(setup))
        return 1


class ScriptedNode:
    """What of a `Node` its actor calls in a run without a gate."""

    def __init__(self, setup: ScriptedSetup) -> None:
        self._number, self._script, self._keep = setup.number, Script(setup.work), ObjectStore()
        self._version = 0
        self._told: dict[Any, tuple[RolloutSummary, ...]] = {}

    def look(self, data: Data, rows: Sequence[int]) -> list[Head]:
        """See `NodeClient`."""
        return [Head(f"bench:{row}", row, 1) for row in rows]

    async def play_one(self, job: Job, started: Callable[[], object]) -> GroupSummary:
        """See `NodeClient`."""
        started()
        return await asyncio.to_thread(self._made, job)

    def _made(self, job: Job) -> GroupSummary:
        group, verdicts = self._script.group(job, self._version)
        key = self._keep.put(group)
        summary = GroupSummary.of(group, verdicts, job, self._number, key)
        self._told[key] = summary.rollouts
        return summary

    async def update(self, weights: Weights) -> SyncReport:
        """See `NodeClient`. There are none."""
        self._version = weights.version
        return SyncReport(weights.version, "full")

    async def write(self, folder: str, name: str, scored: Sequence[Scores]) -> None:
        """See `NodeClient`. Nothing is stored: it is compared with what was told."""
        for one in scored:
            if len(one.scores) != len(self._told.get(one.key, ())):
                raise EngineError(f"{name}: the run gave {len(one.scores)} scores for a group that was told otherwise, or not")

    def forget(self, keys: Sequence[Any]) -> None:
        """See `Node`."""
        for key in keys:
            self._keep.drop(key)
            del self._told[key]
