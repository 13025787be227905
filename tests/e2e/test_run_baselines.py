"""Every baseline and option that is a setting: two real steps, in this process, with finite numbers and changed weights.

Those of which a unit or parity test shows the numbers, and that change nothing else of a run, are slow ones.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metis_fast import config as config_module
from metis_fast.report.log import read_steps
from metis_fast.run import pipeline
from metis_fast.types import StepStats

_VARIANTS = {
    "hdpo": [],
    "grpo by weight": ["loss.w_tool=0"],
    "grpo": ["score.estimator=grpo"],
    "coupled reward": ["score.estimator=coupled", "score.alpha=0.3"],
    "gdpo": ["score.estimator=gdpo"],
    "dr. grpo": ["score.norm_by_std=false"],
    "one mini-batch": ["train.prompts_per_mini_batch=4"],
    "four mini-batches": ["train.prompts_per_mini_batch=1"],
    "kl": ["loss.kl_coef=0.05"],
    "entropy": ["loss.entropy_coef=0.01"],
    "tis": ["loss.tis_cap=2.0"],
    "no dual clip": ["loss.dual_clip=.inf"],
    "bfloat16": ["model.dtype=bfloat16"],
    "reference kernels": ["loss.impl=reference", "train.attention=reference"],
    "prompts not shared": ["train.share_prompt=false"],
    "everything trained": ["model.freeze=[]"],
    "recomputed activations": ["train.activation_checkpointing=true"],
    "nothing skipped": ["train.skip_zero_advantage=false"],
    "small micro-batches": ["train.tokens_per_micro_batch=288"],
    "admission at any time": ["rollout.deterministic=false", "rollout.max_concurrent=5"],
    "small waves": ["rollout.max_concurrent=5"],
    "reference normalization": ["loss.normalization=reference"],
    "muon": ["train.optim.muon_lr=0.001"],
}
_TOGETHER = {  # what has nothing to do with each other, in runs of their own slowly
    "coupled reward, kl, muon": ("coupled reward", "kl", "muon"),
    "gdpo, bfloat16, admission at any time": ("gdpo", "bfloat16", "admission at any time"),
}
_VARIANTS |= {name: [setting for one in parts for setting in _VARIANTS[one]] for name, parts in _TOGETHER.items()}
_QUICK = ("grpo", *_TOGETHER)


@pytest.fixture
def one_thread():
    """`run.threads` is for a whole process; the tests after this one get their own number back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _numbers(steps: list[StepStats]) -> list[float]:
    rates = [rate for step in steps for entry in step.slices.values() for rate in (entry.accuracy, entry.tool_calls)]
    updates = [update for step in steps for update in step.updates]
    return rates + [number for u in updates for number in (u.loss, u.grad_norm, u.kl, u.entropy, u.engine_gap, u.ratio_max)]


@pytest.mark.parametrize("variant", [pytest.param(one, marks=() if one in _QUICK else pytest.mark.slow) for one in _VARIANTS])
@pytest.mark.usefixtures("one_thread")
def test_a_variant_trains_two_steps_with_finite_numbers(demo: Path, tmp_path: Path, variant: str) -> None:
    quiet = ["train.steps=2", "data.heldout=[]", "log.tensorboard=false", "log.progress=false", f"run.dir={tmp_path / 'run'}"]
    pipeline.train(config_module.load(demo / "config.yaml", [*quiet, *_VARIANTS[variant]]))
    steps = read_steps(tmp_path / "run")
    assert [step.step for step in steps] == [0, 1]
    assert all(map(math.isfinite, _numbers(steps)))
    assert any(not update.skipped_step and update.grad_norm > 0 for step in steps for update in step.updates)
    assert sum(step.outcomes.get("infrastructure_error", 0) for step in steps) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (demo / "cold_start", tmp_path / "run" / "trained"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)


@pytest.mark.slow  # parity/test_trainer.py has a quick one, of every saving
@pytest.mark.usefixtures("one_thread")
def test_what_only_changes_memory_and_speed_does_not_change_what_is_sampled_and_barely_the_loss(
    demo: Path, tmp_path: Path
) -> None:
    steps = {}
    for name in ("hdpo", "nothing skipped", "small micro-batches", "recomputed activations"):
        quiet = ["train.steps=1", "data.heldout=[]", "log.tensorboard=false", "log.progress=false", "model.dtype=float32"]
        pipeline.train(config_module.load(demo / "config.yaml", [*quiet, *_VARIANTS[name], f"run.dir={tmp_path / name}"]))
        (steps[name],) = read_steps(tmp_path / name)
    for name, step in steps.items():
        assert step.slices == steps["hdpo"].slices, name
        for update, expected in zip(step.updates, steps["hdpo"].updates, strict=True):
            assert update.loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-6), name
            assert update.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3, abs=1e-6), name
