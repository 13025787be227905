"""`group_advantage`, every implementation, against exact arithmetic and against the advantages of metis_fast.

Shape letters: N rollouts of all groups, P groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from contract.cases import IMPLS, Chosen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metis_fast.config import ScoreConfig
from metis_fast.score.advantage import GroupRewards, advantages
from metis_kernels import GroupAdvantage, group_advantage
from metis_kernels.group_advantage import _groups, triton
from metis_kernels.group_advantage._groups import EPSILON, Estimator
from metis_kernels.inspect.sanitizer import sanitize
from metis_kernels.inspect.tally import tally

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
ROUNDING = 2**-24 * 1.001
"""Relative error of rounding to float32, and a little for the float64 arithmetic before it."""


every_impl = pytest.mark.parametrize("impl", IMPLS)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN and True, so that an element that an implementation leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The arguments of `group_advantage`, rewards float64."""

    r_acc_N: Tensor
    r_tool_N: Tensor
    correct_N: Tensor
    valid_N: Tensor
    num_tokens_N: Tensor
    offsets_P1: Tensor

    def run(self, impl: Chosen, dtype: torch.dtype = torch.float64, **options) -> GroupAdvantage:
        rewards = self.r_acc_N.to(dtype), self.r_tool_N.to(dtype)
        with sanitize():
            return group_advantage(
                *rewards, self.correct_N, self.valid_N, self.num_tokens_N, self.offsets_P1, impl=impl, **options
            )

    def groups(self) -> list[slice]:
        return [slice(start, stop) for start, stop in itertools.pairwise(self.offsets_P1.tolist())]


def make_batch(
    sizes: Sequence[int], seed: int = 0, no_verdict: float = 0.2, distinct: int | None = 5, junk: float = math.nan
) -> Batch:
    """Rewards like those of HDPO; without a verdict, `junk` stands in them. distinct: tool rewards that occur, None: any."""
    rng = np.random.default_rng(seed)
    num = sum(sizes)
    correct = rng.random(num) < 0.6
    valid = rng.random(num) >= no_verdict
    tool = rng.random(num) if distinct is None else 1 / (1 + rng.integers(0, distinct, num))
    r_acc = 0.9 * correct + 0.1 * (rng.random(num) < 0.8)
    return Batch(
        r_acc_N=torch.from_numpy(np.where(valid, r_acc, junk)),
        r_tool_N=torch.from_numpy(np.where(valid, tool * correct, junk)),
        correct_N=torch.from_numpy(correct),
        valid_N=torch.from_numpy(valid),
        # above 2**24, so that a float32 sum would not be exact
        num_tokens_N=torch.from_numpy(rng.integers(0, 2**40, num)),
        offsets_P1=torch.tensor([0, *itertools.accumulate(sizes)]),
    )


def one_group(r_acc: Sequence[float], r_tool: Sequence[float] | None = None, correct: bool | Sequence[bool] = True) -> Batch:
    """A group where every rollout has a verdict and 10 tokens."""
    num = len(r_acc)
    return Batch(
        r_acc_N=torch.tensor(r_acc, dtype=torch.float64),
        r_tool_N=torch.tensor(r_acc if r_tool is None else r_tool, dtype=torch.float64),
        correct_N=torch.tensor([correct] * num if isinstance(correct, bool) else correct),
        valid_N=torch.ones(num, dtype=torch.bool),
        num_tokens_N=torch.full((num,), 10),
        offsets_P1=torch.tensor([0, num]),
    )


def exact(rewards_N: Tensor, members_N: Tensor, groups: Sequence[slice], norm_by_std: bool = True) -> Tensor:
    """A over the members of each group, float64; mean and variance as fractions."""
    out = torch.zeros(len(rewards_N), dtype=torch.float64)
    for group in groups:
        index = [i for i in range(group.start, group.stop) if members_N[i]]
        inside = [Fraction(float(rewards_N[i])) for i in index]
        if len(set(inside)) < 2:
            continue
        mean = sum(inside) / len(inside)
        std = math.sqrt(sum((r - mean) ** 2 for r in inside) / (len(inside) - 1))
        divisor = std + EPSILON if norm_by_std else 1.0
        out[index] = torch.tensor([float(r - mean) / divisor for r in inside], dtype=torch.float64)
    return out


