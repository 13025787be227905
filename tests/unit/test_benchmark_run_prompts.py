"""Prompts of a benchmark on disk: a large image once, whatever is wrong with one before anything is played."""

from __future__ import annotations

import base64
import csv
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from metis_fast.config import Config
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import DataError, JudgeError, ModelError, ToolSetupError
from metis_fast.evaluate import run
from metis_fast.evaluate.promptset import prepare
from metis_fast.evaluate.standin import write_standins, write_tsv

AGENT = Path(__file__).parents[1] / "e2e" / "agent"
COUNT, ORDERS = 3, 4


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    def make(path: Path, model: Path = AGENT, **changes: Any) -> Config:
        tree = {
            "run": {"dir": tmp_path / "run"},
            "log": {"progress": False},
            "model": {"path": model},
            "tools": {"enabled": []},
            "benchmark": {"files": {"hrbench4k": [path]}, "any_md5": True},
        }
        return Config.model_validate(tree | changes)

    return make


@pytest.fixture
def hrbench(tmp_path: Path) -> Path:
    """Three questions in four orders. Two of the images are in all four rows, the third in one, which others refer to."""
    (path,) = write_standins(tmp_path / "files", ["hrbench4k"], COUNT, (64, 48))["hrbench4k"].tsv
    with path.open(newline="") as file:
        rows: list[dict[str, object]] = [{**row} for row in csv.DictReader(file, delimiter="\t")]
    for at, row in enumerate(rows):
        row["image"] = rows[at % COUNT]["image"] if at % COUNT else row["image"]
    return write_tsv(path, rows)


def jpeg(size: tuple[int, int] = (64, 48)) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def with_image(path: Path, data: bytes, row: int) -> Path:
    with path.open(newline="") as file:
        rows: list[dict[str, object]] = [{**row} for row in csv.DictReader(file, delimiter="\t")]
    rows[row]["image"] = base64.b64encode(data).decode()
    return write_tsv(path, rows)


def test_a_large_image_is_on_disk_once_for_all_rows_that_show_it(
    config: Callable[..., Config], hrbench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = prepare(config(hrbench), "hrbench4k", progress=False)
    inside = PromptFiles([small.parquet], any_style=True)
    wanted = [inside.read(row).images[0].data for row in range(COUNT * ORDERS)]
    assert not any((small.folder / "images").iterdir()) and len(set(wanted)) == COUNT
    monkeypatch.setattr("metis_fast.evaluate.promptset._LARGE", 100)
    shutil.rmtree(small.folder)
    large = prepare(config(hrbench), "hrbench4k", progress=False)
    stored = sorted((large.folder / "images").iterdir())
    assert len(stored) == COUNT and {path.read_bytes() for path in stored} == set(wanted)
    assert large.parquet.stat().st_size < 40_000  # texts alone
    beside = PromptFiles([large.parquet], any_style=True)
    assert [beside.read(row).images[0].data for row in range(COUNT * ORDERS)] == wanted


def test_a_large_image_that_is_gone_or_cut_is_written_again(
    config: Callable[..., Config], hrbench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metis_fast.evaluate.promptset._LARGE", 100)
    made = prepare(config(hrbench), "hrbench4k", progress=False)
    first, second, _ = whole = {path: path.read_bytes() for path in sorted((made.folder / "images").iterdir())}
    for harm in (first.unlink, lambda: second.write_bytes(whole[second][:-9])):
        harm()
        again = prepare(config(hrbench), "hrbench4k", progress=False)
        assert {path: path.read_bytes() for path in (again.folder / "images").iterdir()} == whole


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (jpeg()[:-200], "question 4: expected an image that can be decoded, got one that cannot"),
        (jpeg((3, 900)), "row 4, column image: expected an aspect ratio of at most 200, got '3x900'"),
        (jpeg()[:100], "row 4, column image: expected an image that Pillow can decode"),
    ],
    ids=["cut", "strip", "header"],
)
def test_an_image_that_the_model_cannot_be_shown_stops_a_run_before_it_plays(
    config: Callable[..., Config], hrbench: Path, data: bytes, words: str
) -> None:
    path = with_image(hrbench, data, row=4)
    with pytest.raises(DataError) as caught:
        prepare(config(path), "hrbench4k", progress=False)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not [*config(path).run.dir.glob("benchmarks/prompts/*")]  # nothing half done


def test_what_cannot_be_played_is_said_before_files_are_read(
    config: Callable[..., Config], hrbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("files were read")

    monkeypatch.setattr("metis_fast.evaluate.promptset.read", read)
    with pytest.raises(ModelError, match=r"model\.path .* is not a folder"):
        run.run_benchmarks(config(hrbench, model=tmp_path / "none"))
    with pytest.raises(ToolSetupError, match="text_search has no corpus"):
        run.run_benchmarks(config(hrbench, tools={"enabled": ["text_search"]}))


def test_a_judge_that_is_away_is_found_before_anything_is_played(config: Callable[..., Config], hrbench: Path) -> None:
    own = config(hrbench, score={"llm": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}})
    own = own.model_copy(update={"benchmark": own.benchmark.model_copy(update={"judge": True})})
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9"):
        run.run_benchmarks(own)
    assert not [*own.run.dir.glob("benchmarks/hrbench4k/replies.jsonl")]


def test_a_pipe_and_a_pointer_of_git_lfs_are_no_files(config: Callable[..., Config], tmp_path: Path) -> None:
    pipe, pointer = tmp_path / "pipe.tsv", tmp_path / "pointer.tsv"
    os.mkfifo(pipe)
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n")
    for path, words in ((pipe, "a device or a pipe"), (pointer, "is a git-lfs pointer")):
        with pytest.raises(DataError, match=words):
            prepare(config(path), "hrbench4k", progress=False)
