"""Both ops on a sharded vocabulary, in real gloo processes: 1, 2, 4 and 8 ranks give what one process gives.

Shape letters: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections import Counter
from pathlib import Path

import pytest
import torch
from contract import ranks
from contract.cases import IMPLS, Chosen
from contract.compare import SAME, check_gradient, check_head, relative
from contract.ranks import LogprobOnRank, LossOnRank, LossRun
from contract.truth import LossTruth, head_truth, loss_truth
from torch.multiprocessing.spawn import start_processes

from metis_kernels import cpu_library_status

SIZES = tuple(ranks.MEMBERS)
Ranks = dict[int, list[tuple[dict[tuple[Chosen, float], LogprobOnRank], dict[LossRun, LossOnRank]]]]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> Chosen:
    return request.param


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What every rank of every group returned, by the number of ranks and in their order: started once, for all
    implementations that this run's tests ask for."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    own = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    asked = {str(item.callspec.params["impl"]) for item in own}
    if cpu_library_status():  # then those tests are skipped
        asked.discard("cpu")
    # one server imports torch, and the ranks are forked from it before it has any threads
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "torch.profiler", "metis_kernels"])
    start_processes(ranks.main, (folder, tuple(sorted(asked))), nprocs=max(SIZES), start_method="forkserver")
    return {size: [torch.load(folder / f"{size}_{r}.pt", weights_only=False) for r in range(size)] for size in SIZES}


@functools.cache
def alone_and_true(impl: Chosen, run: LossRun) -> tuple[LossOnRank, LossTruth]:
    """What one process gives, and float64."""
    case = ranks.edge_case(ranks.tokens(impl))
    return ranks.shard_loss(case, run, None, slice(None)), loss_truth(case, ranks.OPTIONS[run.options])


@pytest.mark.parametrize("size", SIZES)
def test_sharded_log_probabilities_equal_one_process_and_float64(impl: Chosen, results: Ranks, size: int):
    case = ranks.edge_case(ranks.tokens(impl))
    for temperature in (1.0, 1.3):
        alone = ranks.shard_logprob(case, impl, None, slice(None), temperature)
        want = head_truth(case.hidden_TH, case.head_VH, case.targets_T, temperature)
        for logprobs, _ in results[size]:
            got = logprobs[impl, temperature]
            check_head(got.logp_T, got.entropy_T, got.lse_T, want, torch.float32)
            assert relative(got.logp_T, alone.logp_T) <= SAME
            assert relative(got.entropy_T, alone.entropy_T) <= SAME
            assert relative(got.lse_T, alone.lse_T) <= SAME


@pytest.mark.parametrize("size", SIZES)
def test_the_sharded_loss_equals_one_process_and_float64(impl: Chosen, results: Ranks, size: int):
    for run in ranks.loss_runs(impl, size):
        want, truth = alone_and_true(impl, run)
        got = [losses[run] for _, losses in results[size]]
        d_head = torch.cat([rank.d_head_VH for rank in got])
        d_hidden = [rank.d_hidden_TH for rank in got]
        if not run.reduce_hidden:  # what the ranks hold are partial sums
            d_hidden = [torch.stack(d_hidden).sum(0)]
        for rank in got:
            assert relative(rank.loss, want.loss) <= SAME, run
            assert relative(rank.logp_L, want.logp_L) <= SAME, run
            assert relative(rank.lse_L, want.lse_L) <= SAME, run
        assert relative(d_head, want.d_head_VH) <= SAME, run
        check_gradient(f"dHead, {run}", d_head, truth.d_head_VH, torch.float32)
        for d in d_hidden:
            assert relative(d, want.d_hidden_TH) <= SAME, run
            check_gradient(f"dHidden, {run}", d, truth.d_hidden_TH, torch.float32)


@pytest.mark.parametrize("size", SIZES[1:])
def test_all_ranks_hold_the_same_bits(impl: Chosen, results: Ranks, size: int):
    # else the ranks would decide differently about clipping and fall-backs, and drift apart
    (first_logprobs, first_losses), *others = results[size]
    for logprobs, losses in others:
        for key, got in logprobs.items():
            assert torch.equal(got.logp_T, first_logprobs[key].logp_T)
            assert torch.equal(got.entropy_T, first_logprobs[key].entropy_T)
            assert torch.equal(got.lse_T, first_logprobs[key].lse_T)
        for run, got in losses.items():
            assert torch.equal(got.loss, first_losses[run].loss)
            assert torch.equal(got.logp_L, first_losses[run].logp_L)
            assert torch.equal(got.lse_L, first_losses[run].lse_L)
            assert not run.reduce_hidden or torch.equal(got.d_hidden_TH, first_losses[run].d_hidden_TH)


@pytest.mark.parametrize("size", SIZES[1:])
def test_log_probabilities_take_one_collective(impl: Chosen, results: Ranks, size: int):
    for logprobs, _ in results[size]:
        for got in logprobs.values():
            assert got.collectives == {"c10d::_allgather_base_": 1}


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_loss_takes_one_collective_with_an_anchor_and_two_without(impl: Chosen, results: Ranks, size: int):
    whole = [run for run in ranks.loss_runs(impl, size) if run.anchor != "bad" and run.chunk == ranks.WHOLE]
    assert {run.anchor for run in whole} == {"given", "none"} and {run.reduce_hidden for run in whole} == {True, False}
    for _, losses in results[size]:
        for run in whole:
            if impl == "reference":  # knows no anchor: the exact all-gather of linear_logprob
                want = Counter({"c10d::_allgather_base_": 1, "c10d::allreduce_": int(run.reduce_hidden)})
            else:
                want = Counter({"c10d::allreduce_": (1 if run.anchor == "given" else 2) + run.reduce_hidden})
            assert Counter(losses[run].collectives) == want, run
