"""A run's room in a Ray cluster. All that it starts is reserved at once, as the bundles of one placement group, so that two
runs cannot wait for each other with half of what they need.

A bundle is what Ray keeps together on one machine. `node`: what plays groups there, with its engines, tools and judges.
`ranks`: tensor-parallel ranks of the trainer. Where engines and ranks take turns on GPUs, a node's bundle holds ranks, too. In
every bundle with ranks there is a `Keeper`, which Ray has given their CPU slots and GPUs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from metis_fast.cluster.keeper import Keeper, Where
from metis_fast.config import Config, WorkersConfig
from metis_fast.errors import ConfigError, one_line
from metis_fast.machine import num_cores

_LOG = logging.getLogger(__name__)
NEWS_S = 15.0
"""Between two lines that say what is waited for."""
_POLL_S = 0.1
_CONNECT_S = 10.0

Role = Literal["node", "ranks"]


@dataclass(frozen=True, slots=True)
class Bundle:
    """What Ray keeps together on one machine. cpus, gpus: for all that is in it. ranks: of the trainer's, with a CPU slot each,
    and a GPU where there are some."""

    role: Role
    cpus: int
    gpus: int
    ranks: int = 0


@dataclass(frozen=True, slots=True)
class Seat:
    """A keeper and the ranks of its bundle. machine: Ray's id of it."""

    keeper: Any
    ranks: range
    machine: str
    where: Where


def share(total: int, nodes: int, i: int) -> int:
    """Of so many engines, tools or judges, those of node i."""
    return total // nodes + (i < total % nodes)


def plan(config: Config, ranks: bool, on_gpus: bool, plays: bool = True) -> list[Bundle]:
    """All that a run of these settings reserves: node i's bundle is the i-th. Without GPUs, CPU slots stand for them.

    ranks: whether the trainer's ranks are to be placed. plays: whether nodes are; a cold start plays nothing.

    Raises:
        ConfigError: engines cannot share GPUs with the trainer as asked for.
    """
    vllm, megatron, workers = config.rollout.vllm, config.train.megatron, config.workers
    engines = vllm.replicas if plays and config.rollout.engine == "vllm" else 0
    each, nodes = vllm.tensor_parallel, workers.nodes if plays else 0
    num_ranks = megatron.num_ranks if ranks else 0
    shared = engines > 0 and vllm.sleep
    own = num_ranks // nodes if shared else 0
    if shared:
        _check_shared(config, num_ranks)
    bundles: list[Bundle] = []
    for i in range(nodes):
        has, cpus = share(engines, nodes, i), 1 + share(workers.tools, nodes, i) + share(workers.judges, nodes, i)
        if shared:
            bundles.append(Bundle("node", cpus + own, own if on_gpus else 0, own))
        elif engines:
            slots = each if on_gpus else each * max(1, vllm.cpu_threads)
            bundles.append(Bundle("node", cpus + has * slots, has * each if on_gpus else 0))
        else:
            bundles.append(Bundle("node", cpus, int(on_gpus)))  # the native engine's
    size = megatron.tensor_parallel
    together = 0 if shared else num_ranks // size
    return bundles + [Bundle("ranks", size, size if on_gpus else 0, size)] * together


def _check_shared(config: Config, num_ranks: int) -> None:
    vllm, megatron, nodes = config.rollout.vllm, config.train.megatron, config.workers.nodes
    if not num_ranks:
        raise ConfigError(
            "rollout.vllm.sleep has engine and trainer share GPUs, so Ray has to place both; set train.backend=megatron, or "
            "workers.launcher=local"
        )
    own, size, each = num_ranks // nodes, megatron.tensor_parallel, vllm.tensor_parallel
    most = share(vllm.replicas, nodes, 0)
    if num_ranks % nodes or own % size or own % each or most * each > own:
        fitting = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0 == num_ranks // n % math.lcm(size, each)]
        choose = f"workers.nodes of {', '.join(map(str, fitting))}" if fitting else "other tensor_parallel sizes"
        raise ConfigError(
            f"rollout.vllm.sleep: {vllm.replicas} engines of {each} GPUs do not fit on those of {num_ranks} ranks on {nodes} "
            f"nodes, of which {size} share a node; choose {choose} (a node has a multiple of both tensor_parallel), and "
            f"rollout.vllm.replicas of at most {own // each} a node"
        )


