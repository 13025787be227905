"""Ctrl-C and SIGTERM at any moment: the process ends at once, cleans up behind itself, and the same command goes on exactly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from harness import HERE, SMALL, Command, Ended, Moment, checkpoint_state, phases, run, run_state, sft_state, succeed

from metis_fast.checkpoint.resume import CheckpointStore

_STAGES = {
    "rollout": Moment("pipeline._rollout", signal.SIGINT, entry=4, delay_s=0.05),  # entry 1 is the evaluation before training
    "update": Moment("pipeline._update", signal.SIGINT, entry=2, delay_s=0.005),
    "evaluation": Moment("pipeline._evaluate", signal.SIGINT, entry=2, delay_s=0.05),
    "checkpoint": Moment("resume._write_shards", signal.SIGINT, entry=2),
    "storing": Moment("pipeline._store", signal.SIGINT, entry=2),
}


def _stopped(ended: Ended) -> None:
    assert ended.hit and ended.code == 130, ended
    *steps, last = ended.err.splitlines()
    assert last == "metis-fast: stopped; run the same command again to go on", ended
    assert all(line.startswith("SFT: step ") for line in steps), ended
    assert ended.after_s < 30, ended
    assert not ended.orphans and not ended.scratch, ended


_QUICK = ("update",)  # a kill at a checkpoint is among those of test_run_kill.py


@pytest.mark.parametrize("stage", [pytest.param(one, marks=() if one in _QUICK else pytest.mark.slow) for one in _STAGES])
def test_ctrl_c_ends_a_run_at_once_and_the_resumed_run_ends_like_an_uninterrupted_one(
    demo: Path, tmp_path: Path, stage: str
) -> None:
    # no checkpoint is due before the end, so that the one which is found is the interruption's own
    every = 1 if stage == "checkpoint" else 0
    command = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", f"checkpoint.every={every}"]
    _stopped(run(command, tmp_path / "first", _STAGES[stage]))
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert CheckpointStore(tmp_path / "run" / "checkpoints", 1).steps()[-1:] == (done,)  # the last whole step
    succeed(command, tmp_path / "second")
    assert run_state(tmp_path / "run") == run_state(demo)


@pytest.mark.slow  # test_megatron_run.py has one quick test of it
def test_sigterm_is_taken_as_ctrl_c(demo: Path, tmp_path: Path) -> None:
    command = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}"]
    _stopped(run(command, tmp_path / "first", Moment("pipeline._rollout", signal.SIGTERM, entry=3, delay_s=0.05)))
    succeed(command, tmp_path / "second")
    assert run_state(tmp_path / "run") == run_state(demo)


def test_ctrl_c_before_the_first_step_leaves_no_half_made_run(demo: Path, tmp_path: Path) -> None:
    command = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}"]
    _stopped(run(command, tmp_path / "loading", Moment("model.load_policy", signal.SIGINT, delay_s=0.01)))
    _stopped(run(command, tmp_path / "opening", Moment("toolbox.open", signal.SIGINT, delay_s=0.05)))
    _stopped(run(command, tmp_path / "before", Moment("pipeline._evaluate", signal.SIGINT, delay_s=0.05)))
    succeed(command, tmp_path / "second")
    assert run_state(tmp_path / "run") == run_state(demo)


def test_ctrl_c_to_the_whole_process_group_and_a_second_one_end_the_run_without_a_hang(demo: Path, tmp_path: Path) -> None:
    command = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", "train.steps=100000"]
    running = Command(command, tmp_path / "first")
    while len(running.read("out").splitlines()) < 3:
        time.sleep(0.02)
    began = time.monotonic()
    os.killpg(running.pid, signal.SIGINT)
    time.sleep(0.001)
    os.killpg(running.pid, signal.SIGINT)
    ended = running.wait()
    assert time.monotonic() - began < 5, ended
    assert ended.code == 130 and ended.err.splitlines()[-1].startswith("metis-fast: stopped"), ended
    assert not ended.orphans, ended


@pytest.mark.slow  # test_sft_run.py has a quick one, on files of conversations
def test_ctrl_c_in_a_cold_start_keeps_its_last_step(demo: Path, tmp_path: Path) -> None:
    both = phases((demo / "trajectories" / "base", 12), (demo / "trajectories" / "cold_start", 3))
    command = ["sft", demo / "config.yaml", both, f"model.path={demo / 'model'}", "checkpoint.every=0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed([*command, f"run.dir={whole}", "--out", whole / "model"], tmp_path / "reference")
    resumed = [*command, f"run.dir={broken}", "--out", broken / "model"]
    _stopped(run(resumed, tmp_path / "first", Moment("torch_backend.imitate", signal.SIGINT, entry=5, delay_s=0.005)))
    assert int(checkpoint_state(broken / "sft" / "checkpoints")["step"]) >= 5
    succeed(resumed, tmp_path / "second")
    assert sft_state(broken, broken / "model") == sft_state(whole, whole / "model")


def test_ctrl_c_while_trajectories_are_played_leaves_nothing_behind(tmp_path: Path) -> None:
    few = ["demo.base_prompts=60", "demo.cold_start_prompts=10", phases((Path("base"), 1), (Path("cold_start"), 1))]
    command = ["demo", SMALL, f"run.dir={tmp_path / 'run'}", f"demo.model_shape={HERE / 'small_model.json'}", *few]
    _stopped(run(command, tmp_path / "process", Moment("interrupt.run", signal.SIGINT, delay_s=0.05)))
    assert not list((tmp_path / "run" / "trajectories").glob("*/*"))
