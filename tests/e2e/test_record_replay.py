"""A recorded run is repeated bit for bit where there is no network, no sandbox, no corpus and no judge."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import sqlite3
import subprocess
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import Command, Ended, Moment, error_line, run, run_state, succeed

from metis_fast.config import Config
from metis_fast.recording.opening import open_recording, recorded_toolbox
from metis_fast.recording.rollout import PLAYED, Played
from metis_fast.testing.judge import JudgeServer, Reply, by_equality, completion, serving
from metis_fast.tools import open_toolbox
from metis_fast.tools.protocol import Toolbox
from metis_fast.tools.results import PythonResult, ToolResult
from metis_fast.types import Observation

_NEW_USERS, _NEW_NETWORK = 0x10000000, 0x40000000  # of <sched.h>


def _cut_off() -> None:
    """This process and its children have no network, not even the loopback device, and can make no sandbox."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = {"uid_map": os.getuid(), "gid_map": os.getgid()}
    if libc.unshare(_NEW_USERS | _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    for name, number in own.items():
        Path("/proc/self", name).write_text(f"0 {number} 1")
    Path("/proc/sys/user/max_user_namespaces").write_text("0")


def _alone(command: list[object], folder: Path) -> Ended:
    """Run a command that is cut off."""
    return Command(command, folder, before=_cut_off).wait()


@pytest.fixture(autouse=True)
def needs_namespaces() -> None:
    """To cut a process off."""
    if subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make user namespaces")


def _verdict(task: dict[str, Any]) -> Reply:
    if task["question"] == "What is 1 + 1?":
        return by_equality(task)
    return completion("CORRECT" if len(task["candidate_answer"]) % 2 == 0 else "INCORRECT")


def _recorded(file: Path) -> dict[str, int]:
    """Answers in a recording, by who gave them."""
    database = sqlite3.connect(file)
    counts = dict(database.execute("SELECT what, count(*) FROM calls GROUP BY what").fetchall())
    database.close()
    return counts


def test_a_recorded_run_replays_bit_for_bit_with_network_sandbox_corpora_and_judge_gone(demo: Path, tmp_path: Path) -> None:
    file, recorded, replayed = tmp_path / "file" / "run.sqlite", tmp_path / "recorded", tmp_path / "replayed"
    command = ["train", demo / "config.yaml", "train.steps=2", "train.optim.warmup_steps=0", "eval.every=1", "score.judge=llm"]
    command.append("log.tensorboard=false")
    with serving(JudgeServer(_verdict, models=("judge",))) as url:
        judged = [*command, f"score.llm.base_url={url}"]
        succeed([*judged, f"tools.record={file}", f"run.dir={recorded}"], tmp_path / "first")
    counts = _recorded(file)
    assert counts.keys() == {"python", "text_search", "image_search", "judge llm"}, counts
    gone = [f"tools.{tool}_search.corpus={tmp_path / 'gone.parquet'}" for tool in ("text", "image")]
    line = error_line(_alone([*command, "score.judge=by_row", f"run.dir={tmp_path / 'none'}"], tmp_path / "without"))
    assert "no sandbox for the python tool on this machine" in line  # else this would show nothing
    replay = [*command, *gone, f"tools.replay={file}", "workers.tools=2", "workers.judges=2"]  # which are not started
    ended = _alone([*replay, f"run.dir={replayed}"], tmp_path / "second")
    assert ended.code == 0, ended
    assert not ended.scratch and not ended.orphans
    assert run_state(replayed) == run_state(recorded)
    assert _recorded(file) == counts and [path.name for path in file.parent.iterdir()] == ["run.sqlite"]
    line = error_line(_alone([*replay, "run.seed=1", f"run.dir={tmp_path / 'other'}"], tmp_path / "third"))
    assert f"tools.replay={file} has no answer for " in line and "replay with the settings" in line
    assert re.search(r" of (train|heldout):\d+, rollout \d; ", line), line
    assert not (tmp_path / "other" / "rollouts").exists()


_CODES = (
    "import os, time\nx = os.urandom(8).hex()\nprint(x, time.time_ns())",
    "Image.frombytes('RGB', (32, 32), os.urandom(3072)).show()\nprint(x)",
    "print(x); print(y)",
)


async def _told(box: Toolbox, rollout: str) -> list[ToolResult | Observation]:
    PLAYED.set(Played(rollout, rollout))
    session = box.session(())
    try:
        return [await session.call("python", {"code": code}) for code in _CODES]
    finally:
        await session.close()


async def _all_told(box: Toolbox) -> list[list[ToolResult | Observation]]:
    return await asyncio.gather(*(asyncio.create_task(_told(box, f"rollout {i}")) for i in range(4)))


def test_code_that_never_prints_the_same_is_replayed_to_the_rollout_that_read_it(tmp_path: Path) -> None:
    boxes: list[list[list[ToolResult | Observation]]] = []
    for how in ("record", "replay"):
        config = Config.model_validate({"tools": {"enabled": ["python"], how: tmp_path / "run.sqlite"}})
        recording = open_recording(config)
        assert recording is not None
        with closing(recording):
            box = recorded_toolbox(config, recording, partial(open_toolbox, config.tools, tmp_path / "scratch"))
            with closing(box):
                boxes.append(asyncio.run(_all_told(box)))
    recorded, replayed = boxes
    printed = [[one.stdout for one in told if isinstance(one, PythonResult)] for told in recorded]
    assert len({texts[0] for texts in printed}) == 4 and all(texts[0].split()[0] == texts[1].strip() for texts in printed)
    assert all(isinstance(told[1], PythonResult) and len(told[1].images) == 1 for told in recorded)
    assert replayed == recorded


@pytest.mark.slow
def test_recording_changes_nothing_and_a_run_goes_on_with_a_replay(demo: Path, tmp_path: Path) -> None:
    file, recorded, resumed = tmp_path / "run.sqlite", tmp_path / "recorded", tmp_path / "resumed"
    command = ["train", demo / "config.yaml"]
    succeed([*command, f"tools.record={file}", f"run.dir={recorded}", "workers.tools=2"], tmp_path / "first")
    assert run_state(recorded) == run_state(demo)
    interrupted = [*command, f"run.dir={resumed}", f"tools.record={tmp_path / 'other.sqlite'}"]
    ended = run(interrupted, tmp_path / "second", Moment("pipeline._update", signal.SIGKILL, entry=2))
    assert ended.hit and ended.code == -signal.SIGKILL
    gone = [f"tools.{tool}_search.corpus={tmp_path / 'gone.parquet'}" for tool in ("text", "image")]
    ended = _alone([*command, *gone, f"run.dir={resumed}", f"tools.replay={file}"], tmp_path / "third")
    assert ended.code == 0, ended
    assert run_state(resumed) == run_state(demo)
    succeed([*command, f"run.dir={resumed}", "train.steps=5"], tmp_path / "fourth")  # neither, with the corpora back
