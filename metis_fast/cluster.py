"""The door to Ray: places a run's processes on the nodes of a cluster. Ray starts and ends them; what they say to each other
goes over their own connections.

All that a run starts is reserved at once, as the bundles of one placement group, so that two runs cannot wait for each other
with half of what they need. In every bundle an actor, the `Keeper`, starts the processes and sees them end. A keeper that dies
with its node is started again where the cluster finds room, once something is to run in its bundle.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from metis_fast.config import Config, WorkersConfig
from metis_fast.errors import ConfigError
from metis_fast.machine import PARENT, num_cores
from metis_fast.workers.launch import Child, Job, Process

_LOG = logging.getLogger(__name__)
_NEWS_S = 15.0  # between two lines that say what is waited for
_POLL_S = 0.5
_CALL_S = 20.0  # for a keeper to start or end a process; then it counts as dead
_LEAVE_S = 10.0
_LOST = 255  # "exit code" of a process whose keeper is gone
# a process's environment is that of `ray start` on its node, and these of the run's
_FORWARDED = ("GLOO_", "NCCL_", "OMP_NUM_THREADS", "VLLM_", "HF_")


@dataclass(frozen=True, slots=True)
class Seat:
    """A process's place in a bundle. gpus: which of the bundle's GPUs it sees, [start, stop)."""

    name: str
    gpus: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Bundle:
    """What Ray keeps together on one node. cpus, gpus: for all of its seats together."""

    role: str
    cpus: int
    gpus: int
    seats: tuple[Seat, ...]


def plan(config: Config, ranks: bool, on_gpus: bool) -> list[Bundle]:
    """All that a run of these settings starts, bundle by bundle. Without GPUs, CPU slots stand for them.

    ranks: whether the trainer's ranks are to be placed.

    Raises:
        ConfigError: engines cannot share GPUs with the trainer as asked for.
    """
    vllm, megatron, workers = config.rollout.vllm, config.train.megatron, config.workers
    engines = vllm.replicas if config.rollout.engine == "vllm" else 0
    each = vllm.tensor_parallel
    num_ranks = megatron.num_ranks if ranks else 0
    shared = engines > 0 and vllm.sleep
    size = megatron.tensor_parallel
    if shared:
        size = max(size, each)
        if not num_ranks:
            raise ConfigError(
                "rollout.vllm.sleep has engine and trainer share GPUs, so Ray has to place both; set train.backend=megatron, "
                "or workers.launcher=local"
            )
        if size % megatron.tensor_parallel or size % each or num_ranks % size or engines * each > num_ranks:
            raise ConfigError(
                f"rollout.vllm.sleep: {engines} engines of {each} GPUs do not fit on those of {num_ranks} ranks, of which "
                f"{megatron.tensor_parallel} share a node; make one tensor_parallel a multiple of the other, and rollout.vllm."
                f"replicas at most {num_ranks // each}"
            )
    bundles = []
    for start in range(0, num_ranks, size):
        seats = [Seat(f"rank-{start + i}", (i, i + 1)) for i in range(size)]
        if shared:
            first, last = start // each, min((start + size) // each, engines)
            seats += [Seat(f"engine-{i}", (i * each - start, (i + 1) * each - start)) for i in range(first, last)]
        bundles.append(Bundle("ranks", size, size if on_gpus else 0, tuple(seats)))
    if not shared:
        cpus, gpus = (each, each) if on_gpus else (each * max(1, vllm.cpu_threads), 0)
        bundles += [Bundle("engine", cpus, gpus, (Seat(f"engine-{i}", (0, each)),)) for i in range(engines)]
    bundles += [Bundle("tools", 1, 0, (Seat(f"tools-{i}"),)) for i in range(workers.tools)]
    bundles += [Bundle("judge", 1, 0, (Seat(f"judge-{i}"),)) for i in range(workers.judges)]
    return bundles


class Keeper:
    """An actor in a bundle. Its processes are in groups of their own: they end with all that they start, and Ray's must not."""

    def __init__(self) -> None:
        self._processes: dict[str, Child] = {}

    async def node(self) -> str:
        """Where it runs."""
        return socket.gethostname()

    async def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        gpus: tuple[int, int],
        scratch: bool,
    ) -> None:
        """Start a process under a name, the one of that name before is ended.

        environment: added to this process's own; keys in it go over Ray's connections, into no command line. log, scratch: see
        `Child`.

        Raises:
            OSError: see `Child`.
        """
        await self.kill(name)
        own = dict(os.environ)
        if gpus[1] > gpus[0] and own.get("CUDA_VISIBLE_DEVICES"):
            own["CUDA_VISIBLE_DEVICES"] = ",".join(own["CUDA_VISIBLE_DEVICES"].split(",")[slice(*gpus)])
        self._processes[name] = Child(command, {**own, **environment, PARENT: str(os.getpid())}, log, scratch)

    async def wait(self, name: str) -> int:
        """Exit code of the process, once it has ended; negative: the signal that killed it."""
        process = self._processes[name]
        while (code := process.exit_code()) is None:
            await asyncio.sleep(0.1)
        return code

    async def kill(self, name: str) -> None:
        """End the process, if there is one, and what it started."""
        process = self._processes.get(name)
        if process is not None:
            await asyncio.to_thread(process.kill)


