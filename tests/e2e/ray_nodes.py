"""Workers on a Ray of two nodes, one of which dies; a third one comes later. Argument: folder for the logs."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

from ray.cluster_utils import Cluster

from metis_fast import cluster, config
from metis_fast.workers.hub import Hub
from metis_fast.workers.worker import wait_ready

PROBE = "metis_fast.testing.workers:Probe"


def main(folder: str) -> None:
    logging.basicConfig(level=logging.INFO)
    cluster._NEWS_S = 1.0
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = nodes.add_node(num_cpus=1)
    workers = {"launcher": "ray", "ray_address": nodes.address, "tools": 1, "judges": 1}
    settings = config.build({"run": {"dir": folder}, "workers": workers})
    launcher = cluster.RayLauncher(settings, False, lambda: None)
    with Hub(settings.workers, launcher) as hub:
        both = [hub.worker("tools-0", "tools", PROBE), hub.worker("judge-0", "judge", PROBE)]
        wait_ready(both, lambda: None)
        pids = [asyncio.run(worker.call("pid")) for worker in both]
        nodes.remove_node(other, allow_graceful=False)
        deadline = time.monotonic() + 90
        while all(worker.alive for worker in both):
            assert time.monotonic() < deadline, "nobody noticed"
            time.sleep(0.1)
        time.sleep(5)  # there is no room meanwhile
        assert sum(worker.alive for worker in both) == 1
        nodes.add_node(num_cpus=1)
        wait_ready(both, lambda: None)
        again = [asyncio.run(worker.call("pid")) for worker in both]
        assert sum(a == b for a, b in zip(pids, again, strict=True)) == 1
        assert [worker.restarts for worker in both] in ([0, 1], [1, 0])
    nodes.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
