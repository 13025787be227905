"""sync.mode=delta on a real Ray of this machine: nodes have the same weights as in full, for fewer bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import PROGRAM, checkpoint_state, rollout_state
from jobs import TWO_RANKS, Job

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")]

_SHORT = ("workers.launcher=ray", "workers.nodes=2", "data.heldout=[]", "eval.every=0", "log.progress=false")


@pytest.fixture
def train(demo: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Train the tiny demo with two nodes on a Ray of its own: folder of the run, and overrides."""
    jobs: list[Job] = []

    def submit(name: str, *overrides: str) -> Job:
        line = [PROGRAM, "train", demo / "config.yaml", f"run.dir={tmp_path / name}", *_SHORT, *overrides]
        jobs.append(Job(line, tmp_path / f"job-{name}", HOME=str(tmp_path), RAY_ADDRESS="local"))
        return jobs[-1]

    yield submit
    for job in jobs:
        job.end()


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _logs(folder: Path) -> str:
    return "".join(path.read_text() for path in (folder / "workers").rglob("node.log"))


@pytest.mark.parametrize("trainer", [(), TWO_RANKS], ids=["torch", "megatron"])
def test_a_run_whose_nodes_pull_what_changed_is_bit_for_bit_one_whose_nodes_pull_all(
    train: Callable[..., Job], tmp_path: Path, trainer: tuple[str, ...]
) -> None:
    for mode in ("full", "delta"):
        job = train(mode, f"sync.mode={mode}", "train.steps=4", *trainer)
        assert job.wait(left_s=120) == 0, job.err.read_text()
    full, delta = (tmp_path / mode for mode in ("full", "delta"))
    assert rollout_state(delta / "rollouts") == rollout_state(full / "rollouts")
    assert checkpoint_state(delta / "checkpoints") == checkpoint_state(full / "checkpoints")
    assert (delta / "trained" / "model.safetensors").read_bytes() == (full / "trained" / "model.safetensors").read_bytes()
    pulled = {mode: [record["sync_bytes"] for record in _records(tmp_path / mode)] for mode in ("full", "delta")}
    assert len(set(pulled["full"])) == 1 and pulled["delta"][0] == pulled["full"][0]
    assert all(0 < each < pulled["full"][0] for each in pulled["delta"][1:])
    assert all(record["sync_retries"] == 0 for record in _records(tmp_path / "delta"))
    assert "fetching all of it" not in _logs(tmp_path / "delta")


def test_a_node_that_was_started_again_pulls_all_and_then_what_changed(train: Callable[..., Job], tmp_path: Path) -> None:
    job, folder = train("run", "sync.mode=delta", "train.steps=8"), tmp_path / "run"
    job.when(lambda: len(_records(folder)) >= 2)
    below = {child.pid for child in psutil.Process(job.pid).children(recursive=True)}
    running = (one for one in psutil.process_iter(["cmdline"]) if one.pid in below and one.info["cmdline"])
    next(one for one in running if one.info["cmdline"][0].startswith("ray::Player")).kill()
    assert job.wait(left_s=120) == 0, job.err.read_text()
    assert "was lost" in job.err.read_text()
    assert [record["step"] for record in _records(folder)] == list(range(8))
    assert all(record["sync_retries"] == 0 for record in _records(folder))
    assert "fetching all of it" not in _logs(folder)
