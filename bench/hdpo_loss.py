"""`hdpo_loss`, forward and backward, beside three matrix products and what others offer.

Shape letters: T tokens, L live tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metis_kernels import Impl, hdpo_loss

from . import head_case, ours
from .candidate import Candidate, Errors, Op, Outcome, PeerMissing, Plan, Request, Step, largest_error, relative_error
from .head_case import DUAL_CLIP, EPS_HIGH, EPS_LOW, W_ACC, W_TOOL, HeadCase, dual_loss, eager_logp
from .peers import LogpOf, cce_logp, need_compiler, verl_logp

GRADIENT_LIMITS = {"bf16": (3e-3, 3e-3), "fp32": (1e-5, 1e-5)}


def _leaves(case: HeadCase) -> tuple[Tensor, Tensor]:
    return case.hidden_TH.detach().requires_grad_(), case.head_VH.detach().requires_grad_()


def _outcome(logp_T: Tensor | None, hidden_TH: Tensor, head_VH: Tensor) -> Outcome:
    assert hidden_TH.grad is not None and head_VH.grad is not None
    return Outcome(logp_T, (hidden_TH.grad, head_VH.grad), handed_back=hidden_TH.grad.nbytes + head_VH.grad.nbytes)


def _ours(case: HeadCase, impl: Impl, into_main_grad: bool) -> Step:
    """into_main_grad: dWeight is added to a float32 buffer that is there before; else it is made, in the head's dtype."""
    main_grad = torch.zeros_like(case.head_VH, dtype=torch.float32) if into_main_grad else None

    def step() -> Outcome:
        hidden, head = _leaves(case)
        result = hdpo_loss(
            hidden, head, case.targets_T, case.old_logp_T, case.adv_acc_T, case.adv_tool_T, None, case.num_acc, case.num_tool,
            w_acc=W_ACC, w_tool=W_TOOL, eps_low=EPS_LOW, eps_high=EPS_HIGH, dual_clip=DUAL_CLIP, main_grad=main_grad, impl=impl,
        )  # fmt: skip
        result.loss.backward()
        logp_T = torch.full_like(case.old_logp_T, torch.nan)
        logp_T[result.live_L] = result.logp_L
        if main_grad is None:
            return _outcome(logp_T, hidden, head)
        assert hidden.grad is not None
        return Outcome(logp_T, (hidden.grad, main_grad), handed_back=hidden.grad.nbytes)

    return step


def _by_autograd(case: HeadCase, logp_of: LogpOf) -> Step:
    """Log-probabilities by `logp_of`, the loss on them in eager torch."""

    def step() -> Outcome:
        hidden, head = _leaves(case)
        logp_T = logp_of(hidden, head, case.targets_T)
        dual_loss(logp_T, case).backward()
        return _outcome(logp_T.detach(), hidden, head)

    return step


def _compiled(case: HeadCase) -> Step:
    """The eager loss under torch.compile, as a whole."""
    need_compiler(case.hidden_TH.device)

    @functools.partial(torch.compile, dynamic=False)
    def loss_of(hidden_TH: Tensor, head_VH: Tensor) -> tuple[Tensor, Tensor]:
        logp_T = eager_logp(hidden_TH, head_VH, case.targets_T)
        return dual_loss(logp_T, case), logp_T.detach()

    def step() -> Outcome:
        hidden, head = _leaves(case)
        loss, logp_T = loss_of(hidden, head)
        loss.backward()
        return _outcome(logp_T, hidden, head)

    return step


