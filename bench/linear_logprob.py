"""`linear_logprob`, no gradient, beside one matrix product and what others offer.

Shape letters: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from metis_kernels import Impl, linear_logprob

from . import head_case, ours
from .candidate import Candidate, Errors, Op, Outcome, Plan, Request, Step, largest_error
from .head_case import HeadCase, eager_logp
from .peers import LogpOf, cce_logp, need_compiler, verl_logp


def _ours(case: HeadCase, impl: Impl) -> Step:
    return lambda: Outcome(linear_logprob(case.hidden_TH, case.head_VH, case.targets_T, impl=impl).logp_T)


def _without_gradient(case: HeadCase, logp_of: LogpOf) -> Step:
    def step() -> Outcome:
        with torch.no_grad():
            return Outcome(logp_of(case.hidden_TH, case.head_VH, case.targets_T))

    return step


def _compiled(case: HeadCase) -> Step:
    need_compiler(case.hidden_TH.device)
    return _without_gradient(case, torch.compile(eager_logp, dynamic=False))


PEERS: dict[str, Callable[[HeadCase], Step]] = {
    "eager": lambda case: _without_gradient(case, eager_logp),
    "compile": _compiled,
    "verl": lambda case: _without_gradient(case, verl_logp()),
    "cce": lambda case: _without_gradient(case, cce_logp(case.hidden_TH.device)),
}

OURS: dict[str, Callable[[HeadCase], Step]] = {
    "ours": lambda case: _ours(case, "auto"),
    "ours_reference": lambda case: _ours(case, "reference"),
}


def _floor(case: HeadCase) -> Step:
    logits = case.hidden_TH.new_empty(len(case.hidden_TH), len(case.head_VH))

    def step() -> Outcome:
        torch.mm(case.hidden_TH, case.head_VH.T, out=logits)
        return Outcome()

    return step


def flop_formula(hidden_TH: torch.Size, head_VH: torch.Size, *rest: object, out_shape: object = None, **_: object) -> int:
    """Products of our op: 2 T H V. A formula, not a count; see hdpo_loss.flop_formula."""
    return 2 * hidden_TH[0] * head_VH[0] * head_VH[1]


def _plan(request: Request) -> Plan:
    case = head_case.make(request)
    part = case.part()
    truth_T = eager_logp(part.hidden_TH.double(), part.head_VH.double(), part.targets_T)

    def candidate(name: str, prepare: Callable[[HeadCase], Step], limits: Errors | None) -> Candidate:
        def check() -> Errors:
            found_T = prepare(part)().values
            assert found_T is not None
            return Errors(values=largest_error(found_T, truth_T))

        visible = not (name == "cce" and request.device.type == "cuda")
        return Candidate(name, lambda: prepare(case), check, limits, 1.0, visible)

    limits = Errors(values=head_case.logp_limit(request))
    candidates = [candidate(name, prepare, limits) for name, prepare in OURS.items()]
    candidates.append(Candidate("floor", lambda: _floor(case), None, None, 1.0))
    candidates += [candidate(name, PEERS[name], None) for name in request.peers]
    return Plan(
        candidates,
        shape={letter: request.shape[letter] for letter in "THV"},
        gemm_flops=2 * len(case.targets_T) * case.head_VH.numel(),
        least_bytes=case.hidden_TH.nbytes + case.head_VH.nbytes + case.targets_T.nbytes + 3 * case.old_logp_T.nbytes,
        flop_formulas={torch.ops.metis_kernels.linear_logprob: flop_formula},
        notes=[
            f"Forward only, every token. Errors: largest of {len(part.targets_T)} log-probabilities against float64, the whole "
            "vocabulary.",
            f"ours: impl auto is {ours.chosen(request)}, with entropy and log-sum-exp; ours_reference: plain torch, float32 "
            "products; floor: the logits by torch.mm into a buffer that is there before.",
        ],
    )


OP = Op(
    summary="log-probability, entropy and log-sum-exp of sampled tokens, no gradient",
    shape={"T": 2048, "H": 1024, "V": 32768},
    dtypes=("bf16", "fp32"),
    peers=tuple(PEERS),
    all_live=True,
    errors=("logp",),
    plan=_plan,
)
