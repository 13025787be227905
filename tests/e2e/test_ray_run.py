"""workers.launcher=ray: whole runs on a real Ray of this machine, and what happens when their processes or nodes die."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from coldstart import conversations, write
from harness import AGENT, HERE, PROGRAM, Command, run, run_state, without_ray
from jobs import TWO_RANKS, Job

from metis_fast.rollout.store import read_rollouts

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")


@pytest.fixture
def on_ray(demo: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Train the tiny demo on a Ray of its own, with overrides."""
    jobs: list[Job] = []

    def submit(*overrides: str) -> Job:
        line = [PROGRAM, "train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", "workers.launcher=ray", *overrides]
        jobs.append(Job(line, tmp_path / f"job-{len(jobs)}", HOME=str(tmp_path), RAY_ADDRESS="local"))
        return jobs[-1]

    yield submit
    for job in jobs:
        job.end()


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _steps(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_two_nodes_on_ray_are_bit_for_bit_two_in_one_process(on_ray: Callable[..., Job], demo: Path, tmp_path: Path) -> None:
    options = ["workers.nodes=2", "workers.tools=2", "workers.judges=1", "train.steps=3", "log.progress=false"]
    job = on_ray(*options)
    ended = run(["train", demo / "config.yaml", f"run.dir={tmp_path / 'here'}", *options], tmp_path / "process")
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended
    assert job.wait(left_s=120) == 0, job.err.read_text()
    here, there = (run_state(tmp_path / name) for name in ("here", "run"))
    records = [_records(tmp_path / name) for name in ("here", "run")]
    for one, other in zip(*records, strict=True):
        assert other["sync_bytes"] > 0  # weights had to be sent
        own = {"seconds": 0, "cpu_seconds": 0, "sync_bytes": 0}
        assert one | own == other | own
    assert {k: v for k, v in here.items() if "metrics" not in k} == {k: v for k, v in there.items() if "metrics" not in k}
    logs = sorted(str(path.relative_to(tmp_path / "run" / "workers")) for path in (tmp_path / "run" / "workers").glob("*/*"))
    assert logs == [
        "node-0/judge-0.log", "node-0/node.log", "node-0/tools-0.log", "node-1/node.log", "node-1/tools-0.log",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_whose_ranks_are_on_ray_stopped_by_a_signal_goes_on_when_started_again(
    on_ray: Callable[..., Job], tmp_path: Path
) -> None:
    job = on_ray(*TWO_RANKS, "train.steps=500", "checkpoint.every=0")
    job.when(lambda: bool(_steps(tmp_path)))
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 130, job.err.read_text()
    assert "run the same command again" in job.err.read_text()
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
    done = len(_steps(tmp_path))
    job = on_ray(*TWO_RANKS, f"train.steps={done + 1}", "checkpoint.every=0")
    assert job.wait() == 0, job.err.read_text()
    assert _steps(tmp_path) == list(range(done + 1))
    assert (tmp_path / "run" / "trained" / "config.json").is_file()
    assert sorted(path.name for path in (tmp_path / "run" / "ranks").iterdir()) == ["rank-0.log", "rank-1.log"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_engines_ranks_tools_and_judges_are_all_placed_by_ray(on_ray: Callable[..., Job], tmp_path: Path) -> None:
    workers = ("rollout.engine=vllm", "workers.tools=1", "workers.judges=1", "model.dtype=bfloat16")
    job = on_ray(*TWO_RANKS, *workers, "train.steps=2")
    assert job.wait(limit_s=500, left_s=200) == 0, job.err.read_text()
    records = _records(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 1]
    # in bfloat16; of step 1 after a transfer of the weights from two stages to the engine
    assert all(update["engine_gap"] < 2e-2 for record in records for update in record["updates"])
    logs = sorted(path.name for path in (tmp_path / "run").rglob("*.log"))
    assert logs == ["engine-0.log", "judge-0.log", "node.log", "rank-0.log", "rank-1.log", "tools-0.log"]


@pytest.mark.slow
def test_a_run_ends_soon_after_a_rank_on_ray_was_killed(on_ray: Callable[..., Job], tmp_path: Path) -> None:
    job = on_ray(*TWO_RANKS, "train.steps=500")
    job.when(lambda: bool(_steps(tmp_path)))
    job.processes("rank", "--join")[0].kill()
    killed = time.monotonic()
    assert job.wait() == 2
    assert time.monotonic() < killed + 200
    said = job.err.read_text()
    assert "was killed by SIGKILL" in said and "run the same command again: it resumes from the last checkpoint" in said


@pytest.mark.slow
def test_a_rank_on_ray_that_dies_before_it_joins_is_not_waited_for(on_ray: Callable[..., Job]) -> None:
    job = on_ray(*TWO_RANKS)
    job.when(lambda: bool(job.processes("rank", "--join")))
    for process in job.processes("rank", "--join"):
        process.kill()
    killed = time.monotonic()
    assert job.wait() == 2
    assert time.monotonic() < killed + 200
    assert "was killed by SIGKILL" in job.err.read_text()


@pytest.mark.slow
def test_nothing_is_left_of_a_run_on_ray_that_was_killed(on_ray: Callable[..., Job], tmp_path: Path) -> None:
    job = on_ray(*TWO_RANKS, "train.steps=500", "workers.tools=1")
    job.when(lambda: bool(_steps(tmp_path)))
    os.kill(job.pid, signal.SIGKILL)
    killed = time.monotonic()
    while job.processes("rank", "--join") or job.processes("worker", "--join"):  # they notice by themselves
        assert time.monotonic() < killed + 100
        time.sleep(0.1)
    # Ray's own processes look after each other, and take their time: its agents try to reach the dead head for a minute
    assert job.wait(left_s=400) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "node"])
def test_a_tool_worker_on_ray_that_dies_is_started_again_and_no_rollout_is_lost(
    on_ray: Callable[..., Job], tmp_path: Path, victim: str
) -> None:
    job = on_ray("workers.tools=1", "train.steps=8", "data.heldout=[]", "eval.every=0", "log.progress=false")
    job.when(lambda: bool(_steps(tmp_path)))
    worker = job.processes("worker", "--join")[0]
    if victim == "worker":
        worker.kill()
    else:
        for parent in worker.parents():
            if parent.cmdline()[0].startswith("ray::"):
                parent.kill()
    assert job.wait(left_s=200) == 0, job.err.read_text()
    assert victim == "worker" or "node 0 was lost" in job.err.read_text()
    stored = list(read_rollouts(tmp_path / "run" / "rollouts"))
    assert len(stored) == 8 * 16 and all(one.score.verdict is not None for one in stored)


@pytest.mark.slow
def test_more_than_a_ray_cluster_has_room_for_is_refused_and_the_cluster_of_the_caller_left_alone(
    demo: Path, tmp_path: Path
) -> None:
    line = [sys.executable, HERE / "ray_one_slot.py", demo / "config.yaml", f"run.dir={tmp_path / 'run'}"]
    job = Job([*line, "workers.launcher=ray", "workers.tools=2", "workers.wait_s=2"], tmp_path / "job", HOME=str(tmp_path))
    try:
        assert job.wait(left_s=200) == 2
        said = job.err.read_text()
        assert "waited 2 s for room for 1 times 3 CPUs of a machine (node): the cluster has 0 GPUs and 1 CPUs" in said
        assert "still there" in said
    finally:
        job.end()


@pytest.mark.slow
def test_a_cold_start_whose_ranks_are_on_ray_is_bit_for_bit_that_of_this_machine(tmp_path: Path) -> None:
    write(tmp_path / "set.parquet", conversations(12), "base64")
    phase = f'sft.phases=[{{"trajectories": "{tmp_path / "set.parquet"}", "steps": 3}}]'
    heldout = f"sft.heldout={tmp_path / 'set.parquet'}"
    few = [phase, heldout, "sft.batch_size=4", "sft.tokens_per_micro_batch=2000", "sft.backend=megatron", "log.progress=false"]
    layout = ["train.megatron.data_parallel=2", "model.dtype=float32", f"model.path={AGENT}"]

    def command(name: str) -> list[object]:
        return ["sft", *few, *layout, f"run.dir={tmp_path / name}", "--out", tmp_path / name / "model"]

    config = tmp_path / "empty.yaml"
    config.write_text("{}\n")
    here = command("here")
    ended = run([here[0], config, *here[1:]], tmp_path / "process")
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended
    there = command("there")
    line = [PROGRAM, there[0], config, "workers.launcher=ray", "workers.nodes=1", *there[1:]]
    job = Job(line, tmp_path / "job", HOME=str(tmp_path), RAY_ADDRESS="local")
    try:
        assert job.wait(left_s=120) == 0, job.err.read_text()
    finally:
        job.end()
    for name in ("sft/metrics.jsonl", "sft/eval.jsonl", "model/model.safetensors"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "there" / "sft" / "ranks").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert not (tmp_path / "there" / "workers").exists()  # no node


def test_ray_is_imported_by_nothing_that_does_not_ask_for_it(demo: Path, tmp_path: Path) -> None:
    line = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", "train.steps=1"]
    options = ["data.heldout=[]", "eval.every=0", "log.progress=false", "workers.tools=1"]
    ended = Command([*line, *options], tmp_path / "process", before=without_ray).wait()
    assert ended.code == 0, ended
    assert _steps(tmp_path) == [0]
