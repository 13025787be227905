"""`metis-fast judge rescore`: new verdicts of stored rollouts, beside a store that stays as it is."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metis_fast import cli
from metis_fast import config as config_module
from metis_fast.config import Config, ScoreConfig
from metis_fast.errors import ConfigError, DataError, JudgeError, RecordingError
from metis_fast.recording.file import Recording
from metis_fast.rollout.store import RolloutStore
from metis_fast.score.judge import open_judge
from metis_fast.score.protocol import Cost
from metis_fast.score.rescore import Again, Rescoring, count_rollouts, default_out, named, parts_of, rescore
from metis_fast.score.rescore_report import render_json, render_text
from metis_fast.score.scoring import score_groups
from metis_fast.testing.judge import JudgeServer, Reply, by_equality, completion, serving, text_rollout
from metis_fast.types import Group, Outcome, Prompt, ScoredGroup

ANSWERS = ("4", "four", "5", "", "4 apples")


def played(step: int, style: str = "rule") -> list[ScoredGroup]:
    """Two groups of five answers, judged by rule; the last rollout of the second one was broken off."""
    groups = []
    for i in range(2):
        prompt = Prompt(f"p{step}{i}", "test", (), (), "math", ("4",), style, f"{step}{i}: 2 + 2?")
        texts = [f"<reason>r</reason><answer>{answer}</answer>" if answer else "hm" for answer in ANSWERS]
        rollouts = [text_rollout(prompt.uid, [text], index=j) for j, text in enumerate(texts)]
        if i == 1:
            rollouts[-1] = dataclasses.replace(rollouts[-1], outcome=Outcome.INFRASTRUCTURE_ERROR, error="gone")
        groups.append(Group(prompt, tuple(rollouts)))
    judge = open_judge(ScoreConfig(), {style})
    return asyncio.run(score_groups(groups, judge, Config()))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of two steps, one of them with parts of two nodes."""
    store = RolloutStore(tmp_path / "run" / "rollouts")
    store.write("step-000000", played(0))
    store.write("step-000001.node-0", played(1))
    store.write("step-000001.node-1", played(2))
    config = Config(run=config_module.build({"run": {"dir": str(tmp_path / "run")}}).run)
    (tmp_path / "run" / "config.yaml").write_text(config_module.to_yaml(config))
    return tmp_path / "run"


def again(run: Path, config: ScoreConfig, out: Path | None = None) -> Rescoring:
    parts = parts_of(run)
    return asyncio.run(rescore(parts, count_rollouts(parts, config), config, out or default_out(run, config)))


def llm(url: str, **changes: object) -> ScoreConfig:
    own = {"base_url": url, "model": "grader", "retries": 0, **changes}
    return ScoreConfig.model_validate({"judge": "llm", "llm": own})


def store_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "rollouts").rglob("*") if path.is_file()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_the_same_judge_says_the_same(run: Path):
    before = store_bytes(run)
    found = again(run, ScoreConfig())
    assert found.counts == {"rule": {(True, True): 15, (False, False): 12}}
    assert (found.changed, found.formats, found.broken, found.failures) == ((), 0, 3, {})
    assert store_bytes(run) == before
    verdicts = lines(found.path)
    assert len(verdicts) == 27 and {one["judge"] for one in verdicts if one["answer"]} == {"rule"}


def test_another_judge_s_verdicts_are_told_by_what_changed(run: Path):
    before = store_bytes(run)
    with serving(JudgeServer()) as url:  # to the letter: "four" and "4 apples" are not "4"
        found = again(run, llm(url))
    counts = found.counts["llm"]
    assert (counts[True, True], counts[True, False]) == (6, 9) and counts.keys() <= {
        (True, True),
        (True, False),
        (False, False),
    }
    assert Counter(one.now.answer for one in found.changed) == {"four": 6, "4 apples": 3}
    one = next(one for one in found.changed if one.now.answer == "four")
    assert (one.was, one.before, one.before_reason) == (True, "rule", "equals the ground truth '4'")
    assert (one.now.correct, one.now.judge, one.now.reason) == (False, "llm grader", "says INCORRECT for the ground truth '4'")
    assert store_bytes(run) == before
    text = render_text(found)
    assert "was right, is wrong: 9" in text and "and 4 more" in text and "llm: 27 rollouts, accuracy 55.6% -> 22.2%" in text
    tree = json.loads(render_json(found))
    assert len(tree["changed"]) == 9 and {"style": "llm", "was": True, "is": False, "rollouts": 9} in tree["counts"]


class _Dies(JudgeServer):
    """Goes down after so many verdicts."""

    def __init__(self, after: int) -> None:
        super().__init__(by_equality, refuse=lambda body: Reply(503, "down") if len(self.tasks) >= self.after else None)
        self.after = after


