"""A resumed optimizer takes the same steps as one that never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from metis_fast.checkpoint.optimizer import FlatOptimizer, flatten_optimizer, unflatten_optimizer
from metis_fast.checkpoint.resume import CheckpointStore, ResumeState
from metis_fast.checkpoint.rng import capture_rng
from metis_fast.errors import CheckpointError
from metis_fast.train.muon import Muon

Build = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def parameters(dtype: torch.dtype = torch.float32, rows: int = 6) -> list[torch.nn.Parameter]:
    noise = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(rows, 4, generator=noise).to(dtype)) for _ in range(3)]


def step(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for param in params[seed % 2 :]:  # parameters without a gradient have fewer steps, or no state at all
        param.grad = torch.randn(param.shape, generator=noise).to(param.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def adamw(params: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "weight_decay": 0.0}], betas=(0.8, 0.9))


def adamw_tensor_lr(params: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=torch.tensor(0.1), amsgrad=True, foreach=False)


def adamw_named(params: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW([(f"layer.{index}.weight", param) for index, param in enumerate(params)])


def muon(params: list[torch.nn.Parameter]) -> Muon:
    return Muon([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], 0.1, params[0].dtype, momentum=0.9)


@pytest.mark.parametrize("build", [adamw, adamw_tensor_lr, adamw_named, muon])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_steps_after_a_resume_are_bit_identical(build: Build, dtype, tmp_path):
    params = parameters(dtype)
    optimizer = build(params)
    for seed in (1, 2, 3):
        step(optimizer, params, seed)
    flat = flatten_optimizer(optimizer)
    tensors = {f"optimizer.{name}": tensor for name, tensor in flat.tensors.items()}
    CheckpointStore(tmp_path, 1).save(3, ResumeState(3, tensors, {"optimizer": flat.scalars}, capture_rng()), None)
    resumed_params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = build(resumed_params)
    for group in resumed.param_groups:
        group["weight_decay"] = 0.77  # hyperparameters come from the checkpoint, so this must vanish
    loaded = CheckpointStore(tmp_path, 1).load(3).state
    tensors = {name.removeprefix("optimizer."): tensor for name, tensor in loaded.tensors.items()}
    unflatten_optimizer(resumed, FlatOptimizer(tensors, loaded.scalars["optimizer"]))
    again = flatten_optimizer(resumed)
    assert again.scalars == flat.scalars
    assert again.tensors.keys() == flat.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in flat.tensors.items())
    for seed in (4, 5, 6):
        step(optimizer, params, seed)
        step(resumed, resumed_params, seed)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed_params, strict=True))


def test_float32_moments_of_bfloat16_parameters_are_not_rounded():
    params = parameters(torch.bfloat16)
    optimizer = adamw(params)
    step(optimizer, params, 2)
    moments = {index: torch.randn(6, 4) for index in range(3)}
    for index, param in enumerate(params):
        optimizer.state[param]["exp_avg"] = moments[index]
    resumed_params = parameters(torch.bfloat16)
    resumed = adamw(resumed_params)
    unflatten_optimizer(resumed, flatten_optimizer(optimizer))
    assert all(torch.equal(resumed.state[param]["exp_avg"], moments[index]) for index, param in enumerate(resumed_params))


def test_steps_after_a_resume_leave_the_loaded_state_untouched():
    params = parameters()
    optimizer = adamw(params)
    step(optimizer, params, 2)
    flat = flatten_optimizer(optimizer)
    before = {name: tensor.clone() for name, tensor in flat.tensors.items()}
    resumed_params = parameters()
    resumed = adamw(resumed_params)
    unflatten_optimizer(resumed, flat)
    step(resumed, resumed_params, 4)
    assert all(torch.equal(flat.tensors[name], tensor) for name, tensor in before.items())


def test_scalars_of_a_flat_optimizer_survive_json():
    params = parameters()
    optimizer = adamw(params)
    step(optimizer, params, 2)
    flat = flatten_optimizer(optimizer)
    resumed = adamw(parameters())
    unflatten_optimizer(resumed, FlatOptimizer(flat.tensors, json.loads(json.dumps(flat.scalars))))
    assert resumed.param_groups[0]["betas"] == (0.8, 0.9)  # a tuple again


@pytest.mark.parametrize(
    ("build", "rows", "message"),
    [
        (muon, 6, "checkpoint's optimizer is AdamW, this run's is Muon"),
        (adamw_named, 6, r"groups of \[1, 2\] parameters, this run's has \[3\]"),
        (adamw, 5, r"exp_avg of parameter 0 has shape \(6, 4\) in the checkpoint, expected \(5, 4\)"),
    ],
    ids=["class", "groups", "shape"],
)
def test_the_state_of_another_run_is_refused(build: Build, rows, message):
    params = parameters()
    optimizer = adamw(params)
    step(optimizer, params, 2)
    with pytest.raises(CheckpointError, match=message):
        unflatten_optimizer(build(parameters(rows=rows)), flatten_optimizer(optimizer))
