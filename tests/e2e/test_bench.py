"""`metis-fast bench` and `python -m bench` as programs: one JSON object on stdout, whatever else happens on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness import PROGRAM

ROOT = Path(__file__).parents[2]
COMMANDS = {"installed": [str(PROGRAM), "bench"], "checkout": [sys.executable, "-m", "bench"]}


def _run(command: str, *words: str) -> subprocess.CompletedProcess[str]:
    argv: Sequence[str] = [*COMMANDS[command], *words]
    return subprocess.run(
        argv, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )


@pytest.mark.parametrize("command", ["installed", pytest.param("checkout", marks=pytest.mark.slow)])
def test_bench_prints_one_object_with_the_floor_and_the_peers(command):
    words = ["--shape", "T=64,H=32,V=500", "--peers", "eager", "--threads", "1", "--device", "cpu", "--dtype", "fp32", "--json"]
    done = _run(command, "hdpo_loss", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["impl"] for row in found["rows"]] == ["ours", "ours_param_grad", "ours_reference", "floor", "eager"]
    assert found["machine"]["threads"] == 1


@pytest.mark.slow  # unit/test_bench_report.py has the line, test_scale.py a program of the checkout
@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_op_is_one_line_and_exit_code_2(command):
    done = _run(command, "attention")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "unknown op 'attention'; expected one of group_advantage, linear_logprob, hdpo_loss, prefix_attention, full_attention, "
        "patchify, update_step, rollout, scale, tools"
    )
    assert len(done.stderr.splitlines()) == 1
