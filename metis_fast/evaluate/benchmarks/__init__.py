"""The benchmarks: one small file each, and this dict of them. A new one is a new file and a line here."""

from __future__ import annotations

from metis_fast.errors import ConfigError
from metis_fast.evaluate.benchmark import Benchmark
from metis_fast.evaluate.benchmarks.charxiv import CHARXIV_DQ, CHARXIV_RQ
from metis_fast.evaluate.benchmarks.dynamath import DYNAMATH
from metis_fast.evaluate.benchmarks.hrbench import HRBENCH_4K, HRBENCH_8K
from metis_fast.evaluate.benchmarks.logicvista import LOGICVISTA
from metis_fast.evaluate.benchmarks.mathverse import MATHVERSE
from metis_fast.evaluate.benchmarks.mathvista import MATHVISTA
from metis_fast.evaluate.benchmarks.mme_realworld import MME_REALWORLD, MME_REALWORLD_CN, MME_REALWORLD_LITE
from metis_fast.evaluate.benchmarks.seedbench2plus import SEEDBENCH_2_PLUS
from metis_fast.evaluate.benchmarks.treebench import TREEBENCH
from metis_fast.evaluate.benchmarks.vstar import VSTAR
from metis_fast.evaluate.benchmarks.wemath import WEMATH

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        VSTAR,
        HRBENCH_4K,
        HRBENCH_8K,
        TREEBENCH,
        MME_REALWORLD,
        MME_REALWORLD_LITE,
        MME_REALWORLD_CN,
        SEEDBENCH_2_PLUS,
        CHARXIV_DQ,
        CHARXIV_RQ,
        MATHVISTA,
        MATHVERSE,
        WEMATH,
        DYNAMATH,
        LOGICVISTA,
    )
}
"""By name, in the order of the paper's table."""


def find(name: str) -> Benchmark:
    """A benchmark by its name, an alias, or the name of a file of it, in any case.

    Raises:
        ConfigError: there is none of that name.
    """
    for benchmark in BENCHMARKS.values():
        if name.lower() in (benchmark.name, *benchmark.aliases):
            return benchmark
    named = [one for one in BENCHMARKS.values() if name.lower() in map(str.lower, one.names)]
    if len(named) != 1:
        raise ConfigError(f"benchmark: expected one of {', '.join(BENCHMARKS)}, got {name!r}; see metis-fast benchmark list")
    return named[0]
