"""Advantages against an independent derivation in exact arithmetic, and their properties."""

import itertools
from fractions import Fraction
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_fast.config import ScoreConfig
from metis_fast.score.advantage import GroupRewards, advantages

ESTIMATORS = ("hdpo", "grpo", "coupled", "gdpo")

# One rollout: (correct, format_ok, tool calls, has a verdict).
rollout = st.tuples(st.booleans(), st.booleans(), st.integers(0, 9), st.booleans())
groups_of_rollouts = st.lists(st.lists(rollout, min_size=1, max_size=9), min_size=1, max_size=5)


def config(estimator="hdpo", **changes):
    return ScoreConfig.model_validate({"estimator": estimator, **changes})


def rewards_of(rollouts):
    return GroupRewards(
        r_acc=np.array([0.9 * correct + 0.1 * ok for correct, ok, _, _ in rollouts]),
        r_tool=np.array([correct / (calls + 1) for correct, _, calls, _ in rollouts]),
        correct=np.array([correct for correct, _, _, _ in rollouts]),
        valid=np.array([valid for _, _, _, valid in rollouts]),
    )


def plain(r_acc, r_tool=None, correct=None, valid=None):
    size = len(r_acc)
    return GroupRewards(
        r_acc=np.asarray(r_acc, dtype=np.float64),
        r_tool=np.zeros(size) if r_tool is None else np.asarray(r_tool, dtype=np.float64),
        correct=np.zeros(size, dtype=bool) if correct is None else np.asarray(correct, dtype=bool),
        valid=np.ones(size, dtype=bool) if valid is None else np.asarray(valid, dtype=bool),
    )


def exact(rewards, members, norm_by_std=True):
    """(r - mean) / (std + 1e-6) with the mean and variance as fractions; None stands for "not a member"."""
    inside = [Fraction(r) for r, member in zip(rewards, members, strict=True) if member]
    if len(set(inside)) < 2:
        return [0.0] * len(rewards)
    mean = sum(inside) / len(inside)
    std = sqrt(sum((r - mean) ** 2 for r in inside) / (len(inside) - 1))
    scale = std + 1e-6 if norm_by_std else 1.0
    return [float(Fraction(r) - mean) / scale if member else 0.0 for r, member in zip(rewards, members, strict=True)]


def derived(groups, estimator, alpha, norm_by_std):
    """(adv_acc, adv_tool) of every group, rederived."""
    out = []
    for g in groups:
        acc = exact(g.r_acc, g.valid, norm_by_std)
        if estimator == "hdpo":
            out.append((acc, exact(g.r_tool, g.valid & g.correct, norm_by_std)))
        elif estimator == "grpo":
            out.append((acc, [0.0] * len(acc)))
        elif estimator == "coupled":
            out.append((exact(g.r_acc + alpha * g.r_tool, g.valid, norm_by_std), [0.0] * len(acc)))
        else:
            tool = exact(g.r_tool, g.valid, norm_by_std)
            out.append(([a + alpha * t for a, t in zip(acc, tool, strict=True)], [0.0] * len(acc)))
    if estimator == "gdpo" and norm_by_std:
        batch = [a for (acc, _), g in zip(out, groups, strict=True) for a, valid in zip(acc, g.valid, strict=True) if valid]
        mean = sum(batch) / max(len(batch), 1)
        std = sqrt(sum((a - mean) ** 2 for a in batch) / max(len(batch) - 1, 1))
        out = [
            ([(a - mean) / (std + 1e-6) if v else 0.0 for a, v in zip(acc, g.valid, strict=True)], tool)
            for (acc, tool), g in zip(out, groups, strict=True)
        ]
    return out