class Room:
    """Reserved bundles. Joins the cluster that `workers.ray_address` names, or makes this machine one.

    keepers: by the index of their bundle.
    """

    def __init__(self, config: Config, ranks: bool, check: Callable[[], None], plays: bool = True) -> None:
        """ranks, plays: see `plan`. check: called while waiting; what it raises goes on.

        Raises:
            ConfigError: no such cluster, or no room in it within `workers.wait_s`; or as `plan`.
        """
        self._config = config.workers
        self._closed = False
        self._group: PlacementGroup | None = None
        self.keepers: dict[int, Any] = {}
        self._joined = not ray.is_initialized()  # else it belongs to whoever has called us
        if self._joined:
            _join(config.workers, sum(bundle.cpus for bundle in plan(config, ranks, on_gpus=False, plays=plays)))
        self.host: str = ray.util.get_node_ip_address()
        try:
            self.bundles = plan(config, ranks, on_gpus=ray.cluster_resources().get("GPU", 0) > 0, plays=plays)
            # ranks near each other; nodes, each on a machine of its own if there are so many
            near = "PACK" if any(bundle.ranks for bundle in self.bundles) else "SPREAD"
            resources: list[dict[str, float]] = [{"CPU": b.cpus, **({"GPU": b.gpus} if b.gpus else {})} for b in self.bundles]
            group = self._group = placement_group(resources, strategy=near)
            self.wait(f"room for {_describe(self.bundles)}", check, lambda: bool(group.wait(0)))
            self._node_of: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
            self._start_keepers(check)
        except BaseException:  # Ctrl-C, too: it goes on, and the cluster keeps nothing for us
            self.close()
            raise

    def _start_keepers(self, check: Callable[[], None]) -> None:
        for i, bundle in enumerate(self.bundles):
            if bundle.ranks:
                options = self.options(i, cpus=bundle.ranks, gpus=bundle.ranks if bundle.gpus else 0)
                self.keepers[i] = ray.remote(Keeper).options(**options).remote()
        places, count = [keeper.where.remote() for keeper in self.keepers.values()], len(self.keepers)
        if count:
            what = "Ray to start a process in each bundle"
            self.wait(what, check, lambda: len(ray.wait(places, num_returns=count, timeout=0)[0]) == count)
        try:
            self._where: dict[int, Where] = dict(zip(self.keepers, ray.get(places), strict=True))
        except RayError as error:
            raise ConfigError(f"Ray cannot start what keeps the trainer's ranks: {one_line(error)[-300:]}") from None

    def of(self, role: Role) -> list[int]:
        """Indices of a role's bundles: node by node, since neighbours in number among ranks are to be neighbours on machines;
        node i's is the i-th."""
        found = [i for i, bundle in enumerate(self.bundles) if bundle.role == role]
        return found if role == "node" else sorted(found, key=lambda i: (self._node_of[i], i))

    def seats(self) -> list[Seat]:
        """Of all ranks, in order of their numbers, which count tensor parallel fastest."""
        found, start = [], 0
        for i in sorted(self.keepers, key=lambda i: (self._node_of[i], i)):
            numbers = range(start, start + self.bundles[i].ranks)
            found.append(Seat(self.keepers[i], numbers, self._node_of[i], self._where[i]))
            start = numbers.stop
        return found

    def gpus(self, index: int) -> list[str]:
        """Ids of the GPUs of a bundle with ranks, as CUDA_VISIBLE_DEVICES has them; who takes turns with these is told so."""
        return ray.get(self.keepers[index].gpus.remote())

    def options(self, index: int, cpus: float | None = None, gpus: float | None = None) -> dict[str, Any]:
        """Of an actor in a bundle, for `ray.remote(...).options`. cpus, gpus: that it takes; None: all but the keeper's."""
        assert self._group is not None, "the room was given back"
        bundle = self.bundles[index]
        return {
            "num_cpus": bundle.cpus - bundle.ranks if cpus is None else cpus,
            "num_gpus": (0 if bundle.ranks else bundle.gpus) if gpus is None else gpus,
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
        }

    def wait(self, what: str, check: Callable[[], None], done: Callable[[], bool]) -> None:
        """Until it is done, with news, at most `workers.wait_s`.

        Raises:
            ConfigError: it was not, or the room was given back meanwhile; or what check raises.
        """
        began = news = time.monotonic()
        while not done():
            check()
            if self._closed:
                raise ConfigError("the run ends")
            now = time.monotonic()
            if now > began + self._config.wait_s:
                raise ConfigError(
                    f"waited {self._config.wait_s:g} s for {what}: {_cluster()}; ask for less (workers.nodes, "
                    "rollout.vllm, train.megatron), add machines, or wait longer (workers.wait_s)"
                )
            if now > news + NEWS_S:
                news = now
                _LOG.info("waiting for %s, %.0f s so far: %s", what, now - began, _cluster())
            time.sleep(min(_POLL_S, self._config.wait_s / 4))

    def close(self) -> None:
        """Give the room back; actors in it end. Leaves the cluster if it was joined here."""
        self._closed = True
        for keeper in self.keepers.values():
            with contextlib.suppress(RayError):
                ray.kill(keeper)
        self.keepers.clear()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._joined:
            ray.shutdown()


