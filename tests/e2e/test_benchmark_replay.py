"""A recorded `benchmark run` is repeated to the byte where there is no sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import answering
import yaml
from harness import AGENT, Command, Ended
from test_record_replay import _cut_off as cut_off
from test_record_replay import needs_namespaces  # noqa: F401  (a fixture for all tests here)

from metis_fast.evaluate.replies import read_lines
from metis_fast.evaluate.standin import write_standins
from metis_fast.node import opening

_CALL = '<tool_call>{"name": "python", "arguments": {"code": "import os; print(os.urandom(8).hex())"}}</tool_call>'
_SEEN = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)


def by_chance(text: str) -> str:
    """Answers what python draws at random."""
    seen = _SEEN.findall(text)
    return f"<answer>{seen[-1].strip()}</answer><|im_end|>" if seen else _CALL


def use() -> None:
    """Let whole runs of this process have such an agent."""
    opening.NativeEngine = partial(answering.AnsweringEngine, answer=by_chance)  # pyright: ignore[reportAttributeAccessIssue]


def use_alone() -> None:
    """The same without a sandbox."""
    cut_off()
    use()


def test_a_recorded_benchmark_replays_to_the_byte_without_a_sandbox(tmp_path: Path) -> None:
    files = write_standins(tmp_path / "files", ["vstar"], count=3, pixels=(32, 32))
    path = tmp_path / "my.yaml"
    tree = {
        "run": {"threads": 1},
        "model": {"path": str(AGENT), "dtype": "float32"},
        "rollout": {"max_prompt_tokens": 3000, "max_response_tokens": 400, "max_turns": 3},
        "tools": {"enabled": ["python"]},
        "log": {"progress": False},
        "benchmark": {"any_md5": True, "rollouts": 2, "files": {name: [str(one.tsv[0])] for name, one in files.items()}},
    }
    path.write_text(yaml.safe_dump(tree, width=1 << 20))

    def play(name: str, how: str, before: Callable[[], None]) -> Ended:
        command = ["benchmark", "run", path, how, f"run.dir={tmp_path / name}"]
        return Command(command, tmp_path / f"{name}-process", before=before).wait()

    file = tmp_path / "calls.sqlite"
    ended = play("recorded", f"tools.record={file}", use)
    assert ended.code == 0, ended
    ended = play("replayed", f"tools.replay={file}", use_alone)
    assert ended.code == 0 and not ended.scratch and not ended.orphans, ended
    for name in files:
        recorded, replayed = (tmp_path / run / "benchmarks" / name for run in ("recorded", "replayed"))
        for stored in ("replies.jsonl", "marks.jsonl", "settings.json"):
            assert (replayed / stored).read_bytes() == (recorded / stored).read_bytes(), stored
        results = [json.loads((folder / "result.json").read_text()) | {"seconds": 0} for folder in (recorded, replayed)]
        assert results[0] == results[1] and results[0]["tool_rate"]["value"] == 1.0
        replies = read_lines(recorded / "replies.jsonl")
        assert len({reply["prediction"] for reply in replies}) == len(replies) > 2
