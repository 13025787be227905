"""The actor of a node: a `Node` in a process of its own, with its workers as children, and its groups in Ray's object store.

The run asks for things by ticket (`submit`), and hears of all of them by one long poll at a time, so that many rollouts cost it
few messages. A node's loop may be busy for long, with a native engine's steps for example; the poll is answered by another one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError

from metis_fast import host
from metis_fast.cluster.weights import Arriving, Published
from metis_fast.config import Config
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError, EngineError, InfrastructureError, MetisError, one_line
from metis_fast.model import first_device, load_policy
from metis_fast.node.node import Node
from metis_fast.node.opening import Host, open_node
from metis_fast.rollout.engine import SyncReport
from metis_fast.summary import Data
from metis_fast.types import Group
from metis_fast.workers.launch import engine_gpus

_LOOK_S = 0.02  # between two looks for news
_REMEMBERED = 10_000  # tickets that were cancelled; a node is never asked for so much at once

Method = Literal["play", "play_one", "probe", "layer_outputs", "write", "update", "rest", "resume", "look"]


Asked = tuple[int, Method, tuple[Any, ...]]
"""A ticket, and what to call."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a node is opened with. number: of the node. config: its share of the run's. folder: the run's working folder, in
    which relative paths mean something. environment: of the run, as far as it matters. alone: see `Host`. room: groups that it
    is given at once. gpus: of its engines, where they are somebody else's for Ray. together_s: what
    happens within so long of the first news is told with it, since a message costs the run more than a rollout."""

    number: int
    config: Config
    files: Mapping[Data, PromptFiles]
    styles: Collection[str]
    folder: Path
    environment: Mapping[str, str]
    alone: bool
    room: float
    gpus: Sequence[str] = ()
    together_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Event:
    """Of a ticket. kind: `done`, so many rollouts (value) ended; `started`, its first one began; `finished`, with a result;
    `failed`, with an exception."""

    ticket: int
    kind: Literal["done", "started", "finished", "failed"]
    value: Any = None


class ObjectStore:
    """`Keep` whose groups are objects of Ray's, which live until nobody holds them."""

    def put(self, group: Group) -> Any:
        """See `Keep`."""
        try:
            return ray.put(group)
        except (ObjectStoreFullError, OutOfDiskError) as error:
            raise EngineError(
                f"this machine's Ray object store has no room for the groups that it plays ({one_line(error)[:200]}); start "
                "Ray with a larger --object-store-memory, free the disk that it spills to, or lower rollout.prompts_per_step"
            ) from None

    def get(self, key: Any) -> Group:
        """See `Keep`."""
        return ray.get(key)

    def drop(self, key: Any) -> None:
        """See `Keep`: whoever else holds it, keeps it."""


