"""A full disk: one line says so, what was written before is intact, and the run goes on exactly once there is space."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import Disk, small_disk
from harness import error_line, run, run_state, succeed

from metis_fast.checkpoint.resume import CheckpointStore

_WARNED = "metis_fast.checkpoint.export: the trained model will take"  # said when the run starts


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def test_a_disk_full_at_checkpoint_time_keeps_the_older_ones_and_the_run_resumes_exactly(
    demo: Path, tmp_path: Path, disk: Disk
) -> None:
    folder = disk.folder / "run"
    command = ["train", demo / "config.yaml", f"run.dir={folder}", "log.tensorboard=false"]
    succeed([*command, "train.steps=2"], tmp_path / "first")
    disk.leave(150)  # enough for a step's rollouts, not for a checkpoint of 350 KiB
    line = error_line(run(command, tmp_path / "second"), _WARNED)
    assert "cannot write checkpoint step-000003" in line and "free some space" in line
    assert "training state up to step 2 is safe" in line
    assert CheckpointStore(folder / "checkpoints", 2).load(2).state.step == 2
    disk.resize(64 << 10)
    succeed(command, tmp_path / "third")
    assert run_state(folder) == run_state(demo)


@pytest.mark.parametrize("left", [pytest.param(0, marks=pytest.mark.slow), 8, pytest.param(24, marks=pytest.mark.slow)])
def test_a_disk_full_while_a_step_is_written_is_one_line_and_the_run_resumes_exactly(
    demo: Path, tmp_path: Path, disk: Disk, left: int
) -> None:
    folder = disk.folder / "run"
    command = ["train", demo / "config.yaml", f"run.dir={folder}", "checkpoint.every=0"]
    succeed([*command, "train.steps=1"], tmp_path / "first")
    disk.leave(left)  # KiB: too little for the config, for the rollouts, for what follows them
    line = error_line(run(command, tmp_path / "second"), _WARNED)
    assert "free some space" in line
    disk.resize(64 << 10)
    succeed(command, tmp_path / "third")
    assert run_state(folder) == run_state(demo)
