"""Nodes of other machines, as the run sees them: `NodeClient` over an actor on each (`player`).

A thread a node starts its actor, hears its news, and when it dies or hangs starts another one in its place, wherever Ray finds
room; it is used again once it has the current weights. Nothing of ours is on the network: calls, groups and weights are Ray's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from metis_fast.cluster.player import CONCURRENCY, Asked, Event, Method, Player, Setup
from metis_fast.cluster.room import Room
from metis_fast.config import Config, WorkersConfig
from metis_fast.data.parquet import PromptFiles
from metis_fast.data.row import BadRowError
from metis_fast.errors import EngineError, MetisError, one_line
from metis_fast.node.opening import share_of
from metis_fast.node.protocol import Head, NodeLost, Weights
from metis_fast.rollout.engine import SyncReport
from metis_fast.rollout.layers import Layers
from metis_fast.summary import Data, GroupSummary, Job, Scores
from metis_fast.tools.remote import mcp_environment
from metis_fast.tools.search import keys
from metis_fast.types import Group

_LOG = logging.getLogger(__name__)
_POLL_S = 1.0  # of a quiet node
_TOGETHER_S, _TOGETHER_MORE_S, _MOST_TOGETHER_S = 0.1, 0.025, 0.5
_RIDE_S = 0.02  # for what is asked for upon news, to go with the next poll
_NEWS_S = 15.0  # between two lines that say what is waited for
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # after a start that failed; twice as long after every further one
_LEAVE_S = 10.0  # for a node to end its workers
_FORWARDED = ("GLOO_", "NCCL_", "VLLM_", "HF_", "METIS_")


class _Ended(Exception):
    """The run ends."""


class _Ticket:
    """What a node was asked for. on: told of its events, on the loop of whoever asked."""

    def __init__(self, on: Callable[[Event], None] | None = None) -> None:
        self.future: Future[Any] = Future()
        self._on, self._loop = on, asyncio.get_running_loop() if on is not None else None

    def tell(self, event: Event) -> bool:
        """From any thread. False: it is over, and nobody waits for it any more."""
        if event.kind in ("finished", "failed"):
            try:
                if event.kind == "finished":
                    self.future.set_result(event.value)
                else:
                    self.future.set_exception(event.value)
            except InvalidStateError:
                return False
        elif self._on is not None and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._on, event)
        return True


class RemoteNode:
    """See `NodeClient`. Close it to end its actor."""

    def __init__(self, setup: Setup, options: Mapping[str, Any], config: WorkersConfig, player: type[Player] = Player) -> None:
        """options: of its actor, for Ray. player: what that is made of."""
        self.number, self.room = setup.number, setup.room
        self.num_replicas, self.gone = 1, ""
        self._setup, self._options, self._config, self._player = setup, options, config, player
        self._actor: Any = None
        self._failed: MetisError | None = None  # what the very first start ended with: settings that cannot work
        self._was_up = False
        self._weights: Weights | None = None
        self._kept: set[Any] = set()
        self._tickets: dict[int, _Ticket] = {}
        self._asked: list[Asked] = []  # and not sent yet
        self._polls = True  # it is being heard now; if not, what is asked may go with the next poll
        self._has_asked = threading.Event()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._up, self._closed, self._awake = threading.Event(), threading.Event(), threading.Event()
        self._awake.set()
        self._thread = threading.Thread(target=self._keep, name=f"node-{setup.number}", daemon=True)
        self._thread.start()

    # -- for the run --------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """See `NodeClient`."""
        return self._up.is_set()

    def wait(self, check: Callable[[], None]) -> None:
        """See `NodeClient`."""
        while not self._up.wait(0.1):
            check()
            gone = self.gone  # set after `_failed`, where there is that
            if self._failed is not None:
                raise self._failed
            if gone:
                raise EngineError(f"node {self.number} cannot be started: {gone}")

    def holds(self, group: GroupSummary) -> bool:
        """See `NodeClient`."""
        return group.key in self._kept

    def look(self, data: Data, rows: Sequence[int]) -> Sequence[Head | BadRowError]:
        """See `NodeClient`."""
        ticket = self._ask("look", data, list(rows))
        self._send(at_once=True)  # with what a loop has left to its next turn: it may stand still until this is answered
        return ticket.future.result()

    async def play(self, jobs: Sequence[Job], on_done: Callable[[int], object]) -> list[GroupSummary]:
        """See `NodeClient`."""
        return await self._answer("play", list(jobs), on=lambda event: event.kind == "done" and on_done(event.value))

    async def play_one(self, job: Job, started: Callable[[], object]) -> GroupSummary:
        """See `NodeClient`."""
        return await self._answer("play_one", job, on=lambda event: event.kind == "started" and started())

    async def probe(self, rows: Sequence[int]) -> list[GroupSummary]:
        """See `NodeClient`."""
        return await self._answer("probe", list(rows))

    async def layer_outputs(self, order: int, group: GroupSummary) -> Layers | None:
        """See `NodeClient`."""
        return await self._answer("layer_outputs", order, group)

    def fetch(self, groups: Sequence[GroupSummary]) -> list[Group]:
        """See `NodeClient`."""
        try:
            return ray.get([cast(Any, group.key) for group in groups])
        except RayError as error:
            raise NodeLost(f"groups of node {self.number} are lost: {one_line(error)[:200]}") from None

    def drop(self, groups: Sequence[GroupSummary]) -> None:
        """See `NodeClient`."""
        with self._lock:
            keys = [group.key for group in groups if group.key in self._kept]
            self._kept.difference_update(keys)
            if keys and self._actor is not None:
                self._actor.drop.remote(keys)

    async def write(self, folder: str, name: str, scored: Sequence[Scores]) -> None:
        """See `NodeClient`."""
        await self._answer("write", folder, name, list(scored))

    async def update(self, weights: Weights) -> SyncReport:
        """See `NodeClient`. One that is being started gets them when it is up."""
        refs = await asyncio.to_thread(weights.objects)
        with self._lock:  # whoever becomes ready from here on has them, or starts anew
            self._weights = weights
        return await self._answer("update", refs, weights.version)

    async def rest(self) -> None:
        """See `NodeClient`. An engine that gives its memory away is not started meanwhile; any other need not be told."""
        if self._setup.config.rollout.vllm.sleep:
            self._awake.clear()
            await self._answer("rest")

    async def resume(self) -> None:
        """See `NodeClient`."""
        if self._setup.config.rollout.vllm.sleep:
            self._awake.set()
            await self._answer("resume")

    def close(self) -> None:
        """End it, and what it has started."""
        self._closed.set()
        self.gone = "the run ends"  # for a thread that waits for it to come back
        self._lose(self.gone, leave_s=_LEAVE_S)
        self._thread.join(_LEAVE_S)

    def _ask(self, method: Method, *arguments: object, on: Callable[[Event], Any] | None = None) -> _Ticket:
        ticket, number = _Ticket(on), next(self._numbers)
        with self._lock:
            if self._actor is None or not self._up.is_set():
                raise NodeLost(f"node {self.number} is being started again")
            self._tickets[number] = ticket
            self._asked.append((number, method, arguments))
        ticket.future.add_done_callback(lambda future: self._over(number, future.cancelled()))
        return ticket

    def _send(self, at_once: bool = False) -> None:
        with self._lock:
            if not self._polls and not at_once:
                self._has_asked.set()
                return
            asked, self._asked = self._asked, []
            if asked and self._actor is not None:
                self._actor.submit.remote(asked)

    def _over(self, number: int, cancelled: bool) -> None:
        with self._lock:
            if self._tickets.pop(number, None) is not None and cancelled and self._actor is not None:
                self._asked = [one for one in self._asked if one[0] != number]
                self._actor.cancel.remote(number)

    async def _answer(self, method: Method, *arguments: object, on: Callable[[Event], Any] | None = None) -> Any:
        future = self._ask(method, *arguments, on=on).future
        # a call costs more than what is in it: what is asked for in one turn of the loop goes together
        asyncio.get_running_loop().call_soon(self._send)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancel() and future.exception() is None:  # it came at that very moment
                self.drop(_groups(future.result()))
            raise

    # -- in its thread ------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Until the run ends."""
        try:
            self._keep_up()
        finally:  # a defect of ours, if the run goes on: nobody may wait for it
            if not self._closed.is_set():
                self.gone = "its thread has ended, which the log explains"
                self._lose(self.gone)

    def _keep_up(self) -> None:
        """Start it, hear it, and start it again."""
        failures, down = 0, time.monotonic()
        while not self._closed.is_set():
            if not self._awake.is_set():
                self._awake.wait(_POLL_S)
                down = time.monotonic()  # it could not be started before
                continue
            try:
                self._start()
                failures = 0
                self._listen()
            except _Ended:
                return
            except (RayError, NodeLost, MetisError) as error:
                if isinstance(error, MetisError) and not self._was_up:
                    self._failed = error
                    return
                cause = f"{type(error.cause).__name__}: {error.cause}" if isinstance(error, RayTaskError) else error
                why, was_up = one_line(cause)[:300], self.alive
                down = time.monotonic() if was_up else down
                if not self._closed.is_set():
                    what = "was lost" if was_up else "did not start"
                    _LOG.warning("node %d %s: %s; starting it again", self.number, what, why)
                self._lose(why)
                if self._awake.is_set() and time.monotonic() > down + self._config.wait_s:
                    self.gone = why
            failures += 1
            self._closed.wait(min(_LONGEST_PAUSE_S, _PAUSE_S * 2.0 ** (failures - 1)))

    def _start(self) -> None:
        """An actor with a node in it, which has the current weights.

        Raises:
            _Ended, MetisError, NodeLost, RayError: it is not to be.
        """
        began = time.monotonic()
        made: Any = ray.remote(concurrency_groups=CONCURRENCY, **self._options)  # pyright: ignore[reportCallIssue]
        actor = made(self._player).remote()
        self._actor = actor
        self.num_replicas = self._result(actor.open.remote(self._setup), began)
        opened, weights = time.monotonic(), self._weights
        if weights is not None:
            number, ticket = next(self._numbers), _Ticket()
            self._tickets[number] = ticket
            actor.submit.remote([(number, "update", (weights.objects(), weights.version))])
            while not ticket.future.done():
                self._may_start()
                self._hear(opened, self._config.start_s)
            ticket.future.result()
            self._over(number, cancelled=False)
        with self._lock:
            self._may_start()  # who is told to rest from here on is asked to
            if self._weights is not weights:  # newer ones came meanwhile, and were not sent here
                raise NodeLost(f"node {self.number} was started with weights that are no longer current")
            self._was_up, self.gone = True, ""
            self._up.set()
        _LOG.info("node %d is ready after %.1f s", self.number, time.monotonic() - began)

    def _may_start(self) -> None:
        if self._closed.is_set():
            raise _Ended
        if not self._awake.is_set():
            raise NodeLost("its GPUs are the trainer's until the next weights")

    def _result(self, ref: Any, began: float) -> Any:
        """Of a call that may have to wait for room in the cluster."""
        news = began
        while not ray.wait([ref], timeout=0.2)[0]:
            self._may_start()
            now = time.monotonic()
            if now > news + _NEWS_S:
                news = now
                _LOG.info("waiting for node %d to start, %.0f s so far", self.number, now - began)
            if now > began + self._config.start_s + self._config.wait_s:
                raise NodeLost(f"node {self.number} did not start within {now - began:.0f} s")
        return _get(ref)

    def _listen(self) -> None:
        while True:
            self._hear(time.monotonic(), self._config.silence_s)

    def _hear(self, began: float, limit_s: float) -> None:
        """The next news, or none; waits for them no longer than that."""
        actor = self._actor
        if self._closed.is_set() or actor is None:
            raise _Ended
        with self._lock:
            asked, self._asked, self._polls = self._asked, [], True
            self._has_asked.clear()
        try:
            events = _get(actor.poll.remote(_POLL_S, asked), max(_POLL_S, began + limit_s - time.monotonic()))
        except GetTimeoutError:
            raise NodeLost(f"it has not answered for {limit_s:g} s") from None
        self._polls = not any(event.kind == "finished" for event in events)  # what is played next is asked for soon then
        for event in events:
            ticket = self._tickets.get(event.ticket)
            groups = _groups(event.value) if event.kind == "finished" else []
            with self._lock:
                self._kept.update(group.key for group in groups)
            if ticket is None or not ticket.tell(event):  # cancelled while this was on its way
                self.drop(groups)
        if not self._polls:
            self._has_asked.wait(_RIDE_S)

    def _lose(self, why: str, leave_s: float = 0.0) -> None:
        """Give the actor up, and all that was asked of it."""
        with self._lock:
            actor, self._actor = self._actor, None
            self._up.clear()
            self._kept.clear()
            tickets, self._tickets = list(self._tickets.values()), {}
            self._asked = []
        for ticket in tickets:
            ticket.tell(Event(0, "failed", NodeLost(f"node {self.number} was lost: {why}")))
        if actor is not None:
            with contextlib.suppress(RayError):
                if leave_s:
                    ray.wait([actor.close.remote()], timeout=leave_s)
                ray.kill(actor)


