"""Spans as a Chrome trace: a process for each lane, and in it as many rows as run at once.

Rows hold spans that follow each other or lie in each other, as viewers want it. Ops of torch, where they were recorded, are
further processes below, on the same clock.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from metis_fast.profiling.recorder import MemorySample, Recorded, Recorder
from metis_fast.spans import Lane

Event = dict[str, object]

_FIRST = 1_000_000_000  # numbers of our lanes, above those that a system gives processes, which torch's events have
_MEMORY = _FIRST + len(Lane)
_OPS = _MEMORY + 1
_PROFILER = ("Spans", "Traces")  # what torch's profiler calls itself, where others have the number of a process


@dataclass(frozen=True, slots=True)
class Placed:
    """A span and the row of its lane that it stands in."""

    span: Recorded
    row: int


def place(spans: Sequence[Recorded]) -> list[Placed]:
    """Rows for the spans of one lane. One that lies in its parent stands below that; the others take the first row that is
    free."""
    by_number = {one.number: one for one in spans}
    rows: dict[int, int] = {}
    free_at: list[int] = []  # of each row
    inside: dict[int, int] = {}  # of a span, the end of the last one that was put below it
    placed = []
    for one in sorted(spans, key=lambda one: (one.began_ns, one.number)):
        parent = by_number.get(one.parent)
        fits = (
            parent is not None
            and parent.began_ns <= one.began_ns
            and one.ended_ns <= parent.ended_ns
            and inside.get(parent.number, 0) <= one.began_ns
        )
        if fits and parent is not None:
            rows[one.number] = rows[parent.number]
            inside[parent.number] = one.ended_ns
        else:
            row = next((i for i, end in enumerate(free_at) if end <= one.began_ns), len(free_at))
            if row == len(free_at):
                free_at.append(0)
            free_at[row], rows[one.number] = one.ended_ns, row
        placed.append(Placed(one, rows[one.number]))
    return placed


def _named(pid: int, name: str, order: int) -> Iterator[Event]:
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": order}}


def _whole(pid: int, row: int, name: str, began_us: float, seconds_us: float) -> Event:
    return {"ph": "X", "pid": pid, "tid": row, "name": name, "cat": "metis", "ts": began_us, "dur": seconds_us}


def lane_events(recorder: Recorder, began_ns: int) -> Iterator[Event]:
    """Events of all lanes, an empty one too. began_ns: of `time.perf_counter_ns`, where the trace begins; what had ended by
    then is left out."""
    for order, lane in enumerate(Lane):
        pid = _FIRST + order
        yield from _named(pid, lane.value, order - 100)
        placed = place([one for one in recorder.spans if one.lane is lane and one.ended_ns > began_ns])
        for row in range(max(1, 1 + max((one.row for one in placed), default=0))):
            name = lane.value if row == 0 else f"{lane.value} {row + 1}"
            yield {"ph": "M", "pid": pid, "tid": row, "name": "thread_name", "args": {"name": name}}
        if lane is Lane.RUN:
            for number, start, stop in recorder.steps:
                yield _whole(pid, 0, f"step {number}", (start - began_ns) / 1e3, (stop - start) / 1e3)
        for one in placed:
            span = one.span
            yield _whole(pid, one.row, span.name, (span.began_ns - began_ns) / 1e3, (span.ended_ns - span.began_ns) / 1e3)


def memory_events(samples: Iterable[MemorySample], began_ns: int, ended_ns: int) -> Iterator[Event]:
    """Curves, in MiB, from `began_ns` to `ended_ns`: writing down what torch has recorded takes longer than many a step."""
    yield from _named(_MEMORY, "memory (MiB)", len(Lane) - 100)
    for one in samples:
        if not began_ns <= one.at_ns <= ended_ns:
            continue
        at = (one.at_ns - began_ns) / 1e3
        mib = {"this process": one.resident / 2**20, "its children": one.children / 2**20}
        yield {"ph": "C", "pid": _MEMORY, "tid": 0, "name": "resident", "ts": at, "args": mib}
        if one.reserved:
            gpu = {"allocated": one.allocated / 2**20, "reserved": one.reserved / 2**20}
            yield {"ph": "C", "pid": _MEMORY, "tid": 0, "name": "GPUs", "ts": at, "args": gpu}


def torch_events(path: Path, label: str, began_unix_ns: int, taken: Iterator[int]) -> Iterator[Event]:
    """Those of a trace of torch's profiler, moved onto our clock, without what it says of itself. label: before the names of
    its processes. taken: numbers that no process of the trace has."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    shift_us = (int(trace.get("baseTimeNanoseconds", 0)) - began_unix_ns) / 1e3
    pids: dict[object, int] = {}
    for event in trace["traceEvents"]:
        if event.get("ph") in (None, "M") and event.get("name") == "process_sort_index":
            continue
        if event.get("pid") in _PROFILER or event.get("name") == "Record Window End":
            continue
        pid = event.get("pid")
        if not isinstance(pid, int):  # the profiler's marks of itself, in lanes without a name
            continue
        if pid not in pids:
            pids[pid] = next(taken)
            yield from _named(pids[pid], f"{label}: {pid}", pids[pid] - _OPS)
        if event.get("name") == "process_name" and event.get("ph") == "M":
            continue
        event["pid"] = pids[pid]
        if "ts" in event and event.get("ph") != "M":
            event["ts"] += shift_us
        yield event


def write_trace(path: Path, recorder: Recorder, ops: Sequence[tuple[str, Path]] = ()) -> None:
    """One file, gzipped, for https://ui.perfetto.dev. ops: traces of torch's profiler, with labels."""
    began_ns = min((start for _, start, _ in recorder.steps), default=0)
    ended_ns = max((stop for _, _, stop in recorder.steps), default=0)
    numbers = count(_OPS)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""

        def events() -> Iterator[Event]:
            yield from lane_events(recorder, began_ns)
            yield from memory_events(recorder.memory, began_ns, ended_ns)
            for label, trace in ops:
                yield from torch_events(trace, label, recorder.epoch_ns + began_ns, numbers)

        for event in events():
            file.write(separator + json.dumps(event))
            separator = ",\n"
        file.write("\n]}\n")
