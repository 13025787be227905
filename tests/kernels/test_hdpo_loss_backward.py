"""`hdpo_loss`, every implementation: how gradients reach their owners, bad numbers, strides.

Shape letters: T tokens, L live tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from contract.cases import IMPLS, Chosen, Options, call_loss, make_case, run_loss
from contract.compare import SAME, relative
from contract.truth import loss_truth


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> Chosen:
    return request.param


# numpy, in which Triton's interpreter computes, warns of what a GPU does in silence
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("on_policy", [False, True])
def test_a_non_finite_token_is_not_silently_dropped(impl: Chosen, bad: float, on_policy: bool):
    case = make_case(63, 32, 252)
    case = replace(case, old_logp_T=None) if on_policy else case
    position = int(case.live_T.nonzero()[4])
    case.hidden_TH[position, 3] = bad
    got = run_loss(case, impl)
    row = got.output.live_L == position
    assert not got.output.logp_L[row].isfinite()
    assert got.output.logp_L[~row].isfinite().all()
    assert got.output.loss.isnan() or bad == math.inf
    assert not got.d_hidden_TH[position].isfinite().all()
    others = torch.arange(63) != position
    assert got.d_hidden_TH[others].isfinite().all()
    assert not got.d_head_VH.isfinite().all()


# numpy, in which Triton's interpreter computes, warns of what a GPU does in silence
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ["old_logp_T", "adv_acc_T", "adv_tool_T", "ref_logp_T", "engine_logp_T"])
def test_a_nan_in_a_token_vector_makes_the_loss_and_the_gradient_of_that_token_nan(impl: Chosen, name: str):
    case = make_case(63, 32, 252)
    position = int(case.live_T.nonzero()[4])
    getattr(case, name)[position] = math.nan
    got = run_loss(case, impl, Options(kl_coef=0.1, tis_cap=1.1))
    assert got.output.loss.isnan()
    assert got.d_hidden_TH[position].isnan().all()
    assert got.d_hidden_TH[torch.arange(63) != position].isfinite().all()
    assert got.d_head_VH.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_gets_what_the_parameter_would_on_top_of_what_was_there(impl: Chosen, dtype: torch.dtype):
    case = make_case(63, 32, 252, dtype)
    want = loss_truth(case)
    there = torch.randn(252, 32, generator=torch.Generator().manual_seed(3))
    main_grad = there.clone()
    head = case.head_VH.clone().requires_grad_()
    hidden = case.hidden_TH.clone().requires_grad_()
    call_loss(case, hidden, head, impl, main_grad=main_grad).loss.backward()
    assert head.grad is None
    # the gradient is small beside what was there: float32 keeps 6e-8 of that
    added = main_grad.double() - there.double()
    assert (added - want.d_head_VH).norm() <= 3e-3 * want.d_head_VH.norm() + 1e-7 * there.norm()
    fresh = run_loss(case, impl, main_grad=torch.zeros(252, 32))
    own = run_loss(case, impl)
    assert relative(own.d_head_VH, fresh.d_head_VH) <= (SAME if dtype == torch.float32 else 3e-3)
    assert torch.equal(own.d_hidden_TH, fresh.d_hidden_TH)


def test_an_upstream_factor_scales_both_gradients(impl: Chosen):
    case = make_case(63, 32, 252)
    plain, scaled = run_loss(case, impl), run_loss(case, impl, upstream=-3.5)
    assert relative(scaled.d_hidden_TH, -3.5 * plain.d_hidden_TH) <= SAME
    assert relative(scaled.d_head_VH, -3.5 * plain.d_head_VH) <= SAME


def test_two_calls_in_one_graph_add_their_gradients(impl: Chosen):
    case = make_case(63, 32, 252)
    hidden, head = case.hidden_TH.clone().requires_grad_(), case.head_VH.clone().requires_grad_()
    (call_loss(case, hidden, head, impl).loss + 2 * call_loss(case, hidden, head, impl).loss).backward()
    once = run_loss(case, impl)
    assert hidden.grad is not None and head.grad is not None
    assert relative(hidden.grad, 3 * once.d_hidden_TH) <= SAME
    assert relative(head.grad, 3 * once.d_head_VH) <= SAME


@pytest.mark.parametrize("retain", [False, True])
def test_a_second_backward_raises(impl: Chosen, retain: bool):
    # gradients are scaled in place: a second pass would hand out wrong ones
    case = make_case(2, 32, 33)
    loss = call_loss(case, case.hidden_TH.requires_grad_(), case.head_VH.requires_grad_(), impl).loss
    loss.backward(retain_graph=retain)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|second time"):
        loss.backward()


def test_without_gradients_only_the_value_is_computed(impl: Chosen):
    case = make_case(63, 32, 252)
    want = run_loss(case, impl)
    main_grad = torch.ones(252, 32)
    with torch.no_grad():
        got = call_loss(case, case.hidden_TH.requires_grad_(), case.head_VH.requires_grad_(), impl, main_grad=main_grad)
    assert relative(got.loss, want.output.loss) <= SAME
    assert not got.loss.requires_grad
    assert (main_grad == 1).all()


def test_a_frozen_head_leaves_the_gradient_of_hidden_the_same(impl: Chosen):
    case = make_case(63, 32, 252)
    hidden = case.hidden_TH.clone().requires_grad_()
    call_loss(case, hidden, case.head_VH, impl).loss.backward()
    assert hidden.grad is not None
    assert relative(hidden.grad, run_loss(case, impl).d_hidden_TH) <= SAME
    assert case.head_VH.grad is None


def test_frozen_hidden_states_leave_the_gradient_of_the_head_the_same(impl: Chosen):
    case = make_case(63, 32, 252)
    head = case.head_VH.clone().requires_grad_()
    call_loss(case, case.hidden_TH, head, impl).loss.backward()
    assert head.grad is not None
    assert relative(head.grad, run_loss(case, impl).d_head_VH) <= SAME
    assert case.hidden_TH.grad is None


def test_inputs_are_left_alone(impl: Chosen):
    case = make_case(63, 32, 252)
    copy = case.take(torch.arange(63))
    copy = replace(copy, head_VH=case.head_VH.clone())
    run_loss(case, impl, Options(entropy_coef=0.1, kl_coef=0.1, tis_cap=1.1), anchor_T=torch.zeros(63))
    for name in ("hidden_TH", "head_VH", "targets_T", "old_logp_T", "adv_acc_T", "adv_tool_T", "mask_T", "ref_logp_T"):
        assert torch.equal(getattr(case, name), getattr(copy, name)), name


def strided(value: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second element of a larger tensor."""
    return value.repeat_interleave(2, -1)[..., ::2]


