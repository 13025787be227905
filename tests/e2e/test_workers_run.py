"""Runs whose tools and judges are in workers of this machine: the same numbers, whatever dies, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from harness import Command, Ended, error_line, run, run_state

from metis_fast.rollout.store import read_rollouts
from metis_fast.workers.launch import SCRATCH

_QUICK = ("data.heldout=[]", "eval.every=0", "log.progress=false")
_PER_STEP = 16  # rollouts


def _workers(running: Command, role: str = "") -> list[psutil.Process]:
    """The run's worker processes, those of a role alone if one is given."""
    found = []
    for process in running.family():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if "worker" in line and "--join" in line and line[-1].startswith(role):
            found.append(process)
    return found


def _steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_with_workers_is_bit_for_bit_the_one_in_process(demo: Path, tmp_path: Path) -> None:
    command = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", "workers.tools=2", "workers.judges=1"]
    ended = run(command, tmp_path / "process")
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended
    assert run_state(tmp_path / "run") == run_state(demo)


def _struck(demo: Path, tmp_path: Path, number: signal.Signals, steps: int) -> Ended:
    """A run of which a tool worker and a judge are sent a signal in every step."""
    options = ["workers.tools=2", "workers.judges=1", "workers.silence_s=2", f"train.steps={steps}"]
    running = Command(["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", *options, *_QUICK], tmp_path / "process")
    struck: set[tuple[int, str]] = set()
    while running.alive:
        step = _steps(tmp_path / "run")
        for role in ("tools", "judge"):
            living = _workers(running, role)
            if living and (tmp_path / "run" / "config.yaml").exists() and (step, role) not in struck:
                living[-1].send_signal(number)
                struck.add((step, role))
        time.sleep(0.02)
    assert len(struck) >= steps  # neither is ever done with
    return running.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_that_die_or_hang_in_every_step_cost_no_rollout(demo: Path, tmp_path: Path, number: signal.Signals) -> None:
    ended = _struck(demo, tmp_path, number, 5)
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended
    assert "worker tools-" in ended.err and "worker judge-0 was lost" in ended.err
    stored = list(read_rollouts(tmp_path / "run" / "rollouts"))
    assert len(stored) == 5 * _PER_STEP and all(one.score.verdict is not None for one in stored)
    assert not [turn for one in stored for turn in one.rollout.turns if "worker" in turn.observation]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert not {"infrastructure_error", "judge_error"} & json.loads(line)["outcomes"].keys()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_no_worker_outlives_its_run(demo: Path, tmp_path: Path, number: signal.Signals) -> None:
    options = ["workers.tools=1", "workers.judges=1", "train.steps=500", *_QUICK]
    running = Command(["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", *options], tmp_path / "process")
    while _steps(tmp_path / "run") == 0:
        assert running.alive, running.read("err")
        time.sleep(0.02)
    assert len(_workers(running)) == 2
    scratch = [Path(process.environ()[SCRATCH]) for process in _workers(running)]
    assert all(folder.is_dir() for folder in scratch)
    if number == signal.SIGKILL:
        _workers(running)[0].suspend()
    os.kill(running.pid, number)
    ended = running.wait()
    assert ended.code == (130 if number == signal.SIGINT else -number) and not ended.orphans, ended
    assert not any(folder.exists() for folder in scratch)


def test_what_a_tool_worker_lacks_is_one_line_of_the_command(demo: Path, tmp_path: Path) -> None:
    missing = f"tools.text_search.corpus={tmp_path / 'none.parquet'}"
    command = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", "workers.tools=1", missing]
    line = error_line(run(command, tmp_path / "process"))
    assert "the corpus of text_search" in line and "is not there; set tools.text_search.corpus" in line
