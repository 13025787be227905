"""The loss terms equal ALGORITHM section 4, written out in float64 case by case, forward and gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_fast.config import LossConfig
from metis_fast.train.loss import head_logp, k3, log_ratio_to_ratio, surrogate, truncated_weight


def spec(ratio, adv, low, high, c):
    """S(A) and dS/d ratio of one token, as section 4 writes them: max, then min; `on` decides the gradient."""
    s = max(-adv * ratio, -adv * min(max(ratio, 1 - low), 1 + high))
    value = min(s, -c * adv) if adv < 0 else s
    on = ratio <= 1 + high if adv >= 0 else 1 - low <= ratio <= c
    return value, -adv * on


def run(ratio, adv, config, denominator=1.0, weight=None):
    """Loss per token and gradient of the code under test, one token at a time and all in one sum."""
    ratio_T = torch.tensor(ratio, dtype=torch.float32, requires_grad=True)
    adv_T = torch.tensor(adv, dtype=torch.float32)
    out = surrogate(ratio_T, adv_T, weight, denominator, config)
    (grad,) = torch.autograd.grad(out.loss, ratio_T)
    return float(out.loss.detach()), grad.numpy().astype(np.float64), int(out.num_clipped), int(out.num_live)


# Bounds that float32 holds exactly, so that "on the bound" means the same in float32 and float64.
EXACT = [(0.25, 0.25, 3.0), (0.25, 0.5, 1.5), (0.0, 0.0, 2.0), (1.0, 0.75, math.inf), (0.5, 0.25, math.inf)]
STEP = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize(("low", "high", "c"), EXACT)
@pytest.mark.parametrize("adv", [-2.5, -1.0, 0.0, 0.5, 1.0])
def test_surrogate_is_the_written_out_one_on_every_bound_and_on_both_sides_of_it(low, high, c, adv):
    bounds = [1 - low, 1.0, 1 + high, *([c] if math.isfinite(c) else [])]
    ratios = [b * (1 + side * STEP) for b in bounds for side in (-1, 0, 1)] + [1e-9, 0.1, 5.0, 4e8]
    ratios = [float(np.float32(r)) for r in ratios]
    config = LossConfig(eps_low=low, eps_high=high, dual_clip=c)
    for ratio in ratios:
        value, slope = spec(ratio, adv, low, high, c)
        got, grad, _, _ = run([ratio], [adv], config)
        assert got == pytest.approx(value, rel=1e-6, abs=0), ratio
        assert grad[0] == pytest.approx(slope, rel=1e-6, abs=0), ratio


@pytest.mark.parametrize("adv", [-1.0, 1.0])
def test_the_papers_bounds_pass_their_own_float32_value(adv):
    config = LossConfig()
    bound = float(np.float32(1.2)) if adv > 0 else float(np.float32(0.8))
    inside = run([bound], [adv], config)[1][0]
    outside = run([bound * (1 + adv * 4 * STEP)], [adv], config)[1][0]
    assert (inside, outside) == (-adv, 0.0)


@given(
    tokens=st.lists(
        st.tuples(st.floats(-25, 25, width=32), st.sampled_from([-1.5, -0.25, 0.0, 0.25, 2.0])), min_size=1, max_size=12
    ),
    eps=st.sampled_from(EXACT),
    denominator=st.integers(0, 50),
)
@settings(max_examples=150, deadline=None)
def test_gradient_with_respect_to_logp_is_the_closed_form(tokens, eps, denominator):
    low, high, c = eps
    logp = torch.tensor([d for d, _ in tokens], requires_grad=True)
    adv = torch.tensor([a for _, a in tokens])
    ratio = log_ratio_to_ratio(logp)
    out = surrogate(ratio, adv, None, float(denominator), LossConfig(eps_low=low, eps_high=high, dual_clip=c))
    (grad,) = torch.autograd.grad(out.loss, logp)
    value, expected, clipped = 0.0, [], 0
    for (difference, a), rho in zip(tokens, ratio.detach().double().tolist(), strict=True):
        one, slope = spec(rho, a, low, high, c)
        value += one / denominator if denominator else 0.0
        expected.append(slope * rho / denominator if denominator and abs(difference) <= 20 else 0.0)
        clipped += a != 0 and slope == 0
    scale = max(1.0, max(map(abs, expected)))
    assert float(out.loss.detach()) == pytest.approx(value, rel=1e-5, abs=1e-6 * scale)
    np.testing.assert_allclose(grad.numpy(), expected, rtol=2e-6, atol=0)
    assert int(out.num_clipped) == clipped
    assert int(out.num_live) == sum(a != 0 for _, a in tokens)


def test_the_loss_of_an_empty_denominator_is_0_with_a_gradient_of_0():
    loss, grad, _, _ = run([0.5, 2.0], [0.0, 0.0], LossConfig(), denominator=0)
    assert loss == 0.0 and grad.tolist() == [0.0, 0.0]


def test_truncated_weights_scale_each_token_and_carry_no_gradient():
    old = torch.tensor([-1.0, -2.0, -0.5, -30.0], requires_grad=True)
    engine = torch.tensor([-1.5, -1.0, -4.0, -1.0])
    weight = truncated_weight(old, engine, 2.0)
    np.testing.assert_allclose(weight.detach().numpy(), [math.exp(0.5), math.exp(-1), 2.0, math.exp(-20)], rtol=1e-6)
    plain = run([1.0, 1.1, 0.9, 1.0], [1.0, -1.0, 0.5, 1.0], LossConfig(), 4.0)[1]
    weighted = run([1.0, 1.1, 0.9, 1.0], [1.0, -1.0, 0.5, 1.0], LossConfig(), 4.0, weight.detach())[1]
    np.testing.assert_allclose(weighted, plain * weight.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("difference", [-25.0, -20.0, -1.0, 0.0, 0.5, 20.0, 25.0])
def test_k3_and_its_gradient(difference):
    logp = torch.tensor([-3.0], requires_grad=True)
    value = k3(logp, logp.detach() + difference)
    (grad,) = torch.autograd.grad(value.sum(), logp)
    d = max(-20.0, min(20.0, difference))
    assert float(value.detach()) == pytest.approx(math.exp(d) - d - 1, rel=1e-6)
    inside = abs(difference) <= 20
    assert float(grad) == pytest.approx(-(math.exp(d) - 1) * inside, rel=1e-6)


def test_k3_estimates_the_divergence():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 7, generator=generator).log_softmax(-1)
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)
    exact = float((policy.exp() * (policy - reference)).sum())
    assert float(k3(policy[drawn], reference[drawn]).mean()) == pytest.approx(exact, rel=0.02)


# -- the LM head ----------------------------------------------------------------------------------------------------------


def head_inputs(dtype, tokens=23, hidden=12, vocab=41):
    generator = torch.Generator().manual_seed(1)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    head_VH = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    targets_T = torch.randint(vocab, (tokens,), generator=generator)
    mix = torch.randn(2, tokens, generator=generator)
    return hidden_TH, head_VH, targets_T, mix


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 7, 22, 23, 24, 2048])  # a divisor, remainders of 1 and others, exactly all, more
def test_log_probability_and_entropy_equal_float64_for_every_chunk_size(chunk, temperature):
    hidden, head, targets, mix = head_inputs(torch.float32)
    logp, entropy = head_logp(hidden, head, targets, temperature, chunk)
    grads = torch.autograd.grad((mix[0] * logp).sum() + (mix[1] * entropy).sum(), (hidden, head))
    hidden64, head64 = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    logits = hidden64 @ head64.T / temperature
    probability = logits.softmax(-1)
    logp64 = probability[torch.arange(23), targets].log()
    entropy64 = -(probability * probability.log()).sum(-1)
    grads64 = torch.autograd.grad((mix[0] * logp64).sum() + (mix[1] * entropy64).sum(), (hidden64, head64))
    torch.testing.assert_close(logp.double(), logp64, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(entropy.double(), entropy64, rtol=1e-5, atol=3e-6)
    for got, expected in zip(grads, grads64, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_chunks_give_the_unchunked_gradients():
    results = []
    for chunk in (23, 5):
        hidden, head, targets, mix = head_inputs(torch.float32)
        logp, entropy = head_logp(hidden, head, targets, 1.0, chunk)
        grads = torch.autograd.grad((mix[0] * logp).sum() + (mix[1] * entropy).sum(), (hidden, head))
        results.append((logp.detach(), entropy.detach(), *grads))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)


def test_no_tokens_give_no_numbers_and_a_gradient_of_0():
    hidden, head, targets, _ = head_inputs(torch.float32)
    logp, entropy = head_logp(hidden[:0], head, targets[:0], 1.0, 5)
    (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), head)
    assert len(logp) == len(entropy) == 0 and not grad.any()


def test_without_gradients_the_numbers_are_the_same_bits():
    hidden, head, targets, _ = head_inputs(torch.bfloat16)
    with_grad = head_logp(hidden, head, targets, 0.9, 6)
    with torch.no_grad():
        without = head_logp(hidden, head, targets, 0.9, 6)
    assert all(torch.equal(a, b) for a, b in zip(with_grad, without, strict=True))
    assert without[0].dtype == torch.float32