def test_what_was_judged_is_not_judged_again_and_failures_are(run: Path):
    server = _Dies(after=6)  # two are the check's
    with serving(server) as url:
        config = llm(url, concurrency=1)
        first = again(run, config)
        assert sum(first.failures.values()) > 0 and first.resumed == 0
        known = [one for one in lines(first.path) if one["correct"] is not None]
        server.after = 1000
        second = again(run, config)
        third = again(run, config)
    assert second.resumed == len(known) and not second.failures
    assert third.resumed == 27 and third.cost.requests == 0
    assert (third.counts, len(third.changed)) == (second.counts, 9)
    assert {one.now.key: one.now for one in third.changed} == {one.now.key: one.now for one in second.changed}


def test_a_line_that_was_cut_short_is_judged_again(run: Path):
    whole = again(run, ScoreConfig())
    kept = whole.path.read_bytes()
    for cut in (1, 30, len(kept) - kept.index(b"\n") - 1, len(kept) - 3):
        whole.path.write_bytes(kept[:-cut])
        found = again(run, ScoreConfig())
        assert found.resumed == max(0, kept[:-cut].count(b"\n") - 1)
        assert found.counts == whole.counts
        assert sorted(whole.path.read_bytes().splitlines()) == sorted(kept.splitlines())


def test_a_part_that_was_written_again_is_judged_again(run: Path):
    first = again(run, ScoreConfig())
    RolloutStore(run / "rollouts").write(
        "step-000000", [dataclasses.replace(one, prompt=_other(one.prompt)) for one in played(0)]
    )
    second = again(run, ScoreConfig())
    assert second.resumed == 18
    assert {one.now.answer: one.now.correct for one in second.changed} == {
        "4": False,
        "four": False,
        "4 apples": False,
        "5": True,
    }
    assert len(lines(first.path)) == 36  # nothing was taken out


def _other(prompt: Prompt) -> Prompt:
    return dataclasses.replace(prompt, answers=("5",))


def test_every_judge_has_a_file_of_its_own_and_another_one_s_is_refused(run: Path, tmp_path: Path):
    out = tmp_path / "deep" / "verdicts.jsonl"
    again(run, ScoreConfig(), out)
    assert default_out(run, ScoreConfig()) != default_out(run, ScoreConfig(number_tolerance=0.1))
    assert default_out(run, ScoreConfig()) == default_out(run, ScoreConfig(w_ans=0.5))  # no verdict depends on it
    with pytest.raises(ConfigError, match=r"holds verdicts of another judge \(score\.number_tolerance\); set another --out"):
        again(run, ScoreConfig(number_tolerance=0.1), out)
    with pytest.raises(ConfigError, match=r"\(score\.llm\)"):
        again(run, ScoreConfig.model_validate({"llm": {"model": "other"}}), out)
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="holds something else than verdicts"):
        again(run, ScoreConfig(), tmp_path / "other.jsonl")
    assert (tmp_path / "other.jsonl").read_text() == '{"a": 1}\n'


def test_a_damaged_line_is_named(run: Path):
    path = again(run, ScoreConfig()).path
    path.write_bytes(path.read_bytes().replace(b'"digest"', b'"digits"', 1))
    with pytest.raises(DataError, match=rf"{path}:2: expected a verdict"):
        again(run, ScoreConfig())


def test_two_at_once_are_turned_away(run: Path):
    path = again(run, ScoreConfig()).path
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process writes to"):
            again(run, ScoreConfig())


def test_a_judge_that_does_not_work_stops_it_before_it_writes_anything(run: Path):
    with serving(JudgeServer(lambda task: completion("CORRECT"))) as url:
        with pytest.raises(JudgeError, match="says that 7 is CORRECT"):
            again(run, llm(url))
        assert not default_out(run, llm(url)).exists()


def test_a_judge_that_dies_stops_it_and_what_it_said_is_kept(tmp_path: Path):
    store = RolloutStore(tmp_path / "rollouts")
    for step in range(20):
        store.write(f"step-{step:06d}", played(step))
    server = _Dies(after=12)
    with serving(server) as url:
        config = llm(url, concurrency=1)
        with pytest.raises(JudgeError, match=r"no verdict for \d+ of \d+ rollouts .*HTTP status 503.*max_missing_share=0\.5"):
            again(tmp_path, config)
        judged = [one for one in lines(default_out(tmp_path, config)) if one["correct"] is not None]
        server.after = 10_000
        found = again(tmp_path, config)
    assert found.resumed == len(judged) > 0 and not found.failures


def test_a_judge_that_is_dead_now_is_not_saved_by_what_it_said_before(tmp_path: Path):
    store = RolloutStore(tmp_path / "rollouts")
    for step in range(60):
        store.write(f"step-{step:06d}", played(step))
    server = _Dies(after=100_000)
    with serving(server) as url:
        config = llm(url, concurrency=1)
        parts = parts_of(tmp_path)[:35]
        asyncio.run(rescore(parts, count_rollouts(parts, config), config, default_out(tmp_path, config)))
        server.after = len(server.tasks) + 2  # two are the check's
        with pytest.raises(JudgeError, match=r"no verdict for (\d+) of \1 rollouts with an answer"):
            again(tmp_path, config)  # of all 480, fewer than half are missing


