"""What a run may go on with: files by what is in them, mended rows with a warning, anything else only when it is named."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metis_fast.checkpoint.digest import files_digest
from metis_fast.config import Config, build, by_content, load
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError, DataError
from metis_fast.run.record import RunRecord, open_record


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
    record(config).save(0)
    (tmp_path / "run" / "checkpoints" / "step-000003").mkdir(parents=True)
    return config


def record(config: Config, data: dict[str, PromptFiles | None] | None = None) -> RunRecord:
    return open_record(config, opened(config) if data is None else data, ("model", "tools"))


def changed(config: Config) -> list[str]:
    return [one.key for one in record(config).changes]


def settings(folder: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "run": {"dir": folder / "run", **changes.pop("run", {})},
        "data": {"train": [folder / "data" / "train.parquet"], "heldout": [folder / "data" / "heldout.parquet"]},
        "model": {"path": folder / "model"},
        "tools": {"text_search": {"corpus": folder / "corpus.parquet"}},
    }
    return build({**tree, **changes})


def opened(config: Config) -> dict[str, PromptFiles | None]:
    heldout = PromptFiles(config.data.heldout) if config.data.heldout else None
    return {"data.train": PromptFiles(config.data.train), "data.heldout": heldout}


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
    assert record(moved, files).changes == ()
    train = files["data.train"]
    assert train is not None and train.read(3).uid == "train:3"


def test_what_was_known_of_a_corpus_that_is_gone_for_a_while_is_held_to_later(config: Config, tmp_path: Path) -> None:
    (tmp_path / "corpus.parquet").rename(tmp_path / "away.parquet")
    tools = config.tools.model_copy(update={"replay": tmp_path / "run.sqlite"})  # it needs no corpus
    record(config.model_copy(update={"tools": tools})).save(3)
    (tmp_path / "away.parquet").rename(tmp_path / "corpus.parquet")
    assert changed(config) == []
    (tmp_path / "corpus.parquet").write_bytes(b"other pages")
    with pytest.raises(ConfigError, match=r"another tools\.text_search\.corpus"):
        record(config)


def test_a_mended_row_is_a_warning_that_names_it(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(tmp_path / "data" / "train.parquet", [*ANSWERS[:7], "mended", *ANSWERS[8:]])
    with caplog.at_level(logging.WARNING):
        again = record(config)
    assert "data.train" in caplog.text and "the first is row 7 of train.parquet" in caplog.text
    assert not (tmp_path / "run" / "changes.jsonl").exists()  # not before the run goes on
    again.save(3)
    (line,) = (tmp_path / "run" / "changes.jsonl").read_text().splitlines()
    assert json.loads(line).items() >= {"after_step": 3, "key": "data.train"}.items()
    caplog.clear()
    assert changed(config) == [] and not caplog.text


def test_rows_that_are_mended_a_few_at_a_time_are_other_rows_in_the_end(config: Config, tmp_path: Path) -> None:
    for num in (3, 5):
        write_rows(tmp_path / "data" / "train.parquet", ["mended"] * num + ANSWERS[num:])
        record(config).save(3)
    write_rows(tmp_path / "data" / "train.parquet", ["mended"] * 6 + ANSWERS[6:])
    with pytest.raises(ConfigError, match=r"another data\.train"):
        record(config)


def test_the_only_row_may_be_mended(tmp_path: Path) -> None:
    for name in ("train", "heldout"):
        write_rows(tmp_path / "data" / f"{name}.parquet", ["1"])
    record(settings(tmp_path)).save(0)
    write_rows(tmp_path / "data" / "train.parquet", ["2"])
    assert changed(settings(tmp_path)) == ["data.train"]


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
        record(config)
    assert (f"run.accept_changes=[{key}]" in str(error.value)) == can_be_accepted
    accepting = settings(tmp_path, run={"accept_changes": [key]})
    if not can_be_accepted:
        with pytest.raises(ConfigError, match="restore the file to resume"):
            record(accepting)
        return
    record(accepting).save(3)
    assert changed(config) == []  # it is what the run has now


def test_what_was_not_set_before_or_is_not_any_more_is_a_change(config: Config, tmp_path: Path) -> None:
    without = settings(tmp_path, data={"train": [tmp_path / "data" / "train.parquet"]}, tools={})
    with pytest.raises(
        ConfigError, match=r"another data\.heldout \('some', now None\), tools\.text_search\.corpus \('some', now None\)"
    ):
        record(without)
    accepting = settings(
        tmp_path,
        data={"train": [tmp_path / "data" / "train.parquet"]},
        tools={},
        run={"accept_changes": ["data.heldout", "tools.text_search.corpus"]},
    )
    record(accepting).save(3)
    assert changed(without) == []
    with pytest.raises(ConfigError, match=r"another data\.heldout \(None, now 'some'\)"):
        record(config)


@pytest.mark.parametrize(
    ("section", "key", "value"), [("run", "seed", 7), ("model", "dtype", "float32"), ("data", "shuffle", False)]
)
def test_what_no_checkpoint_can_go_on_with_is_not_offered(
    config: Config, tmp_path: Path, section: str, key: str, value: object
) -> None:
    now = getattr(config, section).model_copy(update={key: value})
    with pytest.raises(ConfigError, match=rf"restore the setting {section}\.{key} to resume") as error:
        record(config.model_copy(update={section: now}))
    assert "accept_changes" not in str(error.value)


def test_a_whole_section_is_not_accepted(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'score' is a section; name the settings in it, as in score\."):
        record(settings(tmp_path, run={"accept_changes": ["score"]}))


def test_every_setting_that_differs_has_to_be_named(config: Config, tmp_path: Path) -> None:
    changes = {"loss": {"w_tool": 0.7}, "score": {"alpha": 0.5}}
    with pytest.raises(
        ConfigError,
        match=r"score\.alpha \(0\.15, now 0\.5\), loss\.w_tool \(0\.15, now 0\.7\);.*=\[score\.alpha,loss\.w_tool\]",
    ):
        record(settings(tmp_path, **changes))
    with pytest.raises(ConfigError, match=r"another score\.alpha .*=\[loss\.w_tool,score\.alpha\]"):
        record(settings(tmp_path, run={"accept_changes": ["loss.w_tool"]}, **changes))
    record(settings(tmp_path, run={"accept_changes": ["loss.w_tool", "score.alpha"]}, **changes)).save(3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "changes.jsonl").read_text().splitlines()]
    assert {(line["key"], line["before"], line["now"]) for line in lines} == {
        ("loss.w_tool", 0.15, 0.7),
        ("score.alpha", 0.15, 0.5),
    }
    assert changed(settings(tmp_path, **changes)) == []


@pytest.mark.parametrize(
    ("key", "meant"), [("w_tool", "loss.w_tool"), ("model.pth", "model.path"), ("sft.phases.0.trajectory", "")]
)
def test_a_key_that_nobody_knows_cannot_be_accepted(config: Config, tmp_path: Path, key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"run.accept_changes: unknown key {key!r}; did you mean '{meant}"):
        record(settings(tmp_path, run={"accept_changes": [key]}))


def test_a_setting_of_a_later_release_had_its_default_before(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "run" / "inputs.json"
    document = json.loads(path.read_text())
    del document["settings"]["loss.w_tool"]
    document["settings"]["loss.gone"] = 3
    document["sha256"] = sha256(json.dumps({key: document[key] for key in ("settings", "inputs")}).encode()).hexdigest()
    path.write_text(json.dumps(document))
    assert changed(config) == []


def test_the_settings_that_count_are_those_of_the_record_not_of_a_file_that_people_edit(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "run" / "config.yaml"
    path.write_text("loss: {w_tool: 0.3}\n")
    with pytest.raises(ConfigError, match=r"another loss\.w_tool"):
        record(settings(tmp_path, loss={"w_tool": 0.3}))
    path.unlink()
    record(config).save(3)
    assert load(path) == config


def test_checkpoints_without_a_record_are_not_gone_on_with(config: Config, tmp_path: Path) -> None:
    (tmp_path / "run" / "inputs.json").unlink()
    with pytest.raises(ConfigError, match=r"holds checkpoints, but its inputs\.json is gone"):
        record(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert changed(config) == []


def _with_inputs(text: str) -> str:
    tree = f'{{"settings": {{}}, "inputs": {text}}}'
    return f'{{"sha256": "{sha256(tree.encode()).hexdigest()}", {tree[1:]}'


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: text[:-9],
        lambda text: text.replace("train", "trein", 1),
        lambda text: _with_inputs('{"data.train": {}}'),
        lambda text: _with_inputs('{"data.train": null}'),
    ],
    ids=range(7),
)
def test_a_damaged_record_is_one_line(config: Config, tmp_path: Path, damage: Callable[[str], str]) -> None:
    path = tmp_path / "run" / "inputs.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match=r"inputs\.json is damaged"):
        record(config)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=r"inputs\.json is damaged"):
        record(config)


def test_what_reads_the_files_can_be_stopped(config: Config, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run")

    def stop() -> None:
        raise KeyboardInterrupt

    new = open_record(config, opened(config), (), stop)
    with pytest.raises(KeyboardInterrupt):
        new.save(0)
    new.close()
    assert not (tmp_path / "run" / "inputs.json").exists()
    assert "digests" not in {thread.name for thread in threading.enumerate()}


def test_a_row_group_of_a_new_run_that_cannot_be_read_is_an_error_before_its_first_step(config: Config, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run")
    files = opened(config)
    path = tmp_path / "data" / "train.parquet"
    data = bytearray(path.read_bytes())
    data[100:200] = bytes(100)
    path.write_bytes(data)
    new = record(config, files)
    with pytest.raises(DataError, match="cannot read row group 0"):
        new.save(0)
    new.close()


def test_what_lies_beside_the_weights_is_not_the_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(5 << 20))
    before = files_digest(tmp_path)
    for name in ("README.md", "all_results.json", "checkpoint-500/model.safetensors", "runs/x/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("notes")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")  # told where the model is opened
    (tmp_path / "sub.parquet").mkdir()
    assert files_digest(tmp_path) == before
    for at in (0, 2_640_000, -1):
        data = bytearray(5 << 20)
        data[at] = 1
        (tmp_path / "model.safetensors").write_bytes(data)
        assert files_digest(tmp_path) != before


def test_every_single_path_that_decides_is_found() -> None:
    config = build({"sft": {"phases": [{"trajectories": "a", "steps": 1}, {"trajectories": "b", "steps": 1}]}})
    assert dict(by_content(config)) == {
        "model.path": config.model.path,
        "tools.text_search.corpus": None,
        "tools.text_search.reference_cache": None,
        "tools.image_search.corpus": None,
        "tools.image_search.cache": None,
        "score.llm.prompt": None,
        "sft.phases.0.trajectories": Path("a"),
        "sft.phases.1.trajectories": Path("b"),
        "sft.heldout": None,
    }
