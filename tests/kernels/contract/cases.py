"""Inputs of the two ops, the implementations that are held to the contract, and how an op is called on a case.

Shape letters: T tokens, L live tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from metis_kernels import HdpoLoss, cpu_library_status, hdpo_loss

Chosen = Literal["triton", "cpu", "reference"]
# not in CI: there the tests must fail if the C++ side is missing, not pass it over in silence
_NOT_BUILT = pytest.mark.skipif(bool(cpu_library_status()) and not os.environ.get("CI"), reason=cpu_library_status())
CPU = pytest.param("cpu", marks=_NOT_BUILT)
IMPLS = ("reference", CPU, "triton")
"""Parameters of the tests that every implementation has to pass (Triton in the interpreter)."""

SHAPES: dict[str, tuple[int, int, int]] = {
    "one_token_one_row": (1, 32, 1),  # softmax of one logit: log-probability and gradients are 0
    "two_tokens_few_rows": (2, 100, 33),  # everything smaller than a tile; H no power of two
    "one_below_a_tile": (63, 32, 252),  # one token short of 64, four rows short of 256
    "two_past_two_tiles": (130, 100, 1000),  # tails of 2 tokens and of rows that fill no tile
    "one_token_many_rows": (1, 100, 1000),  # a matrix-vector product
    "many_tiles_odd": (63, 32, 5003),  # a prime vocabulary: unaligned row stride of the logits, tail of 3 rows
}
"""(T, H, V) by what the size is there for."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `hdpo_loss` that change its value; the defaults are the op's."""

    w_acc: float = 1.0
    w_tool: float = 0.15
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float = 3.0
    temperature: float = 1.0
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    tis_cap: float = 0.0
    loss_scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Inputs of one call. targets_T outside the mask may be anything."""

    hidden_TH: Tensor
    head_VH: Tensor
    targets_T: Tensor
    old_logp_T: Tensor | None
    adv_acc_T: Tensor
    adv_tool_T: Tensor
    mask_T: Tensor
    num_acc: float
    num_tool: float
    ref_logp_T: Tensor | None = None
    engine_logp_T: Tensor | None = None

    @property
    def live_T(self) -> Tensor:
        """Tokens that the paper's recipe sends through the LM head."""
        return self.mask_T & ((self.adv_acc_T != 0) | (self.adv_tool_T != 0))

    def take(self, index: Tensor) -> Case:
        """Some of the tokens, in that order, under the same denominators."""

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        return replace(
            self,
            hidden_TH=self.hidden_TH[index],
            targets_T=self.targets_T[index],
            old_logp_T=pick(self.old_logp_T),
            adv_acc_T=self.adv_acc_T[index],
            adv_tool_T=self.adv_tool_T[index],
            mask_T=self.mask_T[index],
            ref_logp_T=pick(self.ref_logp_T),
            engine_logp_T=pick(self.engine_logp_T),
        )

    def to(self, device: str) -> Case:
        """The same case on another device."""
        moved = {
            name: value.to(device) for name in self.__dataclass_fields__ if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)


def make_case(
    num_tokens: int = 63,
    size: int = 32,
    vocab: int = 252,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    scale: float = 1.0,
    drift: float = 0.3,
    masked: float = 0.2,
    quiet: float = 0.2,
) -> Case:
    """Random inputs that look like a step of training.

    Args:
        scale: standard deviation of the logits. drift: of logp - old, in nats; 0.3 puts about half of the ratios out of
            their bounds.
        masked, quiet: shares of tokens outside the mask, and of those whose advantages are both 0.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def chance(share: float) -> Tensor:
        return torch.rand(num_tokens, generator=random) < share

    hidden = normal(num_tokens, size).to(dtype)
    head = (normal(vocab, size) * scale / size**0.5).to(dtype)
    targets = torch.randint(vocab, (num_tokens,), generator=random)
    z = hidden.double() @ head.double().T
    logp = torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0]
    old = logp - drift * normal(num_tokens)
    loud = ~chance(quiet)
    adv_acc = normal(num_tokens) * loud
    adv_tool = normal(num_tokens) * loud * chance(0.5)
    mask = ~chance(masked)
    if num_tokens < 3:  # too few to leave any out
        mask, adv_acc = torch.ones_like(mask), normal(num_tokens)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        hidden_TH=hidden,
        head_VH=head,
        # what collators write where nothing was sampled; no implementation may read it
        targets_T=torch.where(mask, targets, -100),
        old_logp_T=old.to(wide),
        adv_acc_T=adv_acc.to(wide),
        adv_tool_T=adv_tool.to(wide),
        mask_T=mask,
        num_acc=float(mask.sum()) + 17,  # tokens of other micro-batches count too
        num_tool=float((mask & (adv_tool != 0)).sum()) + 5,
        ref_logp_T=(logp + 0.5 * normal(num_tokens)).to(wide),
        engine_logp_T=(old + 0.2 * normal(num_tokens)).to(wide),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What a call returned, and its gradients (dHidden in the dtype of hidden, dHead of the head or of main_grad)."""

    output: HdpoLoss
    d_hidden_TH: Tensor
    d_head_VH: Tensor


def run_loss(case: Case, impl: Chosen, options: Options | None = None, upstream: float = 1.0, **arguments: Any) -> Result:
    """`hdpo_loss` forward and backward on a case; the head's gradient from main_grad if one is given."""
    hidden = case.hidden_TH.detach().clone().requires_grad_()
    head = case.head_VH.detach().clone().requires_grad_()
    output = call_loss(case, hidden, head, impl, options, **arguments)
    (output.loss * upstream).backward()
    assert hidden.grad is not None
    main_grad = arguments.get("main_grad")
    d_head = head.grad if main_grad is None else main_grad
    assert d_head is not None
    return Result(output, hidden.grad, d_head)


def call_loss(
    case: Case, hidden: Tensor, head: Tensor, impl: Chosen, options: Options | None = None, **arguments: Any
) -> HdpoLoss:
    """`hdpo_loss` on a case with these hidden states and this head in place of the case's."""
    return hdpo_loss(
        hidden, head, case.targets_T, case.old_logp_T, case.adv_acc_T, case.adv_tool_T, case.mask_T,
        case.num_acc, case.num_tool, ref_logp_T=case.ref_logp_T, engine_logp_T=case.engine_logp_T,
        **asdict(options or Options()), impl=impl, **arguments,
    )  # fmt: skip
