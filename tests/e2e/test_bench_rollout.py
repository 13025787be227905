"""`metis-fast bench rollout` as a program: its JSON, and the client that asks over HTTP from a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from harness import PROGRAM

ROOT = Path(__file__).parents[2]
ROW = {"variant", "concurrency", "busy_share", "trajectories_per_s", "p99_s", "overhead"}


def test_rows_of_all_variants_and_of_all_ways_to_synchronise_weights():
    done = subprocess.run(
        [str(PROGRAM), "bench", "rollout", "--shape", "tiny", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # no warning of a failure that is part of the plan
    found = json.loads(done.stdout)
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == ["ours", "ours, one batch", "ours, over-provisioned", "reference", "gather", "raw"]
    for row in rows.values():
        assert row.keys() >= ROW and 0 < row["busy_share"] <= 1 and row["p99_s"] > 0 and row["concurrency"] == 4
    assert rows["ours"]["trajectories"] == 12 and rows["gather"]["trajectories"] == 4
    assert rows["raw"]["overhead"] == 0 < rows["ours"]["overhead"] < rows["gather"]["overhead"]
    assert rows["reference"]["overhead"] is None
    least, most = rows["ours"]["overhead_spread"]
    assert least <= rows["ours"]["overhead"] <= most
    assert (found["machine"]["threads"], found["engine"], found["shape"]["name"]) == (1, "native", "tiny")
    sync = {row["mode"]: row for row in found["sync"]}
    assert list(sync) == ["shared", "copied", "staged", "full", "delta"]
    assert sync["shared"]["num_bytes"] == 0 < sync["delta"]["num_bytes"] < sync["full"]["num_bytes"] / 2
    assert all(row["seconds"]["least"] <= row["seconds"]["median"] <= row["seconds"]["most"] for row in sync.values())
