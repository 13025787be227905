"""lmms-eval itself reads what we export in its log form: its log viewer, and what compares two runs.

It needs an environment of its own, and METIS_LMMS_EVAL with the path of its Python:

    python3.11 -m venv lmms && lmms/bin/pip install lmms-eval==0.7.3 fastapi
"""

from __future__ import annotations

import json
import os
import subprocess
import zlib
from functools import partial
from pathlib import Path

import answering
import pytest
import yaml
from harness import AGENT, Command, succeed

from metis_fast.evaluate.replies import read_lines
from metis_fast.evaluate.standin import write_standins
from metis_fast.node import opening

PYTHON = os.environ.get("METIS_LMMS_EVAL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="METIS_LMMS_EVAL is not set: the Python of an environment that has lmms-eval"),
]
READ = """
import asyncio, json, sys
from lmms_eval.baselines.loader import load_baseline
from lmms_eval.tui.server import get_log_run_samples, list_log_runs

(run,) = asyncio.run(list_log_runs(sys.argv[1]))
samples = asyncio.run(get_log_run_samples(run.run_id, "vstar", sys.argv[1], 0, 500))
scores, whole = load_baseline(sys.argv[2], "vstar")
told = {"run": run.model_dump(), "samples": samples.samples, "scores": scores, "whole": whole["results"]}
told["total"] = samples.total
print("\\n" + json.dumps(told))
"""


def letters(text: str) -> str:
    """A letter that the question decides."""
    return f"<answer>{'ABCD'[zlib.crc32(text.encode()) % 4]}</answer><|im_end|>"


def use_letters() -> None:
    """Let whole runs of this process have such an agent."""
    opening.NativeEngine = partial(answering.AnsweringEngine, answer=letters)  # pyright: ignore[reportAttributeAccessIssue]


def test_lmms_eval_reads_what_is_exported(tmp_path: Path) -> None:
    """Scores of an agent that answers a few of the questions."""
    files = write_standins(tmp_path / "files", ["vstar"], count=12, pixels=(64, 48))
    tree = {
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
        "model": {"path": str(AGENT), "dtype": "float32"},
        "rollout": {"max_prompt_tokens": 3000, "max_response_tokens": 40, "max_turns": 1},
        "tools": {"enabled": []},
        "log": {"progress": False},
        "benchmark": {"any_md5": True, "files": {"vstar": [str(files["vstar"].tsv[0])]}},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    ended = Command(["benchmark", "run", tmp_path / "my.yaml"], tmp_path / "playing", before=use_letters).wait()
    assert ended.code == 0, ended
    succeed(
        ["benchmark", "export", tmp_path / "run", "--lmms-eval", tmp_path / "out", "--model", "mine"], tmp_path / "exporting"
    )
    (samples,) = (tmp_path / "out" / "mine").glob("*_samples_vstar.jsonl")
    read = subprocess.run(
        [PYTHON, "-c", READ, tmp_path / "out", samples], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert read.returncode == 0, read.stdout + read.stderr
    told = json.loads(read.stdout.splitlines()[-1])
    folder = tmp_path / "run" / "benchmarks" / "vstar"
    result = json.loads((folder / "result.json").read_text())
    figure = result["scorers"]["vlmeval"]["figures"][0]
    assert 0 < figure["value"] < 1
    assert told["run"]["model_name"] == "mine" and told["run"]["tasks"] == ["vstar"]
    assert told["run"]["metrics"]["vstar"]["vlmeval,none"] == told["whole"]["vstar"]["vlmeval,none"] == figure["value"]
    replies = read_lines(folder / "replies.jsonl")
    assert told["total"] == len(replies) == 12
    assert [one["filtered_resps"] for one in told["samples"]] == [reply["prediction"] for reply in replies]
    marks = {mark["index"]: mark["value"] for mark in read_lines(folder / "marks.jsonl") if mark["scorer"] == "rule"}
    assert told["scores"] == {str(number): marks[one["index"]] for number, one in enumerate(told["samples"])}
