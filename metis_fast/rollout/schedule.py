"""Sampling ahead of training: which prompts are begun when, and which groups a step takes.

The run's event loop samples groups as tasks, which go on whenever it runs: while a batch is waited for or scored, and while an
update runs in a thread. Every prompt drawn from the data has a number, its place in the run's sequence; it is trained once.

P prompts a step, S the bound, E extra prompts (`over_provision`). At step v, v updates are done and v P groups were trained:

    mode           in flight at most                        a step trains on nothing begun more than S updates ago, S =
    sync           P + E until step v's batch is taken      0 (dropped), 1 (carried over)
    one_step_off   P + E, from when the last one is taken   1 (dropped), 2 (carried over); 1 without extra prompts
    async          (v + 1 + S) P (+ E, dropped) in all      max_staleness

In `async` mode a prompt counts as begun when its first rollout gets one of the `max_concurrent` places. Where training is the
slower part nothing is added to what is in flight there while the next batch is complete, since that would only age.

A step takes the first P groups that are finished, except that the rest must still meet its own bound: of the groups that have
to be trained within n more steps there may be no more than n P left. Of those, the step takes what is too many first, and waits
for it. The first step of an asynchronous run takes the first P prompts: those that end first are the short ones, and at the
start all of (1 + S) P are new. With `slow: drop` nothing is waited for: what would be too old at the next step is cancelled,
counted, and begun again ahead of new prompts; a prompt that was dropped is waited for like any other, so that none starves.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from metis_fast.config import RolloutConfig

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
G = TypeVar("G")
log = logging.getLogger(__name__)
_CLEANUP_S = 20.0  # of cancelled groups; tools that take longer are left to the toolbox, which ends them


@dataclass(frozen=True, slots=True)
class Pending:
    """A prompt that was drawn and is not trained yet: all that a checkpoint keeps of it.

    number: its place in the run's sequence of prompts, from 0. row: of the data files. tries: how often it was dropped.
    """

    number: int
    row: int
    tries: int = 0


@dataclass(frozen=True, slots=True)
class Rules:
    """What the module's table says, for one run.

    per_step: P. max_age: S. ahead: steps' worth of groups that may be in flight besides those of the current step. extra: E.
    drop: whether the slow ones are. closed: nothing is begun between a batch and its update. steps: of the whole run.
    """

    per_step: int
    max_age: int
    ahead: int
    extra: int
    drop: bool
    closed: bool
    steps: int

    @staticmethod
    def of(config: RolloutConfig, steps: int) -> Rules:
        """What `rollout.mode`, `max_staleness`, `over_provision` and `slow` amount to."""
        P, drop = config.prompts_per_step, config.slow == "drop"
        extra = math.ceil(config.over_provision * P - 1e-9)  # a tenth of 30 is 3, whatever its last bit
        if config.mode == "async":
            extra = extra if drop else 0  # carried over, they are the groups of the coming steps, begun in any case
            return Rules(P, config.max_staleness, config.max_staleness, extra, drop, False, steps)
        carried = bool(extra) and not drop
        return Rules(P, carried + (config.mode == "one_step_off"), 0, extra, drop, config.mode == "sync", steps)


class Cursor(Protocol[R_co]):
    """Where prompts come from, as whatever stands for one; see `RowCursor`."""

    async def begin(self, n: int) -> Sequence[tuple[int, R_co]]:
        """The next prompts, with their rows."""
        ...

    def read(self, row: int) -> R_co:
        """One that was drawn before. Called from threads."""
        ...


@dataclass(frozen=True, slots=True)
class Taken(Generic[G]):
    """What a step trains on. groups: P, in the order of their numbers. in_flight: groups that go on being sampled, wait for a
    place, or are finished and wait for their step; carried: of these, what was there before this step's batch was complete.
    dropped: cancelled."""

    groups: list[G]
    in_flight: int
    carried: int
    dropped: int


Play = Callable[[R, Pending, Callable[[], None]], Coroutine[Any, Any, G]]
"""Samples the group of a prompt. Calls its third argument when the first rollout begins, and may do so again."""


@dataclass(slots=True, eq=False)
class _Running(Generic[R, G]):
    place: Pending
    prompt: R
    last: int | None = None  # step that may train it; None: it is not begun
    task: asyncio.Task[G] = field(init=False)

    def due(self, step: int) -> bool:
        return self.last is not None and self.last <= step


class Schedule(Generic[R, G]):
    """Groups that are being sampled, finished ones that wait for their step, and dropped prompts that wait to be begun again.

    cursor: is drawn from as prompts are begun. play: samples the group of a prompt. discard: told of groups that were finished
    and will not be trained.
    """

    def __init__(
        self, rules: Rules, cursor: Cursor[R], play: Play[R, G], discard: Callable[[G], object] = lambda group: None
    ) -> None:
        self._rules, self._cursor, self._play, self._discard = rules, cursor, play, discard
        self._running: list[_Running[R, G]] = []
        self._finished: list[_Running[R, G]] = []  # of those, in the order in which they ended, well or not
        self._line: list[tuple[Pending, R | None]] = []  # to be begun before anything is drawn
        self._drawn = 0
        self._version = 0  # updates done at least
        self._first = 0  # step that was the first one here
        self._taken = 0
        self._changed = asyncio.Event()

    def restore(self, step: int, pending: Iterable[Pending]) -> None:
        """Go on after `step` steps, with what a checkpoint of them kept."""
        assert not self._running
        self._line = [(place, None) for place in sorted(pending, key=lambda place: place.number)]
        self._first = self._version = step
        self._taken = step * self._rules.per_step
        self._drawn = self._taken + len(self._line)

    def pending(self) -> tuple[Pending, ...]:
        """Every prompt that was drawn, and is in no batch that was taken."""
        places = [*(place for place, _ in self._line), *(one.place for one in self._running)]
        return tuple(sorted(places, key=lambda place: place.number))

    async def ready(self, step: int) -> None:
        """Wait until the batch of `step` is there, if it was begun. It is not taken, and nothing is begun."""
        if len(self._running) >= self._rules.per_step:
            await self._choose(step)

    async def batch(self, step: int, on_finished: Callable[[int], object] = lambda n: None) -> Taken[G]:
        """The groups of a step; the engine samples with the weights of `step` updates.

        on_finished: called with the number of groups that have ended since the last call.

        Raises:
            DataError: a prompt cannot be used.
            MetisError, or a defect: as a group raised it; nothing of it is trained.
        """
        self._version = step
        await self._begin(step)
        chosen = await self._choose(step, on_finished)
        assert all(one.last is not None and step <= one.last for one in chosen)
        self._remove(chosen)
        self._taken += len(chosen)
        late = [one for one in self._running if one.due(step)]
        assert self._rules.drop or not late
        await self._drop(late)
        carried = len(self._running)
        if not self._rules.closed and step + 1 < self._rules.steps:
            await self._begin(step)
        chosen.sort(key=lambda one: one.place.number)
        return Taken([one.task.result() for one in chosen], len(self._running), carried, len(late))

    async def close(self) -> None:
        """Cancel what is being sampled, and let it clean up."""
        await self._cancel(list(self._running))

    async def _begin(self, step: int) -> None:
        """Begin as many groups as the rules allow."""
        rules = self._rules
        room = (step + 1 + rules.ahead) * rules.per_step + rules.extra - self._taken - len(self._running)
        if rules.ahead == 0 and not rules.closed:  # one_step_off: the next batch, whatever the update is doing
            room = rules.per_step + rules.extra - len(self._running)
        if rules.ahead and self._choice(self._taken // rules.per_step) is not None:
            room = 0  # the next batch is there; what would be begun now would only grow old
        line, self._line = self._line[: max(0, room)], self._line[max(0, room) :]
        again = await asyncio.gather(*(self._known(*entry) for entry in line))
        new = max(0, min(room - len(again), rules.steps * rules.per_step + rules.extra - self._drawn))
        rows = await self._cursor.begin(new) if new else []
        drawn = [(Pending(self._drawn + i, row), prompt) for i, (row, prompt) in enumerate(rows)]
        self._drawn += new
        for place, prompt in [*again, *drawn]:
            one: _Running[R, G] = _Running(place, prompt)
            if not rules.ahead:
                self._started(one)
            one.task = asyncio.create_task(self._play(prompt, place, lambda one=one: self._started(one)))
            self._running.append(one)
            one.task.add_done_callback(lambda _, one=one: self._ended(one))

    async def _known(self, place: Pending, prompt: R | None) -> tuple[Pending, R]:
        """With its prompt, which a checkpoint does not keep."""
        return place, prompt if prompt is not None else await asyncio.to_thread(self._cursor.read, place.row)

    def _started(self, one: _Running[R, G]) -> None:
        if one.last is None:
            one.last = self._version + self._rules.max_age

    def _ended(self, one: _Running[R, G]) -> None:
        if one in self._running:  # and was not given up
            self._finished.append(one)
            self._changed.set()

    async def _choose(self, step: int, on_finished: Callable[[int], object] = lambda n: None) -> list[_Running[R, G]]:
        """Wait for the groups of a step."""
        told = 0
        while True:
            self._changed.clear()
            for one in self._finished:
                if one.task.cancelled():
                    raise RuntimeError(f"the group of row {one.place.row} was cancelled, and not by its schedule")
                one.task.result()  # raises what it raised
            on_finished(len(self._finished) - told)
            told = len(self._finished)
            chosen = self._choice(step)
            if chosen is not None:
                return chosen
            await self._changed.wait()

    def _choice(self, step: int) -> list[_Running[R, G]] | None:
        """The groups of a step out of the finished ones; None where it has to wait for others."""
        P, max_age, drop = self._rules.per_step, self._rules.max_age, self._rules.drop
        if len(self._finished) < P:
            return None
        in_turn = bool(self._rules.ahead) and step == self._first
        order = self._running if in_turn else self._finished
        chosen: dict[_Running[R, G], None] = {}  # a set that keeps its order
        for later in range(max_age + 1):  # what has to be trained at this step, within one more, ...
            due = {one for one in self._running if one.due(step + later) and (one.place.tries or not drop)}
            num = max(0, min(P, len(due) - later * P) - len(due & chosen.keys()))
            ready = [one for one in order if one in due and one not in chosen]
            if len(ready) < num:
                return None
            chosen |= dict.fromkeys(ready[:num])
        # the others as they come; where the slow ones are dropped, first those that would be
        rest = sorted((one for one in order if one not in chosen), key=lambda one: not one.due(step))
        batch = [*chosen, *rest[: P - len(chosen)]]
        return batch if set(batch) <= set(self._finished) else None

    async def _drop(self, late: Sequence[_Running[R, G]]) -> None:
        await self._cancel(late)
        again = [(replace(one.place, tries=one.place.tries + 1), one.prompt) for one in late]
        self._line = sorted([*self._line, *again], key=lambda entry: entry[0].number)

    async def _cancel(self, gone: Sequence[_Running[R, G]]) -> None:
        for one in gone:
            one.task.cancel()
        if gone:
            done, left = await asyncio.wait([one.task for one in gone], timeout=_CLEANUP_S)
            for task in done:
                if task.cancelled():
                    continue
                if (error := task.exception()) is None:  # it had ended before
                    self._discard(task.result())
                else:  # of nothing that is trained; a defect will come up again
                    log.warning("a cancelled group ended with %r", error)
            if left:
                log.warning("%d cancelled groups have not ended after %.0f s", len(left), _CLEANUP_S)
        self._remove(gone)

    def _remove(self, gone: Iterable[_Running[R, G]]) -> None:
        gone = set(gone)
        self._running = [one for one in self._running if one not in gone]
        self._finished = [one for one in self._finished if one not in gone]
