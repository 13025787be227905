"""What a user can get wrong: one line on stderr says what to do, the exit code is 2, and no run folder is left half-made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import SMALL, cut, error_line, phases, run, run_state, succeed


def _train(demo: Path, *overrides: object) -> list[object]:
    return ["train", demo / "config.yaml", *overrides]


def _rows(demo: Path, out: Path, change: Callable[[list[dict]], object]) -> Path:
    """The demo's training rows, changed, in a file of their own."""
    table = pq.read_table(demo / "data" / "train.parquet")
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), out)
    return out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["loss.w_tol=0.2"], "unknown key 'loss.w_tol'; did you mean 'loss.w_tool'?"),
        (["w_tool=0.2"], "did you mean 'loss.w_tool'?"),
        (["loss.w_tool"], "expected section.key=value"),
        (["loss.w_tool=much"], "loss.w_tool: input should be a valid number"),
        (["train.prompts_per_mini_batch=3"], "choose a divisor"),
        (["rollout.vllm.sleep=true"], "rollout.vllm.sleep lets engine and trainer take turns; set rollout.engine=vllm"),
        (["data.train=[]"], "no training prompts; set data.train"),
        (["data.train=[/nowhere/train.parquet]"], "/nowhere/train.parquet: no such file"),
        (["data.heldout=[/nowhere/heldout.parquet]"], "/nowhere/heldout.parquet: no such file"),
        (["model.path=/nowhere/model"], "model.path /nowhere/model is not a folder"),
        (["tools.text_search.corpus=/nowhere/pages.parquet"], "set tools.text_search.corpus"),
        (["tools.text_search.corpus=null"], "text_search has no corpus; set tools.text_search.corpus, or tools.text_search.pr"),
        (["tools.image_search.corpus=null"], "image_search has no corpus"),
        (["rollout.max_prompt_tokens=8"], "rollout.max_prompt_tokens is 8; raise the limit or remove the row"),
    ],
)
def test_a_setting_that_cannot_work_is_named(demo: Path, tmp_path: Path, arguments: Sequence[str], says: str) -> None:
    assert says in error_line(run(_train(demo, f"run.dir={tmp_path / 'run'}", *arguments), tmp_path))


def test_a_config_file_that_is_not_there_or_not_a_config_is_named(tmp_path: Path) -> None:
    assert "cannot read config" in error_line(run(["train", tmp_path / "none.yaml"], tmp_path))
    broken = tmp_path / "broken.yaml"
    broken.write_text("loss: {w_tool: [\n")
    assert "broken.yaml is not valid YAML" in error_line(run(["train", broken], tmp_path))
    broken.write_text("loss: {w_tol: 1}\n")
    assert "broken.yaml: unknown key 'loss.w_tol'" in error_line(run(["config", broken], tmp_path))
    broken.write_text(f"base: {tmp_path / 'none.yaml'}\n")
    assert "none.yaml" in error_line(run(["train", broken], tmp_path))


def test_a_data_file_that_cannot_be_read_is_named(demo: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.parquet"
    text.write_text("question,answer\n")
    line = error_line(run(_train(demo, f"run.dir={tmp_path / 'run'}", f"data.train=[{text}]"), tmp_path))
    assert "text.parquet: not a Parquet file" in line
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"question": ["what?"]}), other)
    line = error_line(run(_train(demo, f"run.dir={tmp_path / 'run'}", f"data.train=[{other}]"), tmp_path))
    assert "other.parquet: expected a column 'data_source'" in line


def test_a_bad_row_stops_the_run_with_file_row_and_column(demo: Path, tmp_path: Path) -> None:
    bad = _rows(demo, tmp_path / "bad.parquet", lambda rows: rows[0].update(data_source=None))
    command = _train(demo, f"run.dir={tmp_path / 'run'}", f"data.train=[{bad}]", "data.shuffle=false")
    line = error_line(run(command, tmp_path / "process"))
    assert f"{bad}" in line and "row 0" in line and "data_source" in line


