"""What results of several runs are taken for: comparisons and tables that would mislead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from metis_fast.config import Config
from metis_fast.errors import DataError
from metis_fast.evaluate.aggregates import mean, units_of
from metis_fast.evaluate.compare import as_text, compare_runs
from metis_fast.evaluate.playing import weights_of
from metis_fast.evaluate.question import Mark, Question
from metis_fast.evaluate.result import read_results
from metis_fast.evaluate.table import as_markdown, make_table

SETTINGS = {"md5": ["0"], "prompt": "vlmeval", "system": "", "tools": "on", "max_questions": 0, "decoding": {}}


def write(
    folder: Path,
    values: Mapping[str, float],
    scorer: str = "rule",
    asked: Mapping[str, str] | None = None,
    judge: Mapping[str, str] | None = None,
    **settings: object,
) -> Path:
    """The result of V*Bench in a folder. values: of questions; asked: what an index asks, if not the usual question."""
    folder.mkdir(parents=True)
    marks = [Mark(index, 0, scorer, value) for index, value in values.items()]
    questions = [Question(index, "", {}, "", index) for index in values]
    figure = mean("overall", units_of(questions, marks))
    result: dict[str, Any] = {
        "benchmark": "vstar", "title": "V*Bench", "questions": len(values), "warnings": [], "judge": judge or {"model": ""},
        "settings": SETTINGS | settings,
        "scorers": {scorer: {"figures": [{name: getattr(figure, name) for name in figure.__slots__}]}},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    records = [
        {"index": mark.index, "rollout": 0, "scorer": scorer, "value": mark.value, "reason": "", "cluster": mark.index}
        | {"asked": (asked or {}).get(mark.index, "usual")}
        for mark in marks
    ]
    (folder / "marks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_questions_of_one_index_that_ask_something_else_are_no_pair(tmp_path: Path) -> None:
    """Like row 1 of two files of MathVerse."""
    one = write(tmp_path / "one", {"1": 1.0, "2": 1.0, "3": 0.0})
    other = write(tmp_path / "other", {"1": 0.0, "2": 1.0, "3": 1.0}, asked={"1": "else"}, md5=["1"])
    (compared,) = compare_runs(one, other)
    assert compared.test.n == 2 and compared.test.worse == 0 and compared.test.better == 1
    assert compared.test.only_first == compared.test.only_second == 0
    told = as_text([compared])
    assert "1 questions of the same index ask something else, and are left out" in told and "other data files" in told
    nothing = write(tmp_path / "nothing", {"1": 0.0}, asked={"1": "else"})
    with pytest.raises(DataError, match="have no question of the same benchmark"):
        compare_runs(one, nothing)


def test_marks_that_do_not_say_what_was_asked_are_no_pair(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, {"1": 1.0}) for name in ("one", "other"))
    marks = (other / "marks.jsonl").read_text()
    (other / "marks.jsonl").write_text(marks.replace(', "asked": "usual"', ""))
    with pytest.raises(DataError, match="expected what each question asks, got none; run the benchmark again"):
        compare_runs(one, other)


def test_two_judges_are_told(tmp_path: Path) -> None:
    judged = {"values": {"1": 1.0, "2": 0.0}, "scorer": "judge:llm"}
    first = write(tmp_path / "first", judge={"model": "large", "settings": "a"}, **judged)
    for name, judge, note in (
        ("model", {"model": "small", "settings": "b"}, "judge: large and small"),
        ("prompt", {"model": "large", "settings": "b"}, "another prompt or other settings of the judge"),
    ):
        assert f"note: vstar: {note}" in as_text(compare_runs(first, write(tmp_path / name, judge=judge, **judged)))
    same = write(tmp_path / "same", judge={"model": "large", "settings": "a"}, **judged)
    assert "note" not in as_text(compare_runs(first, same))
    rules = [write(tmp_path / f"rule{at}", {"1": 1.0}, judge={"model": f"{at}"}) for at in range(2)]
    assert "note" not in as_text(compare_runs(*rules))


def test_runs_of_one_name_stand_side_by_side(tmp_path: Path) -> None:
    for at, value in enumerate((1.0, 0.0)):
        write(tmp_path / f"size{at}" / "seed0" / "benchmarks" / "vstar", {"1": value, "2": value})
    text = as_markdown(make_table([tmp_path / "size0" / "seed0", tmp_path / "size1" / "seed0"], paper=False))
    assert "| size0/seed0, rule | size1/seed0, rule |" in text and "| V*Bench | overall | 100.0 ± 0.0 | 0.0 ± 0.0 |" in text
    assert "| seed0, rule |" in as_markdown(make_table([tmp_path / "size1" / "seed0"], paper=False))


def test_a_result_that_was_moved_aside_is_in_no_table_unless_it_is_named(tmp_path: Path) -> None:
    write(tmp_path / "run" / "benchmarks" / "vstar", {"1": 1.0})
    old = write(tmp_path / "run" / "benchmarks" / "vstar-old", {"1": 0.0})
    off = write(tmp_path / "run" / "benchmarks" / "vstar-tools-off", {"1": 0.0}, tools="off")
    assert [one.folder.name for one in read_results(tmp_path / "run")] == ["vstar", "vstar-tools-off"]
    assert [one.folder for one in read_results(old)] == [old]
    assert [one.folder for one in read_results(off)] == [off]
    write(tmp_path / "other" / "vstar-old", {"1": 0.0})
    with pytest.raises(DataError, match="got vstar-old for vstar; give the folder itself"):
        read_results(tmp_path / "other")


def test_another_tokenizer_or_chat_template_is_another_model(tmp_path: Path) -> None:
    """Replies of before are then not gone on with."""
    for name in ("model.safetensors", "preprocessor_config.json", "chat_template.jinja", "notes.md"):
        (tmp_path / name).write_text("{}")
    config = Config.model_validate({"model": {"path": tmp_path}})
    before = weights_of(config, None)
    (tmp_path / "notes.md").write_text("more")
    assert weights_of(config, None) == before
    for name in ("preprocessor_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("[]")
        changed = weights_of(config, None)
        assert changed != before and changed["files"] == before["files"]
        before = changed
