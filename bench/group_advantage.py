"""`group_advantage` beside a copy of its bytes and a loop over groups.

Shape letters: P groups, G rollouts of each, N = P G.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metis_kernels import Impl, group_advantage

from . import ours
from .candidate import Candidate, Errors, Op, Outcome, Plan, Request, Step, largest_error

LIMITS = Errors(values=1e-6)
"""Advantages are below 4 at G = 16; float32 rounds them by up to 2.4e-7."""

_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class GroupCase:
    """Rewards float32, correct and valid bool, num_tokens int64, [N] each; offsets_P1 int64, on the host."""

    r_acc_N: Tensor
    r_tool_N: Tensor
    correct_N: Tensor
    valid_N: Tensor
    num_tokens_N: Tensor
    offsets_P1: Tensor


def _make(request: Request) -> GroupCase:
    num_groups, size = request.shape["P"], request.shape["G"]
    device = request.device
    rng = torch.Generator(device).manual_seed(request.seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=device)

    # a pass rate of its own for every prompt, so that groups all right and all wrong occur
    correct = (uniform(num_groups, size) < uniform(num_groups, 1)).flatten()
    turns = (uniform(num_groups * size) * 5).floor()
    return GroupCase(
        r_acc_N=0.9 * correct.float() + 0.1 * (uniform(num_groups * size) < 0.9),
        r_tool_N=correct / (turns + 1),
        correct_N=correct,
        valid_N=uniform(num_groups * size) < 0.95,
        num_tokens_N=(uniform(num_groups * size) * 2048).long() + 1,
        offsets_P1=torch.arange(num_groups + 1) * size,
    )


def _exact(case: GroupCase) -> Tensor:
    """Both advantages in Python's float64, [2 N]."""
    valid, qualifying = case.valid_N.tolist(), (case.valid_N & case.correct_N).tolist()
    acc, tool = ([0.0] * len(valid) for _ in range(2))
    bounds = case.offsets_P1.tolist()
    for rewards, members, out in ((case.r_acc_N.tolist(), valid, acc), (case.r_tool_N.tolist(), qualifying, tool)):
        for start, end in itertools.pairwise(bounds):
            inside = [i for i in range(start, end) if members[i]]
            if len({rewards[i] for i in inside}) < 2:
                continue
            mean = math.fsum(rewards[i] for i in inside) / len(inside)
            std = math.sqrt(math.fsum((rewards[i] - mean) ** 2 for i in inside) / (len(inside) - 1))
            for i in inside:
                out[i] = (rewards[i] - mean) / (std + _EPSILON)
    return torch.tensor(acc + tool, dtype=torch.float64)


def _ours(case: GroupCase, impl: Impl) -> Step:
    def step() -> Outcome:
        result = group_advantage(
            case.r_acc_N, case.r_tool_N, case.correct_N, case.valid_N, case.num_tokens_N, case.offsets_P1, impl=impl
        )
        return Outcome(torch.cat([result.adv_acc_N, result.adv_tool_N]))

    return step


def _loop(case: GroupCase) -> Step:
    """A loop over groups, a few small tensor operations in each: how trainers commonly do it."""
    qualifying_N = case.valid_N & case.correct_N
    bounds = case.offsets_P1.tolist()

    def step() -> Outcome:
        out = torch.zeros(2, len(case.r_acc_N), device=case.r_acc_N.device)
        for row, rewards, members in ((0, case.r_acc_N, case.valid_N), (1, case.r_tool_N, qualifying_N)):
            for start, end in itertools.pairwise(bounds):
                inside = members[start:end]
                chosen = rewards[start:end][inside]
                if len(chosen) < 2 or bool(chosen.max() == chosen.min()):
                    continue
                out[row, start:end][inside] = (chosen - chosen.mean()) / (chosen.std() + _EPSILON)
        return Outcome(out.flatten())

    return step


PEERS: dict[str, Callable[[GroupCase], Step]] = {"loop": _loop}

OURS: dict[str, Callable[[GroupCase], Step]] = {
    "ours": lambda case: _ours(case, "auto"),
    "ours_reference": lambda case: _ours(case, "reference"),
}


def _tensors(case: GroupCase) -> tuple[Tensor, ...]:
    return case.r_acc_N, case.r_tool_N, case.correct_N, case.valid_N, case.num_tokens_N


def _floor(case: GroupCase) -> Step:
    """One copy of the inputs."""
    source = torch.cat([tensor.view(torch.uint8) for tensor in _tensors(case)])
    target = torch.empty_like(source)

    def step() -> Outcome:
        target.copy_(source)
        return Outcome()

    return step


def _plan(request: Request) -> Plan:
    case = _make(request)
    truth = _exact(case).to(request.device)

    def candidate(name: str, prepare: Callable[[GroupCase], Step], limits: Errors | None) -> Candidate:
        def check() -> Errors:
            found = prepare(case)().values
            assert found is not None
            return Errors(values=largest_error(found, truth))

        return Candidate(name, lambda: prepare(case), check, limits, 1.0)

    candidates = [candidate(name, prepare, LIMITS) for name, prepare in OURS.items()]
    candidates.append(Candidate("floor", lambda: _floor(case), None, None, 1.0))
    candidates += [candidate(name, PEERS[name], None) for name in request.peers]
    written = 2 * 4 + 2 * 1  # two advantages and two masks a rollout
    return Plan(
        candidates,
        shape=request.shape,
        gemm_flops=0,
        least_bytes=sum(tensor.nbytes for tensor in _tensors(case)) + written * len(case.r_acc_N),
        flop_formulas={},
        notes=[
            "HDPO. Errors: largest of all advantages against float64.",
            f"ours: impl auto is {ours.chosen(request)}; ours_reference: plain torch; floor: one copy of the inputs; "
            "loop: a Python loop over the groups.",
        ],
    )


OP = Op(
    summary="both advantages of HDPO, masks and denominators, of a batch of groups",
    shape={"P": 512, "G": 16},
    dtypes=("fp32",),
    peers=tuple(PEERS),
    all_live=True,
    errors=("adv",),
    plan=_plan,
)