class _Placed:
    """A process that a keeper has started; see `Process`."""

    def __init__(self, place: _Place, keeper: Any, name: str, log: Path) -> None:
        self._place, self._keeper, self._name, self._log = place, keeper, name, log
        self._where = place.node
        self._end = keeper.wait.remote(name)
        self._code: int | None = None
        self._lock = threading.Lock()
        self._problem = ""

    def exit_code(self) -> int | None:
        """See `Process`."""
        with self._lock:
            if self._code is None and ray.wait([self._end], timeout=0)[0]:
                try:
                    self._code = ray.get(self._end)
                except RayError as error:
                    self._code, self._problem = _LOST, f"; Ray: {_one_line(error)}"
            return self._code

    def kill(self) -> None:
        """See `Process`."""
        try:
            ray.get(self._keeper.kill.remote(self._name), timeout=_CALL_S)
        except RayError:  # it is gone, and its processes find that nobody listens; or it hangs, with its node maybe
            self._place.drop(self._keeper)

    def describe(self) -> str:
        """See `Process`."""
        return f"{self._log} of {self._where}{self._problem}"


class _Place:
    """A bundle and the keeper in it. node: where the last one was. current: None if there is none."""

    def __init__(self, group: PlacementGroup, index: int, bundle: Bundle) -> None:
        self.bundle, self.node = bundle, "a node"
        self._lock = threading.Lock()
        self.current: Any = None
        self._options = {
            "num_cpus": bundle.cpus,
            "num_gpus": bundle.gpus,
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        }

    def keeper(self) -> Any:
        """The actor; a new one, which may have to wait for room, where the last one was dropped."""
        with self._lock:
            if self.current is None:
                self.current = ray.remote(Keeper).options(**self._options).remote()
            return self.current

    def drop(self, keeper: Any) -> None:
        """End a keeper that does not answer."""
        with self._lock:
            if self.current is keeper:
                self.current = None
        with contextlib.suppress(RayError):
            ray.kill(keeper)


