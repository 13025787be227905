"""What a run may go on with: files by what is in them, mended rows with a warning, anything else only when it is named."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metis_fast.config import Config, build, by_content
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError
from metis_fast.run_record import files_digest, open_record


def write_rows(path: Path, answers: list[str]) -> Path:
    rows = [
        {
            "data_source": "unit",
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "ability": "math",
            "reward_model": {"ground_truth": answer, "style": "rule"},
        }
        for i, answer in enumerate(answers)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


ANSWERS = [str(i) for i in range(10)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of some rows, a model and two corpora, with a checkpoint."""
    write_rows(tmp_path / "data" / "train.parquet", ANSWERS)
    write_rows(tmp_path / "data" / "heldout.parquet", ANSWERS[:4])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights" * 1000)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "corpus.parquet").write_bytes(b"pages")
    config = settings(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-000003").mkdir(parents=True)
    first = open_record(
        config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path / "new"})}), opened(config)
    )
    first.save()
    for name in ("config.yaml", "inputs.json"):
        (tmp_path / "new" / name).rename(tmp_path / "run" / name)
    return config


def settings(folder: Path, **changes: Any) -> Config:
    (folder / "new").mkdir(exist_ok=True)
    tree = {
        "run": {"dir": folder / "run", **changes.pop("run", {})},
        "data": {"train": [folder / "data" / "train.parquet"], "heldout": [folder / "data" / "heldout.parquet"]},
        "model": {"path": folder / "model"},
        "tools": {"text_search": {"corpus": folder / "corpus.parquet"}},
    }
    return build({**tree, **changes})


def opened(config: Config) -> dict[str, PromptFiles]:
    return {"data.train": PromptFiles(config.data.train), "data.heldout": PromptFiles(config.data.heldout)}


