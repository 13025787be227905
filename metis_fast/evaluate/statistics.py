"""Standard errors and paired tests where rows depend on each other: those of one image, problem or composite.

Of C clusters with n values in all, the mean m has the cluster-robust variance

    C / (C - 1) * sum over clusters of (sum over its values of (v - m))**2 / n**2

which for clusters of one value each is the usual s**2 / n. (Liang and Zeger 1986; Miller 2024, Adding Error Bars to Evals, has
it without the first factor, which makes it right for few clusters.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import mpmath  # comes with sympy, which torch and math-verify need
import numpy as np

_EXACT = 16  # differing clusters up to which all signs are tried: 65,536 of them
_DRAWS = 100_000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean and its standard error, which is None for one cluster. n: values; clusters: independent ones."""

    value: float
    error: float | None
    n: int
    clusters: int


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable], strata: Sequence[Hashable] = ()) -> Mean:
    """Mean of values that are dependent inside a cluster, with the error above.

    strata: of each value one of several groups, whose means count alike whatever their sizes; none: one group. v - m is then
    the distance to the mean of its group, and a value weighs 1 / (groups * values of its group) where it was 1 / n.

    Raises:
        ValueError: there are no values, or not as many clusters or strata.
    """
    strata = strata or [None] * len(values)
    if not values or not len(values) == len(clusters) == len(strata):
        raise ValueError(
            "a clustered mean: expected values, with a cluster and a group for each, got "
            f"{len(values)}, {len(clusters)} and {len(strata)}"
        )
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for value, stratum in zip(values, strata, strict=True):
        groups[stratum].append(value)
    means = {stratum: math.fsum(group) / len(group) for stratum, group in groups.items()}
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster, stratum in zip(values, clusters, strata, strict=True):
        sums[cluster] += (value - means[stratum]) / (len(groups) * len(groups[stratum]))
    count, mean = len(sums), math.fsum(means.values()) / len(means)
    if count < 2:
        return Mean(mean, None, len(values), count)
    return Mean(mean, math.sqrt(count / (count - 1) * math.fsum(part * part for part in sums.values())), len(values), count)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs on the same questions.

    difference: mean of second minus first, with its clustered standard error. t_p: two-sided, of the paired t test with
    clusters - 1 degrees of freedom; sign_p: of the sign-flip test, which asks for no normal distribution. Both are 1 where
    nothing differs, and None where there is one cluster.
    n, clusters: questions that both have a value of. only_first, only_second: those that only one has.
    better, worse: questions whose value rose, fell.
    """

    difference: float
    error: float | None
    t_p: float | None
    sign_p: float | None
    n: int
    clusters: int
    better: int
    worse: int
    only_first: int
    only_second: int


def compare(first: Mapping[str, float], second: Mapping[str, float], clusters: Mapping[str, Hashable]) -> Comparison:
    """Paired tests over the questions that both runs have a value of. first, second: question -> value; clusters: of each.

    Raises:
        ValueError: the runs have no question in common.
    """
    both = [index for index in first if index in second]
    if not both:
        raise ValueError("two runs without a common question cannot be compared; expected results of the same benchmark")
    differences = [second[index] - first[index] for index in both]
    mean = clustered_mean(differences, [clusters[index] for index in both])
    sums: dict[Hashable, float] = defaultdict(float)
    for index, difference in zip(both, differences, strict=True):
        sums[clusters[index]] += difference
    t_p = sign_p = None
    if mean.error is not None:
        sign_p = _sign_flip(np.array(list(sums.values())))
        t_p = (
            1.0 if not any(differences) else 0.0 if mean.error == 0 else _two_sided(mean.value / mean.error, mean.clusters - 1)
        )
    return Comparison(
        difference=mean.value,
        error=mean.error,
        t_p=t_p,
        sign_p=sign_p,
        n=mean.n,
        clusters=mean.clusters,
        better=sum(difference > 0 for difference in differences),
        worse=sum(difference < 0 for difference in differences),
        only_first=len(first) - len(both),
        only_second=len(second) - len(both),
    )


def _sign_flip(sums: np.ndarray) -> float:
    """Share of the signs of cluster sums [C] whose total is at least as far from 0; all signs, or drawn ones (seeded)."""
    sums = sums[sums != 0]
    count = len(sums)
    if count == 0:
        return 1.0
    limit = abs(sums.sum()) * (1 - 1e-12)  # sums in another order
    if count <= _EXACT:
        signs = 1 - 2 * ((np.arange(1 << count)[:, None] >> np.arange(count)) & 1)
        return float((abs(signs @ sums) >= limit).mean())
    rng = np.random.default_rng(_SEED)
    hits, block = 0, max(1, (1 << 22) // count)
    for start in range(0, _DRAWS, block):
        signs = rng.integers(0, 2, (min(block, _DRAWS - start), count), dtype=np.int8) * 2.0 - 1.0
        hits += int((abs(signs @ sums) >= limit).sum())
    return (hits + 1) / (_DRAWS + 1)  # the signs as they are count as one draw


def _two_sided(t: float, freedom: int) -> float:
    """P(|T| >= |t|) of Student's t: the regularised incomplete beta function at freedom / (freedom + t**2)."""
    return float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))