def test_bad_rows_that_are_skipped_are_counted_in_the_metrics(demo: Path, tmp_path: Path) -> None:
    def spoil(rows: list[dict]) -> None:
        rows[1]["data_source"] = None
        rows[2]["prompt"] = []

    bad = _rows(demo, tmp_path / "bad.parquet", spoil)
    command = _train(demo, f"run.dir={tmp_path / 'run'}", f"data.train=[{bad}]", "data.on_bad_row=skip", "data.shuffle=false")
    ended = run([*command, "train.steps=1", "data.heldout=[]"], tmp_path / "process")
    assert ended.code == 0, ended
    assert ended.err.count("skipped bad row") == 2, ended.err
    (step,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert step["bad_rows_skipped"] == 2


def test_a_data_set_without_a_usable_row_is_refused_where_bad_rows_are_skipped(demo: Path, tmp_path: Path) -> None:
    bad = _rows(demo, tmp_path / "bad.parquet", lambda rows: [row.update(data_source=None) for row in rows])
    command = _train(demo, f"run.dir={tmp_path / 'run'}", f"data.train=[{bad}]", "data.on_bad_row=skip")
    ended = run(command, tmp_path / "process")
    assert ended.code == 2
    assert ended.err.splitlines()[-1] == "metis-fast: no usable row among 16; run `metis-fast data check` on the files"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "lacks config.json; give a Qwen3-VL model folder"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "expected model_type qwen3_vl"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"), "has no *.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "model.safetensors is damaged or cut short"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json; copy it from the model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "lacks preprocessor_config.json"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "preprocessor_config.json"),
    ],
)
def test_a_model_folder_that_is_not_a_whole_qwen3_vl_is_refused(
    demo: Path, tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    model = shutil.copytree(demo / "cold_start", tmp_path / "model")
    spoil(model)
    line = error_line(run(_train(demo, f"run.dir={tmp_path / 'run'}", f"model.path={model}"), tmp_path / "process"))
    assert says in line and str(model) in line


def test_a_cold_start_without_trajectories_says_which_are_missing(demo: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "model", f"run.dir={tmp_path / 'run'}"]
    line = error_line(run(["sft", demo / "config.yaml", "sft.phases=[]", *out], tmp_path))
    assert "sft.phases is empty" in line
    nothing = phases((tmp_path / "nothing", 1))
    line = error_line(run(["sft", demo / "config.yaml", nothing, *out], tmp_path))
    assert str(tmp_path / "nothing") in line


def test_settings_that_decide_a_result_cannot_change_on_resume_and_others_can(demo: Path, tmp_path: Path) -> None:
    command = _train(demo, f"run.dir={cut(demo, tmp_path / 'run', 4)}")
    for override, name in (
        ("loss.w_tool=0.5", "loss.w_tool (0.15, now 0.5)"),
        ("run.seed=3", "run.seed (0, now 3)"),
        ("rollout.temperature=0.7", "rollout.temperature (1.0, now 0.7)"),
        ("train.optim.grad_clip=0.1", "train.optim.grad_clip (1.0, now 0.1)"),
    ):
        line = error_line(run([*command, override], tmp_path / "first"))
        assert f"holds a run with another {name}" in line and "restore the setting" in line
    moved = shutil.copytree(demo / "data", tmp_path / "moved")
    free = ["checkpoint.every=2", "log.tensorboard=false", "data.on_bad_row=skip", "score.llm.retries=7", "rollout.retries=5"]
    succeed([*command, *free, f"data.train={moved / 'train.parquet'}"], tmp_path / "second")
    assert run_state(tmp_path / "run") == run_state(demo)


def test_a_run_folder_that_cannot_be_written_is_named(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = error_line(run(_train(demo, f"run.dir={tmp_path / 'file' / 'run'}"), tmp_path / "process"))
    assert str(tmp_path / "file" / "run") in line
    line = error_line(run(_train(demo, "run.dir=/proc/run"), tmp_path / "process"))
    assert "/proc/run" in line
    line = error_line(run(["demo", SMALL, "run.dir=/proc/run"], tmp_path / "process"))
    assert "/proc/run" in line


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before_it(demo: Path, tmp_path: Path) -> None:
    command = _train(demo, f"run.dir={cut(demo, tmp_path / 'run', 5)}")
    with (tmp_path / "run" / "checkpoints" / "step-000005" / "tensors-00000.safetensors").open("r+b") as handle:
        handle.seek(-100, os.SEEK_END)
        handle.write(b"\xff" * 8)
    ended = run(command, tmp_path / "process")
    assert ended.code == 0, ended
    assert "step-000005" in ended.err and "falling back to an earlier checkpoint" in ended.err
    assert run_state(tmp_path / "run") == run_state(demo)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(demo: Path, tmp_path: Path) -> None:
    command = _train(demo, f"run.dir={cut(demo, tmp_path / 'run', 5)}")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    ended = run(command, tmp_path / "process")
    assert ended.code == 2 and "none of the 2 checkpoints" in ended.err.splitlines()[-1], ended