def _liger(case: HeadCase) -> Step:
    """Liger's chunked GRPO loss, its own defaults: one chunk a rollout, the loss compiled. One advantage, no log-probs out."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PeerMissing(f"not installed (pip install liger-kernel): {error}") from error
    need_compiler(case.hidden_TH.device)
    fused = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=EPS_LOW, epsilon_high=EPS_HIGH, delta=DUAL_CLIP, loss_type="dapo"
    )
    count = case.num_rollouts
    targets, old = case.targets_T.view(count, -1), case.old_logp_T.view(count, -1)
    advantages = case.adv_acc_T.view(count, -1)[:, 0].contiguous()
    sampled = torch.ones_like(targets)

    def step() -> Outcome:
        hidden, head = _leaves(case)
        rollouts = hidden.view(count, -1, hidden.shape[1])
        loss, _ = fused(rollouts, head, targets, sampled, advantages, old_per_token_logps=old)
        loss.backward()
        return _outcome(None, hidden, head)

    return step


PEERS: dict[str, Callable[[HeadCase], Step]] = {
    "eager": lambda case: _by_autograd(case, eager_logp),
    "compile": _compiled,
    "liger": _liger,
    "verl": lambda case: _by_autograd(case, verl_logp()),
    "cce": lambda case: _by_autograd(case, cce_logp(case.hidden_TH.device)),
}
ONE_ADVANTAGE = {"liger"}
"""Peers whose loss has one advantage a token; they are given, and checked on, the accuracy channel alone."""

OURS: dict[str, Callable[[HeadCase], Step]] = {
    "ours": lambda case: _ours(case, "auto", into_main_grad=True),
    "ours_param_grad": lambda case: _ours(case, "auto", into_main_grad=False),
    "ours_reference": lambda case: _ours(case, "reference", into_main_grad=True),
}


def _floor(case: HeadCase, num_rows: int) -> Step:
    """The three products of `num_rows` tokens, outputs allocated beforehand."""
    hidden, head = case.hidden_TH[:num_rows], case.head_VH
    logits = hidden.new_empty(num_rows, len(head))
    d_hidden, d_head = torch.empty_like(hidden), torch.empty_like(head)

    def step() -> Outcome:
        torch.mm(hidden, head.T, out=logits)
        torch.mm(logits, head, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_head)
        return Outcome()

    return step


def _check(part: HeadCase, truth: Outcome, prepare: Callable[[HeadCase], Step]) -> Errors:
    found = prepare(part)()
    values = None
    if found.values is not None and truth.values is not None:
        live = part.live_T  # the others have no log-probability where they are left out
        values = largest_error(found.values[live], truth.values[live])
    pairs = zip(found.gradients, truth.gradients, strict=True)
    return Errors(values, tuple(relative_error(gradient, exact) for gradient, exact in pairs))


def flop_formula(
    hidden_TH: torch.Size, head_VH: torch.Size, live_L: torch.Size, *rest: Any, out_shape: object = None, **_: object
) -> int:
    """Products of our op: 2 L H V for the logits and as much for each gradient that is asked for.

    A formula, not a count: torch cannot look into a custom op. A test holds it to torch's count of the products that the
    reference runs. The products of the C++ code cannot be counted from outside.
    """
    need_hidden, head_grad = rest[-2:]
    return 2 * live_L[0] * head_VH[0] * head_VH[1] * (1 + bool(need_hidden) + (head_grad is not None))


def _plan(request: Request) -> Plan:
    case = head_case.make(request)
    part = case.part()

    @functools.cache
    def truth(one_advantage: bool) -> Outcome:
        exact = _by_autograd((part.accuracy_only() if one_advantage else part).double(), eager_logp)()
        d_hidden_TH, d_head_VH = exact.gradients
        # kept while the times are taken: float64 [V, H] would take 5 GB of the GPU, and float32 is a hundred times finer
        # than the tightest limit
        return dataclasses.replace(exact, gradients=(d_hidden_TH, d_head_VH.float()))

    def candidate(name: str, prepare: Callable[[HeadCase], Step], limits: Errors | None) -> Candidate:
        single = name in ONE_ADVANTAGE
        return Candidate(
            name,
            prepare=lambda: prepare(case),
            check=lambda: _check(part.accuracy_only() if single else part, truth(single), prepare),
            limits=limits,
            live_fraction=case.live_fraction,
            gemms_visible=not (name == "cce" and request.device.type == "cuda"),
        )

    num_tokens, num_live = len(case.targets_T), int(case.live_T.sum())
    limits = Errors(head_case.logp_limit(request), GRADIENT_LIMITS[request.dtype])
    candidates = [candidate(name, prepare, limits) for name, prepare in OURS.items()]
    candidates.append(Candidate("floor", lambda: _floor(case, num_tokens), None, None, 1.0))
    if num_live < num_tokens:
        candidates.append(Candidate("floor_live", lambda: _floor(case, num_live), None, None, case.live_fraction))
    candidates += [candidate(name, PEERS[name], None) for name in request.peers]
    return Plan(
        candidates,
        shape={"T": num_tokens, "H": request.shape["H"], "V": request.shape["V"]},
        gemm_flops=2 * num_tokens * request.shape["H"] * request.shape["V"],
        least_bytes=2 * (case.hidden_TH.nbytes + case.head_VH.nbytes) + case.targets_T.nbytes + 3 * case.old_logp_T.nbytes,
        flop_formulas={torch.ops.metis_kernels.hdpo_loss: flop_formula},
        notes=[
            f"Forward and backward. Errors: against float64, {len(part.targets_T)} of the tokens, the first of each of the "
            f"{case.num_rollouts} rollouts, the whole vocabulary.",
            f"ours: impl auto is {ours.chosen(request)}, dWeight added to a float32 main_grad; ours_param_grad: dWeight "
            "returned in the head's dtype; ours_reference: plain torch, float32 products.",
            "floor: logits, dHidden and dWeight by torch.mm into buffers that are there before; floor_live: of live tokens.",
            "liger: one advantage a token (accuracy), its errors against that loss; it hands out no log-probabilities.",
        ],
    )


OP = Op(
    summary="LM head and clipped dual-surrogate loss, forward and backward",
    shape={"T": 2048, "H": 1024, "V": 32768},
    dtypes=("bf16", "fp32"),
    peers=tuple(PEERS),
    all_live=False,
    errors=("logp", "dHidden", "dWeight"),
    plan=_plan,
)
