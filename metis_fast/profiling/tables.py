"""What a profile says in numbers: stages, lanes, ops, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metis_fast.profiling.recorder import SAMPLE_NS, MemorySample, Recorded, Recorder
from metis_fast.spans import Lane

if TYPE_CHECKING:
    from torch.profiler import profile

_OPS = 15  # rows of a printed table
OTHER = "other"


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage of the run. seconds: of a step, mean; share: of the step; peak_bytes: resident memory while it ran, with that of
    the processes below this one; gpu_bytes: most that torch had allocated."""

    stage: str
    seconds: float
    share: float
    calls: float
    peak_bytes: int
    gpu_bytes: int


@dataclass(frozen=True, slots=True)
class LaneRow:
    """A component. busy: share of the steps in which at least one of its spans ran; mean: spans that ran at once, over all of
    the time; the rest is a bubble."""

    lane: Lane
    spans: int
    busy: float
    mean: float


@dataclass(frozen=True, slots=True)
class OpRow:
    """An op of torch. cpu_s, gpu_s: seconds in itself, without the ops that it calls."""

    name: str
    calls: int
    cpu_s: float
    gpu_s: float


@dataclass(frozen=True, slots=True)
class Tables:
    """Of the steps that were recorded, whose wall seconds are `steps`."""

    steps: tuple[float, ...]
    stages: tuple[StageRow, ...]
    lanes: tuple[LaneRow, ...]
    ops: tuple[OpRow, ...]


def _outermost(spans: Iterable[Recorded]) -> list[Recorded]:
    spans = list(spans)
    numbers = {one.number for one in spans}
    return [one for one in spans if one.parent not in numbers]


def _peak(samples: Sequence[MemorySample], times: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of the samples while something ran, and of the last ones before."""
    inside = [one for one in samples if any(start - SAMPLE_NS <= one.at_ns <= stop for start, stop in times)]
    return max((one.resident + one.children for one in inside), default=0), max((one.allocated for one in inside), default=0)


def _united(times: Iterable[tuple[int, int]]) -> int:
    """Length of the union of spans of time."""
    total, end = 0, 0
    for start, stop in sorted(times):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def tabulate(recorder: Recorder, ops: Sequence[OpRow] = ()) -> Tables:
    """Means over the steps. What of a step is in no stage is `other`."""
    steps = recorder.steps
    length = sum(stop - start for _, start, stop in steps)
    num = max(1, len(steps))
    inside = [one for one in recorder.spans if any(start <= one.began_ns and one.ended_ns <= stop for _, start, stop in steps)]
    by_stage: dict[str, list[Recorded]] = {}
    for one in _outermost(one for one in inside if one.lane is Lane.RUN):
        by_stage.setdefault(one.name, []).append(one)
    stages = []
    for name, own in sorted(by_stage.items(), key=lambda item: min(one.began_ns for one in item[1])):
        times = [(one.began_ns, one.ended_ns) for one in own]
        total = sum(stop - start for start, stop in times)
        stages.append(StageRow(name, total / num / 1e9, total / max(1, length), len(own) / num, *_peak(recorder.memory, times)))
    rest = length / num / 1e9 - sum(one.seconds for one in stages)
    stages.append(StageRow(OTHER, rest, rest * num * 1e9 / max(1, length), 1.0, 0, 0))
    lanes = []
    for lane in Lane:
        times = [
            (max(one.began_ns, start), min(one.ended_ns, stop))
            for one in _outermost(one for one in recorder.spans if one.lane is lane)
            for _, start, stop in steps
            if one.began_ns < stop and one.ended_ns > start
        ]
        at_once = sum(stop - start for start, stop in times)
        lanes.append(LaneRow(lane, len(times), _united(times) / max(1, length), at_once / max(1, length)))
    return Tables(tuple((stop - start) / 1e9 for _, start, stop in steps), tuple(stages), tuple(lanes), tuple(ops))


def op_rows(profiler: profile) -> list[OpRow]:
    """Ops by their own time, longest first."""
    rows = [
        OpRow(one.key, one.count, one.self_cpu_time_total / 1e6, one.self_device_time_total / 1e6)
        for one in profiler.key_averages()
    ]
    return sorted(rows, key=lambda row: -(row.cpu_s + row.gpu_s))


def as_text(tables: Tables) -> str:
    """For people."""
    mib = 2**20
    gpu = any(row.gpu_bytes for row in tables.stages)
    lines = [f"{len(tables.steps)} steps of {', '.join(f'{seconds:.2f}' for seconds in tables.steps)} s", ""]
    lines.append(f"{'stage':12} {'s a step':>9} {'share':>7} {'calls':>6} {'peak MiB':>9}" + f" {'GPU MiB':>9}" * gpu)
    for row in tables.stages:
        memory = f"{row.peak_bytes / mib:9.0f}" if row.peak_bytes else f"{'':9}"
        device = f" {row.gpu_bytes / mib:9.0f}" * gpu
        lines.append(f"{row.stage:12} {row.seconds:9.3f} {row.share:7.1%} {row.calls:6.1f} {memory}{device}")
    lines += ["", f"{'lane':12} {'spans':>9} {'busy':>7} {'at once':>8}"]
    lines += [f"{row.lane:12} {row.spans:9} {row.busy:7.1%} {row.mean:8.2f}" for row in tables.lanes]
    if tables.ops:
        total = sum(row.cpu_s for row in tables.ops) or 1.0
        devices = any(row.gpu_s for row in tables.ops)
        lines += ["", f"{'op (last step)':40} {'calls':>8} {'CPU s':>9} {'share':>7}" + f" {'GPU s':>9}" * devices]
        for row in tables.ops[:_OPS]:
            device = f" {row.gpu_s:9.3f}" * devices
            lines.append(f"{row.name[:40]:40} {row.calls:8} {row.cpu_s:9.3f} {row.cpu_s / total:7.1%}{device}")
    return "\n".join(lines)