def _groups(value: object) -> list[GroupSummary]:
    """Those in what a node was asked for that it keeps."""
    found = value if isinstance(value, list) else [value]
    return [one for one in found if isinstance(one, GroupSummary) and one.key is not None]


def _get(ref: Any, timeout_s: float | None = None) -> Any:
    """What a call returned; raises what it raised, where that is ours.

    Raises:
        RayError: the actor is gone.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, MetisError):
            raise error.cause from None
        raise


def together_s(nodes: int) -> float:
    """See `Setup`: nearly as many messages reach the run, however many nodes send them."""
    return min(_MOST_TOGETHER_S, _TOGETHER_S + _TOGETHER_MORE_S * nodes)


def open_nodes(
    config: Config,
    room: Room,
    files: Mapping[Data, PromptFiles],
    styles: Collection[str],
    alone: bool,
    stack: ExitStack,
) -> list[RemoteNode]:
    """A node in every bundle that is for one; they start in the background (`RemoteNode.wait`), and end with `stack`.

    alone: see `Host`.
    """
    nodes: list[RemoteNode] = []
    stack.callback(_close, nodes)
    environment = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
    environment |= {key: os.environ[key] for key in config.score.llm.key_names() if key in os.environ}
    environment |= {**keys.environment(config.tools.text_search), **mcp_environment(config.tools)}
    groups = 1 + -(-config.rollout.max_concurrent // (config.rollout.rollouts_per_prompt * config.workers.nodes))
    for number, index in enumerate(room.of("node")):
        bundle = room.bundles[index]
        own = share_of(config, number)
        # with ranks in its bundle the GPUs are theirs for Ray, and the engines' by turns
        gpus = tuple(room.gpus(index)) if bundle.ranks else ()
        setup = Setup(
            number,
            own,
            files,
            tuple(sorted(styles)),
            Path.cwd(),
            environment,
            alone,
            groups,
            gpus,
            together_s(config.workers.nodes),
        )
        node = RemoteNode(setup, room.options(index), config.workers)
        nodes.append(node)
    return nodes


def _close(nodes: Sequence[RemoteNode]) -> None:
    with ThreadPoolExecutor(max(1, len(nodes))) as threads:  # each may take its time
        list(threads.map(RemoteNode.close, nodes))
