"""The loss that a trainer computes, against section 4 written out in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from trainer_cases import assert_close, config, derived_gradient, forward, gradients

from metis_fast.train.torch_backend import TorchTrainer


def test_with_the_engine_as_proximal_policy_the_ratio_is_to_its_log_probabilities_and_no_pass_is_owed(load_tiny, groups):
    settings = config(loss={"proximal": "engine"}, train={"prompts_per_mini_batch": 1, "skip_head_rows": False})
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    rng = np.random.default_rng(0)
    moved = []
    for g in groups:
        logp = trainer.logprobs(g.rollouts)
        noisy = [np.minimum(v + rng.normal(0, 0.3, len(v)), 0) * r.sampled for v, r in zip(logp, g.rollouts, strict=True)]
        rollouts = tuple(replace(r, logp=m.astype(np.float32)) for r, m in zip(g.rollouts, noisy, strict=True))
        moved.append(replace(g, rollouts=rollouts))
    run = [(r, s) for r, s in zip(moved[0].rollouts, moved[0].scores, strict=True) if s.needs_gradient]
    new = trainer.logprobs([r for r, _ in run])
    ratio = np.concatenate([np.exp(v - r.logp)[r.sampled] for v, (r, _) in zip(new, run, strict=True)]).astype(np.float64)
    first, second = trainer.update(moved)
    assert first.kl == pytest.approx(-np.log(ratio).mean(), rel=1e-4)
    assert (first.ratio_max, first.ratio_min) == pytest.approx((ratio.max(), ratio.min()), rel=1e-4)
    assert first.clip_acc > 0.1 and first.engine_gap == 0.0
    for one in (first, second):
        assert one.avoided.old_logprobs.tokens > 0


def test_with_the_engine_as_proximal_policy_the_importance_weight_is_truncated(load_tiny, groups):
    """To its log-probabilities: 1 + eps_high where the advantage is positive, the dual clip where it is negative."""
    settings = config(loss={"proximal": "engine", "dual_clip": 1.5})
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    rng = np.random.default_rng(1)
    moved = []
    for g in groups:
        noisy = [np.minimum(v + rng.normal(0, 0.5, len(v)), 0) for v in trainer.logprobs(g.rollouts)]
        rollouts = tuple(replace(r, logp=(n * r.sampled).astype(np.float32)) for r, n in zip(g.rollouts, noisy, strict=True))
        moved.append(replace(g, rollouts=rollouts))
    rows = [(r, s) for g in moved for r, s in zip(g.rollouts, g.scores, strict=True)]
    n_acc = sum(r.num_sampled for r, _ in rows)
    n_tool = sum(r.num_sampled for r, s in rows if s.in_tool_denominator)
    policy = load_tiny()
    policy.model.double()
    total, truncated = torch.zeros((), dtype=torch.float64), 0
    for rollout, one in rows:
        where = torch.from_numpy(np.flatnonzero(rollout.sampled))
        tokens = torch.from_numpy(rollout.tokens.astype(np.int64))
        logp = forward(policy, rollout).log_softmax(-1)[where - 1, tokens[where]]
        ratio = (logp - torch.from_numpy(rollout.logp).double()[where]).exp()
        for weight, advantage in ((1 / n_acc, one.adv_acc), (0.15 / n_tool, one.adv_tool)):
            bounded = ratio.clamp(max=1.2) if advantage > 0 else ratio.clamp(0.8, 1.5)
            total = total - weight * (advantage * bounded).sum()
            truncated += int((bounded < ratio).sum()) if advantage else 0
    assert truncated > 20
    (stats,) = trainer.update(moved)
    assert stats.loss == pytest.approx(float(total.detach()), rel=1e-5, abs=3e-7)
    named = dict(policy.model.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
    assert_close({name: g.double() for name, g in gradients(trainer).items()}, expected, share=5e-5)


OPTIONS = [
    {},
    {"w_tool": 0.0},
    {"entropy_coef": 0.05},
    {"tis_cap": 2.0},
    {"entropy_coef": 0.02, "tis_cap": 1.5, "w_tool": 0.4},
]


@pytest.mark.parametrize("loss", OPTIONS)
def test_every_gradient_equals_the_float64_derivation(load_tiny, trained, groups, loss):
    # engine log-probs near the trainer's, so that the truncated weight has values on both sides of its cap
    settings = config(loss=loss)
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    near = []
    for g in groups:
        noise = np.random.default_rng(0)
        logp = trainer.logprobs(g.rollouts)
        moved = [np.minimum(v + noise.normal(0, 0.7, len(v)), 0) * r.sampled for v, r in zip(logp, g.rollouts, strict=True)]
        rollouts = tuple(replace(r, logp=m.astype(np.float32)) for r, m in zip(g.rollouts, moved, strict=True))
        near.append(replace(g, rollouts=rollouts))
    expected, value = derived_gradient(load_tiny, near, settings)
    (stats,) = trainer.update(near)
    # terms of size 0.1 that nearly cancel, from float32 log-probabilities
    assert stats.loss == pytest.approx(value, rel=1e-5, abs=3e-7)
    got = {name: g.double() for name, g in gradients(trainer).items()}
    assert_close(got, expected, share=5e-5)
    if loss:
        plain = gradients(trained(near, config()))
        assert any((plain[n].double() - g).abs().max() > 1e-3 * g.abs().max() for n, g in expected.items())


def test_kl_to_the_starting_policy_adds_its_gradient(load_tiny, groups):
    settings = config(loss={"kl_coef": 0.3}, lr=3e-3)
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    rollouts = [r for g in groups for r in g.rollouts]
    start = trainer.logprobs(rollouts)
    trainer.update(groups)
    moved = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}

    def load_moved():
        policy = load_tiny()
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                parameter.copy_(moved[name])
        return policy

    expected, _ = derived_gradient(load_moved, groups, settings, start)
    before = {n: s["exp_avg"].clone() for n, s in _states(trainer)}
    trainer.update(groups)
    got = {n: ((s["exp_avg"] - 0.9 * before[n]) / 0.1).double() for n, s in _states(trainer)}
    assert_close(got, expected, share=2e-4)


def _states(trainer):
    return [(name, trainer.optimizer.adamw.state[master]) for name, master in trainer.optimizer.masters.items()]


def test_the_sampling_temperature_is_in_the_gradient(load_tiny, groups):
    settings = config().model_copy(update={"rollout": config().rollout.model_copy(update={"temperature": 0.7})})
    expected, value = derived_gradient(load_tiny, groups, settings)
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    (stats,) = trainer.update(groups)
    assert stats.loss == pytest.approx(value, rel=1e-5, abs=1e-7)
    assert_close({n: g.double() for n, g in gradients(trainer).items()}, expected, share=5e-5)


def test_imitation_is_the_mean_negative_log_likelihood_of_the_sampled_tokens(load_tiny, groups):
    settings = config()
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    rollouts = [r for g in groups for r in g.rollouts]
    logp = np.concatenate([v[r.sampled] for v, r in zip(trainer.logprobs(rollouts), rollouts, strict=True)])
    loss, _ = trainer.imitate(rollouts)
    assert loss == pytest.approx(-logp.astype(np.float64).mean(), rel=1e-5)
    later = [trainer.imitate(rollouts)[0] for _ in range(20)]
    assert later[-1] < 0.5 * loss


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_takes_the_step_that_a_cpu_takes(load_tiny, trained, groups):
    settings = config()
    expected = trained(groups, settings)
    policy = load_tiny()
    policy.model.to("cuda")
    trainer = TorchTrainer(policy, settings, settings.train.optim, 10)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    before = TorchTrainer(load_tiny(), settings, settings.train.optim, 10).logprobs(rollouts)
    for got, want in zip(trainer.logprobs(rollouts), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    trainer.update(groups)
    assert_close({name: value.cpu() for name, value in gradients(trainer).items()}, gradients(expected), share=1e-5)
