"""One benchmark: correctness of every implementation first, then time and memory of those that passed, interleaved."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from . import machine, measure
from .candidate import Candidate, Errors, Missing, Op, PeerMissing, Plan, Request, Row, Spread, Step


@dataclass(frozen=True, slots=True)
class Report:
    """Of one op. shape, gemm_flops, least_bytes, notes: see Plan; error_names: see Op."""

    op: str
    dtype: str
    error_names: tuple[str, ...]
    machine: machine.Machine
    rows: Sequence[Row]
    missing: Sequence[Missing]
    shape: dict[str, int]
    gemm_flops: int
    least_bytes: int
    notes: Sequence[str]

    @property
    def failed(self) -> bool:
        """One of our implementations is outside its limits."""
        return any(row.failed for row in self.rows)


@dataclass(frozen=True, slots=True)
class _Ready:
    """One that passed, warm: its run, products and memory."""

    step: Step
    gemms: float | None
    peak_bytes: int | None


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ready(candidate: Candidate, plan: Plan, device: torch.device) -> _Ready:
    step = candidate.prepare()
    step()  # compiles and tunes, which the FLOP counter would get in the way of
    gemms = None
    if plan.gemm_flops and candidate.gemms_visible:
        gemms = measure.flops(step, plan.flop_formulas) / plan.gemm_flops
    # the floor works in buffers that are there before, so a figure for it would say nothing
    peak = measure.peak_bytes(step, device) if candidate.check is not None else None
    return _Ready(step, gemms, peak)


def compare(name: str, op: Op, request: Request) -> Report:
    """Run `op` as asked. Progress goes to stderr."""
    with _threads(request.threads):
        plan = op.plan(request)
        errors: dict[str, Errors] = {}
        failed: dict[str, str] = {}
        ready: dict[str, _Ready] = {}
        missing: list[Missing] = []
        total = len(plan.candidates) * (2 + request.runs)
        with tqdm(total=total, desc=f"bench {name}", unit="run", file=sys.stderr, disable=None, leave=False) as bar:
            for candidate in plan.candidates:
                try:
                    errors[candidate.name] = candidate.check() if candidate.check else Errors()
                    bar.update()
                    if candidate.limits is not None:
                        failed[candidate.name] = errors[candidate.name].above(candidate.limits, op.errors)
                    if not failed.get(candidate.name):
                        ready[candidate.name] = _ready(candidate, plan, request.device)
                    bar.update()
                except PeerMissing as reason:
                    missing.append(Missing(candidate.name, str(reason)))
                except RuntimeError as error:  # out of memory, or torch.compile that fails
                    if candidate.limits is not None and not isinstance(error, torch.OutOfMemoryError):
                        raise
                    missing.append(Missing(candidate.name, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"))
            times = measure.interleaved(
                {name: entry.step for name, entry in ready.items()}, request.runs, request.device, bar.update
            )
        absent = {entry.impl for entry in missing}
        rows = [
            _row(candidate, errors[candidate.name], failed.get(candidate.name, ""), ready, times)
            for candidate in plan.candidates
            if candidate.name not in absent
        ]
        described = machine.describe(request.device)
    return Report(
        name, request.dtype, op.errors, described, rows, missing, plan.shape, plan.gemm_flops, plan.least_bytes, plan.notes
    )


def _row(
    candidate: Candidate, errors: Errors, failed: str, ready: dict[str, _Ready], times: dict[str, tuple[Spread, Spread]]
) -> Row:
    if candidate.name not in ready:
        return Row(candidate.name, candidate.live_fraction, None, None, None, None, errors, failed)
    entry, (cpu, wall) = ready[candidate.name], times[candidate.name]
    return Row(candidate.name, candidate.live_fraction, cpu, wall, entry.gemms, entry.peak_bytes, errors)
