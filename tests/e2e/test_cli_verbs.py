"""Every verb of the command line: help, results for people and for programs, exit codes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import HERE, PROGRAM, phases, run, succeed

from metis_fast import config as config_module
from metis_fast.report.log import read_evaluations

_ABLATIONS = ("demo_ablation.yaml", "demo_boundary.yaml")  # files of another verb
_CONFIGS = sorted(path for path in (HERE.parents[1] / "configs").glob("*.yaml") if path.name not in _ABLATIONS)
_VERBS = (
    ["demo"],
    ["train"],
    ["sft"],
    ["eval"],
    ["config"],
    ["data", "check"],
    ["data", "demo"],
    ["judge", "check"],
    ["judge", "rescore"],
    ["report"],
    ["rank"],
    ["plan"],
    ["tools", "serve"],
    ["weights", "map"],
    ["bench"],
)


@pytest.mark.parametrize("verb", _VERBS, ids=" ".join)
def test_the_help_of_a_verb_says_what_it_does_and_what_it_takes(verb: list[str], tmp_path: Path) -> None:
    text = succeed([*verb, "--help"], tmp_path)
    usage, explanation = text.split("\n\n")[:2]
    assert usage.startswith(f"usage: metis-fast {' '.join(verb)}")
    assert len(explanation.split()) >= 4 and explanation.strip().endswith("."), text


def test_the_installed_program_lists_every_verb_with_an_explanation() -> None:
    done = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True, check=True)
    for verb in {verb[0] for verb in _VERBS}:
        assert re.search(rf"^ +{verb} +\S+ \S+", done.stdout, re.MULTILINE), done.stdout


def test_a_verb_that_does_not_exist_is_refused_with_the_usage(tmp_path: Path) -> None:
    for arguments in (["trian"], [], ["train"], ["train", "a.yaml", "--fast"], ["report"]):
        ended = run(arguments, tmp_path)
        assert ended.code == 2 and ended.err.startswith("usage: metis-fast"), ended


def test_a_reader_that_goes_away_early_gets_no_traceback() -> None:
    done = subprocess.run(
        f"set -o pipefail; {PROGRAM} config | head -1", shell=True, executable="/bin/bash", capture_output=True, text=True
    )
    assert (done.stderr, done.returncode in (0, 141)) == ("", True)


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: path.name)
def test_what_config_prints_of_a_shipped_file_is_that_config_again(path: Path, tmp_path: Path) -> None:
    (tmp_path / "full.yaml").write_text(succeed(["config", path], tmp_path / "full"))
    (tmp_path / "changes.yaml").write_text(succeed(["config", path, "--changes"], tmp_path / "changes"))
    expected = config_module.load(path)
    assert config_module.load(tmp_path / "full.yaml") == expected
    assert config_module.load(tmp_path / "changes.yaml") == expected
    assert config_module.build(json.loads(succeed(["config", path, "--json"], tmp_path / "json"))) == expected


def test_overrides_may_stand_before_and_after_options(tmp_path: Path) -> None:
    tree = json.loads(succeed(["config", _CONFIGS[0], "loss.w_tool=0.5", "--json", "run.seed=7"], tmp_path))
    assert (tree["loss"]["w_tool"], tree["run"]["seed"]) == (0.5, 7)


def test_data_check_tells_good_files_from_bad_ones_by_its_exit_code(demo: Path, tmp_path: Path) -> None:
    good = demo / "data" / "train.parquet"
    assert json.loads(succeed(["data", "check", good, "--json"], tmp_path / "good"))["bad_rows"] == []
    table = pq.read_table(good)
    rows = table.to_pylist()
    rows[3]["data_source"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "bad.parquet")
    ended = run(["data", "check", tmp_path / "bad.parquet", good], tmp_path / "bad")
    assert ended.code == 1 and f"bad row: {tmp_path / 'bad.parquet'}" in ended.out, ended
    assert run(["data", "check", tmp_path / "none.parquet"], tmp_path / "none").code == 2


def test_data_demo_writes_files_that_data_check_accepts(tmp_path: Path) -> None:
    sizes = [f"demo.{name}_prompts=20" for name in ("base", "cold_start", "train", "heldout")]
    paths = json.loads(succeed(["data", "demo", tmp_path / "set", "--json", *sizes], tmp_path / "write"))
    files = [path for name, path in paths.items() if not name.endswith("corpus")]
    assert len(files) == 4
    report = json.loads(succeed(["data", "check", "--json", *files], tmp_path / "check"))
    assert (report["rows"], report["bad_rows"]) == (80, [])


def test_eval_of_the_exported_model_gives_the_runs_own_last_evaluation(demo: Path, tmp_path: Path) -> None:
    model = f"model.path={demo / 'trained'}"
    rates = json.loads(succeed(["eval", demo / "config.yaml", model, "--json"], tmp_path / "json"))
    last = json.loads((demo / "eval.jsonl").read_text().splitlines()[-1])
    assert rates == last["slices"]
    assert len(read_evaluations(demo)) == 4  # before, twice while training, after
    table = succeed(["eval", demo / "config.yaml", model], tmp_path / "table")
    row = next(line.split() for line in table.splitlines() if line.startswith("all "))
    assert row[1:3] == [str(rates["all"]["num"]), f"{rates['all']['accuracy']:.3f}"]


def test_a_finished_run_that_was_moved_prints_its_summary_again_without_training(demo: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(demo, tmp_path / "run")
    metrics = (folder / "metrics.jsonl").read_bytes()
    out = succeed(["train", demo / "config.yaml", f"run.dir={folder}", "--json"], tmp_path / "process")
    assert json.loads(out.splitlines()[-1]) == json.loads((folder / "summary.json").read_text())
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_sft_names_the_model_that_it_exported_and_train_takes_it(demo: Path, tmp_path: Path) -> None:
    one = phases((demo / "trajectories" / "base", 1))
    command = ["sft", demo / "config.yaml", one, f"model.path={demo / 'model'}", f"run.dir={tmp_path / 'cold'}", "--json"]
    model = json.loads(succeed([*command, "--out", tmp_path / "model"], tmp_path / "sft"))["model"]
    command = ["train", demo / "config.yaml", f"model.path={model}", f"run.dir={tmp_path / 'run'}", "train.steps=1"]
    assert f"report: {tmp_path / 'run' / 'report.html'}" in succeed(command, tmp_path / "train")


def test_report_writes_the_page_of_a_run_and_refuses_a_folder_without_one(demo: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(demo, tmp_path / "run")
    (folder / "report.html").unlink()
    path = json.loads(succeed(["report", folder, "--json"], tmp_path / "json"))["report"]
    assert "<html" in Path(path).read_text(encoding="utf-8")
    ended = run(["report", tmp_path / "none"], tmp_path / "none-process")
    assert ended.code == 2 and len(ended.err.splitlines()) == 1, ended
