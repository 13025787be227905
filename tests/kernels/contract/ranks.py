"""What the ranks of a tensor-parallel test run: both ops on shards of the vocabulary, results left in files.

Shape letters: T tokens, L live tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from contract.cases import Case, Chosen, Options, call_loss, make_case
from metis_kernels import VocabShard, linear_logprob

Result = TypeVar("Result")

VOCAB = 1000
CUTS: dict[int, tuple[int, ...]] = {
    1: (0, 1000),
    2: (0, 333, 1000),  # neither a multiple of any tile
    4: (0, 1, 130, 703, 1000),  # a shard of one row, one two rows past a tile
    8: (0, 1, 130, 257, 333, 500, 703, 999, 1000),
}
"""Where the shards begin and end, by the number of ranks."""

MEMBERS = {1: (2,), 2: (1, 3), 4: (0, 1, 2, 3), 8: tuple(range(8))}
"""The processes of each group: none but the last is the default group, which an op must not use in place of its own."""

OPTIONS = {"paper": Options(), "all_terms": Options(entropy_coef=0.1, kl_coef=0.2, tis_cap=1.1, temperature=1.3)}
WHOLE = 1000
"""A chunk that holds all tokens of a case."""
ANCHORS = ("given", "none", "bad")


@dataclass(frozen=True, slots=True, eq=False)
class LogprobOnRank:
    """logp, entropy and log-sum-exp [T], and the collectives by name."""

    logp_T: Tensor
    entropy_T: Tensor
    lse_T: Tensor
    collectives: dict[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class LossOnRank:
    """Loss, statistics [L], both gradients (the head's: rows of this shard), and the collectives by name."""

    loss: Tensor
    logp_L: Tensor
    lse_L: Tensor
    d_hidden_TH: Tensor
    d_head_VH: Tensor
    collectives: dict[str, int]


@dataclass(frozen=True, slots=True)
class LossRun:
    """One call of `hdpo_loss` on every rank."""

    impl: Chosen
    options: str
    anchor: str
    reduce_hidden: bool
    chunk: int = WHOLE


def edge_case(num_tokens: int) -> Case:
    """A case whose targets stand on both sides of every edge of every shard, several times."""
    case = make_case(num_tokens, 32, VOCAB)
    edges = sorted({cut for cuts in CUTS.values() for cut in cuts})
    around = [j for edge in edges for j in (edge - 1, edge) if 0 <= j < VOCAB]
    return replace(case, targets_T=torch.tensor([around[i % len(around)] for i in range(num_tokens)]))


def anchors(case: Case, kind: str) -> Tensor | None:
    """Anchors of a case: close to the truth, hopeless for some tokens, or none."""
    if kind == "none":
        return None
    exact = torch.logsumexp(case.hidden_TH @ case.head_VH.T, -1)
    return exact + 100 * torch.sin(torch.arange(len(exact))) if kind == "bad" else exact


def loss_runs(impl: Chosen, size: int) -> list[LossRun]:
    """On two ranks every option with every anchor, partial sums of dHidden, and several chunks."""
    if size != 2:  # slow on few cores, and nothing but the edges of the shards is new
        return [
            LossRun(impl, "paper", "given", reduce_hidden=True),
            LossRun(impl, "paper", "none", reduce_hidden=False),
            *([] if size == 8 else [LossRun(impl, "all_terms", "bad", reduce_hidden=True)]),
        ]
    runs = [LossRun(impl, options, anchor, reduce_hidden=True) for options in OPTIONS for anchor in ANCHORS]
    partial = [LossRun(impl, options, "given", reduce_hidden=False) for options in OPTIONS]
    return [*runs, *partial, LossRun(impl, "all_terms", "none", reduce_hidden=True, chunk=5)]


def tokens(impl: Chosen) -> int:
    """How many: in the interpreter few, but one for either side of every edge."""
    return 17 if impl == "triton" else 63


def counted(run: Callable[[], Result]) -> tuple[Result, dict[str, int]]:
    """What `run` returns, and how often it called each collective (the profiler sees inside custom ops)."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = run()
    names = [event.name for event in profiler.events() or () if event.name.startswith("c10d::")]
    return result, {name: names.count(name) for name in set(names)}


def shard_logprob(case: Case, impl: Chosen, shard: VocabShard | None, rows: slice, temperature: float) -> LogprobOnRank:
    """`linear_logprob` on these rows of the head."""
    got, collectives = counted(
        lambda: linear_logprob(
            case.hidden_TH, case.head_VH[rows], case.targets_T, temperature=temperature, shard=shard, impl=impl
        )
    )
    return LogprobOnRank(got.logp_T, got.entropy_T, got.lse_T, collectives)


def shard_loss(case: Case, run: LossRun, shard: VocabShard | None, rows: slice) -> LossOnRank:
    """`hdpo_loss` on these rows of the head, forward and backward."""
    hidden, head = case.hidden_TH.clone().requires_grad_(), case.head_VH[rows].clone().requires_grad_()
    split = {"shard": shard, "reduce_hidden": run.reduce_hidden, "chunk": run.chunk}
    got, collectives = counted(
        lambda: call_loss(case, hidden, head, run.impl, OPTIONS[run.options], anchor_T=anchors(case, run.anchor), **split)
    )
    got.loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return LossOnRank(got.loss.detach(), got.logp_L, got.lse_L, hidden.grad, head.grad, collectives)


def main(rank: int, folder: Path, impls: tuple[Chosen, ...]) -> None:
    """One process of eight: runs everything in every group that it is a member of."""
    torch.set_num_threads(1)
    limit = timedelta(minutes=10)  # of a busy machine; where a rank fails, the others are killed at once
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=max(MEMBERS), timeout=limit)
    groups = {size: dist.new_group(members, timeout=limit) for size, members in MEMBERS.items()}
    for size, members in MEMBERS.items():
        if rank not in members:
            continue
        group, place = groups[size], members.index(rank)
        assert isinstance(group, dist.ProcessGroup)
        start, end = list(pairwise(CUTS[size]))[place]
        shard, rows = VocabShard(start, group), slice(start, end)
        logprobs = {
            (impl, temperature): shard_logprob(edge_case(tokens(impl)), impl, shard, rows, temperature)
            for impl in impls
            for temperature in (1.0, 1.3)
        }
        losses = {run: shard_loss(edge_case(tokens(impl)), run, shard, rows) for impl in impls for run in loss_runs(impl, size)}
        torch.save((logprobs, losses), folder / f"{size}_{place}.pt")
    dist.destroy_process_group()
