"""A whole training run whose agent calls a tool of an MCP server that others wrote (`mcp-server-time`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from harness import Command
from scripted import left_running, use

from metis_fast.config import load
from metis_fast.model import load_policy
from metis_fast.rollout.store import read_rollouts
from metis_fast.testing.faults import Script
from metis_fast.types import Outcome

pytest.importorskip("mcp_server_time")
ARGUMENTS = {"source_timezone": "Europe/Paris", "time": "12:30", "target_timezone": "Asia/Tokyo"}


def _write_script(demo: Path, folder: Path) -> None:
    """What the engine says: a call, a wrong one, or an answer at once; then an answer."""
    tokenizer = load_policy(load(demo / "config.yaml").model).tokenizer
    calls = [json.dumps({"name": "convert_time", "arguments": ARGUMENTS | changed}) for changed in ({}, {"time": "noon"})]
    first = [*(f"<tool_call>{call}</tool_call>" for call in calls), "<answer>42</answer><|im_end|>"]
    turns = [first, ["<reason>Seen.</reason><answer>42</answer><|im_end|>"]]
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    Script([[tokenizer.encode(text) for text in texts] for texts in turns], start).write(folder)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow  # the run itself takes seconds; the demo's data and policy are made for it
def test_a_run_trains_on_calls_of_a_server_that_others_wrote(demo: Path, tmp_path: Path) -> None:
    run, script = tmp_path / "run", tmp_path / "script"
    _write_script(demo, script)
    server = f"{{command: [{sys.executable}, -m, mcp_server_time, --local-timezone, UTC]}}"
    settings = f"rollout.vllm={{replicas: 1, restarts: 0, arguments: {{faults: {script}}}}}"
    room = {"prompt": 2048, "response": 1024, "turn": 512, "observation": 512}  # tokens; the demo's vocabulary is small
    command = [
        "train",
        demo / "config.yaml",
        f"run.dir={run}",
        "rollout.engine=vllm",
        settings,
        "train.steps=2",
        "gate.prompts=0",
    ]
    command += [f"rollout.max_{part}_tokens={most}" for part, most in room.items()]
    command += ["tools.enabled=[]", f"tools.mcp=[{server}]", "data.heldout=[]", "eval.every=0", "log.progress=false"]
    ended = Command(command, tmp_path / "ran", None, use).wait()
    assert ended.code == 0 and not ended.orphans and not left_running(run / "workers"), ended
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [0, 1]
    seen = [one.rollout for step in (0, 1) for one in read_rollouts(run / "rollouts" / f"step-{step:06d}.parquet")]
    assert len(seen) == 32 and {rollout.outcome for rollout in seen} == {Outcome.ANSWERED}, [rollout.error for rollout in seen]
    told = [rollout.turns[0].observation for rollout in seen if len(rollout.turns) > 1]
    assert 8 < len(told) < 32  # two of three begin with a call
    right = [text for text in told if "Asia/Tokyo" in text]
    wrong = [text for text in told if "Asia/Tokyo" not in text]
    assert right and all("Europe/Paris" in text for text in right)
    assert wrong and all("Invalid time format" in text for text in wrong)
