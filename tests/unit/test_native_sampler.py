"""The native engine's sampler: which tokens are drawn, how often, and with which log-probability."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from metis_fast.rollout.engine import Sampling
from metis_fast.rollout.episode import SampleKey
from metis_fast.rollout.sampling import sample

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, -8.0, 0.3, -0.5, 1.0, 3.0])
CHI2_999 = {2: 13.8, 3: 16.3, 8: 26.1, 9: 27.9}  # 99.9 % quantile of chi-square by degrees of freedom
NOTHING = torch.tensor([], dtype=torch.long)


def chi_square(drawn, probability):
    """Statistic of observed counts against probabilities (of the tokens that have any)."""
    count = np.bincount(drawn, minlength=len(probability))
    assert count[probability == 0].sum() == 0
    seen = probability > 0
    expected = probability[seen] * len(drawn)
    return float(((count[seen] - expected) ** 2 / expected).sum())


def draw(num, sampling, banned=NOTHING):
    """`num` draws with as many seeds, as rollouts of one batch have them."""
    rows = [replace(sampling, seed=SampleKey(3, "train/0", i).turn_seed(0)) for i in range(num)]
    return sample(LOGITS.expand(num, -1), rows, [0] * num, banned)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_frequencies_match_probabilities_over_seeds(temperature):
    tokens, logp = draw(40_000, Sampling(1, (), temperature))
    expected = torch.log_softmax(LOGITS / temperature, -1)
    assert chi_square(tokens.numpy(), expected.double().exp().numpy()) < CHI2_999[9]
    torch.testing.assert_close(logp, expected[tokens])


def test_frequencies_match_probabilities_over_positions_and_neighbours_are_independent():
    num = 40_000
    tokens, _ = sample(LOGITS.expand(num, -1), [Sampling(1, (), seed=5)] * num, range(num), NOTHING)
    probability = LOGITS.double().softmax(-1)
    assert chi_square(tokens.numpy(), probability.numpy()) < CHI2_999[9]
    best = (tokens == 9).numpy()
    both, p = (best[1:] & best[:-1]).mean(), float(probability[9])
    assert abs(both - p * p) < 4 * (p * p / num) ** 0.5


def test_what_is_banned_keeps_its_mass_in_the_log_probability_only():
    tokens, logp = draw(20_000, Sampling(1, ()), torch.tensor([9]))
    probability = LOGITS.double().softmax(-1)
    rest = probability.clone()
    rest[9] = 0
    assert chi_square(tokens.numpy(), (rest / rest.sum()).numpy()) < CHI2_999[8]
    torch.testing.assert_close(logp, probability.log()[tokens].float())


def test_top_k_draws_from_exactly_the_k_best():
    tokens, logp = draw(20_000, Sampling(1, (), top_k=3))
    probability = LOGITS.double().softmax(-1)
    kept = torch.zeros_like(probability)
    kept[[9, 0, 4]] = probability[[9, 0, 4]]
    assert chi_square(tokens.numpy(), (kept / kept.sum()).numpy()) < CHI2_999[2]
    torch.testing.assert_close(logp, probability.log()[tokens].float())


@pytest.mark.parametrize(("top_p", "size"), [(1e-9, 1), (0.5, 1), (0.52, 2), (0.82, 4), (0.999, 9)])
def test_top_p_draws_from_the_smallest_set_that_reaches_p(top_p, size):
    probability = LOGITS.double().softmax(-1)
    ordered, index = probability.sort(descending=True)
    assert ordered[:size].sum() >= top_p and (size == 1 or ordered[: size - 1].sum() < top_p)  # the table is right
    tokens, _ = draw(20_000, Sampling(1, (), top_p=top_p))
    kept = set(index[:size].tolist())
    assert set(tokens.tolist()) == kept


def test_greedy_takes_the_best_allowed_token_and_its_log_probability_at_temperature_1():
    tokens, logp = draw(3, Sampling(1, (), temperature=0.0), torch.tensor([9]))
    assert tokens.tolist() == [0, 0, 0]
    torch.testing.assert_close(logp, torch.log_softmax(LOGITS, -1)[tokens])


def test_every_row_follows_its_own_settings():
    settings_of_rows = [Sampling(1, (), 0.0), Sampling(1, (), top_k=1), Sampling(1, (), top_p=0.01), Sampling(1, (), 5.0)]
    many = [replace(settings_of_rows[i % 4], seed=i) for i in range(4000)]
    tokens, _ = sample(LOGITS.expand(4000, -1), many, [0] * 4000, NOTHING)
    rows = tokens.view(-1, 4).T
    assert all(set(row.tolist()) == {9} for row in rows[:3])
    assert len(set(rows[3].tolist())) == 10