def test_everything_may_move(config: Config, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name in ("data", "model"):
        shutil.move(tmp_path / name, elsewhere / "deep" / name)
    shutil.move(tmp_path / "corpus.parquet", elsewhere / "deep" / "corpus.parquet")
    (elsewhere / "deep" / "data" / "train.parquet").rename(elsewhere / "deep" / "data" / "renamed.parquet")
    moved = settings(elsewhere / "deep", run={"dir": tmp_path / "run"})
    moved = moved.model_copy(
        update={"data": moved.data.model_copy(update={"train": (elsewhere / "deep" / "data" / "renamed.parquet",)})}
    )
    files = opened(moved)
    record = open_record(moved, files)
    assert record.changes == []
    assert files["data.train"].read(3).uid == "train:3"


def test_a_mended_row_is_a_warning_that_names_it(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(tmp_path / "data" / "train.parquet", [*ANSWERS[:7], "mended", *ANSWERS[8:]])
    with caplog.at_level(logging.WARNING):
        record = open_record(config, opened(config))
    assert "data.train" in caplog.text and "the first is row 7 of train.parquet" in caplog.text
    record.save()
    record.log_changes(3)
    (line,) = (tmp_path / "run" / "changes.jsonl").read_text().splitlines()
    assert json.loads(line).items() >= {"after_step": 3, "key": "data.train"}.items()
    caplog.clear()
    assert open_record(config, opened(config)).changes == [] and not caplog.text


def other_rows(folder: Path) -> None:
    write_rows(folder / "data" / "train.parquet", [f"{answer}0" for answer in ANSWERS])


def a_row_less(folder: Path) -> None:
    write_rows(folder / "data" / "train.parquet", ANSWERS[1:])


def another_heldout(folder: Path) -> None:
    write_rows(folder / "data" / "heldout.parquet", ANSWERS)


def other_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").write_bytes(b"WEIGHTS" * 1000)


def other_shape(folder: Path) -> None:
    (folder / "model" / "config.json").write_text('{"a": 1}')


def another_corpus(folder: Path) -> None:
    (folder / "corpus.parquet").write_bytes(b"Pages")


@pytest.mark.parametrize(
    ("change", "key", "can_be_accepted"),
    [
        (other_rows, "data.train", True),
        (a_row_less, "data.train", False),
        (another_heldout, "data.heldout", True),
        (other_weights, "model.path", True),
        (other_shape, "model.path", True),
        (another_corpus, "tools.text_search.corpus", True),
    ],
)
def test_other_files_are_refused_unless_they_are_named(
    config: Config, tmp_path: Path, change: Callable[[Path], None], key: str, can_be_accepted: bool
) -> None:
    change(tmp_path)
    with pytest.raises(ConfigError, match=f"holds a run with another {key} ") as error:
        open_record(config, opened(config))
    assert (f"run.accept_changes=[{key}]" in str(error.value)) == can_be_accepted
    accepting = settings(tmp_path, run={"accept_changes": [key]})
    assert [one.key for one in open_record(accepting, opened(accepting)).changes] == [key]


def test_every_setting_that_differs_has_to_be_named(config: Config, tmp_path: Path) -> None:
    changed = {"loss": {"w_tool": 0.7}, "score": {"alpha": 0.5}}
    with pytest.raises(
        ConfigError,
        match=r"loss.w_tool \(0.15, now 0.7\).*accept it with run.accept_changes=\[loss.w_tool\]|score.alpha.*=\[score.alpha\]",
    ):
        open_record(settings(tmp_path, **changed), opened(config))
    with pytest.raises(ConfigError, match=r"holds a run with another score\.alpha"):
        open_record(settings(tmp_path, run={"accept_changes": ["loss.w_tool"]}, **changed), opened(config))
    both = settings(tmp_path, run={"accept_changes": ["loss.w_tool", "score.alpha"]}, **changed)
    record = open_record(both, opened(config))
    record.save()
    record.log_changes(3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "changes.jsonl").read_text().splitlines()]
    assert {(line["key"], line["before"], line["now"]) for line in lines} == {
        ("loss.w_tool", 0.15, 0.7),
        ("score.alpha", 0.15, 0.5),
    }
    assert open_record(settings(tmp_path, **changed), opened(config)).changes == []


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json"])
def test_checkpoints_without_a_record_are_not_gone_on_with(config: Config, tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).unlink()
    with pytest.raises(ConfigError, match=f"holds checkpoints, but its {name} is gone"):
        open_record(config, opened(config))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert open_record(config, opened(config)).changes == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "[]",
        lambda text: text[:-9],
        lambda text: text.replace("train", "trein", 1),
        lambda text: json.dumps({"inputs": {"data.train": {}}, "sha256": sha256(b'{"data.train": {}}').hexdigest()}),
        lambda text: json.dumps({"inputs": {"data.train": None}, "sha256": sha256(b'{"data.train": null}').hexdigest()}),
    ],
    ids=range(6),
)
def test_a_damaged_record_is_one_line(config: Config, tmp_path: Path, damage: Callable[[str], str]) -> None:
    path = tmp_path / "run" / "inputs.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match=r"inputs\.json is damaged"):
        open_record(config, opened(config))


def test_what_reads_the_files_can_be_stopped(config: Config, tmp_path: Path) -> None:
    (tmp_path / "run" / "inputs.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_record(config, opened(config), stop)


def test_a_readme_beside_the_weights_is_not_the_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(5 << 20))
    before = files_digest(tmp_path)
    (tmp_path / "README.md").write_text("notes")
    assert files_digest(tmp_path) == before
    for at in (0, -1):
        data = bytearray(5 << 20)
        data[at] = 1
        (tmp_path / "model.safetensors").write_bytes(data)
        assert files_digest(tmp_path) != before


def test_every_single_path_that_decides_is_found(tmp_path: Path) -> None:
    config = build({"sft": {"phases": [{"trajectories": "a", "steps": 1}, {"trajectories": "b", "steps": 1}]}})
    assert dict(by_content(config)) == {
        "model.path": config.model.path,
        "sft.phases.0.trajectories": Path("a"),
        "sft.phases.1.trajectories": Path("b"),
    }
