"""`metis-fast train` inside of a program that has started Ray itself, with one CPU slot. Arguments: those of the command."""

from __future__ import annotations

import sys

import ray

from metis_fast import cli

if __name__ == "__main__":
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    code = cli.main(["train", *sys.argv[1:]])
    assert ray.cluster_resources()["CPU"] == 1
    print("still there", file=sys.stderr)
    sys.exit(code)
