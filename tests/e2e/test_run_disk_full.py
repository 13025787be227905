"""A full disk: one line says so, what was written before is intact, and the run goes on exactly once there is space."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import Disk, small_disk
from harness import cut, error_line, run, run_state, succeed

from metis_fast.checkpoint.resume import CheckpointStore

_WARNED = "metis_fast.checkpoint.export: the trained model will take"  # said when the run starts


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def test_a_disk_full_at_checkpoint_time_keeps_the_older_ones_and_the_run_resumes_exactly(
    demo: Path, tmp_path: Path, disk: Disk
) -> None:
    folder = cut(demo, disk.folder / "run", 4)
    command = ["train", demo / "config.yaml", f"run.dir={folder}", "log.tensorboard=false"]
    disk.leave(150)  # enough for a step's rollouts, not for a checkpoint of 350 KiB
    line = error_line(run(command, tmp_path / "first"), _WARNED)
    assert "cannot write checkpoint step-000005" in line and "free some space" in line
    assert "training state up to step 4 is safe" in line
    assert CheckpointStore(folder / "checkpoints", 2).load(4).state.step == 4
    disk.resize(64 << 10)
    succeed(command, tmp_path / "second")
    assert run_state(folder) == run_state(demo)


@pytest.mark.parametrize("left", [pytest.param(0, marks=pytest.mark.slow), 8, pytest.param(24, marks=pytest.mark.slow)])
def test_a_disk_full_while_a_step_is_written_is_one_line_and_the_run_resumes_exactly(
    demo: Path, tmp_path: Path, disk: Disk, left: int
) -> None:
    folder = cut(demo, disk.folder / "run", 4)
    (folder / "rollouts" / "step-000004.parquet").unlink()
    command = ["train", demo / "config.yaml", f"run.dir={folder}", "checkpoint.every=0"]
    disk.leave(left)  # KiB: too little for the config, for the rollouts, for what follows them
    line = error_line(run(command, tmp_path / "first"), _WARNED)
    assert "free some space" in line
    disk.resize(64 << 10)
    succeed(command, tmp_path / "second")
    assert run_state(folder) == run_state(demo)