def test_a_rescoring_is_recorded_and_replayed_without_the_judge(run: Path, tmp_path: Path):
    server = JudgeServer(models=("grader",))
    parts, file = parts_of(run), tmp_path / "verdicts.sqlite"

    def rescored(config: ScoreConfig, writable: bool, out: str) -> Rescoring:
        with closing(Recording(file, writable)) as recording:
            counts = count_rollouts(parts, config)
            return asyncio.run(rescore(parts, counts, config, tmp_path / out, recording=recording))

    with serving(server) as url:
        first = rescored(llm(url, model=""), True, "first.jsonl")
        asked = len(server.tasks)
        assert rescored(llm(url, model=""), True, "second.jsonl").counts == first.counts
        assert len(server.tasks) == asked + 2  # the check's
    third = rescored(llm("http://127.0.0.1:9", model=""), False, "third.jsonl")  # where nobody is
    assert (third.counts, third.cost) == (first.counts, Cost())
    said = [sorted((tmp_path / name).read_text().splitlines()) for name in ("third.jsonl", "first.jsonl")]
    assert said[0] == said[1] and len(said[0]) == 28  # their first lines, too
    with pytest.raises(RecordingError, match="has no answer for judge rule"):
        rescored(ScoreConfig(), False, "fourth.jsonl")


def older(run: Path) -> None:
    """The store as it was before verdicts had reasons."""
    for path in (run / "rollouts").glob("*.parquet"):
        rows = pq.read_table(path)
        verdicts = [
            one and {name: one[name] for name in ("correct", "format_ok", "answer")} for one in rows["verdict"].to_pylist()
        ]
        place = rows.schema.get_field_index("verdict")
        rows = rows.set_column(place, "verdict", pa.array(verdicts)).drop_columns(["judge_style", "no_verdict"])
        pq.write_table(rows, path)


def test_a_store_of_an_older_version_needs_a_judge_for_all(run: Path):
    older(run)
    with pytest.raises(ConfigError, match=r"kept no judge styles; name one for all rows, as score\.judge=rule"):
        again(run, ScoreConfig())
    found = again(run, ScoreConfig(judge="rule"))
    assert sum(found.counts["rule"].values()) == 27 and found.changed == ()


def test_a_run_without_rollouts_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="expected stored rollouts in its folder `rollouts`, found none"):
        parts_of(tmp_path)


def test_a_model_that_is_not_named_is_another_judge_where_another_one_is_served(run: Path):
    lenient = JudgeServer(lambda task: completion("INCORRECT" if task["candidate_answer"] == "7" else "CORRECT"), models=("a",))
    with serving(lenient) as url:
        again(run, llm(url, model=""))
        assert again(run, llm(url, model="a"), default_out(run, llm(url, model=""))).resumed == 27
    with serving(JudgeServer(models=("b",))) as url:
        with pytest.raises(ConfigError, match=r"holds verdicts of another judge \(score\.llm\)"):
            again(run, llm(url, model=""))
        config = asyncio.run(named(llm(url, model=""), {"rule"}))
        assert config.llm.model == "b" and again(run, config).resumed == 0
        assert asyncio.run(named(ScoreConfig(), {"rule"})) == ScoreConfig()


def told(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["judge", "rescore", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_on_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, out = told([run], capsys)
    assert code == 0 and f"verdicts: {run / 'verdicts'}/" in out and "was right, is wrong" not in out
    code, out = told([run], capsys)
    assert code == 0 and "(27 were there)" in out
    with serving(JudgeServer()) as url:
        words = [
            "score.judge=llm",
            f"score.llm.base_url={url}",
            "score.llm.model=grader",
            "--json",
            "--out",
            tmp_path / "own.jsonl",
        ]
        code, out = told([run, *words], capsys)
        assert code == 0 and len(json.loads(out)["changed"]) == 9
        (tmp_path / "my.yaml").write_text(f"score: {{judge: llm, llm: {{base_url: '{url}', model: grader}}}}\n")
        code, out = told([run, tmp_path / "my.yaml", "--out", tmp_path / "own.jsonl"], capsys)
        assert code == 0 and "(27 were there)" in out
        own = [f"tools.record={tmp_path / 'kept.sqlite'}", "--out", tmp_path / "kept.jsonl", *words[:3]]
        assert told([run, *own], capsys)[0] == 0
    assert Again(**lines(tmp_path / "own.jsonl")[0]).judge in ("llm grader", "")
    code, out = told(
        [run, f"tools.replay={tmp_path / 'kept.sqlite'}", *words[:3], "--out", tmp_path / "replayed.jsonl"], capsys
    )
    assert code == 0 and len(lines(tmp_path / "replayed.jsonl")) == len(lines(tmp_path / "kept.jsonl")) == 27
