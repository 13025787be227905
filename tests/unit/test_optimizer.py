"""The optimizer: float32 masters, clipping, schedule, what is decayed, and that a bad gradient does nothing."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from metis_fast.config import OptimConfig
from metis_fast.train.muon import Muon
from metis_fast.train.optimizer import Optimizer, Schedule, trainable


class Inner(nn.Module):
    """What stands under `model.` in a Qwen3-VL."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(4, 4)
        self.embed_tokens = nn.Embedding(5, 4)
        self.proj = nn.Linear(4, 6)


class Small(nn.Module):
    """Named like the parts of a Qwen3-VL."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.model = Inner()
        self.lm_head = nn.Linear(4, 5, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.to(dtype)


def optimizer_of(model, total_steps=10, **settings):
    return Optimizer(trainable(model, ()), OptimConfig.model_validate({"grad_clip": 1e9} | settings), total_steps)


def step_with(optimizer, gradients):
    """One step on gradients that arrive as one micro-batch."""
    optimizer.start()
    for name, parameter in optimizer.parameters.items():
        if name in gradients:
            value = gradients[name].to(parameter.dtype)
            parameter.grad = value if parameter.grad is None else parameter.grad + value
    optimizer.accumulate()
    return optimizer.step()


def random_gradients(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def test_a_step_is_adamw_written_out():
    model = Small()
    lr, beta1, beta2, eps, decay = 0.01, 0.9, 0.95, 1e-6, 0.1
    optimizer = optimizer_of(model, lr=lr, betas=[beta1, beta2], eps=eps, weight_decay=decay)
    expected = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in expected.items()}
    for t in range(1, 4):
        gradients = random_gradients(model, t)
        norm = step_with(optimizer, gradients)
        assert norm == pytest.approx(math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values())), rel=1e-6)
        for name, w in expected.items():
            g = gradients[name].double()
            first, second = moments[name]
            first.mul_(beta1).add_(g, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            w.mul_(1 - lr * decay * (w.ndim >= 2))  # biases are not decayed
            w.sub_(lr * (first / (1 - beta1**t)) / ((second / (1 - beta2**t)).sqrt() + eps))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-6, atol=1e-6)


def test_the_gradient_is_clipped_by_its_global_norm_over_all_parameters():
    model = Small()
    optimizer = optimizer_of(model, grad_clip=0.5)
    gradients = random_gradients(model)
    norm = step_with(optimizer, gradients)
    assert norm > 1
    for name, master in optimizer.masters.items():
        seen = optimizer.adamw.state[master]["exp_avg"] / 0.1
        torch.testing.assert_close(seen, gradients[name] * 0.5 / norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_leaves_weights_and_state(bad, dtype):
    model = Small(dtype)
    optimizer = optimizer_of(model)
    step_with(optimizer, random_gradients(model))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: optimizer.adamw.state[m]["exp_avg"].clone() for n, m in optimizer.masters.items()}
    gradients = random_gradients(model, 2)
    gradients["model.proj.bias"][3] = bad
    assert not math.isfinite(step_with(optimizer, gradients))
    assert optimizer.num_steps == 1
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(optimizer.adamw.state[m]["exp_avg"], state[n]) for n, m in optimizer.masters.items())
    assert math.isfinite(step_with(optimizer, random_gradients(model, 3)))  # nothing of it is left behind


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    model = Small(torch.bfloat16)
    optimizer = optimizer_of(model, lr=1e-4, weight_decay=0.0, betas=[0.0, 0.5])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ones = {n: torch.ones(p.shape) for n, p in model.named_parameters()}
    step_with(optimizer, ones)
    large = before["model.proj.weight"].abs() > 0.5
    assert torch.equal(model.model.proj.weight[large], before["model.proj.weight"][large])  # below half a unit
    for _ in range(199):
        step_with(optimizer, ones)
    moved = before["model.proj.weight"].float() - optimizer.masters["model.proj.weight"].detach()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.02), rtol=1e-2, atol=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, optimizer.masters[name].to(torch.bfloat16))


def test_micro_batches_are_summed_in_float32():
    model = Small(torch.bfloat16)
    optimizer = optimizer_of(model)
    optimizer.start()
    name = "model.proj.weight"
    for value in (256.0, 1.0, 1.0):  # in bfloat16, 256 + 1 is 256
        optimizer.parameters[name].grad = torch.full((6, 4), value, dtype=torch.bfloat16)
        optimizer.accumulate()
    gradient = optimizer.masters[name].grad
    assert gradient is not None and bool((gradient == 258).all())
    assert optimizer.parameters[name].grad is None


def test_a_parameter_without_a_gradient_decays_and_keeps_its_average_like_one_whose_gradient_is_0():
    runs = []
    for zero in (True, False):
        model = Small()
        optimizer = optimizer_of(model, weight_decay=0.1, lr=0.1)
        step_with(optimizer, random_gradients(model))
        nothing = {n: torch.zeros(p.shape) for n, p in model.named_parameters()} if zero else {}
        before = model.model.proj.weight.detach().clone()
        assert step_with(optimizer, nothing) == 0.0
        assert not torch.equal(model.model.proj.weight, before)
        runs.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 2}, [0.5, 1, 1, 1, 1, 1]),
        ({"final_lr": 0.0}, [1, 0.8, 0.6, 0.4, 0.2, 0]),
        ({"warmup_steps": 1, "final_lr": 0.2}, [1, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"warmup_steps": 2, "final_lr": 0.1}, [0.5, 1, 1, 0.7, 0.4, 0.1]),
        ({"warmup_steps": 99}, [(i + 1) / 99 for i in range(6)]),
        ({"warmup_steps": 6, "final_lr": 0.5}, [(i + 1) / 6 for i in range(6)]),
    ],
)
def test_the_learning_rate_reaches_its_final_share_at_the_last_step(settings, shares):
    schedule = Schedule(OptimConfig(lr=0.01, **settings), total_steps=6)
    assert [schedule.share(step) for step in range(6)] == pytest.approx(shares)


@pytest.mark.parametrize(("warmup", "final", "total"), [(0, 0.0, 9), (3, 0.0, 24), (2, 0.1, 7), (5, 0.5, 5), (0, 0.0, 1)])
def test_a_cosine_is_half_a_wave_between_warm_up_and_last_step(warmup, final, total):
    schedule = Schedule(OptimConfig(schedule="cosine", warmup_steps=warmup, final_lr=final), total_steps=total)
    for step in range(total):
        if step < warmup:
            expected = (step + 1) / warmup
        else:
            expected = final + (1 - final) * (1 + math.cos(math.pi * (step - warmup) / max(1, total - 1 - warmup))) / 2
        assert schedule.share(step) == pytest.approx(expected, abs=1e-12)
    assert schedule.share(total + 50) == pytest.approx(final)  # of a run that was prolonged


def test_a_cosine_that_falls_to_nothing_less_is_refused():
    with pytest.raises(ValidationError, match="schedule=cosine with final_lr=1 stays at lr; set final_lr"):
        OptimConfig(schedule="cosine")


def test_the_learning_rate_stays_at_its_final_share_in_a_run_that_was_prolonged():
    schedule = Schedule(OptimConfig(final_lr=0.25), total_steps=6)
    assert [schedule.share(step) for step in (5, 6, 100)] == [0.25] * 3


def test_the_rate_that_is_announced_is_the_one_that_is_used():
    model = Small()
    optimizer = optimizer_of(model, total_steps=3, lr=0.01, warmup_steps=1, final_lr=0.1, betas=[0.0, 0.999], weight_decay=0.0)
    for seed in range(4):
        announced, before = optimizer.lr, model.model.proj.weight.detach().clone()
        step_with(optimizer, random_gradients(model, seed))
        assert {group["lr"] for group in optimizer.adamw.param_groups} == {announced}
        assert not torch.equal(before, model.model.proj.weight)


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest():
    model = Small()
    optimizer = optimizer_of(model, muon_lr=0.02, lr=0.001, weight_decay=0.0)
    assert [name for name, _ in optimizer.named()] == ["adamw", "muon"]
    assert optimizer.muon is not None
    taken = {id(w) for group in optimizer.muon.param_groups for w in group["params"]}
    assert {n for n, w in optimizer.masters.items() if id(w) in taken} == {"model.visual.weight", "model.proj.weight"}
    rest = {id(w) for group in optimizer.adamw.param_groups for w in group["params"]}
    assert taken.isdisjoint(rest) and len(taken) + len(rest) == len(optimizer.masters)
    before = model.model.proj.weight.detach().clone()
    step_with(optimizer, random_gradients(model))
    singular = torch.linalg.svdvals(model.model.proj.weight.detach() - before) / 0.02
    assert float(singular.min()) > 0.5 and float(singular.max()) < 1.5  # an orthogonal step, up to Newton-Schulz's error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_computes_in_the_dtype_of_the_model_on_float32_masters(dtype):
    model = Small(dtype)
    optimizer = optimizer_of(model, muon_lr=0.02, weight_decay=0.0)
    name, gradients = "model.proj.weight", random_gradients(model)
    before = optimizer.masters[name].detach().clone()
    step_with(optimizer, gradients)
    # U V^T of the first step's momentum, a multiple of the gradient, by Newton-Schulz in float64
    x = gradients[name].to(dtype).double().T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    step = (before - optimizer.masters[name].detach()).double() / (0.02 * math.sqrt(6 / 4))  # a tall matrix steps further
    error = float((step - x.T).norm() / x.norm())
    assert error < 1e-5 if dtype == torch.float32 else 1e-4 < error < 3e-2


def test_muon_in_bfloat16_is_torch_s_bit_for_bit():
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((6, 4), (4, 6), (5, 5))]
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    optimizers = (
        Muon(ours, 0.1, torch.bfloat16),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="original"),
    )
    for seed in range(3):
        for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
            noise = torch.Generator().manual_seed(seed)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=noise)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        ((), set()),
        (("vision",), {"model.visual.weight", "model.visual.bias"}),
        (("embeddings",), {"model.embed_tokens.weight", "lm_head.weight"}),
    ],
)
def test_frozen_parts_have_no_gradient_and_no_state(freeze, still):
    model = Small()
    names = trainable(model, freeze)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == still
    assert names.keys() == {n for n, _ in model.named_parameters()} - still


def test_a_part_that_was_frozen_before_is_trained_again():
    model = Small()
    trainable(model, ("vision", "embeddings"))
    assert trainable(model, ()).keys() == dict(model.named_parameters()).keys()


def test_a_tied_head_is_one_parameter():
    model = Small()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert [n for n in trainable(model, ()) if "embed" in n or "head" in n] == ["model.embed_tokens.weight"]
    assert "lm_head.weight" not in trainable(model, ("embeddings",)) and not model.lm_head.weight.requires_grad
