"""An ablation whose runs are tasks of Ray, on a real Ray of this machine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from harness import PROGRAM, run_state

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

_LIMIT_S = 1800.0  # beside other work


def test_runs_on_ray_are_those_of_this_machine(demo: Path, tmp_path: Path) -> None:
    folders = {}
    for where in ("local", ""):
        out = tmp_path / (where or "here")
        file = tmp_path / f"{out.name}.yaml"
        file.write_text(f"""
out: {out}
base: {{base: {demo / "config.yaml"}, log: {{tensorboard: false}}, eval: {{every: 0}}}}
budget: {{steps: 1}}
ray: {where or '""'}
variants: {{hdpo: {{}}, bad: {{model: {{path: /nowhere}}}}}}
""")
        environment = os.environ | {"RAY_worker_niceness": "0"}  # else Ray gives its workers, and so the run, what others leave
        command = [PROGRAM, "ablate", file, "--json"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, env=environment)
        assert ended.returncode == 1, ended.stderr
        assert "bad/seed-0: failed, exit code 2: metis-fast: " in ended.stderr
        assert set(json.loads(ended.stdout)["variants"]) == {"hdpo"}
        folders[where] = out / "hdpo" / "seed-0"
    assert run_state(folders["local"]) == run_state(folders[""])


def test_a_cluster_that_is_not_there_is_one_line(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "far.yaml"
    file.write_text(f"out: {tmp_path / 'far'}\nbase: {demo / 'config.yaml'}\nray: 127.0.0.1:1\nvariants: {{a: {{}}}}\n")
    ended = subprocess.run([PROGRAM, "ablate", file], capture_output=True, text=True, timeout=_LIMIT_S)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and last.startswith("metis-fast: ray: cannot join the cluster '127.0.0.1:1'"), ended.stderr
