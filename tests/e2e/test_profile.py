"""`metis-fast profile`: what its trace and tables say of a run, and that the run itself is left alone."""

from __future__ import annotations

import gzip
import json
import signal
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from disks import small_disk
from harness import Moment, error_line, run, succeed

from metis_fast.run.folder import held
from metis_fast.spans import Lane

_STEPS = 2


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def _profile(demo: Path, folder: Path, *settings: object) -> tuple[dict, list[dict]]:
    """Tables and trace of some steps after those of the demo's run."""
    out = folder / "profile"
    command = ["profile", demo / "config.yaml", "train.steps=20", "checkpoint.every=2", "log.progress=false", *settings]
    tables = json.loads(succeed([*command, "--steps", _STEPS, "--out", out, "--json"], folder / "process").splitlines()[-1])
    assert tables["trace"] == str(out / "trace.json.gz")
    with gzip.open(out / "trace.json.gz", "rt") as file:
        return tables, json.load(file)["traceEvents"]


def _named(events: list[dict], kind: str) -> dict[tuple[int, int], str]:
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == kind}


def _rows(events: list[dict], pid: int) -> Iterator[list[dict]]:
    rows = defaultdict(list)
    for event in events:
        if event["ph"] == "X" and event["pid"] == pid:
            rows[event["tid"]].append(event)
    yield from rows.values()


def _assert_nested(row: list[dict]) -> None:
    """Two events of a row lie in each other or apart. A thousandth of a microsecond is what a float loses."""
    ends: list[float] = []
    for event in sorted(row, key=lambda e: (e["ts"], -e["dur"])):
        while ends and ends[-1] <= event["ts"] + 1e-3:
            ends.pop()
        assert not ends or event["ts"] + event["dur"] <= ends[-1] + 1e-3, event
        ends.append(event["ts"] + event["dur"])


def _check(tables: dict, events: list[dict]) -> dict[str, int]:
    """What holds of every trace. Returns the number of each lane's process."""
    processes = {name: pid for (pid, _), name in _named(events, "process_name").items()}
    assert [name for name in processes if name in set(Lane)] == [lane.value for lane in Lane]
    pids = {lane.value: processes[lane.value] for lane in Lane}
    threads = _named(events, "thread_name")
    for lane, pid in pids.items():
        assert threads[pid, 0] == lane
        for row in _rows(events, pid):
            _assert_nested(row)
            assert all(event["dur"] >= 0 for event in row)
    steps = sorted(
        (e for row in _rows(events, pids["run"]) for e in row if e["name"].startswith("step ")), key=lambda e: e["ts"]
    )
    assert len(steps) == len(tables["steps"]) == _STEPS
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in pairwise(steps))
    mean = sum(tables["steps"]) / _STEPS
    assert sum(stage["seconds"] for stage in tables["stages"]) == pytest.approx(mean)
    other = tables["stages"][-1]
    assert other["stage"] == "other" and -1e-6 <= other["seconds"] < 0.05 * mean + 0.02, "something of a step is in no stage"
    return pids