def assert_rounded(got: Tensor, want: Tensor) -> None:
    """`got` is float32 and as near to `want` as float32 can be."""
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=ROUNDING, atol=1e-12)


def assert_no_signal(got: GroupAdvantage) -> None:
    for name in ("adv_acc_N", "adv_tool_N", "in_tool_N", "needs_gradient_N", "signal_acc_P", "signal_tool_P"):
        assert not getattr(got, name).any(), name
    assert got.num_tool == 0


# 1, 2, 3: the smallest sets; 16: a power of two, the usual group; 63, 100: none; 1024: the largest group
@every_impl
@pytest.mark.parametrize("size", [1, 2, 3, 16, 63, 100, 1024])
@pytest.mark.parametrize("norm_by_std", [True, False])
def test_equals_exact_arithmetic_at_every_group_size(impl: Chosen, size: int, norm_by_std: bool):
    batch = make_batch([size], seed=size, no_verdict=0.0, distinct=None)
    for dtype in (torch.float32, torch.float64):
        got = batch.run(impl, dtype, norm_by_std=norm_by_std)
        given_acc, given_tool = batch.r_acc_N.to(dtype), batch.r_tool_N.to(dtype)
        assert_rounded(got.adv_acc_N, exact(given_acc, batch.valid_N, batch.groups(), norm_by_std))
        assert_rounded(got.adv_tool_N, exact(given_tool, batch.correct_N, batch.groups(), norm_by_std))


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm_by_std", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_the_advantages_of_the_trainer_on_ragged_groups(
    impl: Chosen, estimator: Estimator, norm_by_std: bool, dtype: torch.dtype
):
    batch = make_batch([16, 0, 5, 1, 100, 0, 2, 3, 16, 7], seed=3)
    batch = replace(batch, r_acc_N=batch.r_acc_N.to(dtype).double(), r_tool_N=batch.r_tool_N.to(dtype).double())
    got = batch.run(impl, dtype, estimator=estimator, alpha=0.3, norm_by_std=norm_by_std)
    config = ScoreConfig.model_validate({"estimator": estimator, "alpha": 0.3, "norm_by_std": norm_by_std})
    columns = batch.r_acc_N, batch.r_tool_N, batch.correct_N, batch.valid_N
    want = advantages([GroupRewards(*(column[group].numpy() for column in columns)) for group in batch.groups()], config)

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(group, name) for group in want]))

    # both are float64 rounded once, up to the order of sums
    torch.testing.assert_close(got.adv_acc_N, joined("adv_acc"), rtol=2 * ROUNDING, atol=1e-12)
    torch.testing.assert_close(got.adv_tool_N, joined("adv_tool"), rtol=2 * ROUNDING, atol=1e-12)
    assert torch.equal(got.in_tool_N, joined("in_tool_denominator"))
    assert torch.equal(got.needs_gradient_N, joined("needs_gradient"))
    assert got.num_acc == batch.num_tokens_N[batch.valid_N].sum()
    assert got.num_tool == batch.num_tokens_N[joined("in_tool_denominator")].sum()
    assert got.signal_acc_P.tolist() == [bool(got.adv_acc_N[group].any()) for group in batch.groups()]
    assert got.signal_tool_P.tolist() == [bool(got.in_tool_N[group].any()) for group in batch.groups()]
    assert got.signal_acc_P.any() and not got.signal_acc_P.all()  # the batch has groups of both kinds


@every_impl
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(impl: Chosen, estimator: Estimator, dtype: torch.dtype):
    # the first two: where float32 mean and std leave an advantage of -0.056 and of 0.029
    for size, value in [(16, 0.9), (7, 1 / 3), (3, 0.9), (1, 0.7), (2, 1.0), (100, 0.1), (5, 0.0)]:
        got = one_group([value] * size).run(impl, dtype, estimator=estimator)
        assert_no_signal(got)
        assert got.num_acc == 10 * size  # a uniform group counts in N_acc all the same


@every_impl
@pytest.mark.parametrize("correct", [[False] * 4, [False, True, False, False]], ids=["all_wrong", "one_correct"])
def test_fewer_than_two_correct_rollouts_have_no_tool_channel(impl: Chosen, correct: list[bool]):
    got = one_group([0.1, 0.9, 0.1, 0.0], [0.5, 0.25, 1.0, 0.0], correct).run(impl)
    assert not got.adv_tool_N.any() and not got.in_tool_N.any() and not got.signal_tool_P.any()
    assert got.num_tool == 0
    assert got.adv_acc_N.all() and got.needs_gradient_N.all()


