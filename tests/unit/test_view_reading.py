"""The reader of run folders: whatever is missing, cut, damaged or newer is said, and the rest is there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from view_runs import ABILITIES, Maker, write_benchmark, write_run

from metis_fast import cli
from metis_fast.errors import DataError
from metis_fast.report.lines import JsonLines
from metis_fast.report.log import read_steps, step_scalars
from metis_fast.rollout.store import RolloutStore, read_rollouts
from metis_fast.view.answers import Answers, as_json
from metis_fast.view.file import write_file
from metis_fast.view.index import Filter, filter_of
from metis_fast.view.pictures import Source, draw, points, variants
from metis_fast.view.run import Run, open_runs

STEPS, PROMPTS, SIZE = 4, 9, 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "hdpo", steps=STEPS, prompts=PROMPTS, size=SIZE)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "hdpo"))


def places(run: Run, **query: str) -> list[int]:
    return run.index.select(filter_of(query))[1].tolist()


def test_a_whole_run_is_read_with_nothing_missing(finished: Path):
    record = Run("hdpo", finished).read()
    assert record.notes == ()
    assert [step.stats for step in record.steps] == read_steps(finished)
    assert record.steps[2].scalars == {"step": 2.0, **step_scalars(record.steps[2].stats)}
    assert [one.step for one in record.evaluations] == [0, 3]
    assert record.summary is not None and record.config["loss.w_tool"] == 0.15


def test_lines_come_as_they_are_written(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, lambda record: record["step"])
    assert lines.read().notes == ("metrics.jsonl is missing",)
    path.write_text('{"step": 0}\n{"st')
    read = lines.read()
    assert read.records == (0,) and "no end yet" in read.notes[0]
    with path.open("a") as file:
        file.write('ep": 1}\n')
    assert lines.read() == type(read)((0, 1), ())
    with path.open("a") as file:
        file.write('{"other": 1}\nnonsense\n[1]\n{"step": 4}\n')
    read = lines.read()
    assert read.records == (0, 1, 4)
    assert "3 lines are no records" in read.notes[0] and "line 3" in read.notes[0]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_that_a_resumed_run_made_anew_is_read_anew(tmp_path: Path, in_place: bool):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, lambda record: record["step"])
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(9)))
    assert lines.read().records == tuple(range(9))
    scratch = path if in_place else tmp_path / "new"
    scratch.write_text('{"step": 0}\n{"step": 1}\n')
    scratch.replace(path)
    assert lines.read().records == (0, 1)


def test_each_missing_file_is_said_and_the_rest_is_there(folder: Path):
    for name in ("metrics.jsonl", "eval.jsonl", "summary.json", "config.yaml"):
        (folder / name).unlink()
    run = Run("hdpo", folder)
    record = run.read()
    text = " ".join(record.notes)
    assert all(name in text for name in ("metrics.jsonl", "eval.jsonl", "summary.json", "config.yaml"))
    assert len(places(run)) == STEPS * PROMPTS * SIZE
    shutil.rmtree(folder / "rollouts")
    assert any("rollouts is missing" in note for note in run.read().notes)
    assert places(run) == []


@pytest.mark.parametrize("sort", ["newest", "oldest", "adv_acc"])
def test_a_run_that_has_no_rollouts_yet_has_an_empty_list(tmp_path: Path, sort: str):
    (tmp_path / "metrics.jsonl").touch()
    answer = Answers(open_runs([tmp_path], None)).by_name["rollouts"]({"run": tmp_path.name, "sort": sort, "hist": "tokens"})
    assert answer["total"] == 0 and answer["rows"] == [] and answer["hist"] == []


def test_records_of_a_newer_version_are_read_as_far_as_they_are_known(folder: Path):
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["new"] = {"deep": [1]}
        record["slices"]["all"]["newer"] = 1.0
        record["updates"][0]["avoided"]["another"] = {"tokens": 1, "flops": 2.0}
    del records[1]["slices"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    record = Run("hdpo", folder).read()
    assert [step.stats.step for step in record.steps] == [0, 2, 3]
    assert any("1 lines are no records" in note for note in record.notes)
    assert any(
        "fields of a newer version are left out: new, slices.newer, updates.avoided.another" in note for note in record.notes
    )


@pytest.mark.parametrize(
    ("place", "value"),
    [("seconds", {"rollout": {"wall": 1}}), ("outcomes", {"answered": [1]}), ("step", {}), ("updates", [1]),
     ("staleness", {"a": 1}), ("slices", {"all": {"num": {"deep": 1}}}), ("outcomes", {"answered": 10**400})],
)  # fmt: skip
def test_a_value_of_another_shape_is_a_line_that_is_left_out(folder: Path, place: str, value: object):
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[2][place] = value
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tree = Answers([Run("hdpo", folder)]).by_name["overview"]({})
    assert tree["runs"][0]["steps"] == STEPS - 1
    assert any("1 lines are no records" in note and "line 3" in note for note in tree["runs"][0]["notes"])


def test_a_folder_that_has_gone_is_said_and_one_that_comes_back_is_read(finished: Path, folder: Path):
    answers = Answers([Run("hdpo", folder)]).by_name
    before = answers["runs"]({})["runs"][0]["stamp"]
    shutil.rmtree(folder)
    head, listed = answers["overview"]({})["runs"][0], answers["rollouts"]({"run": "hdpo"})
    assert str(folder) in head["gone"] and "has gone" in head["gone"] and head["stored"] == 0
    assert listed["gone"] == head["gone"] and listed["rows"] == []
    assert answers["runs"]({})["runs"][0]["stamp"] != before
    shutil.copytree(finished, folder)
    assert answers["overview"]({})["runs"][0]["gone"] == "" and answers["rollouts"]({"run": "hdpo"})["total"] > 0


def test_pipes_and_folders_in_place_of_files_are_said_or_passed_over(folder: Path):
    for name in ("metrics.jsonl", "config.yaml", "rollouts/step-000001.parquet", "rollouts/images/a.arrow"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    (folder / "eval.jsonl").unlink()
    (folder / "eval.jsonl").mkdir()
    (folder / "rollouts" / "step-000077.parquet").symlink_to("nowhere")
    run = Run("hdpo", folder)
    assert {"metrics.jsonl is no file", "config.yaml is no file", "eval.jsonl is no file"} <= {*run.read().notes}
    assert len(places(run)) == (STEPS - 1) * PROMPTS * SIZE


def test_the_newest_parts_come_first_and_the_rest_with_later_calls(folder: Path):
    whole, run = Run("hdpo", folder).index.snapshot(), Run("hdpo", folder)
    (folder / "rollouts" / "step-000002.parquet").write_bytes(b"PAR1 cut")
    found = [run.index.snapshot(within_s=0.0) for _ in range(STEPS)]
    assert [one.left for one in found] == [3, 2, 1, 0]
    assert [sorted(one.parts) for one in found] == [
        ["step-000003"], ["step-000003"], ["step-000001", "step-000003"], ["step-000000", "step-000001", "step-000003"]
    ]  # fmt: skip
    assert run.index.snapshot(within_s=0.0) is found[-1] and run.index.snapshot() is found[-1]
    kept = [place for place in range(whole.size) if whole.row(place)["step"] != 2]
    assert [found[-1].row(place) for place in range(found[-1].size)] == [whole.row(place) for place in kept]


def test_overview_and_list_say_what_is_not_read_yet_and_a_rollout_waits_for_all(folder: Path):
    ask = Answers([Run("hdpo", folder)], soon_s=0.0).by_name
    listed = ask["rollouts"]({"run": "hdpo"})
    assert (listed["left"], listed["parts"]) == (STEPS - 1, STEPS)
    assert {row["step"] for row in listed["rows"]} == {STEPS - 1} and listed["total"] == PROMPTS * SIZE
    head = ask["overview"]({})
    assert (head["left"], head["parts"]) == (STEPS - 2, STEPS) and head["runs"][0]["stored"] == 2 * PROMPTS * SIZE
    one = ask["rollout"]({"run": "hdpo", "part": "step-000000", "row": "0"})
    assert [step["step"] for step in one["steps"]] == [0, 1, 2, 3]
    listed = ask["rollouts"]({"run": "hdpo", "wait": "1"})
    assert (listed["left"], listed["total"]) == (0, STEPS * PROMPTS * SIZE)


def test_benchmarks_of_a_run_are_in_its_overview(folder: Path):
    write_benchmark(folder, 0, 0.8)
    path = write_benchmark(folder, 9, 0.9)
    ask = Answers([Run("hdpo", folder)]).by_name
    table = ask["overview"]({})["runs"][0]["benchmarks"]
    assert {"step-000000, rule", "step-000009, rule"} < {*table["columns"]}
    assert table["lines"][0]["cells"]["step-000009, rule"]["value"] == 90.0
    path.write_text("[1]")
    head = ask["overview"]({})["runs"][0]
    assert head["benchmarks"] is None and any("benchmarks are left out" in note for note in head["notes"])


def test_a_damaged_summary_and_config_are_said(folder: Path):
    (folder / "summary.json").write_text("{")
    (folder / "config.yaml").write_text("a: [")
    record = Run("hdpo", folder).read()
    assert record.summary is None and record.config == {} and len(record.steps) == STEPS
    assert len(record.notes) == 2 and "summary.json" in record.notes[0] and "config.yaml" in record.notes[1]


def _rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A part as another program may write it: rows changed, columns of any type."""
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        change(row)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("r_acc", "much"), ("turns", "none"), ("turns", [{"text": 1}]), ("qualifies", 0.5), ("verdict", [1]),
     ("question", {"a": 1}), ("index", "x"), ("kind", 3), ("outcome", None), ("prompt_uid", 7), ("turns", None)],
)  # fmt: skip
def test_columns_of_another_type_leave_a_part_out_or_are_shown(folder: Path, name: str, value: object):
    _rewritten(folder / "rollouts" / "step-000002.parquet", lambda row: row.update({name: value, "newer": 1}))
    ask = Answers([Run("hdpo", folder)]).by_name
    tree = ask["rollouts"]({"run": "hdpo"})
    assert tree["total"] == STEPS * PROMPTS * SIZE or (
        tree["total"] == (STEPS - 1) * PROMPTS * SIZE and "step-000002.parquet" in tree["notes"][0]
    )
    as_json(tree)


