"""An LLM judge that is missing, down at the start, or lost in the middle of a run; several that have to agree; runs that are
judged again. Real HTTP servers play the judges."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Command, Moment, checkpoint_state, error_line, run, run_state, succeed

from metis_fast.rollout.store import read_rollouts
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


@pytest.mark.slow
def test_a_run_goes_on_with_those_of_several_judges_that_are_left(command: list[object], tmp_path: Path) -> None:
    judges = [_Judge(), _Judge(), _Judge()]
    with serving(judges[0]) as one, serving(judges[1]) as two, serving(judges[2]) as three:
        peers = json.dumps([{"base_url": url, "model": f"judge-{i}"} for i, url in enumerate((one, two, three))])
        settings = [f"score.llm.judges={peers}", "workers.judges=2", "score.llm.retries=0", f"run.dir={tmp_path / 'run'}"]
        running = Command([*command, *settings], tmp_path / "process")
        metrics = tmp_path / "run" / "metrics.jsonl"
        while running.alive and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 1):
            time.sleep(0.001)
        judges[1].down = True
        ended = running.wait()
    assert ended.code == 0, ended
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(step["infra_failed_rate"], step["judge_failed_rate"]) for step in steps] == [(0.0, 0.0)] * 3
    verdicts = [stored.score.verdict for stored in read_rollouts(tmp_path / "run" / "rollouts")]
    asked = {verdict.judge for verdict in verdicts if verdict is not None and verdict.answer}
    assert asked == {"llm judge-0 + llm judge-1 + llm judge-2", "llm judge-0 + llm judge-2"}
    said = {verdict.reason.partition(" say ")[0] for verdict in verdicts if verdict is not None and verdict.answer}
    assert said == {"3 of 3", "2 of 3"}


class _FailsOnSome(_Judge):
    """HTTP status 503 for answers of an odd length, while it is down."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse = lambda body: None
        self.default = lambda task: Reply(503, "down") if self.down and len(task["candidate_answer"]) % 2 else _verdict(task)


@pytest.mark.slow
def test_missing_verdicts_are_counted_over_the_steps_that_the_settings_name(command: list[object], tmp_path: Path) -> None:
    judge = _FailsOnSome()
    with serving(judge) as url:
        share = ["score.max_missing_share=0.01", "score.missing_steps=5"]
        running = Command([*command, *share, f"score.llm.base_url={url}", f"run.dir={tmp_path / 'run'}"], tmp_path / "process")
        metrics = tmp_path / "run" / "metrics.jsonl"
        while running.alive and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 1):
            time.sleep(0.001)
        judge.down = True
        line = error_line(running.wait())
    assert re.search(
        r"gave no verdict for \d+ of \d+ .*, and for \d+ of \d+ in [23] steps, more than score\.max_missing_share", line
    )


def _judged_again(demo: Path, out: Path, url: str) -> list[object]:
    settings = ["score.judge=llm", f"score.llm.base_url={url}", "score.llm.concurrency=1", "log.progress=false"]
    return ["judge", "rescore", demo, *settings, "--out", out, "--json"]


@pytest.mark.slow
def test_judging_a_run_again_goes_on_where_it_was_killed_and_changes_nothing_of_the_run(demo: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (demo / "rollouts").rglob("*.parquet")}
    with serving(_Judge()) as url:
        whole = json.loads(succeed(_judged_again(demo, tmp_path / "whole.jsonl", url), tmp_path / "whole"))
        killed = Moment("rescore._judged", signal.SIGKILL, entry=20)
        ended = run(_judged_again(demo, tmp_path / "own.jsonl", url), tmp_path / "first", killed)
        assert ended.hit and ended.code == -signal.SIGKILL
        known = (tmp_path / "own.jsonl").read_bytes().count(b"\n") - 1
        found = json.loads(succeed(_judged_again(demo, tmp_path / "own.jsonl", url), tmp_path / "second"))
    assert 0 < known == found["resumed"]
    assert sorted(found["counts"], key=str) == sorted(whole["counts"], key=str)
    assert sum(count["rollouts"] for count in found["counts"]) + found["broken"] == sum(
        1 for _ in read_rollouts(demo / "rollouts")
    )
    assert any(one["was"] != one["is"] for one in found["counts"])
    assert {path: path.read_bytes() for path in (demo / "rollouts").rglob("*.parquet")} == before


@pytest.mark.slow
def test_a_run_s_own_judge_says_the_same_again(demo: Path, tmp_path: Path) -> None:
    found = json.loads(succeed(["judge", "rescore", demo, "--out", tmp_path / "own.jsonl", "--json"], tmp_path / "process"))
    assert found["changed"] == [] and found["formats"] == 0 and found["failures"] == {} and found["counts"]