@given(batch=groups_of_rollouts, alpha=st.sampled_from([0.0, 0.15, 0.5]), norm_by_std=st.booleans())
@settings(max_examples=60)
def test_every_estimator_equals_its_derivation(batch, alpha, norm_by_std):
    groups = [rewards_of(rollouts) for rollouts in batch]
    for estimator in ESTIMATORS:
        got = advantages(groups, config(estimator, alpha=alpha, norm_by_std=norm_by_std))
        for one, (acc, tool) in zip(got, derived(groups, estimator, alpha, norm_by_std), strict=True):
            np.testing.assert_allclose(one.adv_acc, acc, rtol=2e-6, atol=1e-6, err_msg=estimator)
            np.testing.assert_allclose(one.adv_tool, tool, rtol=2e-6, atol=1e-6, err_msg=estimator)


@given(size=st.integers(1, 40), value=st.one_of(st.sampled_from([0.9, 1 / 3, 0.1]), st.floats(-1e6, 1e6)))
@settings(max_examples=60)
def test_a_uniform_group_has_advantage_exactly_zero_and_no_gradient(size, value):
    uniform = plain([value] * size, [abs(value)] * size, [True] * size)
    other = plain([0.1, 0.9, 1.0], [0.0, 1.0, 0.5], [False, True, True])  # must not leak in through the batch of gdpo
    for estimator in ESTIMATORS:
        (got, _) = advantages([uniform, other], config(estimator))
        assert not got.adv_acc.any() and not got.adv_tool.any(), estimator
        assert not got.needs_gradient.any() and not got.in_tool_denominator.any(), estimator


@pytest.mark.parametrize(("size", "value"), [(16, 0.9), (7, 1 / 3)])
def test_the_noisy_cases_of_float32_are_exactly_zero(size, value):
    (got,) = advantages([plain([value] * size, [value] * size, [True] * size)], config())
    assert not got.adv_acc.any() and not got.adv_tool.any()


@given(batch=groups_of_rollouts, data=st.data())
@settings(max_examples=40)
def test_the_order_of_rollouts_and_groups_does_not_matter(batch, data):
    group_order = data.draw(st.permutations(range(len(batch))))
    orders = [data.draw(st.permutations(range(len(batch[g])))) for g in group_order]
    straight = [rewards_of(rollouts) for rollouts in batch]
    shuffled = [rewards_of([batch[g][i] for i in order]) for g, order in zip(group_order, orders, strict=True)]
    for estimator in ESTIMATORS:
        before, after = (advantages(groups, config(estimator)) for groups in (straight, shuffled))
        for g, order, got in zip(group_order, orders, after, strict=True):
            np.testing.assert_allclose(got.adv_acc, before[g].adv_acc[list(order)], rtol=1e-6, atol=1e-7, err_msg=estimator)
            np.testing.assert_allclose(got.adv_tool, before[g].adv_tool[list(order)], rtol=1e-6, atol=1e-7, err_msg=estimator)
            np.testing.assert_array_equal(got.needs_gradient, before[g].needs_gradient[list(order)], estimator)
            np.testing.assert_array_equal(got.in_tool_denominator, before[g].in_tool_denominator[list(order)], estimator)


@given(batch=groups_of_rollouts, garbage=st.sampled_from([0.0, 1.0, float("nan"), float("inf")]))
@settings(max_examples=40)
def test_a_rollout_without_verdict_is_as_if_it_had_not_been_sampled(batch, garbage):
    full = [rewards_of(rollouts) for rollouts in batch]
    for group in full:
        group.r_acc[~group.valid] = garbage
        group.r_tool[~group.valid] = garbage
    small = [GroupRewards(g.r_acc[g.valid], g.r_tool[g.valid], g.correct[g.valid], g.valid[g.valid]) for g in full]
    for estimator, reference_noise in itertools.product(ESTIMATORS, (False, True)):
        found = (advantages(groups, config(estimator), reference_noise) for groups in (full, small))
        for group, with_lost, without in zip(full, *found, strict=True):
            for name in ("adv_acc", "adv_tool", "in_tool_denominator", "needs_gradient"):
                values = getattr(with_lost, name)
                np.testing.assert_array_equal(values[group.valid], getattr(without, name), estimator)
                assert not values[~group.valid].any(), estimator