@every_impl
def test_all_correct_rollouts_learn_from_the_tool_channel_alone(impl: Chosen):
    got = one_group([1.0] * 4, [1.0, 0.5, 0.5, 0.25]).run(impl)
    assert not got.adv_acc_N.any() and not got.signal_acc_P.any()
    assert got.in_tool_N.all() and got.needs_gradient_N.all()
    assert (got.num_acc, got.num_tool) == (40, 40)


@every_impl
def test_a_rollout_at_the_mean_has_signal_though_its_advantage_is_zero(impl: Chosen):
    got = one_group([0.0, 0.5, 1.0]).run(impl)
    assert got.adv_acc_N[1] == got.adv_tool_N[1] == 0
    assert got.in_tool_N.all() and got.needs_gradient_N.all()
    assert got.num_tool == 30


@every_impl
def test_a_channel_without_weight_needs_no_gradient(impl: Chosen):
    batch = one_group([0.9, 0.9, 0.9, 0.0], [1.0, 0.5, 0.5, 0.0], [True, True, True, False])
    want = {(1.0, 0.15): [True] * 4, (1.0, 0.0): [True] * 4, (0.0, 0.15): [True] * 3 + [False], (0.0, 0.0): [False] * 4}
    for (w_acc, w_tool), needs in want.items():
        got = batch.run(impl, w_acc=w_acc, w_tool=w_tool)
        assert got.needs_gradient_N.tolist() == needs
        assert got.in_tool_N.tolist() == [True] * 3 + [False]
    assert not batch.run(impl, estimator="grpo", w_acc=0.0, w_tool=1.0).needs_gradient_N.any()


@every_impl
@pytest.mark.parametrize("estimator", ["coupled", "gdpo"])
def test_tool_rewards_of_weight_zero_give_no_signal(impl: Chosen, estimator: Estimator):
    batch = one_group([0.9, 0.9, 0.9], [1.0, 0.5, 0.25])
    assert_no_signal(batch.run(impl, estimator=estimator, alpha=0.0))
    assert batch.run(impl, estimator=estimator, alpha=0.1).needs_gradient_N.all()


@every_impl
@pytest.mark.parametrize("norm_by_std", [True, False])
def test_nan_of_a_rollout_with_a_verdict_shows_in_its_group_and_only_there(impl: Chosen, norm_by_std: bool):
    batch = make_batch([4, 1, 6], no_verdict=0.0, distinct=None)
    batch.r_acc_N[:] = torch.rand(11, generator=torch.Generator().manual_seed(0))
    clean = batch.run(impl, norm_by_std=norm_by_std)
    batch.r_acc_N[2] = batch.r_acc_N[4] = torch.nan
    got = batch.run(impl, norm_by_std=norm_by_std)
    assert got.adv_acc_N[:5].isnan().all()  # a group of one too
    assert torch.equal(got.adv_acc_N[5:], clean.adv_acc_N[5:])
    assert torch.equal(got.adv_tool_N, clean.adv_tool_N)
    assert got.signal_acc_P.all() and got.needs_gradient_N.all()


@every_impl
def test_nan_shows_in_the_whole_batch_of_gdpo_but_for_uniform_groups(impl: Chosen):
    r_acc = [0.0, 1.0, torch.nan, 0.5, 1.0, 0.9, 0.9]
    batch = replace(one_group(r_acc, [0.0] * 7), offsets_P1=torch.tensor([0, 3, 5, 7]))
    got = batch.run(impl, estimator="gdpo")
    assert got.adv_acc_N[:5].isnan().all()
    assert got.adv_acc_N[5:].tolist() == [0.0, 0.0]


@every_impl
def test_what_stands_where_there_is_no_verdict_changes_nothing(impl: Chosen):
    for estimator in ESTIMATORS:
        results = [make_batch([16, 9], junk=junk).run(impl, estimator=estimator) for junk in (0.0, math.nan, math.inf)]
        for field, other in itertools.product(fields(GroupAdvantage), results[1:]):
            assert torch.equal(getattr(other, field.name), getattr(results[0], field.name)), (estimator, field.name)


