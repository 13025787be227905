"""configs/launch: a training of two ranks under Slurm, whose srun is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import HERE, PROGRAM
from jobs import SRUN, TWO_RANKS, Job

_LAUNCH = HERE.parents[1] / "configs" / "launch"


@pytest.fixture
def start(demo: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a launch file's command, with the tiny demo's config and overrides behind it."""
    jobs: list[Job] = []

    def start(command: list[object], *overrides: str, **environment: str) -> Job:
        line = [*command, demo / "config.yaml", f"run.dir={tmp_path / 'run'}", *TWO_RANKS, *overrides]
        jobs.append(Job(line, tmp_path / f"job-{len(jobs)}", HOME=str(tmp_path), **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


@pytest.fixture
def slurm(start: Callable[..., Job], tmp_path: Path) -> Callable[..., Job]:
    """Run a launch file as Slurm would on one node."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(f'#!/bin/sh\nexec {sys.executable} {SRUN} "$@"\n')
    (tools / "srun").chmod(0o755)

    def submit(*overrides: str, file: str = "slurm.sbatch", tasks: int = 2, nodes: int = 1, **environment: str) -> Job:
        path = os.pathsep.join([str(tools), str(PROGRAM.parent), os.environ["PATH"]])
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": str(tasks), "SLURM_JOB_NUM_NODES": str(nodes)}
        job |= {"METIS_HOST": "127.0.0.1", "SLURM_CPUS_ON_NODE": "4"}
        return start(["bash", _LAUNCH / file], *overrides, PATH=path, **job | environment)

    return submit


def _steps(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def _check_whole(job: Job, folder: Path, steps: int) -> None:
    """The job has ended well after that many steps."""
    assert job.wait() == 0, job.err.read_text()
    assert _steps(folder) == list(range(steps))
    assert (folder / "run" / "trained" / "config.json").is_file()
    assert sorted(path.name for path in (folder / "run" / "ranks").iterdir()) == ["rank-0.log", "rank-1.log"]


def _check_stopped(job: Job, folder: Path) -> None:
    """SIGTERM after a step: what was done is on disk."""
    job.when(lambda: bool(_steps(folder)))
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 130, job.err.read_text()
    assert "run the same command again" in job.err.read_text()
    assert len(list((folder / "run" / "checkpoints").glob("step-*"))) == 1


_STAND_IN = f"""#!/bin/sh
echo "$METIS_RANK_KEY $SLURM_PROCID: $@" >> "$0.calls"
case "$1" in
config) exec {PROGRAM} "$@" ;;
train) trap "exit 130" TERM; while :; do sleep 0.1; done ;;
rank) exec sleep 600 ;;
esac
"""


def test_a_slurm_job_starts_a_run_with_its_ranks_and_passes_the_signal_on(slurm: Callable[..., Job], tmp_path: Path) -> None:
    """Of which the commands are stand-ins; the tests that follow have a real one."""
    program = tmp_path / "bin" / "metis-fast"
    program.write_text(_STAND_IN)
    program.chmod(0o755)

    def calls() -> list[list[str]]:
        """Key and rank of each, and its command."""
        lines = Path(f"{program}.calls").read_text().splitlines() if Path(f"{program}.calls").exists() else []
        return sorted(line.split(": ", 1) for line in lines)

    job = slurm("train.steps=500")
    job.when(lambda: len(calls()) == 5)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 130, job.err.read_text()
    (_, config), (_, doctor), (key, train), zero, one = calls()
    assert config == doctor.replace("doctor", "config") + " --json" and doctor.split()[0] == "doctor"
    command, where = train.split(" train.megatron.launch=join train.megatron.listen=")
    assert command == doctor.replace("doctor", "train") and where.startswith("127.0.0.1:")
    assert len(key.strip()) == 64 and [zero, one] == [[f"{key.strip()} {i}", f"rank --join {where} --wait 1800"] for i in "01"]


@pytest.mark.slow
def test_a_slurm_job_stopped_before_its_time_limit_goes_on_when_submitted_again(
    slurm: Callable[..., Job], tmp_path: Path
) -> None:
    _check_stopped(slurm("train.steps=500", "checkpoint.every=0"), tmp_path)
    done = len(_steps(tmp_path))
    _check_whole(slurm(f"train.steps={done + 1}", "checkpoint.every=0"), tmp_path, done + 1)


@pytest.mark.slow
def test_a_job_ends_soon_after_one_of_its_ranks_was_killed(slurm: Callable[..., Job], tmp_path: Path) -> None:
    job = slurm("train.steps=500")
    job.when(lambda: bool(_steps(tmp_path)))
    job.processes("rank", "--join")[0].kill()
    killed = time.monotonic()
    assert job.wait() == 2
    assert time.monotonic() < killed + 60
    assert "run the same command again: it resumes from the last checkpoint" in job.err.read_text()


@pytest.mark.slow
def test_a_run_whose_ranks_cannot_start_is_not_waited_for(slurm: Callable[..., Job], tmp_path: Path) -> None:
    job = slurm()
    job.when(lambda: bool(job.processes("rank", "--join")))
    for process in job.processes("rank", "--join"):
        process.kill()
    assert job.wait() == 130
    assert "the ranks have ended" in job.err.read_text()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
def test_ray_on_the_nodes_of_a_job_runs_it_and_stops_with_it(slurm: Callable[..., Job], tmp_path: Path) -> None:
    own = {"file": "ray.sbatch", "METIS_HOST": "127.0.0.1"}
    job = slurm("train.steps=500", "checkpoint.every=0", "workers.tools=1", **own)
    job.when(lambda: bool(_steps(tmp_path)))
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(left_s=200) == 130, job.err.read_text()
    assert "run the same command again" in job.err.read_text()
    done = len(_steps(tmp_path))
    job = slurm(f"train.steps={done + 1}", "checkpoint.every=0", "workers.tools=1", **own)
    assert job.wait(left_s=200) == 0, job.err.read_text()
    assert _steps(tmp_path) == list(range(done + 1))
    assert (tmp_path / "run" / "ray" / "node-0.log").read_text()
    assert sorted(path.name for path in (tmp_path / "run" / "ranks").iterdir()) == ["rank-0.log", "rank-1.log"]


@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
def test_ray_that_does_not_start_is_said(slurm: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "bin" / "ray").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "ray").chmod(0o755)
    job = slurm(file="ray.sbatch")
    assert job.wait() == 2
    assert job.err.read_text() == f"ray.sbatch: Ray did not start, see {tmp_path / 'run'}/ray\n"


def test_a_job_with_other_tasks_than_the_layout_has_ranks_is_refused(slurm: Callable[..., Job]) -> None:
    job = slurm(tasks=16)
    assert job.wait() == 2
    assert (
        job.err.read_text()
        == "slurm.sbatch: the layout (train.megatron) has 2 ranks, the job 16 tasks; change --ntasks-per-node\n"
    )


def test_a_job_of_several_nodes_without_ray_is_refused(slurm: Callable[..., Job]) -> None:
    job = slurm(nodes=2)
    assert job.wait() == 2
    assert job.err.read_text() == "slurm.sbatch: the job has 2 nodes, this file is for one; submit ray.sbatch\n"


def test_a_host_name_that_other_nodes_cannot_reach_is_refused(slurm: Callable[..., Job]) -> None:
    job = slurm(file="ray.sbatch", nodes=2)
    assert job.wait() == 2
    assert "set METIS_HOST" in job.err.read_text()
