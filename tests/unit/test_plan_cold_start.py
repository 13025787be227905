"""What plans and the doctor say of a config that has a cold start alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metis_fast import cli
from metis_fast.config import build, load
from metis_fast.plan.cold_start import as_planned, as_trained, is_cold_start
from metis_fast.plan.command import awake, own_layout
from metis_fast.plan.gpus import GIB, GPUS
from metis_fast.plan.shape import read_model_config
from metis_fast.train.optimizer import Schedule

CONFIGS = Path(__file__).parents[2] / "configs"
SFT, HDPO = CONFIGS / "qwen3vl_8b_sft.yaml", CONFIGS / "qwen3vl_8b_hdpo.yaml"
SHAPE = ["model.config=" + str(CONFIGS / "qwen3vl_8b.json")]


def test_a_cold_start_is_planned_with_its_own_settings_and_without_an_engine() -> None:
    config = load(SFT, SHAPE)
    assert is_cold_start(config) and not is_cold_start(load(HDPO))
    trained = as_trained(config)
    assert trained.model.freeze == ("vision",) and trained.train.tokens_per_micro_batch == 20480
    planned = as_planned(config)
    assert planned.rollout.max_prompt_tokens + planned.rollout.max_response_tokens == 20480
    one = own_layout(config, read_model_config(config, None), GPUS["h100"])
    assert one.fits and one.memory.engine == 0 and one.awake == 0
    assert one.seconds.rollout == one.seconds.old_logprobs == one.seconds.weight_sync == 0 < one.seconds.dense
    whole = load(SFT, [*SHAPE, "sft.freeze=[]"])
    assert own_layout(whole, read_model_config(whole, None), GPUS["h100"]).memory.total > one.memory.total


def test_the_verb_plans_a_cold_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(SFT), *SHAPE]) == 0
    said = capsys.readouterr().out
    assert "a cold start on 32 conversations a step" in said and "engine" in said and "rollouts a step" not in said
    assert cli.main(["plan", str(SFT), *SHAPE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["host"] is None


def test_an_engine_that_is_too_large_when_it_wakes_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    config = load(HDPO, [*SHAPE, "rollout.vllm.gpu_memory=0.85"])
    gpu = GPUS["h100"]
    one = own_layout(config, read_model_config(config, None), gpu)
    assert not one.fits and one.memory.total < gpu.memory < one.awake
    said = awake(gpu.memory, one, config)
    assert f"take {one.awake / GIB:.0f} GiB: lower rollout.vllm.gpu_memory from 0.85 to" in said
    lower = load(HDPO, [*SHAPE, f"rollout.vllm.gpu_memory={said.split()[-3]}"])
    assert own_layout(lower, read_model_config(lower, None), gpu).fits
    assert cli.main(["plan", str(HDPO), *SHAPE, "rollout.vllm.gpu_memory=0.85"]) == 1
    assert "While the engine is awake" in capsys.readouterr().out


def test_a_warm_up_longer_than_the_run_is_told() -> None:
    optim = build({"sft": {"optim": {"lr": 1e-5, "warmup_steps": 250}}}).sft.optim
    doubt = Schedule(optim, 3).doubt("sft.optim")
    assert "sft.optim.warmup_steps=250 is no less than the 3 optimizer steps" in doubt and "gets to 1.2e-07 of 1e-05" in doubt
    assert not Schedule(optim, 2500).doubt("sft.optim")