@pytest.mark.parametrize(
    ("name", "value"),
    [("images", None), ("image_spans", [{"start": None}]), ("answers", [None]), ("prompt_len", None), ("adv_acc", float("nan")),
     ("text", None), ("error", None), ("tokens", [1]), ("logp", [None])],
)  # fmt: skip
def test_rows_that_lack_something_are_shown_or_refused_in_a_line(folder: Path, name: str, value: object):
    _rewritten(folder / "rollouts" / "step-000002.parquet", lambda row: row.update({name: value}))
    ask = Answers([Run("hdpo", folder)]).by_name
    for hist in ("adv_acc", "tokens"):
        as_json(ask["rollouts"]({"run": "hdpo", "step_min": "2", "text": "panel", "hist": hist, "sort": "adv_acc"}))
    as_json(ask["overview"]({}))
    for path in ("rollout", "group", "tokens"):
        try:
            as_json(ask[path]({"run": "hdpo", "part": "step-000002", "row": "1"}))
        except DataError as error:
            assert "\n" not in str(error)
    if name == "image_spans":
        assert write_file([Run("hdpo", folder)], folder.parent / "page.html", 300_000).kept > 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other columns", "no parquet"])
def test_a_part_that_cannot_be_read_is_left_out_and_said(folder: Path, damage: str):
    path = folder / "rollouts" / "step-000001.parquet"
    data = bytearray(path.read_bytes())
    match damage:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "flipped":
            data[len(data) // 3] ^= 1
            path.write_bytes(data)
        case "empty":
            path.write_bytes(b"")
        case "other columns":
            pq.write_table(pq.read_table(path).drop_columns(["r_tool"]), path)
        case "no parquet":
            path.write_text("hello")
    run = Run("hdpo", folder)
    snapshot = run.index.snapshot()
    assert snapshot.size == (STEPS - 1) * PROMPTS * SIZE
    assert len(snapshot.notes) == 1 and "step-000001.parquet" in snapshot.notes[0]


def test_parts_of_nodes_and_parts_that_come_later_are_found(folder: Path):
    run = Run("hdpo", folder)
    before = run.index.snapshot()
    assert run.index.snapshot() is before
    RolloutStore(folder / "rollouts").write("step-000009.node-1", [Maker(5).group(0, 9, SIZE, 0.5)])
    (folder / "rollouts" / ".step-000010.parquet.tmp").write_text("half")
    after = run.index.snapshot()
    assert after.size == before.size + SIZE and after.notes == ()
    assert {after.row(place)["step"] for place in places(run, step_min="9")} == {9}


def test_the_index_says_what_the_store_says(finished: Path):
    run = Run("hdpo", finished)
    snapshot = run.index.snapshot()
    stored = [one for part in sorted((finished / "rollouts").glob("*.parquet")) for one in read_rollouts(part)]
    assert snapshot.size == len(stored)
    for place, one in enumerate(stored):
        row, score = snapshot.row(place), one.score
        assert (row["uid"], row["sample"]) == (one.rollout.prompt_uid, one.rollout.index)
        assert (row["ability"], row["kind"]) == (one.ability, one.kind)
        assert row["calls"] == one.rollout.num_tool_calls and row["tokens"] == one.rollout.num_sampled
        assert row["turns"] == len(one.rollout.turns)
        assert row["correct"] == (-1 if score.verdict is None else int(score.verdict.correct))
        assert (row["r_acc"], row["r_tool"]) == (score.r_acc, score.r_tool)
        assert (row["adv_acc"], row["adv_tool"]) == (score.adv_acc, score.adv_tool)
        assert row["moves_acc"] == (score.adv_acc != 0) and row["moves_tool"] == (score.adv_tool != 0)
        assert row["outcome"] == ("judge_error" if score.outcome == "judge_error" else one.rollout.outcome)


def test_every_filter_keeps_what_it_says_and_nothing_else(finished: Path):
    run = Run("hdpo", finished)
    snapshot = run.index.snapshot()
    rows = [snapshot.row(place) for place in range(snapshot.size)]
    cases = {
        ("step_min", "1"): lambda row: row["step"] >= 1,
        ("step_max", "2"): lambda row: row["step"] <= 2,
        ("ability", ABILITIES[1]): lambda row: row["ability"] == ABILITIES[1],
        ("kind", "direct"): lambda row: row["kind"] == "direct",
        ("outcome", "judge_error"): lambda row: row["outcome"] == "judge_error",
        ("correct", "1"): lambda row: row["correct"] == 1,
        ("correct", "0"): lambda row: row["correct"] == 0,
        ("correct", "-1"): lambda row: row["correct"] == -1,
        ("calls_min", "2"): lambda row: row["calls"] >= 2,
        ("calls_max", "0"): lambda row: row["calls"] == 0,
        ("adv_acc_max", "-0.5"): lambda row: row["adv_acc"] <= -0.5,
        ("adv_tool_min", "0.1"): lambda row: row["adv_tool"] >= 0.1,
        ("channel", "acc"): lambda row: row["moves_acc"],
        ("channel", "tool"): lambda row: row["moves_tool"],
        ("channel", "both"): lambda row: row["moves_acc"] and row["moves_tool"],
        ("channel", "none"): lambda row: not (row["moves_acc"] or row["moves_tool"]),
        ("q", "1"): lambda row: row["qualifies"],
        ("q", "0"): lambda row: not row["qualifies"],
        ("uid", "data/train.parquet:3"): lambda row: row["uid"] == "data/train.parquet:3",
        ("text", "ZERODIVISION"): lambda row: row["tool_errors"] > 0,
        ("text", "in panel 7?"): lambda row: row["uid"].endswith(":7"),
    }
    for (name, value), wanted in cases.items():
        expected = [place for place, row in enumerate(rows) if wanted(row)]
        assert 0 < len(expected) < len(rows), (name, value)
        assert places(run, **{name: value}) == expected, (name, value)
    both = places(run, correct="1", text="zerodivision", kind="uncertain")
    assert both == [
        i for i, row in enumerate(rows) if row["correct"] == 1 and row["tool_errors"] and row["kind"] == "uncertain"
    ]
    assert places(run, ability="no such", text="x") == []


@pytest.mark.parametrize(
    "query", [{"step_min": "x"}, {"correct": "2"}, {"channel": "all"}, {"q": "yes"}, {"adv_acc_max": "1,5"}], ids=str
)
def test_a_filter_that_is_none_is_refused(query: dict[str, str]):
    with pytest.raises(DataError, match="expected"):
        filter_of(query)


def test_histograms_count_every_rollout_once_and_their_bars_filter_to_their_count(finished: Path):
    run = Run("hdpo", finished)
    snapshot, everything = run.index.select(Filter({}, {}, {}))
    for name in ("calls", "adv_acc", "adv_tool", "tokens", "r_tool", "step"):
        bars = snapshot.histogram(name, everything)
        assert sum(bar["num"] for bar in bars) == snapshot.size
        for bar in bars if len(np.unique(snapshot.columns[name])) <= 24 else ():
            query = {f"{name}_min": str(bar["low"]), f"{name}_max": str(bar["high"])}
            assert len(places(run, **query)) == bar["num"], (name, bar)
    with pytest.raises(DataError, match="expected one of"):
        snapshot.histogram("uid", everything)


def test_the_share_of_signal_is_that_of_the_scores(finished: Path):
    entry = Run("hdpo", finished).index.snapshot().signal[2]
    stored = [one for one in read_rollouts(finished / "rollouts" / "step-000002.parquet") if one.score.verdict is not None]
    moved = [one for one in stored if one.score.adv_tool != 0]
    assert entry["step"] == 2 and entry["num"] == len(stored)
    assert entry["tool_rollouts"] == pytest.approx(len(moved) / len(stored))
    tokens = sum(one.rollout.num_sampled for one in stored)
    assert entry["tool_tokens"] == pytest.approx(sum(one.rollout.num_sampled for one in moved) / tokens)


def test_reading_changes_nothing_in_the_folder(folder: Path):
    def state() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}

    before = state()
    run = Run("hdpo", folder)
    run.read()
    snapshot = run.index.snapshot()
    run.index.rows.read(snapshot.parts["step-000000"], 3, tokens=True)
    run.images.png(run.index.rows.read(snapshot.parts["step-000000"], 3, tokens=False)["images"][0], 100)
    places(run, text="panel")
    assert state() == before


