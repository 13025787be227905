"""`metis-fast bench rollout` as a program: its JSON, and the client that asks over HTTP from a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import PROGRAM

ROOT = Path(__file__).parents[2]
ROW = {"variant", "concurrency", "busy_share", "trajectories_per_s", "p99_s", "overhead"}


VARIANTS = ["ours", "ours, one batch", "ours, over-provisioned", "reference", "gather", "raw"]


def _bench(*words: str) -> tuple[dict[str, Any], str]:
    """(the JSON object, stderr) of a tiny run."""
    done = subprocess.run(
        [str(PROGRAM), "bench", "rollout", "--shape", "tiny", "--json", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_rows_of_all_variants_and_of_all_ways_to_synchronise_weights():
    found, err = _bench()
    assert not err  # no warning of a failure that is part of the plan
    for row in found["rows"]:
        assert row.keys() >= ROW and 0 < row["busy_share"] <= 1 and row["p99_s"] > 0 and row["concurrency"] == 4
    (larger,) = (row for row in found["rows"] if row["batch"] == 8)
    assert (larger["variant"], larger["trajectories"], larger["overhead"]) == ("ours", 16, None)
    rows = {row["variant"]: row for row in found["rows"] if row["batch"] == 4}
    assert list(rows) == VARIANTS
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


@pytest.mark.slow  # vLLM takes half a minute to load
def test_a_vllm_engine_plays_the_same_plan():
    found, _ = _bench("--engine", "vllm")
    rows = {row["variant"]: row for row in found["rows"] if row["batch"] == 4}
    assert found["engine"] == "vllm" and list(rows) == VARIANTS
    assert rows["ours"]["busy_share"] > 0.9 and rows["ours"]["overhead_cpu"] is None and rows["ours"]["overhead"] < 0.1
    engine = found["sync"][-1]
    assert engine["mode"] == "vllm" and engine["num_bytes"] >= engine["size"] > 0 and engine["seconds"]["least"] > 0