@pytest.mark.parametrize(
    "settings",
    [(), pytest.param(("rollout.mode=one_step_off", "loss.tis_cap=2"), marks=pytest.mark.slow)],
    ids=["sync", "one step off"],
)
def test_a_profile_of_a_run_that_goes_on(demo: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    before = _files(demo)
    # one step off is another run: it begins anew, beside the old one's folder
    tables, events = _profile(demo, tmp_path, *settings, *([f"run.dir={tmp_path / 'none'}"] if settings else []))
    assert _files(demo) == before
    pids = _check(tables, events)
    names = {lane: {e["name"] for row in _rows(events, pid) for e in row} for lane, pid in pids.items()}
    assert {"rollout", "sync", "score", "update", "store", "log"} <= names["run"]
    assert {"decode", "prefill"} <= names["engine"]
    assert {"update", "forward", "backward", "optimizer"} <= names["trainer"]
    assert all(names[lane] for lane in names), "a lane without a span"
    lanes = {row["lane"]: row for row in tables["lanes"]}
    assert all(0 < row["busy"] <= 1 + 1e-9 for row in lanes.values())
    assert lanes["episodes"]["mean"] > lanes["episodes"]["busy"], "rollouts run side by side"
    peaks = {stage["stage"]: stage["peak_bytes"] for stage in tables["stages"]}
    assert peaks["rollout"] > 100 << 20
    assert any(e["ph"] == "C" and e["args"]["this process"] > 100 for e in events)
    assert {op["name"] for op in tables["ops"]} >= {"aten::mm"}
    first = min(e["ts"] for e in events if e["ph"] == "X")
    last_step = max((e for e in events if e["ph"] == "X" and e["name"].startswith("step ")), key=lambda e: e["ts"])
    ops = [e for e in events if e["ph"] == "X" and e["name"] == "aten::mm"]
    assert ops and all(last_step["ts"] <= e["ts"] <= last_step["ts"] + last_step["dur"] for e in ops)
    assert first >= last_step["ts"] - 1e6 * sum(tables["steps"]) - 1e7
    if not settings:
        assert (tmp_path / "profile" / "run" / "metrics.jsonl").read_text().splitlines()[0].startswith('{"step": 5')


def _short(demo: Path, out: Path) -> list[object]:
    settings = ("train.steps=20", "log.progress=false")
    return ["profile", demo / "config.yaml", *settings, "--steps", 1, "--no-ops", "--out", out, "--json"]


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow), pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_one_that_was_stopped_or_killed_is_begun_anew_by_the_same_call(
    demo: Path, tmp_path: Path, number: signal.Signals
) -> None:
    before, out = _files(demo), tmp_path / "profile"
    ended = run(_short(demo, out), tmp_path / "first", Moment("pipeline._score", number, entry=2))
    assert ended.hit and ended.orphans == () and (out / "run").exists()
    if number is signal.SIGKILL:
        assert ended.code == -9
    else:
        assert ended.code == 130 and ended.err.splitlines()[-1].startswith("metis-fast: stopped")
    with held(out):
        assert "another process is running" in error_line(run(_short(demo, out), tmp_path / "beside"))
    tables = json.loads(succeed(_short(demo, out), tmp_path / "second").splitlines()[-1])
    assert len(tables["steps"]) == 1 and (out / "trace.json.gz").exists()
    assert "is not empty; name a new folder" in error_line(run(_short(demo, out), tmp_path / "third"))
    assert _files(demo) == before


@pytest.mark.slow
@pytest.mark.parametrize("left", [4, 60])  # a tmpfs of 0 has no limit
def test_a_full_disk_is_one_line_and_the_same_call_goes_on_with_room(demo: Path, tmp_path: Path, left: int) -> None:
    with small_disk(tmp_path / "disk") as disk:
        out = disk.folder / "profile"
        disk.leave(left)  # KiB
        ended = run(_short(demo, out), tmp_path / "first")
        assert "free some space" in ended.err.splitlines()[-1] and ended.code == 2 and ended.orphans == ()
        assert "Traceback" not in ended.err
        disk.resize(64 << 10)
        succeed(_short(demo, out), tmp_path / "second")


@pytest.mark.slow
def test_ranks_add_their_ops(job: Path, tmp_path: Path) -> None:
    settings = ("train.backend=megatron", "train.megatron.tensor_parallel=2", f"run.dir={tmp_path / 'none'}")
    out = tmp_path / "profile"
    command = ["profile", job, "model.freeze=[]", "train.steps=20", *settings, "--steps", 1, "--out", out]
    succeed(command, tmp_path / "process")
    with gzip.open(out / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    updates = [e for e in events if e["ph"] == "X" and e["name"] == "update" and e["cat"] == "metis"]
    (update,) = [e for e in updates if e["tid"] == 0 and "trainer" in _named(events, "process_name")[e["pid"], 0]]
    for rank in (0, 1):
        pids = {pid for (pid, _), name in _named(events, "process_name").items() if name.startswith(f"rank {rank} update")}
        ops = [e for e in events if e["ph"] == "X" and e["pid"] in pids and e["name"] == "aten::mm"]
        assert ops and all(update["ts"] <= e["ts"] <= update["ts"] + update["dur"] for e in ops), "by the same clock"
    assert not (out / "ops").exists()


def test_what_cannot_be_profiled_is_one_line(demo: Path, tmp_path: Path) -> None:
    command = ["profile", demo / "config.yaml", "--out"]
    assert "is not empty; name a new folder" in error_line(run([*command, demo], tmp_path / "a"))
    assert "--steps: expected 1 or more" in error_line(run([*command, tmp_path / "new", "--steps", 0], tmp_path / "b"))
    few = error_line(run([*command, tmp_path / "new"], tmp_path / "c"))
    assert "has 5 of them already; 4 more are needed" in few and "set train.steps=9" in few
    assert not (tmp_path / "new").exists()