class RayLauncher:
    """Starts a run's processes through Ray; see `Launcher`.

    Joins the cluster that `workers.ray_address` names, or makes this machine one, and reserves room for everything.
    """

    def __init__(self, config: Config, ranks: bool, check: Callable[[], None]) -> None:
        """ranks: whether the trainer's ranks are to be placed.

        Processes print to files below `run.dir`, which all nodes have to see. check: called while waiting; what it raises goes
        on.

        Raises:
            ConfigError: no such cluster, or no room in it within `workers.wait_s`.
        """
        self._config, self._folder = config.workers, config.run.dir.resolve()
        self._closed = threading.Event()
        self._group: PlacementGroup | None = None
        self._places: list[_Place] = []
        self._joined = not ray.is_initialized()  # else it belongs to whoever has called us
        if self._joined:
            _join(config.workers, sum(bundle.cpus for bundle in plan(config, ranks, on_gpus=False)))
        self.host = ray.util.get_node_ip_address()
        try:
            self._bundles = plan(config, ranks, on_gpus=ray.cluster_resources().get("GPU", 0) > 0)
            self._reserve(check)
        except BaseException:
            self.close()
            raise

    def _reserve(self, check: Callable[[], None]) -> None:
        bundles = self._bundles
        self._group = placement_group(
            [{"CPU": bundle.cpus, **({"GPU": bundle.gpus} if bundle.gpus else {})} for bundle in bundles], strategy="PACK"
        )
        wanted = f"room for {_describe(bundles)}"
        self._wait(wanted, check, lambda: self._group is not None and self._group.wait(0))
        node_of: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        # neighbours in number are neighbours on nodes: ranks count tensor parallel fastest, then data parallel
        order = sorted(node_of, key=lambda index: (node_of[index], index))
        for role in dict.fromkeys(bundle.role for bundle in bundles):
            mine = iter([bundle for bundle in bundles if bundle.role == role])
            self._places += [_Place(self._group, i, next(mine)) for i in order if bundles[i].role == role]
        nodes = {node_of[i] for i, bundle in enumerate(bundles) if bundle.role == "ranks"}
        self._environment = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
        if len(nodes) == 1:
            self._environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        starting = {place.keeper().node.remote(): place for place in self._places}

        def all_started() -> bool:
            for ready in ray.wait(list(starting), num_returns=len(starting), timeout=0)[0] if starting else []:
                place = starting.pop(ready)
                with contextlib.suppress(RayError):  # `start` tries again
                    place.node = str(ray.get(ready))
            return not starting

        self._wait("Ray to start a process for each of them", check, all_started)

    def _wait(self, what: str, check: Callable[[], None], done: Callable[[], bool]) -> None:
        began = news = time.monotonic()
        while not done():
            check()
            if self._closed.is_set():
                raise ConfigError("the run ends")
            now = time.monotonic()
            if now > began + self._config.wait_s:
                raise ConfigError(
                    f"waited {self._config.wait_s:g} s for {what}: {_cluster()}; ask for less (train.megatron, "
                    "rollout.vllm, workers), or wait longer (workers.wait_s)"
                )
            if now > news + _NEWS_S:
                news = now
                _LOG.info("waiting for %s, %.0f s so far: %s", what, now - began, _cluster())
            time.sleep(min(_POLL_S, self._config.wait_s / 4))

    def start(self, job: Job) -> Process:
        """See `Launcher`. Where the process's node is gone, waits until the cluster has room again."""
        place, seat = self._seat(job.name)
        log = self._folder / ("ranks" if job.role == "rank" else "workers") / f"{job.name}.log"
        environment = {**self._environment, **job.environment}
        deadline = time.monotonic() + self._config.wait_s
        while True:
            keeper = place.keeper()
            try:
                node = keeper.node.remote()
                self._wait(f"room for {job.name}", lambda: None, functools.partial(_done, node))
                place.node = str(ray.get(node))
                started = keeper.start.remote(job.name, tuple(job.command), environment, log, seat.gpus, job.role != "rank")
                ray.get(started, timeout=_CALL_S)
            except RayTaskError as error:
                raise ConfigError(f"cannot start {job.name} on {place.node}: {_one_line(error)}") from None
            except RayError as error:
                place.drop(keeper)
                if self._closed.is_set() or time.monotonic() > deadline:
                    raise ConfigError(f"cannot start {job.name}: {_one_line(error)}") from None
                _LOG.info("starting %s again: %s", job.name, _one_line(error))
                time.sleep(_POLL_S)
            else:
                return _Placed(place, keeper, job.name, log)

    def _seat(self, name: str) -> tuple[_Place, Seat]:
        for place in self._places:
            for seat in place.bundle.seats:
                if seat.name == name:
                    return place, seat
        raise AssertionError(f"{name} was not planned")

    def close(self) -> None:
        """End everything that was started, and give its room back."""
        self._closed.set()
        asked = [place.current.kill.remote(seat.name) for place in self._places if place.current for seat in place.bundle.seats]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=_LEAVE_S)
        for place in self._places:
            if place.current:
                place.drop(place.current)
        self._places.clear()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._joined:
            ray.shutdown()


def _join(config: WorkersConfig, slots: int) -> None:
    """slots: CPU slots that a cluster which is started here must have; they are no more than a number."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = None if config.ray_address == "auto" else config.ray_address
    options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False, "logging_level": logging.WARNING}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _LOG.info("joining Ray (workers.ray_address=%s)", config.ray_address)
    try:
        try:
            ray.init(address, num_cpus=max(slots, num_cores()), **options)
        except ValueError:  # a cluster that runs already has as many as it has
            ray.init(address, **options)
    except (ConnectionError, RayError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster at workers.ray_address={config.ray_address}: {_one_line(error)}; see that it runs and that this "
            "machine is one of its nodes, or set workers.ray_address=local"
        ) from None
    finally:
        for number, handler in handlers.items():  # Ray's own would end the run without a checkpoint
            signal.signal(number, handler)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    _LOG.info("Ray: %d nodes; %s", len(nodes), _cluster())


def _describe(bundles: Sequence[Bundle]) -> str:
    """ "4 x 2 GPUs and 2 CPUs of a node (ranks), 1 x 1 CPUs (tools)"."""
    parts = []
    for (role, gpus, cpus), count in Counter((bundle.role, bundle.gpus, bundle.cpus) for bundle in bundles).items():
        parts.append(f"{count} times {f'{gpus} GPUs and ' if gpus else ''}{cpus} CPUs of a node ({role})")
    return ", ".join(parts)


def _cluster() -> str:
    has, free = ray.cluster_resources(), ray.available_resources()
    return (
        f"the cluster has {has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs, "
        f"{free.get('GPU', 0):g} and {free.get('CPU', 0):g} of them free"
    )


def _done(ready: Any) -> bool:
    return bool(ray.wait([ready], timeout=_POLL_S)[0])


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[-300:]
