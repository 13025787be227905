"""`linear_logprob`, every implementation, against float64. Shape letters: T tokens, H hidden size, V vocabulary."""

from __future__ import annotations

import pytest
import torch
from contract.cases import CPU, IMPLS, SHAPES, Chosen, make_case
from contract.compare import check_head, logp_tolerance
from contract.truth import head_truth
from torch import Tensor

from metis_kernels import LinearLogprob, linear_logprob


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> Chosen:
    return request.param


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    case = make_case(*shape, dtype, scale=scale, masked=0.0)
    return case.hidden_TH, case.head_VH, case.targets_T


def check(got: LinearLogprob, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0) -> None:
    check_head(got.logp_T, got.entropy_T, got.lse_T, head_truth(hidden, head, targets, temperature), hidden.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_float64_at_every_shape(impl: Chosen, shape: tuple[int, int, int], dtype: torch.dtype):
    hidden, head, targets = inputs(shape, dtype)
    check(linear_logprob(hidden, head, targets, impl=impl), hidden, head, targets)


def test_the_reference_computes_float64_in_float64():
    hidden, head, targets = inputs((63, 32, 252), torch.float64)
    check(linear_logprob(hidden, head, targets, impl="reference"), hidden, head, targets)


def test_one_row_of_vocabulary_has_log_probability_zero(impl: Chosen):
    hidden, head, targets = inputs((2, 32, 1))
    got = linear_logprob(hidden, head, targets, impl=impl)
    assert got.logp_T.abs().max() <= 2e-7
    assert got.entropy_T.abs().max() <= 2e-7


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_divides_logits_by_the_temperature(impl: Chosen, temperature: float):
    hidden, head, targets = inputs((63, 32, 252))
    check(linear_logprob(hidden, head, targets, temperature=temperature, impl=impl), hidden, head, targets, temperature)


def shifted(hidden: Tensor, head: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Inputs whose logits are all `shift` higher: one column more, 1 in every token."""
    column = torch.ones(len(hidden), 1), torch.full((len(head), 1), shift)
    return torch.cat([hidden, column[0]], 1), torch.cat([head, column[1]], 1)


@pytest.mark.parametrize("shift", [-80.0, 80.0])
def test_a_shift_of_all_logits_changes_only_the_log_sum_exp(impl: Chosen, shift: float):
    # -80: every logit is negative, where a maximum that starts from 0 (a masked tail, say) would show
    hidden, head, targets = inputs((63, 31, 252))
    got = linear_logprob(*shifted(hidden, head, shift), targets, impl=impl)
    want = head_truth(hidden, head, targets)
    limit = logp_tolerance(abs(shift) + want.peak, torch.float32)
    torch.testing.assert_close(got.logp_T.double(), want.logp_T, rtol=0, atol=limit)
    torch.testing.assert_close(got.lse_T.double(), want.lse_T + shift, rtol=0, atol=limit)
    torch.testing.assert_close(got.entropy_T.double(), want.entropy_T, rtol=1e-5, atol=limit)


def test_equal_logits_give_the_uniform_distribution(impl: Chosen):
    hidden, head, targets = torch.ones(3, 32), torch.full((252, 32), -0.25), torch.tensor([0, 100, 251])
    got = linear_logprob(hidden, head, targets, impl=impl)
    uniform = torch.full((3,), 252.0).log()
    torch.testing.assert_close(got.logp_T, -uniform, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.entropy_T, uniform, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [100.0, 3000.0])
def test_huge_logits_stay_finite_and_exact(impl: Chosen, scale: float):
    hidden, head, targets = inputs((63, 32, 252), scale=scale)
    want = head_truth(hidden, head, targets)
    assert want.peak > 3 * scale
    got = linear_logprob(hidden, head, targets, impl=impl)
    limit = logp_tolerance(want.peak, torch.float32)
    torch.testing.assert_close(got.logp_T.double(), want.logp_T, rtol=0, atol=limit)
    torch.testing.assert_close(got.lse_T.double(), want.lse_T, rtol=0, atol=limit)
    torch.testing.assert_close(got.entropy_T.double(), want.entropy_T, rtol=1e-5, atol=limit)


def test_finds_the_target_at_every_edge_of_a_tile(impl: Chosen):
    edges = sorted(
        {j for tile in (16, 32, 48, 64, 128, 256, 512) for k in (1, 2, 3) for j in (k * tile - 1, k * tile)} | {0, 999}
    )
    targets = torch.tensor([j for j in edges if j < 1000])
    case = make_case(len(targets), 32, 1000)
    check(linear_logprob(case.hidden_TH, case.head_VH, targets, impl=impl), case.hidden_TH, case.head_VH, targets)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_chunk_does_not_matter(impl: Chosen, chunk: int):
    hidden, head, targets = inputs((63, 32, 252))
    check(linear_logprob(hidden, head, targets, chunk=chunk, impl=impl), hidden, head, targets)


def test_no_tokens_give_empty_results(impl: Chosen):
    got = linear_logprob(torch.empty(0, 32), torch.randn(252, 32), torch.empty(0, dtype=torch.int64), impl=impl)
    assert [value.shape for value in (got.logp_T, got.entropy_T, got.lse_T)] == [(0,)] * 3


# numpy, in which Triton's interpreter computes, warns of what a GPU does in silence
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_token_gives_non_finite_results_alone(impl: Chosen, bad: float):
    hidden, head, targets = inputs((63, 32, 252))
    clean = linear_logprob(hidden, head, targets, impl=impl)
    hidden[5, 3] = bad
    got = linear_logprob(hidden, head, targets, impl=impl)
    others = torch.arange(63) != 5
    for name in ("logp_T", "entropy_T", "lse_T"):
        assert not getattr(got, name)[5].isfinite()
        torch.testing.assert_close(getattr(got, name)[others], getattr(clean, name)[others], rtol=0, atol=0)


def test_strided_inputs_are_read_by_their_strides(impl: Chosen):
    hidden, head, targets = inputs((63, 32, 252))
    views = {
        "transposed hidden": (hidden.T.contiguous().T, head, targets),
        "every second column of hidden": (hidden.repeat_interleave(2, 1)[:, ::2], head, targets),
        "one row of hidden for all": (hidden[:1].expand(63, 32), head, targets),
        "transposed head": (hidden, head.T.contiguous().T, targets),
        "every second row of head": (hidden, head.repeat_interleave(2, 0)[::2], targets),
        "head behind an offset": (hidden, torch.cat([torch.full((3, 32), 9.0), head])[3:], targets),
        "every second target": (hidden, head, targets.repeat_interleave(2)[::2]),
    }
    for name, (some_hidden, some_head, some_targets) in views.items():
        got = linear_logprob(some_hidden, some_head, some_targets, impl=impl)
        want = head_truth(some_hidden, some_head, some_targets)
        error = float((got.logp_T.double() - want.logp_T).abs().max())
        assert error <= logp_tolerance(want.peak, torch.float32), f"{name}: {error:.2e}"


def test_gives_no_gradient_and_leaves_its_inputs_alone(impl: Chosen):
    hidden, head, targets = inputs((2, 32, 33))
    before = hidden.clone(), head.clone(), targets.clone()
    got = linear_logprob(hidden.requires_grad_(), head.requires_grad_(), targets, impl=impl)
    assert not (got.logp_T.requires_grad or got.entropy_T.requires_grad or got.lse_T.requires_grad)
    assert all(torch.equal(now.detach(), then) for now, then in zip((hidden, head, targets), before, strict=True))


# A Qwen3-VL vocabulary in the interpreter would take minutes; tests/kernels/test_gpu.py runs it on a GPU.
@pytest.mark.parametrize("vast_impl", ["reference", CPU])
def test_is_exact_to_1e_5_at_the_real_vocabulary(vast_impl: Chosen):
    random = torch.Generator().manual_seed(0)
    # logits of standard deviation 2, in the range of a trained model's
    hidden = torch.randn(64, 256, generator=random).bfloat16()
    head = (torch.randn(151936, 256, generator=random) / 8).bfloat16()
    targets = torch.randint(151936, (64,), generator=random)
    targets[:2] = torch.tensor([0, 151935])
    got = linear_logprob(hidden, head, targets, impl=vast_impl)
    want = head_truth(hidden, head, targets)
    assert (got.logp_T.double() - want.logp_T).abs().max() <= 1e-5
    assert (got.lse_T.double() - want.lse_T).abs().max() <= 1e-5
    torch.testing.assert_close(got.entropy_T.double(), want.entropy_T, rtol=1e-5, atol=0)
