"""Rollouts that run ahead of training: what is trained, how old it is, and what a kill or Ctrl-C at any moment leaves."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import Moment, error_line, moments, run, succeed

from metis_fast.checkpoint.resume import CheckpointStore
from metis_fast.data.cursor import prompt_cursor
from metis_fast.data.parquet import PromptFiles
from metis_fast.rollout.store import read_rollouts

_STEPS, _PER_STEP, _SEED = 5, 4, 0  # of small.yaml
_AHEAD = ["loss.tis_cap=2", "log.tensorboard=false", "eval.every=0"]
_ASYNC = [*_AHEAD, "rollout.mode=async", "rollout.max_staleness=2"]
_DROP = [*_ASYNC, "rollout.over_provision=0.5", "rollout.slow=drop"]

# Stages of a run, and a time in seconds that each of them lasts longer than.
_STAGES = {
    "carry": (("pipeline._update", 0.02), ("resume._write_shards", 0.0), ("log.step", 0.0)),
    "drop": (("pipeline._next_batch", 0.0), ("pipeline._update", 0.02), ("pipeline._store", 0.0)),
}


def _sequence(demo: Path, num: int) -> list[str]:
    """The first prompts of a run, by uid."""
    files = PromptFiles([demo / "data" / "train.parquet"])
    return [prompt.uid for prompt in prompt_cursor(files, _SEED).next(num)]


def _trained(folder: Path) -> list[list[str]]:
    """Uids of the prompts of every step; one that two epochs brought into the same step stands there twice."""
    parts = sorted((folder / "rollouts").glob("step-*.parquet"))
    firsts = [[stored.rollout for stored in read_rollouts(part) if stored.rollout.index == 0] for part in parts]
    return [sorted(rollout.prompt_uid for rollout in rollouts) for rollouts in firsts]


def _pending(folder: Path, demo: Path) -> list[str]:
    """Uids of what the last checkpoint kept for later."""
    loaded = CheckpointStore(folder / "checkpoints", keep_last=1).latest()
    assert loaded is not None and loaded.state.step == _STEPS
    files = PromptFiles([demo / "data" / "train.parquet"])
    return [files.read(place["row"]).uid for place in loaded.state.scalars["pending"]]


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _check_whole(folder: Path, demo: Path, extra: int = 0) -> None:
    """A finished run trained every prompt of the sequence once an epoch; what it drew beyond that is kept for later."""
    trained = _trained(folder)
    assert [len(uids) for uids in trained] == [_PER_STEP] * _STEPS
    pending = _pending(folder, demo)
    assert len(pending) <= extra
    drawn = _sequence(demo, _STEPS * _PER_STEP + len(pending))
    assert Counter([uid for uids in trained for uid in uids] + pending) == Counter(drawn)
    records = _metrics(folder)
    assert [record["step"] for record in records] == list(range(_STEPS))
    assert all(record["staleness"] and len(record["staleness"]) <= 3 for record in records)


def test_an_asynchronous_run_trains_what_older_weights_sampled_within_its_bound(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    succeed(["train", demo / "config.yaml", f"run.dir={folder}", *_ASYNC, "eval.every=2"], tmp_path / "process")
    _check_whole(folder, demo)
    records = _metrics(folder)
    assert sum(record["staleness"][0] for record in records[1:]) < sum(sum(record["staleness"]) for record in records[1:])
    assert all(record["sync_bytes"] > 0 for record in records)
    # every token's version is in the store: none is newer than its step, none older than the bound
    for step, part in enumerate(sorted((folder / "rollouts").glob("step-*.parquet"))):
        for stored in read_rollouts(part):
            versions = stored.rollout.weight_version[stored.rollout.sampled]
            assert step - 2 <= versions.min() and versions.max() <= step
            assert (versions[1:] >= versions[:-1]).all()
    assert [json.loads(line)["step"] for line in (folder / "eval.jsonl").read_text().splitlines()] == [0, 2, 4, 5]


def test_one_step_off_trains_the_sequence_in_order_with_weights_one_update_old(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    succeed(["train", demo / "config.yaml", f"run.dir={folder}", *_AHEAD, "rollout.mode=one_step_off"], tmp_path / "process")
    _check_whole(folder, demo)
    drawn = _sequence(demo, _STEPS * _PER_STEP)
    assert _trained(folder) == [sorted(drawn[i : i + _PER_STEP]) for i in range(0, len(drawn), _PER_STEP)]
    ages = [record["staleness"] for record in _metrics(folder)]
    assert len(ages[0]) == 1 and all(len(age) == 2 and age[0] == 0 for age in ages[1:])


@pytest.mark.parametrize("slow", [pytest.param("carry", marks=pytest.mark.slow), "drop"])
def test_a_run_ahead_that_is_killed_in_every_stage_loses_no_prompt_and_trains_none_twice(
    demo: Path, tmp_path: Path, slow: str
) -> None:
    folder, settings = tmp_path / "run", _DROP if slow == "drop" else _ASYNC
    command = ["train", demo / "config.yaml", f"run.dir={folder}", *settings]
    for number, moment in enumerate(moments(len(slow), _STAGES[slow], signal.SIGKILL)):
        ended = run(command, tmp_path / f"kill-{number}", moment)
        assert ended.hit and ended.code == -signal.SIGKILL, (moment, ended)
        assert not ended.orphans, (moment, ended)
    succeed(command, tmp_path / "last")
    _check_whole(folder, demo, extra=2 if slow == "drop" else 0)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(Moment("pipeline._next_batch", signal.SIGINT, delay_s=0.05), marks=pytest.mark.slow, id="batch"),
        pytest.param(Moment("pipeline._update", signal.SIGINT, entry=2, delay_s=0.005), id="update"),
        pytest.param(
            Moment("pipeline._update", signal.SIGTERM, entry=2, delay_s=0.1), marks=pytest.mark.slow, id="late in an update"
        ),
    ],
)
def test_ctrl_c_while_rollouts_run_ahead_ends_the_run_at_once_and_loses_no_step(
    demo: Path, tmp_path: Path, moment: Moment
) -> None:
    folder = tmp_path / "run"
    # no checkpoint is due before the end, so that the one which is found is the interruption's own
    command = ["train", demo / "config.yaml", f"run.dir={folder}", *_ASYNC, "checkpoint.every=0"]
    ended = run(command, tmp_path / "first", moment)
    assert ended.hit and ended.code == 130, ended
    assert ended.err == "metis-fast: stopped; run the same command again to go on\n", ended
    assert ended.after_s < 30 and not ended.orphans and not ended.scratch, ended
    done = len(_metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
    assert CheckpointStore(folder / "checkpoints", 1).steps()[-1:] == ((done,) if done else ())
    succeed(command, tmp_path / "second")
    _check_whole(folder, demo)


def test_an_update_that_fails_beside_rollouts_ends_the_run_in_one_line_and_leaves_nothing_running(
    demo: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = ["train", demo / "config.yaml", f"run.dir={folder}", *_ASYNC, "train.optim.lr=1e30", "train.optim.warmup_steps=0"]
    ended = run(command, tmp_path / "first")
    assert "the step was not applied; its rollouts are in" in error_line(ended)
    assert not ended.orphans and not ended.scratch, ended
