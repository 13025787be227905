"""Both ops inside torch.compile: one graph without breaks, the same numbers as eager.

Shape letters: T tokens, L live tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.cases import CPU, IMPLS, Case, Chosen, Options, call_loss, make_case
from contract.compare import SAME, relative
from torch import Tensor, nn

from metis_kernels import linear_logprob


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> Chosen:
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    # what an earlier test compiled must not be found again, nor count against the limit of recompilations
    torch.compiler.reset()


class Trunk(nn.Module):
    """A layer, then both ops on what it gives, as in a training step: old log-probabilities and anchors, then the loss."""

    def __init__(self, case: Case, impl: Chosen, options: Options, main_grad: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = case.hidden_TH.shape[1]
        self.layer = nn.Linear(size, size, dtype=case.hidden_TH.dtype)
        self.head = nn.Parameter(case.head_VH.clone())
        self.main_grad = torch.zeros(case.head_VH.shape) if main_grad else None
        self.case, self.options = case, options
        self.impl: Chosen = impl
        self.live_L = (case.mask_T if options.entropy_coef else case.live_T).nonzero()[:, 0]

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, its log-probabilities [L], a metric, and the log-sum-exp of all tokens [T]."""
        hidden = torch.tanh(self.layer(hidden_TH))
        before = linear_logprob(hidden, self.head, self.case.targets_T.clamp(min=0), impl=self.impl)
        extra: dict[str, Any] = {"live_L": self.live_L, "anchor_T": before.lse_T, "main_grad": self.main_grad}
        got = call_loss(self.case, hidden, self.head, self.impl, self.options, **extra)
        return got.loss, got.logp_L, got.metrics.ratio_max, before.lse_T


ALL_TERMS = Options(entropy_coef=0.1, kl_coef=0.2, tis_cap=1.1)


MAIN_GRAD = pytest.param(Options(), True, torch.bfloat16, id="main_grad")
TERMS = pytest.param(ALL_TERMS, False, torch.bfloat16, id="all_terms")


@pytest.mark.slow
@pytest.mark.parametrize(("options", "main_grad", "dtype"), [MAIN_GRAD, TERMS])
def test_one_compiled_graph_of_the_reference_equals_eager(options: Options, main_grad: bool, dtype: torch.dtype):
    assert_compiled_equals_eager("reference", options, main_grad, dtype)


@pytest.mark.parametrize(("options", "main_grad", "dtype"), [MAIN_GRAD, TERMS])
@pytest.mark.parametrize("impl", [CPU, "triton"])
def test_one_compiled_graph_of_a_fused_kernel_equals_eager(impl: Chosen, options: Options, main_grad: bool, dtype: torch.dtype):
    assert_compiled_equals_eager(impl, options, main_grad, dtype)


def test_one_compiled_graph_equals_eager_in_float32(impl: Chosen):
    assert_compiled_equals_eager(impl, Options(), False, torch.float32)


def assert_compiled_equals_eager(impl: Chosen, options: Options, main_grad: bool, dtype: torch.dtype) -> None:
    case = make_case(21, 32, 100, dtype)
    results = []
    for compiled in (False, True):
        model = Trunk(case, impl, options, main_grad)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        hidden = case.hidden_TH.clone().requires_grad_()
        loss, *values = run(hidden)
        loss.backward()
        head_grad = model.main_grad if main_grad else model.head.grad
        assert (model.head.grad is None) == main_grad
        results.append([loss, *values, hidden.grad, model.layer.weight.grad, head_grad])
    for eager, compiled in zip(*results, strict=True):
        assert relative(compiled, eager) <= SAME
        assert eager.detach().abs().sum() > 0


@pytest.mark.parametrize("impl", [CPU, *(pytest.param(one, marks=pytest.mark.slow) for one in ("triton", "reference"))])
def test_an_upstream_factor_reaches_the_gradients_of_a_compiled_graph(impl: Chosen):
    case = make_case(21, 32, 100)
    model = Trunk(case, impl, Options(), main_grad=False)
    grads = []
    for factor in (1.0, -3.5):
        model.zero_grad()
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        (factor * run(case.hidden_TH)[0]).backward()
        assert model.head.grad is not None
        grads.append(model.head.grad)
    assert relative(grads[1], -3.5 * grads[0]) <= SAME


# opcheck's own checks of dynamic shapes and of autograd: a fake implementation that disagrees with the real one shows here
def test_the_registration_of_linear_logprob_is_sound(impl: Chosen):
    case = make_case(5, 32, 33, masked=0.0)
    arguments = (case.hidden_TH, case.head_VH, case.targets_T, 1.3, 0, "", 2, impl)
    assert set(torch.library.opcheck(torch.ops.metis_kernels.linear_logprob.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("need_hidden", [False, True])
@pytest.mark.parametrize("need_head", [False, True])
def test_the_registration_of_hdpo_loss_is_sound(impl: Chosen, need_hidden: bool, need_head: bool):
    case = make_case(5, 32, 33, masked=0.0, quiet=0.0)
    live = torch.tensor([0, 2, 3])
    share = torch.full((3,), 0.2)
    assert case.old_logp_T is not None
    arguments = (
        case.hidden_TH, case.head_VH, live, case.targets_T[live], None, case.adv_acc_T[live], case.adv_tool_T[live], share,
        case.old_logp_T[live], None, None, 0.2, 0.2, 3.0, 0.0, 0.0, 0.0, False, 1.3, 0, "", True, 2, impl, need_hidden,
        torch.zeros(33, 32) if need_head else None,
    )  # fmt: skip
    assert set(torch.library.opcheck(torch.ops.metis_kernels.hdpo_loss.default, arguments).values()) == {"SUCCESS"}


def test_the_registration_of_attach_gradients_is_sound():
    hidden, head = torch.randn(5, 32), torch.randn(33, 32)
    arguments = (torch.tensor(2.0), hidden, head, torch.randn(5, 32), torch.randn(33, 32))
    assert set(torch.library.opcheck(torch.ops.metis_kernels.attach_gradients.default, arguments).values()) == {"SUCCESS"}