def test_strided_inputs_are_read_by_their_strides(impl: Chosen):
    case = make_case(63, 32, 252)
    want = loss_truth(case)
    anchor = want.head.lse_T.float()
    assert case.old_logp_T is not None
    views = {
        "transposed hidden": replace(case, hidden_TH=case.hidden_TH.T.contiguous().T),
        "strided hidden": replace(case, hidden_TH=strided(case.hidden_TH)),
        "transposed head": replace(case, head_VH=case.head_VH.T.contiguous().T),
        "strided head": replace(case, head_VH=strided(case.head_VH)),
        "head behind an offset": replace(case, head_VH=torch.cat([torch.full((3, 32), 9.0), case.head_VH])[3:]),
        "strided vectors": replace(
            case,
            targets_T=strided(case.targets_T),
            old_logp_T=strided(case.old_logp_T),
            adv_acc_T=strided(case.adv_acc_T),
            adv_tool_T=strided(case.adv_tool_T),
            mask_T=strided(case.mask_T),
        ),
    }
    for name, view in views.items():
        # not through run_loss, which would make the inputs contiguous
        hidden, head = view.hidden_TH.detach().requires_grad_(), view.head_VH.detach().requires_grad_()
        loss = call_loss(view, hidden, head, impl, anchor_T=strided(anchor)).loss
        loss.backward()
        assert hidden.grad is not None and head.grad is not None
        assert relative(loss, want.loss) <= 1e-5, name
        assert relative(hidden.grad, want.d_hidden_TH) <= 1e-5, name
        assert relative(head.grad, want.d_head_VH) <= 1e-5, name


def test_one_hidden_state_for_all_tokens_gets_the_sum_of_their_gradients(impl: Chosen):
    case = make_case(63, 32, 252)
    row = case.hidden_TH[:1].clone().requires_grad_()
    repeated = replace(case, hidden_TH=case.hidden_TH[:1].expand(63, 32), old_logp_T=None)
    want = loss_truth(repeated)
    call_loss(repeated, row.expand(63, 32), case.head_VH, impl).loss.backward()
    assert row.grad is not None
    assert relative(row.grad, want.d_hidden_TH.sum(0, keepdim=True)) <= 1e-5


def test_a_constant_advantage_may_be_an_expanded_tensor(impl: Chosen):
    case = make_case(63, 32, 252)
    full = replace(case, adv_acc_T=torch.full((63,), 0.7))
    expanded = replace(case, adv_acc_T=torch.tensor(0.7).expand(63))
    assert torch.equal(run_loss(expanded, impl).d_head_VH, run_loss(full, impl).d_head_VH)
