"""Nodes on a real Ray of three nodes of one machine: the run is that of one process, and what happens when they die or stop."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import PROGRAM, run_state, succeed
from jobs import Job

from metis_fast.data.cursor import prompt_cursor
from metis_fast.data.parquet import PromptFiles
from metis_fast.rollout.store import read_rollouts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")]

_PER_STEP = 16  # rollouts
_STEPS = 6
_QUICK = ("data.heldout=[]", "eval.every=0", "log.progress=false", f"train.steps={_STEPS}", "workers.silence_s=4")


class Machines:
    """Three nodes of Ray, one CPU slot each: a node of the run on each of them."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.others = [self._cluster.add_node(num_cpus=1) for _ in range(2)]
        self.address = self._cluster.address

    def remove(self, number: int) -> None:
        """Kill all of Ray's processes of one that is not the head."""
        self._cluster.remove_node(self.others.pop(number), allow_graceful=False)

    def add(self) -> None:
        """One more."""
        self.others.append(self._cluster.add_node(num_cpus=1))

    def close(self) -> None:
        """End them."""
        self._cluster.shutdown()


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    monkeypatch.setenv("HOME", str(tmp_path))
    made = Machines()
    yield made
    made.close()


@pytest.fixture
def train(machines: Machines, demo: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Train the tiny demo on them."""
    jobs: list[Job] = []

    def submit(*overrides: str) -> Job:
        on = ["workers.launcher=ray", "workers.nodes=3", f"workers.ray_address={machines.address}", *_QUICK]
        line = [PROGRAM, "train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", *on, *overrides]
        jobs.append(Job(line, tmp_path / f"job-{len(jobs)}", HOME=str(tmp_path)))
        return jobs[-1]

    yield submit
    for job in jobs:
        job.end()


def _steps(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _players() -> list[psutil.Process]:
    found = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
    return [process for process in found if process.info["cmdline"][0].startswith("ray::Player")]


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def _check(demo: Path, folder: Path, in_order: bool = True) -> None:
    """Every step was trained on all its rollouts, all of them judged, no group twice, none left out."""
    files = PromptFiles([demo / "data" / "train.parquet"])
    seed = json.loads((demo / "inputs.json").read_text())["settings"]["run.seed"]
    expected = [prompt.uid for prompt in prompt_cursor(files, seed).next(_STEPS * _PER_STEP // 4)]
    trained = list[str]()
    for step in range(_STEPS):
        parts = sorted((folder / "run" / "rollouts").glob(f"step-{step:06d}.*parquet"))
        stored = [one for part in parts for one in read_rollouts(part)]
        assert len(stored) == _PER_STEP and all(one.score.verdict is not None for one in stored), step
        counts = Counter(one.rollout.prompt_uid for one in stored)
        # a step may hold a prompt twice, from two epochs: 16 prompts make one, and a group that is played again comes late
        assert all(number % 4 == 0 for number in counts.values()), counts
        trained += [uid for uid, number in counts.items() for _ in range(number // 4)]
    assert sorted(trained) == sorted(expected) if in_order else len(trained) == len(expected)
    assert [record["step"] for record in _records(folder)] == list(range(_STEPS))


def test_three_nodes_of_a_cluster_train_bit_for_bit_as_three_in_one_process(
    train: Callable[..., Job], demo: Path, tmp_path: Path
) -> None:
    job = train("data.heldout=" + str([str(demo / "data" / "heldout.parquet")]), "eval.every=2")
    here = tmp_path / "here"
    options = ["workers.nodes=3", f"train.steps={_STEPS}", "eval.every=2"]
    succeed(["train", demo / "config.yaml", f"run.dir={here}", *options], tmp_path / "process")
    assert job.wait(left_s=120) == 0, job.err.read_text()
    expected = run_state(here)
    found = run_state(tmp_path / "run")
    moved = {key for key in expected if key.startswith("metrics ")}  # they say how many bytes of weights were sent
    assert {key: found[key] for key in expected if key not in moved} == {k: v for k, v in expected.items() if k not in moved}
    records = [json.loads(line) for line in (here / "metrics.jsonl").read_text().splitlines()]
    for record, other in zip(records, _records(tmp_path), strict=True):
        assert other["sync_bytes"] > 0
        own = {"seconds": 0, "cpu_seconds": 0, "sync_bytes": 0}
        assert record | own == other | own


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_node_that_is_killed_leaves_its_groups_to_the_others_and_is_used_again(
    train: Callable[..., Job], demo: Path, tmp_path: Path, mode: str
) -> None:
    job = train(f"rollout.mode={mode}", "loss.tis_cap=2")
    for step in (1, 3):
        job.when(lambda step=step: _steps(tmp_path) >= step)
        _players()[0].kill()
    assert job.wait(left_s=120) == 0, job.err.read_text()
    said = job.err.read_text()
    assert said.count("was lost") >= 1 and "is ready after" in said
    _check(demo, tmp_path)


def test_a_machine_that_dies_is_done_without_and_one_that_comes_is_used(
    train: Callable[..., Job], machines: Machines, demo: Path, tmp_path: Path
) -> None:
    job = train("train.steps=6", "rollout.retries=2")
    job.when(lambda: _steps(tmp_path) >= 1)
    machines.remove(0)
    job.when(lambda: "was lost" in job.err.read_text())
    machines.add()
    assert job.wait(left_s=120) == 0, job.err.read_text()
    _check(demo, tmp_path)


def test_a_node_that_stands_still_is_done_without(train: Callable[..., Job], demo: Path, tmp_path: Path) -> None:
    job = train()
    job.when(lambda: _steps(tmp_path) >= 1)
    stopped = _players()[0]
    stopped.send_signal(signal.SIGSTOP)
    job.when(lambda: "has not answered for 4 s" in job.err.read_text())
    time.sleep(5)
    stopped.send_signal(signal.SIGCONT)
    assert job.wait(left_s=120) == 0, job.err.read_text()
    _check(demo, tmp_path)


def test_nothing_is_left_of_a_run_that_was_killed(train: Callable[..., Job], tmp_path: Path) -> None:
    job = train("train.steps=500")
    job.when(lambda: _steps(tmp_path) >= 1)
    psutil.Process(job.pid).kill()
    killed = time.monotonic()
    while _players() or job.processes():
        assert time.monotonic() < killed + 100
        time.sleep(0.1)


_FULL = """
import ray
from metis_fast.cluster.player import ObjectStore
from metis_fast.errors import EngineError
from metis_fast.types import Group, ImageBlob, Message, Prompt

# a disk that counts as full: Ray would put what has no room in memory there
full = {"automatic_object_spilling_enabled": False, "local_fs_capacity_threshold": 0.001}
small = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False, "log_to_driver": False}
ray.init("local", _system_config=full, **small)
image = ImageBlob.of(bytes(30 << 20))
group = Group(Prompt("p", "s", (Message("user", "<image>"),), (image,), "math", (), "rule", ""), ())
kept = []
try:
    for _ in range(5):
        kept.append(ObjectStore().put(group))
except EngineError as error:
    print(len(kept), "kept, then:", error)
"""


def test_an_object_store_without_room_is_said_in_one_line(tmp_path: Path) -> None:
    job = Job([sys.executable, "-c", _FULL], tmp_path / "job", HOME=str(tmp_path), RAY_ADDRESS="local")
    try:
        assert job.wait(left_s=120) == 0, job.err.read_text()
        said = job.err.read_text().splitlines()[-1]
        assert said.startswith("2 kept, then: this machine's Ray object store has no room for the groups that it plays (")
        assert said.endswith("free the disk that it spills to, or lower rollout.prompts_per_step")
    finally:
        job.end()