@given(batch=groups_of_rollouts)
@settings(max_examples=40)
def test_the_advantages_of_a_group_add_up_to_zero(batch):
    groups = [rewards_of(rollouts) for rollouts in batch]
    for estimator, norm_by_std in itertools.product(ESTIMATORS, (True, False)):
        for got in advantages(groups, config(estimator, norm_by_std=norm_by_std)):
            assert abs(got.adv_acc.astype(np.float64).sum()) < 1e-5, estimator
            assert abs(got.adv_tool.astype(np.float64).sum()) < 1e-5, estimator


@given(batch=groups_of_rollouts)
@settings(max_examples=40)
def test_masks_cover_every_advantage_that_is_not_zero(batch):
    groups = [rewards_of(rollouts) for rollouts in batch]
    for estimator in ESTIMATORS:
        for group, got in zip(groups, advantages(groups, config(estimator)), strict=True):
            moved = (got.adv_acc != 0) | (got.adv_tool != 0)
            assert not (moved & ~got.needs_gradient).any(), estimator
            assert not ((got.adv_tool != 0) & ~got.in_tool_denominator).any(), estimator
            assert not (got.in_tool_denominator & ~(group.valid & group.correct)).any(), estimator


def test_an_advantage_of_zero_stays_in_the_tool_denominator_of_a_set_with_signal():
    group = plain([1.0] * 4, [1.0, 0.5, 0.0, 0.25], [True, True, True, False])  # 0.5 is the mean over Q_p
    (got,) = advantages([group], config())
    assert got.adv_tool[1] == 0.0
    np.testing.assert_array_equal(got.in_tool_denominator, [True, True, True, False])
    np.testing.assert_array_equal(got.needs_gradient, [True, True, True, False])


def test_one_qualifying_rollout_has_no_tool_signal():
    (got,) = advantages([plain([1.0, 0.1, 0.0], [0.5, 0.0, 0.0], [True, False, False])], config())
    assert not got.adv_tool.any() and not got.in_tool_denominator.any()
    assert got.needs_gradient.all()


def test_wrong_rollouts_do_not_enter_the_mean_of_the_tool_channel():
    (got,) = advantages([plain([1, 1, 0, 0], [1.0, 0.5, 0, 0], [True, True, False, False])], config(norm_by_std=False))
    np.testing.assert_array_equal(got.adv_tool, [0.25, -0.25, 0, 0])


def test_coupled_compares_the_sum_of_rewards_and_not_its_parts():
    group = plain([1.0, 0.75], [0.5, 1.0], [True, True])  # 1 + 0.5 * 0.5 = 0.75 + 0.5 * 1
    (got,) = advantages([group], config("coupled", alpha=0.5))
    assert not got.adv_acc.any() and not got.needs_gradient.any()


def test_gdpo_scales_by_the_spread_over_the_batch():
    quiet, loud = plain([1.0, 1.0]), plain([0.0, 1.0])
    (alone,) = advantages([loud], config("gdpo"))
    (_, beside) = advantages([quiet, loud], config("gdpo"))
    # Twice the valid rollouts with the same sum of squares: std falls by sqrt(3).
    np.testing.assert_allclose(beside.adv_acc, alone.adv_acc * sqrt(3), rtol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_batch_and_a_group_without_any_verdict_give_nothing(estimator):
    assert advantages([], config(estimator)) == []
    (got,) = advantages([plain([1.0, 0.0], valid=[False, False])], config(estimator))
    assert not got.adv_acc.any() and not got.needs_gradient.any()


def test_arrays_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        GroupRewards(np.zeros(2), np.zeros(3), np.zeros(2, dtype=bool), np.zeros(2, dtype=bool))
