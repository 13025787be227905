"""The run log: what is in the files after kills and resumes, and what the terminal shows."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metis_fast.config import LogConfig
from metis_fast.errors import DataError
from metis_fast.report.log import Evaluation, RunLog, read_evaluations, read_steps, step_scalars
from metis_fast.report.progress import progress
from metis_fast.types import Avoided, Savings, Slice, StepStats, UpdateStats

QUIET = LogConfig(tensorboard=False)
UPDATE = UpdateStats(
    loss=0.5,
    loss_acc=0.4,
    loss_tool=0.1,
    grad_norm=2.0,
    lr=1e-6,
    clip_acc=0.1,
    clip_tool=0.2,
    kl=0.01,
    ratio_max=1.5,
    ratio_min=0.5,
    entropy=1.0,
    engine_gap=0.1,
    num_tokens=100,
    flops=9e12,
    avoided=Savings(rollouts=Avoided(30, 2e12), prompts=Avoided(120, 5e11)),
    n_acc=60,
    n_tool=30,
)
RATES = Slice(num=8, num_no_verdict=1, accuracy=0.75, tool_rate=0.5, tool_calls=0.6, format_rate=1.0, response_tokens=33.25)


def stats(step: int, **changes) -> StepStats:
    made = StepStats(
        step=step,
        epoch=0,
        reward_acc=0.1 + step,
        reward_tool=0.2,
        slices={"all": RATES, "direct": RATES},
        outcomes={"answered": 8},
        tool_errors=1,
        qualifying_share=0.75,
        signal_share=0.5,
        bad_rows_skipped=0,
        updates=(UPDATE,),
        seconds={"rollout": 1.5, "train": 0.25},
    )
    return dataclasses.replace(made, **changes)


def test_steps_and_evaluations_read_back_equal(tmp_path: Path):
    written = [stats(0), stats(1, updates=(UPDATE, dataclasses.replace(UPDATE, skipped_step=True)))]
    with RunLog(tmp_path, QUIET) as log:
        log.evaluation(0, {"all": RATES})
        for one in written:
            log.step(one)
    assert read_steps(tmp_path) == written
    assert read_evaluations(tmp_path) == [Evaluation(0, {"all": RATES})]


def test_what_ran_ahead_is_logged_and_reads_back(tmp_path: Path):
    ahead = stats(
        4, staleness=(10, 30, 60), groups_in_flight=8, groups_carried=5, groups_dropped=2, sync_bytes=1000, sync_retries=1
    )
    with RunLog(tmp_path, QUIET) as log:
        log.step(ahead)
    assert read_steps(tmp_path) == [ahead]
    scalars = step_scalars(ahead)
    assert [scalars[f"staleness/{age}"] for age in range(3)] == [0.1, 0.3, 0.6]
    assert scalars["staleness/mean"] == 1.5
    assert [scalars[f"groups/{name}"] for name in ("in_flight", "carried", "dropped")] == [8.0, 5.0, 2.0]
    assert (scalars["sync/bytes"], scalars["sync/retries"]) == (1000.0, 1.0)
    assert "staleness/mean" not in step_scalars(stats(4))  # a step without a token that counts has no age


def test_the_judges_missing_verdicts_are_a_share_of_what_there_was_to_judge():
    outcomes = {"answered": 5, "turn_limit": 1, "judge_error": 2, "infrastructure_error": 8}
    assert step_scalars(stats(0, outcomes=outcomes))["share/judge_failed_rate"] == 0.25
    assert step_scalars(stats(0))["share/judge_failed_rate"] == 0.0
    assert step_scalars(stats(0, outcomes={"infrastructure_error": 8}))["share/judge_failed_rate"] == 0.0


def test_what_our_machinery_broke_off_is_a_share_of_all_rollouts():
    outcomes = {"answered": 5, "turn_limit": 1, "judge_error": 2, "infrastructure_error": 8}
    assert step_scalars(stats(0, outcomes=outcomes))["share/infra_failed_rate"] == 0.5


def test_records_from_before_there_were_rates_of_failures_get_them_from_their_outcomes(tmp_path: Path):
    outcomes = {"answered": 6, "judge_error": 2, "infrastructure_error": 8}
    with RunLog(tmp_path, QUIET) as log:
        log.step(stats(0, outcomes=outcomes))
    path = tmp_path / "metrics.jsonl"
    record = json.loads(path.read_text())
    del record["infra_failed_rate"], record["judge_failed_rate"]
    path.write_text(json.dumps(record) + "\n")
    (step,) = read_steps(tmp_path)
    assert (step.infra_failed_rate, step.judge_failed_rate) == (0.5, 0.25)


def test_steps_of_a_run_from_before_rollouts_could_run_ahead_still_read(tmp_path: Path):
    with RunLog(tmp_path, QUIET) as log:
        log.step(stats(0))
    path = tmp_path / "metrics.jsonl"
    record = json.loads(path.read_text())
    for name in ("staleness", "groups_in_flight", "groups_carried", "groups_dropped", "sync_bytes", "sync_retries"):
        del record[name]
    path.write_text(json.dumps(record) + "\n")
    assert read_steps(tmp_path) == [stats(0)]


def test_an_interrupted_and_resumed_run_has_the_files_of_an_uninterrupted_one(tmp_path: Path):
    with RunLog(tmp_path / "whole", QUIET) as log:
        for step in range(6):
            log.evaluation(step, {"all": RATES})
            log.step(stats(step))

    killed = RunLog(tmp_path / "resumed", QUIET)
    for step in range(5):
        killed.evaluation(step, {"all": RATES})
        killed.step(stats(step, reward_tool=0.2 if step < 3 else 0.9))
    with RunLog(tmp_path / "resumed", QUIET) as log:
        log.truncate(3)
        for step in range(3, 6):
            log.evaluation(step, {"all": RATES})
            log.step(stats(step))

    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_line_cut_short_by_a_kill_is_dropped_and_the_log_goes_on(tmp_path: Path):
    with RunLog(tmp_path, QUIET) as log:
        log.step(stats(0))
    with (tmp_path / "metrics.jsonl").open("ab") as handle:
        handle.write(b'{"step": 1, "epo')
    assert [one.step for one in read_steps(tmp_path)] == [0], "a reader does not mind either"

    with RunLog(tmp_path, QUIET) as log:
        log.step(stats(1))

    assert read_steps(tmp_path) == [stats(0), stats(1)]


def test_a_record_that_is_not_ours_is_named_with_its_line(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: expected a record"):
        read_steps(tmp_path)


def test_tensorboard_shows_the_resumed_steps_instead_of_the_dropped_ones(tmp_path: Path):
    with RunLog(tmp_path, LogConfig()) as log:
        for step in range(4):
            log.step(stats(step))
    with RunLog(tmp_path, LogConfig()) as log:
        log.truncate(2)
        log.step(stats(2, reward_acc=7.0))

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()

    points = [(event.step, event.value) for event in events.Scalars("reward/acc")]
    assert points == [(0, pytest.approx(0.1)), (1, pytest.approx(1.1)), (2, 7.0)]
    assert {"accuracy/direct", "tool_rate/all", "loss/tool", "policy/ratio_max", "seconds/rollout"} <= set(
        events.Tags()["scalars"]
    )


def test_tensorboard_is_left_alone_when_switched_off(tmp_path: Path):
    with RunLog(tmp_path, QUIET) as log:
        log.step(stats(0))
    assert not (tmp_path / "tensorboard").exists()


def test_several_updates_become_means_sums_and_extremes():
    other = dataclasses.replace(UPDATE, loss=0.1, ratio_max=4.0, ratio_min=0.9, num_tokens=50)
    skipped = dataclasses.replace(UPDATE, loss=100.0, ratio_max=99.0, num_tokens=7, skipped_step=True)
    scalars = step_scalars(stats(0, updates=(UPDATE, other, skipped)))
    assert math.isclose(scalars["loss/total"], 0.3)
    assert (scalars["policy/ratio_max"], scalars["policy/ratio_min"]) == (4.0, 0.5)
    assert scalars["tokens/run"] == 157
    assert (scalars["flops/run"], scalars["tokens_avoided/prompts"], scalars["flops_avoided/rollouts"]) == (27e12, 360, 6e12)


def test_the_live_line_has_its_columns_under_its_headings(tmp_path: Path, capsys):
    with RunLog(tmp_path, QUIET) as log:
        log.step(stats(0))
        log.step(stats(1, updates=()))
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["step", "accuracy", "tools:direct", "loss", "grad", "norm", "seconds"]
    assert first.split() == ["0", "0.750", "0.500", "+0.5000", "2", "1.8"]
    assert second.split() == ["1", "0.750", "0.500", "-", "-", "1.8"]
    assert len(heading) == len(first) == len(second)


def test_the_live_line_shows_abilities_where_the_data_has_no_kinds(tmp_path: Path, capsys):
    with RunLog(tmp_path, QUIET) as log:
        log.step(stats(0, slices={"all": RATES, "search": RATES, "math": RATES}))
    assert capsys.readouterr().out.splitlines()[0].split()[2:4] == ["tools:math", "tools:search"]


class Terminal:
    """A stderr that says it is a terminal, and keeps what is written."""

    encoding = "utf-8"

    def __init__(self, is_terminal: bool):
        self.text, self._is_terminal = "", is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize(("wanted", "is_terminal"), [(True, True), (True, False), (False, True)])
def test_bars_are_drawn_only_where_wanted_and_where_somebody_sees_them(monkeypatch, wanted: bool, is_terminal: bool):
    terminal = Terminal(is_terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    with progress(3, "rollouts", LogConfig(progress=wanted)) as bar:
        bar.update(3)
    assert ("rollouts" in terminal.text) == (wanted and is_terminal)
