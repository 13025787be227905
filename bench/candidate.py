"""What the benchmark passes around: a request, the implementations to compare, and a row of the result for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metis_fast.errors import MetisError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class BenchError(MetisError):
    """A benchmark that cannot run as asked."""


class PeerMissing(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure.

    shape: letters to sizes; those of the op's `shape`. live_fraction: share of the tokens with an advantage, in (0, 1].
    peers: which to run. runs: timed runs of each implementation. threads: of torch, on the CPU.
    """

    shape: dict[str, int]
    dtype: str
    live_fraction: float
    peers: tuple[str, ...]
    runs: int
    threads: int
    device: torch.device
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one run returns: values (log-probabilities, advantages, attention; None where an implementation does not hand
    them out) and gradients, if it makes any. handed_back: bytes of the gradients that were allocated by the run itself.
    """

    values: Tensor | None = None
    gradients: tuple[Tensor, ...] = ()
    handed_back: int = 0


Step = Callable[[], Outcome]


@dataclass(frozen=True, slots=True)
class Errors:
    """Against float64. values: largest absolute error, None: not given. gradients: relative, in the Frobenius norm."""

    values: float | None = None
    gradients: tuple[float, ...] = ()

    def above(self, limits: Errors, names: Sequence[str]) -> str:
        """Those over their limit, NaN included, by the op's names for them; "" if none is."""
        have = (self.values, *self.gradients)
        most = (limits.values, *limits.gradients[: len(self.gradients)])
        over = []
        for name, error, limit in zip(names, have, most, strict=False):
            if error is not None and limit is not None and not error <= limit:  # "not <=": a NaN is over any limit
                over.append(f"error of {name} {error:.2g} > {limit:.2g}")
        return ", ".join(over)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One implementation.

    prepare: allocates what it needs and returns the run to measure. May raise PeerMissing.
    check: runs it on a small part of the same problem, against float64; None for the floor, which solves no problem.
    limits: errors beyond which no speed is printed; None for peers, whose errors are shown as they are.
    live_fraction: share of the tokens that it is given work for. gemms_visible: whether the FLOP counter sees its products.
    """

    name: str
    prepare: Callable[[], Step]
    check: Callable[[], Errors] | None
    limits: Errors | None
    live_fraction: float
    gemms_visible: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """An op ready to be measured.

    flop_formulas: of ops that the FLOP counter cannot look into. gemm_flops: of one product; 0 where there are none.
    least_bytes: inputs and outputs, each moved once, the base of GB/s. notes: for people, under the table.
    """

    candidates: Sequence[Candidate]
    shape: dict[str, int]
    gemm_flops: int
    least_bytes: int
    flop_formulas: dict[Any, Callable[..., int]]
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Op:
    """summary: one line. shape: default sizes. dtypes: what it can be asked for, the default first. peers: known names.

    all_live: every token is work for it, so that there is no live fraction to choose. errors: names of what is compared with
    float64, values first.
    """

    summary: str
    shape: dict[str, int]
    dtypes: tuple[str, ...]
    peers: tuple[str, ...]
    all_live: bool
    errors: tuple[str, ...]
    plan: Callable[[Request], Plan]


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of a run: median, least and most."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Row:
    """Result of one implementation. No times: it failed its limits. failed: why."""

    impl: str
    live_fraction: float
    cpu: Spread | None
    wall: Spread | None
    gemms: float | None
    peak_bytes: int | None
    errors: Errors
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Missing:
    """A peer that did not run, and why."""

    impl: str
    why: str


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the Frobenius norm, in float64."""
    return float((value.double() - truth).norm() / truth.double().norm())


def largest_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth|, in float64."""
    return float((value.double() - truth).abs().max())
