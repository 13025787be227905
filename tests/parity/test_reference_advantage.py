"""Reference mode equals the public recipe bit for bit, noise included (ALGORITHM section 3)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_fast.config import ScoreConfig
from metis_fast.score.advantage import GroupRewards, advantages


def recipe(scores, norm_by_std=True):
    """The recipe's formula, one scalar at a time as it is written there: float32 tensors, no test for equal scores."""
    tensors = [torch.tensor(score, dtype=torch.float32) for score in scores]
    if len(tensors) == 1:
        mean, std = torch.tensor(0.0), torch.tensor(1.0)
    else:
        mean, std = torch.mean(torch.stack(tensors)), torch.std(torch.stack(tensors))
    return [((x - mean) / (std + 1e-6) if norm_by_std else x - mean).item() for x in tensors]


def group(r_acc, r_tool, correct):
    size = len(r_acc)
    return GroupRewards(np.array(r_acc), np.array(r_tool), np.array(correct, dtype=bool), np.ones(size, dtype=bool))


@pytest.mark.parametrize(("size", "value", "noise"), [(16, 0.9, -0.056), (7, 1 / 3, 0.029)])
def test_the_noise_of_uniform_groups_is_the_recipes(size, value, noise):
    (got,) = advantages([group([value] * size, [value] * size, [True] * size)], ScoreConfig(), reference_noise=True)
    np.testing.assert_allclose(got.adv_acc, noise, atol=5e-4)
    np.testing.assert_allclose(got.adv_tool, noise, atol=5e-4)
    assert got.in_tool_denominator.all()  # noise is not 0, so the recipe counts these tokens


@given(
    rollouts=st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 9)), min_size=1, max_size=33),
    norm_by_std=st.booleans(),
)
@settings(max_examples=150)
def test_both_channels_are_bit_equal_to_the_recipe(rollouts, norm_by_std):
    r_acc = [0.9 * correct + 0.1 * ok for correct, ok, _ in rollouts]
    r_tool = [correct / (calls + 1) for correct, _, calls in rollouts]
    correct = [correct for correct, _, _ in rollouts]
    (got,) = advantages([group(r_acc, r_tool, correct)], ScoreConfig(norm_by_std=norm_by_std), reference_noise=True)
    np.testing.assert_array_equal(got.adv_acc, np.array(recipe(r_acc, norm_by_std), dtype=np.float32))
    qualifying = [i for i, right in enumerate(correct) if right]
    tool = np.zeros(len(rollouts), dtype=np.float32)
    if len(qualifying) >= 2:
        tool[qualifying] = recipe([r_tool[i] for i in qualifying], norm_by_std)
    np.testing.assert_array_equal(got.adv_tool, tool)
    np.testing.assert_array_equal(got.in_tool_denominator, tool != 0)
    assert got.needs_gradient.all()


def test_a_group_of_one_keeps_its_reward():
    (got,) = advantages([group([1.0], [0.5], [True])], ScoreConfig(), reference_noise=True)
    assert got.adv_acc[0] == np.float32(1.0) / (np.float32(1.0) + np.float32(1e-6))
    assert got.adv_tool[0] == 0.0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=16))
@settings(max_examples=60)
def test_where_no_channel_is_uniform_both_modes_agree_to_rounding(rollouts):
    r_acc = [float(right) for right, _ in rollouts]
    r_tool = [right / (calls + 1) for right, calls in rollouts]
    one = group(r_acc, r_tool, [right for right, _ in rollouts])
    (exact,), (noisy,) = advantages([one], ScoreConfig()), advantages([one], ScoreConfig(), reference_noise=True)
    if len(set(r_acc)) > 1:
        np.testing.assert_allclose(exact.adv_acc, noisy.adv_acc, rtol=2e-5, atol=2e-6)
    if len({r for r in r_tool if r}) > 1:
        np.testing.assert_allclose(exact.adv_tool, noisy.adv_tool, rtol=2e-4, atol=2e-5)