@every_impl
@settings(max_examples=15)
@given(data=st.data())
def test_permuting_rollouts_permutes_their_advantages(impl: Chosen, data: st.DataObject):
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    batch = make_batch(sizes, seed=data.draw(st.integers(0, 99)))
    order = torch.tensor(
        [i for group in batch.groups() for i in data.draw(st.permutations(range(group.start, group.stop)))],
        dtype=torch.int64,
    )
    moved = Batch(
        batch.r_acc_N[order],
        batch.r_tool_N[order],
        batch.correct_N[order],
        batch.valid_N[order],
        batch.num_tokens_N[order],
        batch.offsets_P1,
    )
    for estimator in ("hdpo", "gdpo"):
        before, after = batch.run(impl, estimator=estimator), moved.run(impl, estimator=estimator)
        for name in ("adv_acc_N", "adv_tool_N"):  # sums in another order, rounded
            torch.testing.assert_close(getattr(after, name), getattr(before, name)[order], rtol=2 * ROUNDING, atol=1e-12)
        assert torch.equal(after.needs_gradient_N, before.needs_gradient_N[order])
        assert torch.equal(after.in_tool_N, before.in_tool_N[order])
        assert (after.num_acc, after.num_tool) == (before.num_acc, before.num_tool)


@every_impl
@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0]], ids=["no_groups", "an_empty_group", "empty_groups"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_without_rollouts_has_no_tokens_and_no_signal(impl: Chosen, sizes: list[int], estimator: Estimator):
    got = make_batch(sizes).run(impl, estimator=estimator)
    assert len(got.adv_acc_N) == 0 and len(got.signal_acc_P) == len(got.signal_tool_P) == len(sizes)
    assert_no_signal(got)
    assert got.num_acc == 0


@every_impl
def test_a_batch_without_verdicts_has_no_tokens_and_no_signal(impl: Chosen):
    for estimator in ESTIMATORS:
        got = make_batch([4, 3], no_verdict=1.0).run(impl, estimator=estimator)
        assert_no_signal(got)
        assert got.num_acc == 0


@every_impl
def test_takes_views_that_are_not_contiguous(impl: Chosen):
    batch = make_batch([16, 9], no_verdict=0.0)
    spread = replace(batch, r_acc_N=batch.r_acc_N.repeat_interleave(2)[::2], valid_N=batch.valid_N.repeat_interleave(3)[::3])
    assert torch.equal(spread.run(impl).adv_acc_N, batch.run(impl).adv_acc_N)


def test_offsets_on_an_accelerator_are_not_looked_at_and_give_a_larger_block_with_the_same_result():
    assert _groups.largest_group(torch.empty(3, dtype=torch.int64, device="meta"), 40) == 40
    assert _groups.largest_group(torch.empty(3, dtype=torch.int64, device="meta"), 5000) == 1024
    batch = make_batch([16, 0, 3, 7])
    columns = batch.r_acc_N, batch.r_tool_N, batch.correct_N, batch.valid_N, batch.num_tokens_N, batch.offsets_P1
    narrow, wide = (triton.group_advantage(*columns, "hdpo", 0.0, True, True, True, largest) for largest in (16, 1024))
    for got, want in zip(wide, narrow, strict=True):
        torch.testing.assert_close(got, want, rtol=2 * ROUNDING, atol=1e-12)


def test_is_one_launch_that_moves_the_bytes_of_its_documentation():
    batch = make_batch([16, 16, 7], no_verdict=0.0)
    with tally() as counted:
        arguments = batch.r_acc_N.float(), batch.r_tool_N.float(), batch.correct_N, batch.valid_N, batch.num_tokens_N
        group_advantage(*arguments, batch.offsets_P1, impl="triton")
    num, num_groups = 39, 3
    assert counted.total.launches == 1
    assert counted.total.load_bytes + counted.total.store_bytes == 28 * num + 18 * num_groups
    assert counted.total.atomic_bytes == 16 * num_groups


@every_impl
def test_traces_whole_under_torch_compile(impl: Chosen):
    batch = make_batch([16, 0, 9])

    def run(r_acc: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        got = group_advantage(r_acc, batch.r_tool_N, batch.correct_N, batch.valid_N, batch.num_tokens_N, offsets, impl=impl)
        return 2 * got.adv_acc_N, got.adv_tool_N, got.in_tool_N, got.signal_acc_P, got.num_acc, got.num_tool

    eager = run(batch.r_acc_N, batch.offsets_P1)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(batch.r_acc_N, batch.offsets_P1)
    for got, want in zip(compiled, eager, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@every_impl
@pytest.mark.parametrize("estimator", ["hdpo", "gdpo"])
def test_fake_results_have_the_metadata_of_real_ones(impl: Chosen, estimator: Estimator):
    batch = make_batch([5, 3])
    columns = batch.r_acc_N, batch.r_tool_N, batch.correct_N, batch.valid_N, batch.num_tokens_N, batch.offsets_P1
    options = (estimator, 0.15, True, True, True, impl)
    assert set(torch.library.opcheck(torch.ops.metis_kernels.group_advantage.default, (*columns, *options)).values()) == {
        "SUCCESS"
    }


def call(**changes) -> GroupAdvantage:
    batch = make_batch([3, 2])
    columns = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    return group_advantage(**{**columns, **changes})


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3, 4], r"offsets_P1: expected 0 first and N = 5 last, got 0 and 4"),
        ([1, 3, 5], r"offsets_P1: expected 0 first and N = 5 last, got 1 and 5"),
        ([0, 4, 3, 5], r"offsets_P1: expected ascending values, got 4 then 3 at index 1"),
        ([0], r"offsets_P1: expected 0 first and N = 5 last, got 0 and 0"),
    ],
)
def test_refuses_offsets_that_do_not_cut_the_rollouts_into_groups(impl: Chosen, offsets: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        call(offsets_P1=torch.tensor(offsets), impl=impl)


@every_impl
def test_refuses_a_group_above_the_largest(impl: Chosen):
    batch = make_batch([2, 1025])
    with pytest.raises(ValueError, match=r"offsets_P1: expected groups of at most 1024 rollouts, got 1025 in group 1"):
        batch.run(impl)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r_acc_N": torch.zeros(5, dtype=torch.bfloat16)}, "r_acc_N: expected dtype float32 or float64, got bfloat16"),
        ({"r_acc_N": torch.zeros(5, 1)}, r"r_acc_N: expected shape \[N\] = \[any\], got \[5, 1\]"),
        ({"r_acc_N": [0.0] * 5}, "r_acc_N: expected a tensor, got list"),
        ({"r_tool_N": torch.zeros(5)}, "r_tool_N: expected dtype float64, got float32"),
        ({"r_tool_N": torch.zeros(4, dtype=torch.float64)}, r"r_tool_N: expected shape \[N\] = \[5\], got \[4\]"),
        ({"correct_N": torch.zeros(5)}, "correct_N: expected dtype bool, got float32"),
        ({"valid_N": torch.zeros(5, dtype=torch.bool, device="meta")}, "valid_N: expected a tensor on cpu .* got one on meta"),
        ({"num_tokens_N": torch.zeros(5, dtype=torch.int32)}, "num_tokens_N: expected dtype int64, got int32"),
        ({"offsets_P1": torch.zeros(3, dtype=torch.int32)}, "offsets_P1: expected dtype int64, got int32"),
        ({"offsets_P1": torch.zeros(0, dtype=torch.int64)}, r"offsets_P1: expected shape \[P \+ 1\], at least one offset"),
        ({"offsets_P1": torch.zeros(3, dtype=torch.int64, device="meta")}, "offsets_P1: expected a tensor on cpu"),
        ({"offsets_P1": [0, 5]}, "offsets_P1: expected a tensor, got list"),
        ({"estimator": "rloo"}, "estimator: expected one of hdpo, grpo, coupled, gdpo, got 'rloo'"),
        ({"alpha": -0.1}, "alpha: expected a number >= 0, got -0.1"),
        ({"alpha": math.nan}, "alpha: expected a number >= 0, got nan"),
        ({"alpha": None}, "alpha: expected a number >= 0, got None"),
        ({"w_acc": -1.0}, "w_acc: expected a number >= 0, got -1.0"),
        ({"w_tool": -1.0}, "w_tool: expected a number >= 0, got -1.0"),
        ({"impl": "cuda"}, "impl: expected one of auto, triton, cpu, reference, got 'cuda'"),
    ],
)
def test_refuses_wrong_arguments_by_name(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        call(**changes)
