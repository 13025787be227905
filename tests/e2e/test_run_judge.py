"""An LLM judge that is missing, down at the start, or lost in the middle of a run; a real HTTP server plays it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Command, checkpoint_state, error_line, run, run_state, succeed

from metis_fast.testing.judge import JudgeServer, Reply, by_equality, completion, serving


class _Judge(JudgeServer):
    """Says CORRECT where the answer has an even length, so that groups disagree, and to what is right beyond doubt; HTTP status
    503 while it is down."""

    def __init__(self) -> None:
        super().__init__(_verdict, refuse=lambda body: Reply(503, "down") if self.down else None, models=("judge",))
        self.down = False


def _verdict(task: dict[str, Any]) -> Reply:
    if task["question"] == "What is 1 + 1?":
        return by_equality(task)
    return completion("CORRECT" if len(task["candidate_answer"]) % 2 == 0 else "INCORRECT")


@pytest.fixture
def command(demo: Path) -> list[object]:
    """Every row says `rule`, as in Metis-RL; a model judges them all, the one that is served. Without evaluations: it would
    judge those, too, just when a test takes it down."""
    return ["train", demo / "config.yaml", "score.judge=llm", "score.llm.retries=1", "train.steps=3", "eval.every=0"]


def test_a_run_that_a_model_is_to_judge_needs_an_endpoint(command: list[object], tmp_path: Path) -> None:
    line = error_line(run([*command, f"run.dir={tmp_path / 'run'}"], tmp_path / "process"))
    assert "score.llm.base_url is empty; set score.llm.base_url" in line


def test_rows_for_an_llm_judge_need_an_endpoint(demo: Path, tmp_path: Path) -> None:
    table = pq.read_table(demo / "data" / "train.parquet")
    rows = table.to_pylist()
    for row in rows:
        row["reward_model"]["style"] = "llm"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "llm.parquet")
    settings = [f"data.train=[{tmp_path / 'llm.parquet'}]", f"run.dir={tmp_path / 'run'}"]
    line = error_line(run(["train", demo / "config.yaml", *settings], tmp_path / "process"))
    assert "score.llm.base_url is empty; set score.llm.base_url" in line


def test_a_judge_that_is_not_there_stops_the_run_before_it_leaves_anything(command: list[object], tmp_path: Path) -> None:
    with serving(_Judge()) as url:
        pass  # its port answers no more
    line = error_line(run([*command, f"run.dir={tmp_path / 'run'}", f"score.llm.base_url={url}"], tmp_path / "process"))
    assert f"LLM judge at {url}: " in line and "start it" in line
    assert not (tmp_path / "run").exists()


def test_of_several_models_none_is_guessed(command: list[object], tmp_path: Path) -> None:
    judge = _Judge()
    judge.models = ("judge", "policy")
    with serving(judge) as url:
        line = error_line(run([*command, f"run.dir={tmp_path / 'run'}", f"score.llm.base_url={url}"], tmp_path / "process"))
    assert "2 models are served (judge, policy); set score.llm.model to one of them" in line
    assert not (tmp_path / "run").exists()


def test_a_prompt_of_ones_own_that_cannot_ask_is_refused(command: list[object], tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Is {answer} right?")
    own = f"score.llm.prompt={tmp_path / 'own.txt'}"
    settings = [own, "score.llm.base_url=http://127.0.0.1:1", f"run.dir={tmp_path / 'run'}"]
    line = error_line(run([*command, *settings], tmp_path / "process"))
    assert f"{own} lacks {{question}} and {{truth}}" in line
    assert not (tmp_path / "run").exists()


def test_a_run_whose_judge_dies_is_saved_and_goes_on_exactly_when_the_judge_is_back(
    command: list[object], tmp_path: Path
) -> None:
    judge = _Judge()
    with serving(judge) as url:
        succeed([*command, f"score.llm.base_url={url}", f"run.dir={tmp_path / 'whole'}"], tmp_path / "reference")
        assert judge.paths_of_gets == ["/v1/models"] and {body["model"] for body in judge.bodies} == {"judge"}
        broken = [*command, f"score.llm.base_url={url}", f"run.dir={tmp_path / 'run'}", "checkpoint.every=0"]
        running = Command(broken, tmp_path / "first")
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
            time.sleep(0.001)
        judge.down = True  # while the third step is sampled, so that no step has verdicts for some of its rollouts only
        line = error_line(running.wait())
        assert "the judge of style 'llm' gave no verdict for any of" in line and "then resume" in line
        assert checkpoint_state(tmp_path / "run" / "checkpoints")["step"] == "2"
        judge.down = False
        succeed(broken, tmp_path / "second")
    assert run_state(tmp_path / "run") == run_state(tmp_path / "whole")