class Player:
    """See the module. Made by Ray, with `CONCURRENCY`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._together_s = 0.0
        self._opened = ExitStack()
        self._node: Node | None = None
        self._version: int | None = None  # of the weights that its engine was given last, whole
        self._played: Counter[str] = Counter()  # groups by stream, since it was given weights
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._cancelled: dict[int, None] = {}  # perhaps not begun yet; the latest ones, in order
        self._events: deque[Event] = deque()  # filled by one thread, emptied by another

    async def open(self, setup: Setup) -> int:
        """Make the node and its workers; returns the number of its engine's replicas.

        Raises:
            MetisError: see `open_node`.
        """
        self._loop, self._together_s = asyncio.get_running_loop(), setup.together_s
        os.environ.update(setup.environment)
        try:
            os.chdir(setup.folder)
        except OSError as error:
            raise ConfigError(
                f"{os.uname().nodename} has no folder {setup.folder} ({error.strerror}), in which the run was started; nodes "
                "share it, run.dir, model, data and corpora, under the same paths"
            ) from None
        return await asyncio.to_thread(self._open, setup)

    def _open(self, setup: Setup) -> int:
        config, loop = setup.config, self._loop
        assert loop is not None
        logs = config.run.dir.resolve() / "workers" / f"node-{setup.number}"
        logs.mkdir(parents=True, exist_ok=True)
        form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        handler = logging.FileHandler(logs / "node.log")
        handler.setFormatter(form)
        logging.getLogger("metis_fast").addHandler(handler)
        log = logging.getLogger("metis_fast")
        log.setLevel(logging.INFO)
        log.info("node %d opens on %s", setup.number, os.uname().nodename)
        host.prepare(config.run.threads)
        random.seed(config.run.seed)
        np.random.seed(config.run.seed % 2**32)
        torch.manual_seed(config.run.seed)
        device = first_device() if config.rollout.engine == "native" else torch.device("cpu")
        vllm = config.rollout.vllm
        # Ray shows this process the GPUs of its own
        gpus = setup.gpus or engine_gpus(torch.cuda.device_count(), 0, vllm.replicas * vllm.tensor_parallel, share=True)
        here = Host(
            gpus, device, setup.alone, lambda: None,
            lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(),
        )  # fmt: skip
        node = self._opened.enter_context(
            open_node(
                setup.number, config, setup.files, setup.styles, here, lambda: load_policy(config.model, device=device),
                ObjectStore(), logs, setup.room,
            )
        )  # fmt: skip
        node.wait(lambda: None)
        log.info("node %d is open: %d engines, %s", setup.number, node.num_replicas, ", ".join(node.toolbox.names))
        self._node = node
        return node.num_replicas

    async def submit(self, asked: Sequence[Asked]) -> None:
        """Begin what `poll` tells the end of."""
        for one in asked:
            if one[0] in self._cancelled:
                del self._cancelled[one[0]]
                continue
            task = asyncio.get_running_loop().create_task(self._run(*one))
            self._tasks[one[0]] = task
            task.add_done_callback(lambda _, ticket=one[0]: self._tasks.pop(ticket, None))

    async def cancel(self, ticket: int) -> None:
        """Break it off; nothing more is told of it."""
        task = self._tasks.pop(ticket, None)
        if task is not None:
            task.cancel()
        else:  # over, or asked for with a poll that another loop still has
            self._cancelled[ticket] = None
            if len(self._cancelled) > _REMEMBERED:  # the oldest was over, or its poll would have come by now
                del self._cancelled[next(iter(self._cancelled))]

    async def drop(self, keys: Sequence[Any]) -> None:
        """Keep these groups no longer."""
        assert self._node is not None
        self._node.forget(keys)

    async def _run(self, ticket: int, method: Method, arguments: tuple[Any, ...]) -> None:
        try:
            self._tell(Event(ticket, "finished", await self._call(ticket, method, arguments)))
        except (MetisError, InfrastructureError) as error:
            self._tell(Event(ticket, "failed", error))
        except RayError as error:
            self._tell(Event(ticket, "failed", EngineError(f"Ray failed a node: {one_line(error)[:300]}")))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # nobody awaits this task: whatever it was, the run hears of it here
            logging.getLogger("metis_fast").exception("a defect of ours")
            self._tell(Event(ticket, "failed", RuntimeError(f"{type(error).__name__}: {error}")))
            raise

    async def _call(self, ticket: int, method: Method, arguments: tuple[Any, ...]) -> Any:
        node = self._node
        assert node is not None

        def done(num: int) -> None:
            self._tell(Event(ticket, "done", num))

        match method:
            case "play":
                groups = await node.play(arguments[0], done)
                self._played[groups[0].job.stream] += len(groups)
                return groups
            case "play_one":
                group = await node.play_one(arguments[0], lambda: self._tell(Event(ticket, "started")))
                self._played[group.job.stream] += 1
                return group
            case "update":
                return await self._update(node, *arguments)
            case "look":
                return await asyncio.to_thread(node.look, *arguments)
            case _:
                return await getattr(node, method)(*arguments)

    async def _update(self, node: Node, published: Published, version: int) -> SyncReport:
        coming = Arriving(published, version, self._version, lambda: node.engine.held())
        self._version = None
        report = coming.told(await node.update(coming))
        self._version = version
        played, self._played = dict(self._played), Counter()
        said = "weights %d came in %.1f s; groups played since those before: %s"
        logging.getLogger("metis_fast").info(said, version, report.seconds, played or "none")
        return report

    def _tell(self, event: Event) -> None:
        self._events.append(event)

    @ray.method(concurrency_group="news")
    async def poll(self, wait_s: float, asked: Sequence[Asked] = ()) -> list[Event]:
        """What has happened since the last call, in order; waits so long for something. On a loop of its own.

        asked: to `submit` first, since a call of its own costs as much as this one.
        """
        if asked:
            assert self._loop is not None, "nothing is asked of a node that is not open"
            asyncio.run_coroutine_threadsafe(self.submit(asked), self._loop)
        deadline = time.monotonic() + wait_s
        while not self._events and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
        if self._events:
            await asyncio.sleep(self._together_s)
        return [self._events.popleft() for _ in range(len(self._events))]

    async def close(self) -> None:
        """End the node and its workers."""
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.to_thread(self._opened.close)


CONCURRENCY = {"news": 4}
"""Concurrency groups of the actor, for Ray."""
