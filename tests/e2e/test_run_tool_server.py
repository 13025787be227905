"""The Python tool's server is killed from outside, again and again: rollouts are tried again or lose their verdict, no more."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
from harness import Command, Ended, below

from metis_fast.rollout.store import StoredRollout, read_rollouts
from metis_fast.types import Outcome

_STEPS, _ROLLOUTS = 5, 16


def _server(running: Command) -> psutil.Process | None:
    """The outermost process of the tool server, if a session runs in it."""
    for process in running.family():
        try:
            if process.ppid() == running.pid and "metis_fast.tools.sandbox.server" in " ".join(process.cmdline()):
                # itself, the first process of its namespace, and a session or more
                return process if len(list(below(process.pid))) > 1 else None
        except psutil.NoSuchProcess:
            continue
    return None


def _killed(demo: Path, tmp_path: Path, retries: int) -> tuple[Ended, list[StoredRollout]]:
    """A run whose server is killed once a step while it works."""
    command = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", f"train.steps={_STEPS}", "data.heldout=[]"]
    settings = [f"rollout.retries={retries}", "tools.python.pool=0"]  # so that a session is one of a rollout
    running = Command([*command, *settings], tmp_path / "process")
    metrics, kills = tmp_path / "run" / "metrics.jsonl", 0
    while running.alive and not (tmp_path / "run" / "config.yaml").exists():
        time.sleep(0.002)  # a server killed while it starts is no sandbox on this machine, which ends the command
    while running.alive:
        done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        server = _server(running) if kills <= done else None
        if server is not None:
            server.kill()
            kills = done + 1
        time.sleep(0.002)
    assert kills
    ended = running.wait()
    assert ended.code == 0, ended
    assert not ended.orphans and not ended.scratch, ended
    return ended, list(read_rollouts(tmp_path / "run" / "rollouts"))


def _outcomes(tmp_path: Path) -> list[dict[str, int]]:
    return [json.loads(line)["outcomes"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def _nothing_is_blamed_on_the_agent(stored: list[StoredRollout]) -> None:
    observations = [turn.observation for one in stored for turn in one.rollout.turns]
    assert not [text for text in observations if "Python session ended" in text or "Python server" in text]


def test_a_rollout_whose_tool_server_died_is_tried_again(demo: Path, tmp_path: Path) -> None:
    ended, stored = _killed(demo, tmp_path, retries=2)
    assert "try 1: " in ended.err  # the kills did hit rollouts
    assert all("infrastructure_error" not in outcomes for outcomes in _outcomes(tmp_path))
    assert len(stored) == _STEPS * _ROLLOUTS and all(one.score.verdict is not None for one in stored)
    _nothing_is_blamed_on_the_agent(stored)


@pytest.mark.slow  # unit/test_episode.py has what becomes of such a rollout, test_remote_tools.py that it has no verdict
def test_a_rollout_that_may_not_be_tried_again_loses_its_verdict_and_the_run_goes_on(demo: Path, tmp_path: Path) -> None:
    _, stored = _killed(demo, tmp_path, retries=0)
    lost = [one for one in stored if one.rollout.outcome is Outcome.INFRASTRUCTURE_ERROR]
    assert lost and len(lost) < len(stored)
    assert len(lost) == sum(outcomes.get("infrastructure_error", 0) for outcomes in _outcomes(tmp_path))
    assert all(sum(outcomes.values()) == _ROLLOUTS for outcomes in _outcomes(tmp_path))
    for one in lost:
        assert one.score.verdict is None and one.score.outcome is Outcome.INFRASTRUCTURE_ERROR
        assert (one.score.r_acc, one.score.adv_acc, one.score.adv_tool, one.score.needs_gradient) == (0.0, 0.0, 0.0, False)
    _nothing_is_blamed_on_the_agent(stored)
