"""configs/launch: a training of two ranks under Slurm, whose srun is a stand-in, and under a real Ray on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from harness import HERE, PROGRAM

_LAUNCH = HERE.parents[1] / "configs" / "launch"
_SRUN = HERE / "fake_srun.py"
_TWO = [
    "train.backend=megatron",
    "train.megatron.pipeline_parallel=2",
    "data.heldout=[]",
    "eval.every=0",
    "log.progress=false",
]
_LIMIT_S = 120.0


class Job:
    """A job started by a launch file. Whatever carries its mark in the environment belongs to it."""

    def __init__(self, command: list[object], folder: Path, **environment: str) -> None:
        folder.mkdir()
        self.mark = f"METIS_TEST_JOB={folder}"
        self.err = folder / "err"
        own = {"METIS_TEST_JOB": str(folder), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
        with self.err.open("wb") as err:
            self._process = subprocess.Popen(
                list(map(str, command)), stdout=err, stderr=err, env=os.environ | own, start_new_session=True
            )
        self.pid = self._process.pid

    def wait(self, left_s: float = 10) -> int:
        """Its exit code; nothing of it is left, soon after its end."""
        code = self._process.wait(_LIMIT_S)
        deadline = time.monotonic() + left_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, left
        return code

    def processes(self, *words: str) -> list[psutil.Process]:
        """Of its processes, those with these words in their command lines; the stand-in for srun has those of its tasks."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = self.mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                line = process.cmdline()
            except (OSError, psutil.Error):
                continue
            if words and str(_SRUN) in line:
                continue
            if mine and process.pid != self.pid and line and all(word in line for word in words):
                found.append(process)
        return found

    def when(self, happened: Callable[[], bool]) -> None:
        """Wait for something while it runs."""
        deadline = time.monotonic() + _LIMIT_S
        while not happened():
            assert self._process.poll() is None and time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.05)

    def end(self) -> None:
        """Leave nothing behind, whatever a test found."""
        for process in self.processes():
            process.kill()
        self._process.kill()
        self._process.wait()


@pytest.fixture
def start(demo: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a launch file's command, with the tiny demo's config and overrides behind it."""
    jobs: list[Job] = []

    def start(command: list[object], *overrides: str, **environment: str) -> Job:
        line = [*command, demo / "config.yaml", f"run.dir={tmp_path / 'run'}", *_TWO, *overrides]
        jobs.append(Job(line, tmp_path / f"job-{len(jobs)}", HOME=str(tmp_path), **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


@pytest.fixture
def slurm(start: Callable[..., Job], tmp_path: Path) -> Callable[..., Job]:
    """Run slurm.sbatch as Slurm would on one node."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(f'#!/bin/sh\nexec {sys.executable} {_SRUN} "$@"\n')
    (tools / "srun").chmod(0o755)

    def submit(*overrides: str, tasks: int = 2, nodes: int = 1, **environment: str) -> Job:
        path = os.pathsep.join([str(tools), str(PROGRAM.parent), os.environ["PATH"]])
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": str(tasks), "SLURM_JOB_NUM_NODES": str(nodes)}
        return start(["bash", _LAUNCH / "slurm.sbatch"], *overrides, PATH=path, METIS_HOST="127.0.0.1", **job | environment)

    return submit


@pytest.fixture
def on_ray(start: Callable[..., Job]) -> Callable[..., Job]:
    """Run ray_ranks.py on a Ray of its own."""

    def submit(*overrides: str) -> Job:
        return start([sys.executable, _LAUNCH / "ray_ranks.py"], *overrides, RAY_ADDRESS="local")

    return submit


def _steps(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def _whole(job: Job, folder: Path, steps: int) -> None:
    """The job has ended well after that many steps."""
    assert job.wait() == 0, job.err.read_text()
    assert _steps(folder) == list(range(steps))
    assert (folder / "run" / "trained" / "config.json").is_file()
    assert sorted(path.name for path in (folder / "run" / "ranks").iterdir()) == ["rank-0.log", "rank-1.log"]


def _stopped(job: Job, folder: Path) -> None:
    """SIGTERM after a step: what was done is on disk."""
    job.when(lambda: bool(_steps(folder)))
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 130, job.err.read_text()
    assert "run the same command again" in job.err.read_text()
    assert len(list((folder / "run" / "checkpoints").glob("step-*"))) == 1


def test_a_slurm_job_stopped_before_its_time_limit_goes_on_when_submitted_again(
    slurm: Callable[..., Job], tmp_path: Path
) -> None:
    _stopped(slurm("train.steps=500", "checkpoint.every=0"), tmp_path)
    done = len(_steps(tmp_path))
    _whole(slurm(f"train.steps={done + 1}", "checkpoint.every=0"), tmp_path, done + 1)


def test_a_ray_job_stopped_by_a_signal_goes_on_when_started_again(on_ray: Callable[..., Job], tmp_path: Path) -> None:
    _stopped(on_ray("train.steps=500", "checkpoint.every=0"), tmp_path)
    done = len(_steps(tmp_path))
    _whole(on_ray(f"train.steps={done + 1}", "checkpoint.every=0"), tmp_path, done + 1)


@pytest.mark.parametrize("launch", [pytest.param("slurm", marks=pytest.mark.slow), "on_ray"])
def test_a_job_ends_soon_after_one_of_its_ranks_was_killed(launch: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    job: Job = request.getfixturevalue(launch)("train.steps=500")
    job.when(lambda: bool(_steps(tmp_path)))
    job.processes("rank", "--join")[0].kill()
    killed = time.monotonic()
    assert job.wait() == 2
    assert time.monotonic() < killed + 60
    assert "run the same command again: it resumes from the last checkpoint" in job.err.read_text()


@pytest.mark.slow
def test_ranks_end_with_the_process_that_started_them_on_ray(on_ray: Callable[..., Job], tmp_path: Path) -> None:
    job = on_ray("train.steps=500")
    job.when(lambda: bool(_steps(tmp_path)))
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait(left_s=60) == -signal.SIGKILL  # Ray's own processes look after each other, and take their time


@pytest.mark.slow
def test_a_run_whose_ranks_cannot_start_is_not_waited_for(slurm: Callable[..., Job], tmp_path: Path) -> None:
    job = slurm()
    job.when(lambda: bool(job.processes("rank", "--join")))
    for process in job.processes("rank", "--join"):
        process.kill()
    assert job.wait() == 130
    assert "the ranks have ended" in job.err.read_text()


def test_a_job_with_other_tasks_than_the_layout_has_ranks_is_refused(slurm: Callable[..., Job]) -> None:
    job = slurm(tasks=16)
    assert job.wait() == 2
    assert job.err.read_text() == "slurm.sbatch: the layout (train.megatron) has 2 ranks, the job 16 tasks; change --nodes\n"


def test_a_host_name_that_other_nodes_cannot_reach_is_refused(slurm: Callable[..., Job]) -> None:
    job = slurm(nodes=2)
    assert job.wait() == 2
    assert "set METIS_HOST" in job.err.read_text()


def test_more_ranks_than_a_ray_cluster_has_room_for_are_refused(start: Callable[..., Job]) -> None:
    command: list[object] = [sys.executable, _LAUNCH / "ray_ranks.py", "--wait", "1"]
    job = start(command, "train.megatron.data_parallel=512", RAY_ADDRESS="local")
    assert job.wait() == 2
    assert "no room for 1024 times 1 CPUs of a node" in job.err.read_text()
