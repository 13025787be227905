"""Trackers: what TensorBoard, W&B and trackio get, and that none of them can hurt a run."""

from __future__ import annotations

import importlib.util
import io
import logging
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report_log import RATES, stats
from view_runs import write_run

from metis_fast.config import LogConfig
from metis_fast.errors import ConfigError
from metis_fast.report.log import RunLog
from metis_fast.report.samples import Sample, samples
from metis_fast.report.trackers import Guarded, side_by_side

LOGGER = "metis_fast.report.trackers"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the rollouts of one step."""
    return write_run(tmp_path_factory.mktemp("runs") / "stored", steps=1, prompts=4, size=2)


def _tracked(folder: Path, config: LogConfig) -> None:
    with RunLog(folder, config) as log:
        log.evaluation(0, {"all": RATES})
        for step in range(2):
            log.step(stats(step))


def test_samples_are_first_rollouts_of_prompts_with_small_images(stored: Path):
    found = samples(stored, 0, most=3)
    assert len(found) == len({one.uid for one in found}) == 3
    assert all(max(image.size) <= 320 and image.mode == "RGB" for one in found for image in one.images)
    assert any(one.images for one in found)
    assert samples(stored, 7) == []


def test_tensorboard_shows_rollouts_with_their_images(stored: Path):
    _tracked(stored, LogConfig(rollouts_every=2))
    events = EventAccumulator(str(stored / "tensorboard"))
    events.Reload()
    shown = samples(stored, 0)
    with_images = [i for i, one in enumerate(shown) if one.images]
    assert events.Tags()["images"] == [f"rollouts/{i}" for i in with_images]
    (image,) = events.Images(f"rollouts/{with_images[0]}")  # of step 0 and not of step 1
    picture = Image.open(io.BytesIO(image.encoded_image_string))
    assert picture.size == side_by_side(shown[with_images[0]].images).size
    (text,) = events.Tensors("rollouts/0/text_summary")
    written = text.tensor_proto.string_val[0].decode()
    assert shown[0].text.splitlines()[0] in written
    assert all(line.startswith("    ") for line in written.splitlines())
    assert {"heldout_accuracy/all", "reward/acc"} <= set(events.Tags()["scalars"])


def test_no_rollouts_are_shown_where_none_are_wanted(stored: Path, tmp_path: Path):
    (tmp_path / "rollouts").symlink_to(stored / "rollouts")
    _tracked(tmp_path, LogConfig(rollouts_every=0))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == []


def test_wandb_keeps_a_run_offline(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # its own process, on a busy machine
    (tmp_path / "rollouts").symlink_to(stored / "rollouts")
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        for _ in range(2):  # the second time it goes on
            _tracked(tmp_path, LogConfig(tensorboard=False, trackers=("wandb",), rollouts_every=2))
    assert caplog.records == []
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.stem for path in files}) == 1, "both are one run"
    data = files[0].read_bytes()
    assert b"heldout_accuracy/all" in data and b"reward/acc" in data and b"rollouts/text" in data
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/rollouts/*.png"))


def test_trackio_keeps_a_run_in_its_local_file(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "rollouts").symlink_to(stored / "rollouts")
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        _tracked(run, LogConfig(tensorboard=False, trackers=("trackio",), project="here", rollouts_every=2))
    assert [record.message for record in caplog.records] == []
    (path,) = (tmp_path / "trackio").glob("here*.db")
    with sqlite3.connect(path) as base:
        rows = base.execute("select step, metrics from metrics").fetchall()
    assert any(step == 1 and "reward/acc" in str(metrics) for step, metrics in rows)
    assert any("heldout_accuracy/all" in str(metrics) for _, metrics in rows)


def test_what_is_not_installed_is_said_before_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"names trackio, which is not installed; in the .*: pip install -e '\.\[trackio\]'"):
        RunLog(tmp_path, LogConfig(tensorboard=False, trackers=("trackio",)))


class Broken:
    """A tracker whose every call fails, as one does whose disk is full."""

    calls = 0

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")

    def rollouts(self, shown: Sequence[Sample], step: int) -> None:
        raise RuntimeError("and this")

    def close(self) -> None:
        raise ConnectionError("gone")


def test_a_tracker_that_fails_is_said_once_and_asked_again(caplog: pytest.LogCaptureFixture):
    broken = Broken()
    guarded = Guarded("broken", lambda: broken)
    for step in range(5):
        guarded.tell(lambda one, step=step: one.scalars({}, step))
        guarded.tell(lambda one, step=step: one.rollouts([], step))
    guarded.close()
    guarded.close()
    assert broken.calls == 5
    assert [record.message.partition(". ")[0] for record in caplog.records] == [
        "tracker broken: OSError: [Errno 28] No space left on device"
    ]


def test_a_tracker_that_cannot_be_opened_is_said_once(caplog: pytest.LogCaptureFixture):
    def refuse() -> Broken:
        raise ConnectionError("no network")

    guarded = Guarded("refused", refuse)
    for step in range(3):
        guarded.tell(lambda one, step=step: one.scalars({}, step))
    guarded.close()
    assert [record.message.partition(". ")[0] for record in caplog.records] == [
        "tracker refused: cannot be opened: ConnectionError: no network"
    ]


def test_a_tracker_that_hangs_holds_nothing_up(caplog: pytest.LogCaptureFixture):
    release = threading.Event()

    def hang() -> Broken:
        release.wait(60)
        raise TimeoutError("at last")

    guarded = Guarded("slow", hang)
    began = time.monotonic()
    for step in range(1000):
        guarded.tell(lambda one, step=step: one.scalars({}, step))
    guarded.close(seconds=0.1)
    assert time.monotonic() - began < 30
    release.set()
    assert [record.message.partition(";")[0] for record in caplog.records] == ["tracker slow: it does not keep up"]


def test_a_full_disk_under_tensorboard_leaves_the_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    _tracked(tmp_path, LogConfig())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len([record for record in caplog.records if "tracker tensorboard" in record.message]) == 1
