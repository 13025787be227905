"""kill -9 at any moment, the same command again: what the run leaves is bit-identical to what an uninterrupted one leaves."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from harness import HERE, PROGRAM, SMALL, Moment, moments, phases, rollout_state, run, run_state, sft_state, succeed

# Stages of a run, and a time in seconds that each of them lasts longer than.
_STAGES = (
    ("pipeline._rollout", 0.08),
    ("pipeline._update", 0.02),
    ("pipeline._evaluate", 0.08),
    ("resume._write_shards", 0.0),
    ("atomic._flush_tree", 0.0),
    ("pipeline._store", 0.003),
    ("log.step", 0.0),
)


def _chain(command: list[object], folder: Path, chain: list[Moment]) -> None:
    """The command again and again, killed at each moment."""
    for number, moment in enumerate(chain):
        ended = run(command, folder / f"kill-{number}", moment)
        assert ended.hit and ended.code == -signal.SIGKILL, (moment, ended)
        assert not ended.orphans, (moment, ended)


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_in_every_stage_ends_bit_identical_to_an_uninterrupted_one(demo: Path, tmp_path: Path, every: int) -> None:
    command = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", f"checkpoint.every={every}"]
    _chain(command, tmp_path, moments(every, _STAGES, signal.SIGKILL))
    succeed(command, tmp_path / "last")
    assert run_state(tmp_path / "run") == run_state(demo)


@pytest.mark.slow  # test_sft_run.py has a quick one, on files of conversations
def test_a_cold_start_killed_at_any_moment_ends_bit_identical_to_an_uninterrupted_one(demo: Path, tmp_path: Path) -> None:
    both = phases((demo / "trajectories" / "base", 20), (demo / "trajectories" / "cold_start", 12))
    command = ["sft", demo / "config.yaml", both, "checkpoint.every=1", f"model.path={demo / 'model'}"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed([*command, f"run.dir={whole}", "--out", whole / "model"], tmp_path / "reference")
    chain = [
        Moment("torch_backend.imitate", signal.SIGKILL, entry=8),  # before the first checkpoint
        Moment("atomic._flush_tree", signal.SIGKILL),
        Moment("torch_backend.imitate", signal.SIGKILL, entry=13, delay_s=0.005),
        Moment("export.export_model", signal.SIGKILL, delay_s=0.001),
    ]
    _chain([*command, f"run.dir={broken}", "--out", broken / "model"], tmp_path, chain)
    succeed([*command, f"run.dir={broken}", "--out", broken / "model"], tmp_path / "last")
    assert sft_state(broken, broken / "model") == sft_state(whole, whole / "model")


def test_the_demo_killed_while_it_makes_data_model_or_trajectories_makes_the_same(demo: Path, tmp_path: Path) -> None:
    # few prompts and no steps to speak of: what is compared is what comes before them
    few = [
        "demo.base_prompts=30",
        "demo.cold_start_prompts=20",
        "train.steps=1",
        phases((Path("base"), 2), (Path("cold_start"), 1)),
    ]
    command = ["demo", SMALL, f"demo.model_shape={HERE / 'small_model.json'}", *few]
    made = Moment("cold_start.sft", signal.SIGKILL)  # what is compared is there by then
    _chain([*command, f"run.dir={tmp_path / 'whole'}"], tmp_path / "reference", [made])
    chain = [
        Moment("files.write_demo", signal.SIGKILL, delay_s=0.05),
        Moment("tiny.build_tiny", signal.SIGKILL, delay_s=0.02),
        Moment("interrupt.run", signal.SIGKILL, delay_s=0.02),
        Moment("interrupt.run", signal.SIGKILL, entry=2, delay_s=0.01),
    ]
    _chain([*command, f"run.dir={tmp_path / 'broken'}"], tmp_path, chain)
    succeed([*command, f"run.dir={tmp_path / 'broken'}"], tmp_path / "last")
    for name in ("base", "cold_start"):
        whole, broken = (tmp_path / run / "trajectories" / name for run in ("whole", "broken"))
        assert rollout_state(broken) == rollout_state(whole)
    for name in ("train.parquet", "heldout.parquet", "text_corpus.parquet"):
        assert (tmp_path / "broken" / "data" / name).read_bytes() == (tmp_path / "whole" / "data" / name).read_bytes()


def test_the_installed_program_ends_like_the_processes_of_these_tests(demo: Path, tmp_path: Path) -> None:
    command = [PROGRAM, "train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert run_state(tmp_path / "run") == run_state(demo)