def test_folders_of_runs_are_opened_and_others_refused(finished: Path, tmp_path: Path):
    again = tmp_path / "hdpo"
    shutil.copytree(finished, again)
    runs = open_runs([finished.parent, again], None)
    assert [run.name for run in runs] == [f"{finished.parent.name}/hdpo", f"{tmp_path.name}/hdpo"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected a run's"):
        open_runs([tmp_path / "empty"], None)
    with pytest.raises(DataError, match="found none"):
        open_runs([tmp_path / "nowhere"], None)


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart(tmp_path: Path):
    folders = [
        tmp_path / name
        for name in ("price/hdpo/seed-0", "price/hdpo/seed-1", "price/a,b/seed-0", "n\u00e4 \U0001f415 '\"/seed\t7")
    ]
    folders.append(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")))
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").touch()
    assert [run.name for run in open_runs(folders[:2], None)] == ["seed-0", "seed-1"]
    names = [run.name for run in open_runs(folders, None)]
    assert names == ["hdpo/seed-0", "hdpo/seed-1", "a_b/seed-0", "n\u00e4 \U0001f415 '\"/seed_7", f"{tmp_path.name}/?"]
    tree = Answers(open_runs(folders, None)).by_name["overview"]({"runs": ",".join(names)})
    assert [run["name"] for run in tree["runs"]] == names
    variant = tmp_path / "price" / "hdpo"
    assert [run.name for run in open_runs([variant, tmp_path / "price" / "a,b"], None)] == names[:3]
    (tmp_path / "price" / "demo" / "sft").mkdir(parents=True)  # beside the runs of an ablation
    (tmp_path / "price" / "demo" / "sft" / "config.yaml").touch()
    assert [run.name for run in open_runs([tmp_path / "price"], None)] == ["a_b/seed-0", "hdpo/seed-0", "hdpo/seed-1"]


@pytest.mark.parametrize(
    ("arguments", "token", "said"),
    [
        (["nowhere"], "", "nowhere: expected the folder of a run"),
        (["hdpo", "--port", "70000"], "", "--port: expected 0 to 65535, got 70000"),
        (["hdpo", "--host", "192.0.2.1", "--port", "0"], "", "cannot listen on view.host=192.0.2.1"),
        (["hdpo"], "short", "METIS_VIEW_TOKEN holds no token"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    finished: Path,
    arguments: list[str],
    token: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(finished.parent)
    monkeypatch.setenv("METIS_VIEW_TOKEN", token)
    assert cli.main(["view", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_runs_that_differ_in_seed_and_folder_only_are_of_one_variant():
    configs = {
        "a": {"run.seed": 0, "run.dir": "x", "loss.w_tool": 0.1},
        "b": {"run.seed": 1, "run.dir": "y", "loss.w_tool": 0.1},
        "c": {"run.seed": 0, "run.dir": "z", "loss.w_tool": 0.0},
        "d": {},
    }
    assert variants(configs) == {"a": "w_tool=0.1", "b": "w_tool=0.1", "c": "w_tool=0.0", "d": "d"}


def test_a_band_is_mean_least_and_most_where_all_runs_are():
    curves = [{0: 1.0, 1: 2.0, 2: 9.0}, {0: 3.0, 1: 6.0}]
    sources = [Source(f"run-{i}", {"tool_rate/all": curve}, "same") for i, curve in enumerate(curves)]
    drawn = [one for one in draw(sources, True, [], [], 0) if one["name"] == "tools_kind-all"]
    line = drawn[0]["lines"][0]
    assert (line["steps"], line["values"], line["low"], line["high"]) == ([0, 1], [2.0, 4.0], [1.0, 2.0], [3.0, 6.0])
    lines = next(one for one in draw(sources, False, [], [], 0) if one["name"] == "tools_kind-all")["lines"]
    assert [(line["label"], line["steps"]) for line in lines] == [("run-0", [0, 1, 2]), ("run-1", [0, 1])]


def test_what_no_rollout_of_a_step_did_is_none_and_no_gap():
    every = {step: float(step) for step in range(3)}
    first = {"step": every, "outcomes/answered": {0: 4.0, 1: 3.0, 2: 4.0}, "outcomes/length": {1: 1.0}}
    sources = [Source("a", first, "same"), Source("b", {"step": every, "outcomes/answered": dict.fromkeys(every, 4.0)}, "same")]
    pictures = {bands: {one["name"]: one["lines"] for one in draw(sources, bands, [], [], 0)} for bands in (False, True)}
    assert [line["values"] for line in pictures[False]["outcomes-length"]] == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert pictures[True]["outcomes-length"][0]["values"] == [0.0, 0.5, 0.0]
    assert not any("turn_limit" in name for drawn in pictures.values() for name in drawn)
    alone = next(one for one in draw(sources[:1], False, [], [], 0) if one["name"] == "outcomes")["lines"]
    assert [(line["label"], line["values"]) for line in alone] == [("answered", [4.0, 3.0, 4.0]), ("length", [0.0, 1.0, 0.0])]


def test_long_curves_are_thinned_and_keep_their_extremes():
    long = {step: 1.0 for step in range(5000)} | {1234: 77.0}
    source = Source("run", {"policy/ratio_max": long, "policy/ratio_min": long}, "run")
    picture = next(one for one in draw([source], False, [], [], 0) if one["name"] == "ratio")
    largest = picture["lines"][0]
    assert len(largest["steps"]) == 1000 and max(largest["values"]) == 77.0


def test_numbers_that_are_none_are_no_points(finished: Path):
    record = Run("hdpo", finished).read()
    step = record.steps[0]
    bad = type(step)(step.stats, {**step.scalars, "loss/total": float("nan"), "policy/kl": float("inf")})
    found = points([bad], [], [])
    assert "loss/total" not in found and "policy/kl" not in found and found["loss/acc"] == {0: step.scalars["loss/acc"]}
