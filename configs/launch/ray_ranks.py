"""Train with the Megatron back end on a Ray cluster: this process is the run, Ray starts its ranks.

    python configs/launch/ray_ranks.py CONFIG [section.key=value ...]

Joins the cluster that RAY_ADDRESS or `ray start` on this machine names; where there is none, this machine becomes one. A rank
takes a GPU, or a CPU slot in a cluster without GPUs; those that share every matrix (train.megatron.tensor_parallel) are put on
one node. The exit code is that of `metis-fast train`, and like there Ctrl-C and SIGTERM stop it with a checkpoint and the same
command resumes it. Ray only starts and ends processes; what they say to each other goes over their own connections.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from metis_fast import cli
from metis_fast import config as config_module
from metis_fast.config import MegatronConfig
from metis_fast.errors import ConfigError, MetisError
from metis_fast.train.megatron.wire import KEY

_NEWS_S = 30.0  # between two lines that say what is waited for
_LEAVE_S = 10.0  # for ranks to be ended
_NOTICE_S = 60.0  # until the run has noticed by itself that a rank is gone
_FORWARDED = ("GLOO_", "NCCL_", "OMP_NUM_THREADS")  # a rank's environment is else that of `ray start` on its node


class Rank:
    """A rank where Ray has put it, as a process of its own: it ends with its whole process group, and Ray's must not."""

    def __init__(self, number: int, where: str, key: str, log: Path, environment: dict[str, str]) -> None:
        """key goes over Ray's connections, into no command line and no job description."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "metis_fast", "rank", "--join", where, "--rank", str(number)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # 0: Ray shows a rank its own GPU alone
                env={**os.environ, **environment, "LOCAL_RANK": "0", KEY: key},
                start_new_session=True,
            )

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self._process.wait()

    def stop(self) -> None:
        """End it and what it forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _place(layout: MegatronConfig, resource: str, wait_s: float) -> PlacementGroup:
    """Room for all ranks: a bundle, which Ray keeps on one node, for each group of tensor-parallel ranks."""
    size = layout.tensor_parallel
    bundle: dict[str, float] = {"CPU": size} if resource == "CPU" else {"CPU": size, "GPU": size}
    group = placement_group([bundle] * (layout.num_ranks // size), strategy="PACK")
    waited = 0.0
    while not group.wait(min(_NEWS_S, wait_s - waited)):
        waited += _NEWS_S
        has = ray.cluster_resources()
        wanted = f"{layout.num_ranks // size} times {size} {resource}s of a node, and as many CPUs"
        found = f"the cluster has {has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs, {_free()} of them free"
        if waited >= wait_s:
            raise ConfigError(
                f"no room for {wanted} within {wait_s:g} s: {found}; change train.megatron, or wait longer (--wait)"
            )
        print(f"waiting for {wanted}: {found}", file=sys.stderr, flush=True)
    return group


def _free() -> str:
    free = ray.available_resources()
    return f"{free.get('GPU', 0):g} and {free.get('CPU', 0):g}"


@contextlib.contextmanager
def _ranks(layout: MegatronConfig, where: str, key: str, logs: Path, wait_s: float) -> Iterator[list[Any]]:
    """All ranks, as Ray actors. Neighbours in number are neighbours on nodes."""
    resource = "GPU" if ray.cluster_resources().get("GPU", 0) else "CPU"
    group = _place(layout, resource, wait_s)
    node_of: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    environment = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
    if len(set(node_of.values())) == 1:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    actors = []
    try:
        for bundle in sorted(node_of, key=lambda bundle: (node_of[bundle], bundle)):
            for _ in range(layout.tensor_parallel):
                options = {
                    "num_cpus": 1,
                    "num_gpus": 1 if resource == "GPU" else 0,
                    "max_concurrency": 2,  # `stop` while `wait` waits
                    "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
                }
                number = len(actors)
                actor = ray.remote(Rank).options(**options)
                actors.append(actor.remote(number, where, key, logs / f"rank-{number}.log", environment))
        yield actors
    finally:
        ray.wait([actor.stop.remote() for actor in actors], num_returns=len(actors), timeout=_LEAVE_S)


def _watch(actors: Sequence[Any], logs: Path, over: threading.Event, gone: Callable[[str], None]) -> None:
    """Stop a run that waits for a rank which has ended before it joined; of one that had joined the run knows by itself."""
    number_of = {actor.wait.remote(): number for number, actor in enumerate(actors)}
    while number_of and not over.is_set():
        for ended in ray.wait(list(number_of), timeout=1)[0]:
            number = number_of.pop(ended)
            try:
                code = ray.get(ended)
            except RayError as error:
                code = " ".join(str(error).split())[-300:]
            if code != 0 and not over.wait(_NOTICE_S):
                gone(f"rank {number} ended with {code} (log: {logs / f'rank-{number}.log'})")
                return


def _train(args: argparse.Namespace) -> int:
    config = config_module.load(args.config, args.overrides)
    layout = config.train.megatron
    if config.train.backend != "megatron":
        raise ConfigError(f"{args.config}: train.backend={config.train.backend} has no ranks; set train.backend=megatron")
    ray.init(log_to_driver=False, include_dashboard=False)
    host = ray.util.get_node_ip_address()
    with socket.create_server((host, 0)) as server:  # a port that is free now
        where = f"{host}:{server.getsockname()[1]}"
    key = os.environ[KEY] = secrets.token_hex(32)
    logs = config.run.dir.resolve() / "ranks"
    over = threading.Event()
    problems: list[str] = []

    def gone(problem: str) -> None:
        problems.append(problem)
        os.kill(os.getpid(), signal.SIGTERM)

    with _ranks(layout, where, key, logs, args.wait) as actors:
        watcher = threading.Thread(target=_watch, args=(actors, logs, over, gone))
        watcher.start()
        try:
            launch = ("train.megatron.launch=join", f"train.megatron.listen={where}")
            code = cli.main(["train", str(args.config), *args.overrides, *launch])
        finally:
            over.set()
            watcher.join()
    for problem in problems:
        print(f"ray_ranks: {problem}", file=sys.stderr)
    return 2 if problems else code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="for room in the cluster (default 600)")
    args = parser.parse_args(argv)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return _train(args)
    except MetisError as error:
        print(f"ray_ranks: {error}", file=sys.stderr)
        return 2
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
