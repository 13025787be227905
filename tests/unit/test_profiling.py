"""Spans, the rows of a trace, and the tables, from spans whose times are known."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from itertools import count
from pathlib import Path

import pytest
import torch

from metis_fast.profiling.recorder import MemorySample, Recorded, Recorder, sample_memory
from metis_fast.profiling.tables import as_text, tabulate
from metis_fast.profiling.trace import place, torch_events, write_trace
from metis_fast.spans import Lane, listening, span, spanned
from metis_fast.torch_profiler import profiler

SECOND = 1_000_000_000


def _span(number: int, lane: Lane, name: str, began: float, ended: float, parent: int = -1) -> Recorded:
    return Recorded(number, lane, name, round(began * SECOND), round(ended * SECOND), parent)


def test_nobody_is_told_of_spans_while_nobody_listens() -> None:
    recorder = Recorder()
    with span(Lane.TOOLS, "before"), listening(recorder), span(Lane.TOOLS, "heard"):
        pass
    with span(Lane.TOOLS, "after"):
        pass
    assert [one.name for one in recorder.spans] == ["heard"]


def test_spans_of_tasks_know_what_they_were_begun_in() -> None:
    recorder = Recorder()

    async def rollout(name: str) -> None:
        with span(Lane.EPISODES, name):
            await asyncio.sleep(0)
            with span(Lane.EPISODES, f"message of {name}"), span(Lane.ENGINE, "decode"):
                await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(rollout("a"), rollout("b"))

    with listening(recorder):
        asyncio.run(both())
    by_name = {one.name: one for one in recorder.spans}
    for name in ("a", "b"):
        assert by_name[f"message of {name}"].parent == by_name[name].number
        assert by_name[name].parent == -1
    assert all(one.parent == -1 for one in recorder.spans if one.lane is Lane.ENGINE)
    assert all(one.began_ns <= one.ended_ns for one in recorder.spans)


def test_a_span_ends_with_an_error_and_a_decorated_function_keeps_its_result() -> None:
    recorder = Recorder()

    @spanned(Lane.TRAINER, "double")
    def double(value: int, fail: bool = False) -> int:
        """Of a number."""
        if fail:
            raise ValueError(value)
        return 2 * value

    assert (double(2), double.__name__, double.__doc__) == (4, "double", "Of a number.")
    with listening(recorder):
        assert double(3) == 6
        with pytest.raises(ValueError, match="4"):
            double(4, fail=True)
    assert [one.name for one in recorder.spans] == ["double", "double"]


def test_rows_hold_spans_in_each_other_or_apart() -> None:
    spans = [
        _span(0, Lane.EPISODES, "a", 0, 10),
        _span(1, Lane.EPISODES, "b", 1, 4),  # beside a, not in it
        _span(2, Lane.EPISODES, "message of a", 2, 3, parent=0),
        _span(3, Lane.EPISODES, "message of b", 2, 3, parent=1),
        _span(4, Lane.EPISODES, "c", 5, 6),  # where b was
        _span(5, Lane.EPISODES, "d", 9, 12),
        _span(6, Lane.EPISODES, "late", 9, 11, parent=0),  # outlives what it was begun in
    ]
    rows = {one.span.name: one.row for one in place(spans)}
    assert rows == {"a": 0, "message of a": 0, "b": 1, "message of b": 1, "c": 1, "d": 1, "late": 2}


def test_tables_add_up() -> None:
    recorder = Recorder()
    recorder.steps = [(7, 0, 10 * SECOND), (8, 10 * SECOND, 20 * SECOND)]
    recorder.spans = [
        _span(0, Lane.RUN, "rollout", 0, 6),
        _span(1, Lane.RUN, "update", 6, 9),
        _span(2, Lane.RUN, "rollout", 10, 18),
        _span(3, Lane.RUN, "score", 11, 12, parent=2),  # in a stage, and none itself
        _span(4, Lane.RUN, "rollout", -5, -1),  # of the step that warmed up
        _span(5, Lane.TOOLS, "python", 1, 4),
        _span(6, Lane.TOOLS, "python", 2, 5),
        _span(7, Lane.TOOLS, "python", -2, 1),  # a part of it is in the first step
    ]
    recorder.memory = [MemorySample(3 * SECOND, 100, 20, 0, 0), MemorySample(8 * SECOND, 300, 0, 0, 0)]
    tables = tabulate(recorder)
    stages = {row.stage: row for row in tables.stages}
    assert list(stages) == ["rollout", "update", "other"]
    assert (stages["rollout"].seconds, stages["rollout"].share, stages["rollout"].calls) == (7.0, 0.7, 1.0)
    assert (stages["rollout"].peak_bytes, stages["update"].peak_bytes) == (120, 300)
    assert stages["other"].seconds == pytest.approx(1.5)
    assert sum(row.seconds for row in tables.stages) == pytest.approx(10)
    tools = next(row for row in tables.lanes if row.lane is Lane.TOOLS)
    assert (tools.spans, tools.busy, tools.mean) == (3, pytest.approx(5 / 20), pytest.approx(7 / 20))
    assert "rollout" in as_text(tables) and "70.0%" in as_text(tables)


def test_ops_of_torch_are_below_named_lanes_and_its_marks_of_itself_are_left_out(tmp_path: Path) -> None:
    ops = [
        {"ph": "M", "pid": 7, "tid": 7, "name": "thread_name", "args": {"name": "thread 7"}},
        {"ph": "X", "pid": 7, "tid": 7, "name": "aten::mm", "ts": 5.0, "dur": 1.0},
        {"ph": "X", "pid": "Spans", "tid": "PyTorch Profiler", "name": "PyTorch Profiler (0)", "ts": 0.0, "dur": 9.0},
        {"ph": "i", "pid": "Traces", "tid": "Trace PyTorch Profiler", "name": "Iteration Start", "ts": 0.0},
    ]
    path = tmp_path / "ops.json"
    path.write_text(json.dumps({"baseTimeNanoseconds": 2000, "traceEvents": ops}))
    events = list(torch_events(path, "torch", 1000, count(100)))
    assert [(event["pid"], event["name"]) for event in events[2:]] == [(100, "thread_name"), (100, "aten::mm")]
    assert events[0]["args"] == {"name": "torch: 7"} and events[3]["ts"] == 6.0


def test_memory_is_that_of_the_process() -> None:
    sample = sample_memory()
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system has no /proc")
    assert 10 << 20 < sample.resident < 1 << 40
    recorder = Recorder()
    with recorder.sampling():
        time.sleep(0.2)
    assert len(recorder.memory) >= 2


def test_a_trace_holds_the_steps_and_nothing_of_the_time_in_which_it_is_written(tmp_path: Path) -> None:
    recorder, now = Recorder(), time.perf_counter_ns()
    with listening(recorder), profiler() as torchs, span(Lane.TRAINER, "update"):
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    torchs.export_chrome_trace(str(tmp_path / "run.json"))
    end = time.perf_counter_ns()
    recorder.steps.append((0, now, end))
    recorder.memory = [MemorySample(at, 1 << 20, 0, 0, 0) for at in (now - SECOND, now + 1000, end, end + 60 * SECOND)]
    write_trace(tmp_path / "trace.json.gz", recorder, [("torch", tmp_path / "run.json")])
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    drawn = [event for event in events if event["ph"] != "M"]
    assert all(event["ts"] >= 0 and event["ts"] + event.get("dur", 0) <= (end - now) / 1e3 + 1 for event in drawn)
    assert sum(event["ph"] == "C" for event in drawn) == 2
    assert any(event["name"] == "aten::mm" for event in drawn)
    processes = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert sum(name.startswith("torch") for name in processes) == 1, processes
