"""Run folders that change or close under the page, and verdicts that are missing: no number of something else is shown."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import signal
from pathlib import Path

import httpx2
import pytest
from modes import modes_count
from view_runs import Maker, stats, write_run

from metis_fast import cli
from metis_fast.config import LogConfig
from metis_fast.errors import DataError
from metis_fast.report.html import write_report
from metis_fast.report.lines import JsonLines
from metis_fast.report.log import RunLog
from metis_fast.report.slices import ability_name, slice_lines
from metis_fast.report.summary import read_summary, write_summary
from metis_fast.testing.tiny import build_tokenizer
from metis_fast.types import Slice, StepStats
from metis_fast.view.advisories import tools_given_up
from metis_fast.view.answers import Answers
from metis_fast.view.app import make_app
from metis_fast.view.file import write_file
from metis_fast.view.run import Run, open_runs

NONE, SOME = Slice(8, 8, 0.0, 0.0, 0.0, 0.0, 0.0), Slice(8, 2, 0.5, 0.25, 0.5, 1.0, 9.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "hdpo", steps=2, prompts=2, size=2)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(finished, tmp_path / "hdpo"))


def test_a_log_that_was_made_anew_is_read_anew_though_it_begins_as_the_old_one(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, lambda record: record["loss"])
    first = json.dumps({"step": 0, "same": "x" * 1000, "loss": 0}) + "\n"
    path.write_text(first + '{"loss": 1}\n{"loss": 2}\n')
    assert lines.read().records == (0, 1, 2)
    path.write_text(first + '{"loss": 8}\n{"loss": 9}\n{"loss": 7}\n{"loss')  # the same inode, and longer
    assert lines.read().records == (0, 8, 9, 7)
    with path.open("a") as file:
        file.write('": 6}\n')
    assert lines.read().records == (0, 8, 9, 7, 6)


def test_a_resumed_run_forgets_rollouts_and_results_of_the_steps_that_it_makes_again(folder: Path):
    run = Run("hdpo", folder)
    assert run.read().summary is not None and len(run.index.snapshot().parts) == 2
    for name in ("step-000001.node-1.parquet", "step-000012.parquet", "step-x.parquet"):
        shutil.copy(folder / "rollouts" / "step-000001.parquet", folder / "rollouts" / name)
    for step in (0, 1, 12):
        (folder / "heldout").mkdir(exist_ok=True)
        (folder / "heldout" / f"step-{step:06d}.jsonl").touch()
        (folder / "benchmarks" / f"step-{step:06d}" / "vstar").mkdir(parents=True)
    (folder / "benchmarks" / "steps.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    with RunLog(folder, LogConfig(tensorboard=False)) as log:
        log.truncate(1)
        record = run.read()
        assert [step.stats.step for step in record.steps] == [0] and record.summary is None
        assert [*run.index.snapshot().parts] == ["step-000000"]
    assert sorted(path.name for path in (folder / "rollouts").glob("*.parquet")) == ["step-000000.parquet", "step-x.parquet"]
    assert [path.name for path in (folder / "heldout").iterdir()] == ["step-000000.jsonl"]
    assert sorted(path.name for path in (folder / "benchmarks").iterdir()) == ["step-000000", "steps.jsonl"]
    assert (folder / "benchmarks" / "steps.jsonl").read_text() == '{"step": 0}\n'


def test_a_step_that_is_logged_twice_counts_once_in_the_report(folder: Path):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text())
    page = write_report(folder).read_text()
    assert '<span class="quiet">Steps</span><b>2</b>' in page and '<span class="quiet">Rollouts</span><b>8</b>' in page


def test_tokens_are_read_by_the_tokenizer_that_is_there_now(folder: Path):
    run = Run("hdpo", folder)
    before = run.pieces()
    assert before.found and run.pieces() is before
    shutil.rmtree(folder / "trained")
    assert not run.pieces().found
    build_tokenizer(["something else entirely"], 300).save_pretrained(folder / "trained")
    assert run.pieces().found and run.pieces() is not before


def test_an_image_file_that_is_restored_is_shown_again(folder: Path):
    (images,) = (folder / "rollouts" / "images").glob("*.arrow")
    run = Run("hdpo", folder)
    row = run.index.rows.read(next(iter(run.index.snapshot().parts.values())), 0, tokens=False)
    sha256 = row["images"][0]
    whole = images.read_bytes()
    images.write_bytes(whole[:-100] + b"x" * 100)
    with pytest.raises(DataError, match="missing"):
        run.images.picture(sha256)
    images.unlink()
    images.write_bytes(whole)
    assert run.images.picture(sha256).size == (256, 192)


def test_rates_over_no_verdict_are_not_shown_as_0(tmp_path: Path):
    with RunLog(tmp_path, LogConfig(tensorboard=False)) as log:
        log.evaluation(0, {"all": NONE, "math": NONE, "search": SOME})
        log.evaluation(9, {"all": SOME, "math": NONE, "search": SOME})
    (head,) = Answers([Run("hdpo", tmp_path)]).by_name["overview"]({})["runs"]
    after = {"tool_rate": 0.25, "accuracy": 0.5}
    assert [(row["name"], row["before"], row["after"]) for row in head["before_after"]] == [
        ("all", None, after), ("search", after, after)
    ]  # fmt: skip
    path = tmp_path / "summary.json"
    summary = write_summary(
        path, seed=0, wall_s=1.0, before={"direct": NONE, "math": NONE}, after={"direct": SOME, "math": SOME}
    )
    assert read_summary(path) == summary
    assert summary.before.kinds == {} and summary.after.kinds["direct"].accuracy == 0.5
    assert summary.before.by_ability == {"math": {}}
    write_report(tmp_path)  # which has a dash there


def test_kinds_within_an_ability_stand_below_it_while_a_run_goes_on(tmp_path: Path):
    def rated(share: float) -> Slice:
        return Slice(8, 0, share, 0.25, 0.5, 1.0, 9.0)

    names = ("all", "math/algebra", "search", "direct", "math/algebra/direct", "search/direct", "direct-0.7")
    with RunLog(tmp_path, LogConfig(tensorboard=False)) as log:
        for step in (0, 3):
            log.evaluation(step, {name: rated(place / 10) for place, name in enumerate(names)})
    (head,) = Answers([Run("hdpo", tmp_path)]).by_name["overview"]({})["runs"]
    assert [(row["name"], row["indent"], row["after"]["accuracy"]) for row in head["before_after"]] == [
        ("all", 0, 0.0), ("direct", 0, 0.3), ("math/algebra", 0, 0.1), ("direct", 1, 0.4), ("search", 0, 0.2),
        ("direct", 1, 0.5), ("direct-0.7", 0, 0.6),
    ]  # fmt: skip


def test_tools_are_not_given_up_where_the_judge_fails(finished: Path):
    maker = Maker()
    one = stats(0, 0.5, [maker.group(2, 0, 2, 0.5)], maker.generator)
    called, given_up = Slice(8, 0, 0.9, 0.9, 1.0, 1.0, 9.0), Slice(8, 0, 0.9, 0.1, 0.1, 1.0, 9.0)

    def run(later: Slice) -> list[StepStats]:
        rates = [called] * 8 + [later] * 8
        return [dataclasses.replace(one, step=step, slices={"tool_needed": rate}) for step, rate in enumerate(rates)]

    assert tools_given_up(run(NONE)) is None and tools_given_up(run(given_up)) is not None


def test_a_slice_without_a_verdict_has_no_rates_in_the_terminal():
    lines = [line.split() for line in slice_lines({"search": SOME, "llm": NONE})]
    assert lines[1:] == [["search", "8", "0.500", "0.250", "0.50"], ["llm", "8", "no", "verdict"]]


def test_the_name_of_an_ability_cannot_speak_to_the_terminal():
    assert ability_name("\x1b[31mmath\x07 \x9b2J\n of\u0000 it") == "[31mmath 2J of it"
    assert ability_name("قيمت\u200cها 👩\u200d🔬") == "قيمت\u200cها 👩\u200d🔬"


@pytest.mark.parametrize(
    ("closed", "said"),
    [
        ("rollouts", "rollouts cannot be read: Permission denied"),
        ("metrics.jsonl", "metrics.jsonl cannot be read: Permission denied"),
        ("summary.json", "cannot read"),
        ("config.yaml", "config.yaml cannot be read"),
        ("rollouts/step-000001.parquet", "step-000001.parquet is left out"),
        ("rollouts/images", ""),
        ("trained", ""),
        (".", "cannot be read: Permission denied"),
        ("..", "cannot be read: Permission denied"),
    ],
)
def test_what_belongs_to_somebody_else_is_said_and_the_rest_is_shown(folder: Path, closed: str, said: str):
    run = Run("hdpo", folder)
    place = folder / closed
    ask = Answers([run]).by_name
    place.chmod(0)
    try:
        with modes_count():
            (head,) = ask["overview"]({})["runs"]
            listed = ask["rollouts"]({"run": "hdpo"})
            ask["runs"]({})
            for row in listed["rows"][:1]:
                query = {"run": "hdpo", "part": row["part"], "row": str(row["row"])}
                assert ask["rollout"](query)["talk"]["turns"] and ask["group"](query)["members"]
                assert ask["tokens"](query)["ids"]
    finally:
        place.chmod(0o755)
    assert said in "; ".join([*head["notes"], head["gone"]])
    assert bool(listed["rows"]) == (closed not in ("rollouts", ".", ".."))
    assert head["gone"] == "" or "has gone" not in head["gone"]


def test_a_folder_of_runs_with_one_of_somebody_else_opens_with_the_others(folder: Path):
    other = folder.parent / "other"
    other.mkdir(mode=0)
    with modes_count():
        assert [run.folder for run in open_runs([folder.parent], None)] == [folder]
    other.rmdir()


def test_a_page_as_a_file_that_is_stopped_leaves_nothing_and_a_link_stays_one(finished: Path, tmp_path: Path):
    runs = open_runs([finished], None)
    (tmp_path / "there").mkdir()
    out = tmp_path / "runs.html"
    with pytest.raises(KeyboardInterrupt):
        write_file(runs, out, 30_000_000, lambda kept: signal.raise_signal(signal.SIGTERM))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    out.symlink_to("there/page.html")  # as /dev/stdout is one
    written = write_file(runs, out, 30_000_000)
    assert out.is_symlink() and (tmp_path / "there" / "page.html").stat().st_size == written.size


@pytest.mark.parametrize("words", [["view", "x" * 300], ["report", "x" * 300], ["report", ".", "--out", "x" * 300]])
def test_a_name_that_is_too_long_is_one_line(
    finished: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(finished)
    assert cli.main(words) == 2
    assert "name" in (said := capsys.readouterr().err) and said.count("\n") == 1 and "Traceback" not in said


def test_what_is_asked_for_without_its_body_has_the_same_head(finished: Path):
    app = make_app(open_runs([finished], None), "a-token-of-the-tests")

    async def ask(method: str, path: str) -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.request(method, path, headers={"authorization": "Bearer a-token-of-the-tests"})

    for path in ("/", "/main.js", "/api/runs", "/api/overview"):
        assert asyncio.run(ask("HEAD", path)).status_code == asyncio.run(ask("GET", path)).status_code == 200, path
