"""`metis-fast bench update_step` as a program, with real processes for its variants."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from harness import PROGRAM

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # two minutes; tests/unit/test_bench_update_step.py compares variants in one process
def test_every_variant_has_the_gradient_of_the_reference_and_ours_costs_less():
    done = subprocess.run(
        [str(PROGRAM), "bench", "update_step", "--shape", "tiny", "--threads", "1", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {row["variant"]: row for row in found["rows"]}
    savings = ["+skip_old_logprobs", "+skip_zero_advantage", "+share_packs", "+share_prompt", "+share_images"]
    assert list(rows) == ["reference", "none", *savings, "ours"]
    assert all(row["grad_err"] <= 1e-5 for row in rows.values())
    assert rows["none"]["grad_err"] > 0  # it is another computation
    flops = [row["flops"] for row in rows.values()]
    assert flops == sorted(flops, reverse=True) and rows["ours"]["flops_ratio"] > 4
    assert rows["ours"]["ratio"] > 1  # in CPU seconds; 4 on a quiet machine
    assert found["machine"]["threads"] == 1 and found["shape"]["name"] == "tiny"
