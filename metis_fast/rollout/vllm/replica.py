"""A replica of the model as the run sees it: the worker that its engine runs in, and what of images and weights it has."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from metis_fast.workers.worker import Worker

LOAD_S = 600.0  # for a replica to take a version


@dataclass(slots=True, eq=False)
class Replica:
    """A worker, and what the run knows of it.

    sent: images that it has. sessions: open ones. since: first weight version that it got in this life; what it sampled with an
    older one is not to be used. None: it has those of the model's folder. waiting: the life (`Worker.restarts`) in which it
    cannot have the current version any more. slots: for the requests that vLLM runs at once; those beyond wait here, where no
    deadline counts yet.
    """

    worker: Worker
    slots: asyncio.Semaphore
    sent: set[str] = field(default_factory=set)
    sessions: int = 0
    since: int | None = 0
    waiting: int | None = None

    @property
    def waits(self) -> bool:
        """Whether it is up, but is of no use before the next update."""
        return self.waiting == self.worker.restarts

    def started(self) -> None:
        """It is new."""
        self.sent.clear()
        self.since = None

    def wait(self) -> None:
        """The next update gives it weights."""
        self.waiting = self.worker.restarts

    def got(self, version: int) -> None:
        """It has these weights."""
        self.waiting = None
        if self.since is None:
            self.since = version

    async def lose(self, life: int, why: str) -> None:
        """Start it anew if it still lives that life: what failed may have left it with weights of another version."""
        if self.worker.restarts == life:
            await self.worker.lose(why)
