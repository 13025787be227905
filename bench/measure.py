"""Time, memory and products of a run.

Time. All implementations run once each in every round, and the first one of a round rotates, so that a slow phase of the
machine falls on all of them. On the CPU, wall time is perf_counter and CPU time is process_time: the sum over all threads,
spinning included. On a GPU, wall time is between two CUDA events, and CPU time is what the host spent on the launches.

Memory. The peak of the bytes that live tensors have above what lived when the run began, less the gradients that the run
hands back (dHidden, dWeight): scratch, saved activations, accumulators. On the CPU it is added up from torch's own record of
every allocation and release through its allocator, inside C++ ops too; buffers that a library takes from malloc or the stack
do not appear (torch's matrix products pack their operands in some). On a GPU it is max_memory_allocated. Both are the same on
every run.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .candidate import Spread, Step


def _once(step: Step, device: torch.device) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one run."""
    if device.type != "cuda":
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        return time.process_time() - cpu, time.perf_counter() - wall
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    cpu = time.process_time()
    begin.record()
    step()
    end.record()
    cpu = time.process_time() - cpu  # before waiting, which spins
    torch.cuda.synchronize(device)
    return cpu, begin.elapsed_time(end) / 1e3


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A collection would take half a second of a run, with torch loaded, and free memory in the middle of it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _spread(seconds: list[float]) -> Spread:
    return Spread(statistics.median(seconds), min(seconds), max(seconds))


def interleaved(
    steps: dict[str, Step], runs: int, device: torch.device, done: Callable[[], object]
) -> dict[str, tuple[Spread, Spread]]:
    """(CPU, wall) of each, over `runs` rounds. `done` is called after every run. The steps must be warm."""
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    with _no_collection():
        for number in range(runs):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                cpu_s, wall_s = _once(steps[name], device)
                cpu[name].append(cpu_s)
                wall[name].append(wall_s)
                done()
    return {name: (_spread(cpu[name]), _spread(wall[name])) for name in names}


def peak_bytes(step: Step, device: torch.device) -> int:
    """Peak of the live tensor bytes of a run, without the gradients that it hands back. See the top of this file."""
    if device.type == "cuda":
        with _no_collection():
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            outcome = step()
            return torch.cuda.max_memory_allocated(device) - before - outcome.handed_back
    # kineto writes two lines to stderr for every profile unless its log level is above all of its messages'
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with _no_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        outcome = step()
    results = record.profiler.kineto_results if record.profiler is not None else None
    assert results is not None
    memory = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, live)
    return peak - outcome.handed_back


def flops(step: Step, formulas: dict[Any, Callable[..., int]]) -> int:
    """Floating-point operations of the matrix products of a run; `formulas` for ops that torch cannot look into."""
    # torch.compile refuses to run under the counter; what it compiles has the products of the code it is given
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return counter.get_total_flops()
