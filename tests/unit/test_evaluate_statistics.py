"""Errors and tests for dependent rows: beside their closed form, a bootstrap over clusters, and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from metis_fast.evaluate.statistics import clustered_mean, compare

# of numpy's default_rng(3); what scipy 1.17.1 says of them stands in `test_a_paired_test_is_scipys`
FIRST = "1000011100001000110000110011011110011110"
SECOND = "1000011110011000010100110011001110011111"


def values(bits: str) -> dict[str, float]:
    return {str(at): float(bit) for at, bit in enumerate(bits)}


def alone(names: dict[str, float]) -> dict[str, str]:
    return {name: name for name in names}


def dependent(clusters: int, sizes: tuple[int, ...], seed: int) -> tuple[list[float], list[int]]:
    """0 and 1 whose rate differs from cluster to cluster."""
    rng = np.random.default_rng(seed)
    found, names = [], []
    for cluster in range(clusters):
        size = sizes[cluster % len(sizes)]
        found += (rng.random(size) < rng.beta(1.5, 0.8)).astype(float).tolist()
        names += [cluster] * size
    return found, names


def test_the_error_of_independent_values_is_the_usual_one():
    found = [0.0, 1.0, 1.0, 0.5, 0.25, 1.0]
    mean = clustered_mean(found, range(6))
    assert mean.value == pytest.approx(np.mean(found))
    assert mean.error == pytest.approx(np.std(found, ddof=1) / math.sqrt(6))
    assert (mean.n, mean.clusters) == (6, 6)


@pytest.mark.parametrize("sizes", [(4,), (1, 2, 7)])
def test_the_error_is_its_closed_form(sizes: tuple[int, ...]):
    found, names = dependent(30, sizes, 1)
    residuals = np.array(found) - np.mean(found)
    same = np.equal.outer(names, names)
    variance = residuals @ same @ residuals / len(found) ** 2 * 30 / 29
    assert clustered_mean(found, names).error == pytest.approx(math.sqrt(variance), rel=1e-12)


@pytest.mark.parametrize(("clusters", "sizes"), [(200, (4,)), (300, (1, 2, 5))])
def test_the_error_is_that_of_a_bootstrap_over_clusters(clusters: int, sizes: tuple[int, ...]):
    found, names = dependent(clusters, sizes, 2)
    totals = np.bincount(names, found)
    counts = np.bincount(names)
    drawn = np.random.default_rng(0).integers(0, clusters, (8000, clusters))
    spread = (totals[drawn].sum(1) / counts[drawn].sum(1)).std(ddof=1)
    error = clustered_mean(found, names).error
    assert error == pytest.approx(spread, rel=0.05)
    independent = clustered_mean(found, range(len(found))).error
    assert error is not None and independent is not None
    assert error > 1.1 * independent  # so that ignoring the clusters would be seen


def test_groups_that_count_alike_have_the_error_of_a_bootstrap_too():
    rng = np.random.default_rng(5)
    rate, size = rng.beta(1.5, 0.8, 250), rng.integers(1, 4, 250)
    found = [
        (float(rng.random() < rate[c]), c, group)
        for c in range(250)
        for group in range(2)
        for _ in range(size[c] if group else 1)
    ]
    one = clustered_mean([v for v, _, _ in found], [c for _, c, _ in found], [g for _, _, g in found])
    sums, counts = np.zeros((250, 2)), np.zeros((250, 2))
    for value, cluster, group in found:
        sums[cluster, group] += value
        counts[cluster, group] += 1
    drawn = rng.integers(0, 250, (8000, 250))
    spread = (sums[drawn].sum(1) / counts[drawn].sum(1)).mean(1).std(ddof=1)
    assert one.value == pytest.approx((sums.sum(0) / counts.sum(0)).mean())
    assert one.error == pytest.approx(spread, rel=0.05)


def test_one_cluster_has_no_error_and_nothing_has_no_mean():
    assert clustered_mean([0.0, 1.0], ["a", "a"]).error is None
    with pytest.raises(ValueError, match="got 0, 0"):
        clustered_mean([], [])
    with pytest.raises(ValueError, match="got 2, 1"):
        clustered_mean([0.0, 1.0], ["a"])


def test_a_paired_test_is_scipys():
    first, second = values(FIRST), values(SECOND)
    found = compare(first, second, alone(first))
    assert found.t_p == pytest.approx(0.4211369313239447, rel=1e-9)
    in_fours = compare(first, second, {name: str(int(name) // 4) for name in first})
    assert in_fours.t_p == pytest.approx(0.44333185016966004, rel=1e-9)
    assert in_fours.sign_p == pytest.approx(0.75)
    assert (in_fours.clusters, in_fours.better, in_fours.worse) == (10, 4, 2)


@pytest.mark.parametrize("seed", range(3))
def test_paired_tests_are_those_of_the_scipy_that_is_installed(seed: int):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 2, (2, 60)).astype(float)
    names = [str(at) for at in range(60)]
    in_threes = {name: str(int(name) // 3) for name in names}
    found = compare(dict(zip(names, first, strict=True)), dict(zip(names, second, strict=True)), in_threes)
    sums = (second - first).reshape(20, 3).sum(1)
    assert found.t_p == pytest.approx(stats.ttest_1samp(sums, 0).pvalue, rel=1e-9)
    draws = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=100_000, rng=0)
    assert found.sign_p == pytest.approx(draws.pvalue, abs=0.01)


def test_the_sign_test_tries_all_signs_of_few_clusters_and_draws_of_many():
    sums = [1.0, -1.0, 2.0, 1.0, 1.0, -2.0, 3.0]
    exact = np.mean([abs(np.dot(signs, sums)) >= abs(sum(sums)) for signs in itertools.product((-1, 1), repeat=len(sums))])
    names = [str(at) for at in range(len(sums))]
    found = compare(dict.fromkeys(names, 0.0), dict(zip(names, sums, strict=True)), {name: name for name in names})
    assert found.sign_p == pytest.approx(exact)
    many = [str(at) for at in range(40)]  # 26 of 40 questions rose, the others fell: a binomial test
    second = {name: 1.0 if at < 26 else -1.0 for at, name in enumerate(many)}
    found = compare(dict.fromkeys(many, 0.0), second, {name: name for name in many})
    binomial = sum(math.comb(40, k) for k in range(41) if k >= 26 or k <= 14) / 2**40
    assert found.sign_p == pytest.approx(binomial, abs=0.004)
    assert compare(dict.fromkeys(many, 0.0), second, {name: name for name in many}) == found  # drawn with a seed


def test_runs_that_share_some_questions_are_compared_on_those():
    first, second = {"a": 1.0, "b": 0.0, "c": 1.0}, {"b": 1.0, "c": 1.0, "d": 0.0}
    found = compare(first, second, {name: name for name in "abcd"})
    assert (found.n, found.only_first, found.only_second, found.difference) == (2, 1, 1, 0.5)
    same = compare(first, first, {name: name for name in "abc"})
    assert (same.t_p, same.sign_p, same.difference) == (1.0, 1.0, 0.0)
    assert compare(first, second, dict.fromkeys("abcd", "x")).t_p is None
    with pytest.raises(ValueError, match="common question"):
        compare({"a": 1.0}, {"b": 1.0}, {"a": "a", "b": "b"})