def survey(config: WorkersConfig) -> list[Mapping[str, float]] | None:
    """Resources of every machine of the cluster that a run would join; None where it would start one.

    Raises:
        ConfigError: `workers.ray_address` names one that does not answer.
    """
    if config.ray_address == "local":
        return None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _check_address(config)
    try:
        ray.init(config.ray_address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RayError, ValueError, RuntimeError) as error:
        if config.ray_address == "auto" and "RAY_ADDRESS" not in os.environ:
            return None
        raise _unreachable(config, error) from None
    try:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def _check_address(config: WorkersConfig) -> None:
    """Ray itself would try an address at which nobody listens for minutes.

    Raises:
        ConfigError: nobody does.
    """
    address = os.environ.get("RAY_ADDRESS", "") if config.ray_address == "auto" else config.ray_address
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdigit()) or "//" in address:  # "local", or a client's address
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise _unreachable(config, error) from None


def _unreachable(config: WorkersConfig, error: Exception) -> ConfigError:
    return ConfigError(
        f"no Ray cluster at workers.ray_address={config.ray_address}: {one_line(error)[-300:]}; see that it runs and that "
        "this machine is one of its nodes, or set workers.ray_address=local"
    )


def _join(config: WorkersConfig, slots: int) -> None:
    """slots: CPU slots that a cluster which is started here must have; they are no more than a number."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of a run that ends; all others are waited for, and said
    _check_address(config)
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
        raise _unreachable(config, error) from None
    finally:
        for number, handler in handlers.items():  # Ray's own would end the run without a checkpoint
            signal.signal(number, handler)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    _LOG.info("Ray: %d nodes; %s", len(nodes), _cluster())


def _describe(bundles: Sequence[Bundle]) -> str:
    """ "4 times 2 GPUs and 2 CPUs of a node (ranks), 1 times 3 CPUs of a node (node)"."""
    parts = []
    for (role, gpus, cpus), count in Counter((bundle.role, bundle.gpus, bundle.cpus) for bundle in bundles).items():
        parts.append(f"{count} times {f'{gpus} GPUs and ' if gpus else ''}{cpus} CPUs of a machine ({role})")
    return ", ".join(parts)


def _cluster() -> str:
    has, free = ray.cluster_resources(), ray.available_resources()
    return (
        f"the cluster has {has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs, "
        f"{free.get('GPU', 0):g} and {free.get('CPU', 0):g} of them free"
    )
