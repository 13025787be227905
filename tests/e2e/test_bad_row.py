"""A run that a bad row stopped goes on by either advice, and ends as if the row had never been bad, or never been there."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import error_line, run, run_state, succeed
from PIL import Image

from metis_fast.data.cursor import prompt_cursor
from metis_fast.data.parquet import PromptFiles
from metis_fast.report.log import read_steps

_PER_STEP = 4


def write(demo: Path, out: Path, change: Callable[[list[dict[str, Any]]], object], **options: Any) -> Path:
    """The demo's training rows, changed, in a file of the same name."""
    table = pq.read_table(demo / "data" / "train.parquet")
    rows = table.to_pylist()
    change(rows)
    out.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), out / "train.parquet", **options)
    return out / "train.parquet"


def damage(row: int) -> Callable[[list[dict[str, Any]]], None]:
    """An answer that got lost."""

    def change(rows: list[dict[str, Any]]) -> None:
        rows[row]["reward_model"]["ground_truth"] = []

    return change


def cut_image(row: int) -> Callable[[list[dict[str, Any]]], None]:
    """A photo that ends too soon: its header, which is all that is read with the row, says nothing of it."""

    def change(rows: list[dict[str, Any]]) -> None:
        photo = io.BytesIO()
        Image.effect_noise((640, 480), 60).save(photo, "JPEG")
        rows[row]["images"] = [{"bytes": photo.getvalue()[:-2000], "path": None}]
        rows[row]["prompt"] = [{"role": "user", "content": "<image>What is this?"}]

    return change


def test_with_the_row_mended_it_ends_as_if_the_row_had_always_been_right(demo: Path, tmp_path: Path) -> None:
    drawn = prompt_cursor(PromptFiles([demo / "data" / "train.parquet"]), seed=0).draw(2 * _PER_STEP)
    row = drawn[_PER_STEP + 1][0]
    data = write(demo, tmp_path / "data", damage(row))
    command = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", f"data.train={data}"]
    line = error_line(run(command, tmp_path / "first"))
    assert f"row {row}, column reward_model.ground_truth" in line and "mend the row, or set data.on_bad_row=skip" in line
    write(demo, tmp_path / "data", lambda rows: None, row_group_size=3, compression="gzip")
    ended = run(command, tmp_path / "second")
    assert ended.code == 0, ended
    assert f"1 of 16 rows differ, the first is row {row} of train.parquet" in ended.err
    assert run_state(tmp_path / "run") == run_state(demo)


def rename_style(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["reward_model"]["style"] = "vibes"


def test_styles_that_nobody_knows_do_not_matter_where_one_judge_takes_every_row(demo: Path, tmp_path: Path) -> None:
    data = write(demo, tmp_path / "data", rename_style)
    few = ["data.heldout=[]", "eval.every=0", "train.steps=1", "log.tensorboard=false"]
    command = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", f"data.train={data}", *few]
    assert "judge style 'vibes'; known styles are" in error_line(run(command, tmp_path / "first"))
    ended = run([*command, "score.judge=rule", f"run.dir={tmp_path / 'judged'}"], tmp_path / "second")
    assert ended.code == 0, ended
    assert read_steps(tmp_path / "judged")[0].slices == read_steps(demo)[0].slices  # which the data's own `rule` judged


@pytest.mark.parametrize("spoil", [pytest.param(damage, marks=pytest.mark.slow), cut_image])
def test_with_the_row_skipped_it_ends_as_if_the_row_had_never_been(
    demo: Path, tmp_path: Path, spoil: Callable[[int], Callable[[list[dict[str, Any]]], None]]
) -> None:
    row = _PER_STEP + 1
    few = ["data.shuffle=false", "data.heldout=[]", "train.steps=3", "log.tensorboard=false"]

    def command(name: str, change: Callable[[list[dict[str, Any]]], object]) -> list[object]:
        data = write(demo, tmp_path / name, change)
        return ["train", demo / "config.yaml", f"run.dir={tmp_path / name / 'run'}", f"data.train={data}", *few]

    with_it = command("with", spoil(row))
    assert f"row {row}," in error_line(run(with_it, tmp_path / "first"))
    shutil.copytree(tmp_path / "with" / "run", tmp_path / "stopped")
    succeed([*with_it, "data.on_bad_row=skip"], tmp_path / "second")
    succeed(command("without", lambda rows: rows.pop(row)), tmp_path / "third")
    trained = [(tmp_path / name / "run" / "trained" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert trained[0] == trained[1]
    stopped = (tmp_path / "stopped" / "checkpoints").glob("step-*/tensors-*.safetensors")
    assert all(path.read_bytes() != trained[0] for path in stopped)  # steps were taken after it
