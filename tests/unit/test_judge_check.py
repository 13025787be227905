"""`metis-fast judge check`: examples of every form, what it finds, and its exit code."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metis_fast import cli
from metis_fast.config import ScoreConfig
from metis_fast.errors import DataError
from metis_fast.score.check import Confusion, check_examples
from metis_fast.score.examples import Example, read_examples
from metis_fast.testing.judge import JudgeServer, Reply, completion, serving

PETS = "Which?\nA. cat\nB. dog"
HEAD = "style\tanswer\tground_truth\tlabel\n"
ROWS: list[dict[str, Any]] = [
    {"style": "rule", "question": "2 + 2?", "answer": "four", "ground_truth": "4", "label": True},
    {"style": "Multiple-Choice", "question": PETS, "answer": "a dog", "ground_truth": ["B", "C"], "label": True},
    {"style": "llm", "answer": '"5"\t5', "ground_truth": "5", "label": False},
]  # fmt: skip
TSV = 'style\tanswer\tground_truth\tequal\nrule\tfour\t4\ttrue\n\nrule\t"5" \'\t5\tfalse\n'


def llm(url: str, **changes: object) -> ScoreConfig:
    own = {"base_url": url, "model": "grader", "retries": 0, **changes}
    return ScoreConfig.model_validate({"judge": "llm", "llm": own})


def examples(*answers: str, label: bool = True) -> list[Example]:
    return [Example(i, "rule", f"Question {i}?", answer, ("Paris",), label) for i, answer in enumerate(answers, start=2)]


def test_lines_of_json_are_read(tmp_path: Path):
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    assert read_examples(path) == [
        Example(1, "rule", "2 + 2?", "four", ("4",), True),
        Example(2, "Multiple-Choice", PETS, "a dog", ("B", "C"), True),
        Example(3, "llm", "", '"5"\t5', ("5",), False),
    ]


def test_parquet_is_read_with_lists_or_texts_of_ground_truths(tmp_path: Path):
    one, many = tmp_path / "one.parquet", tmp_path / "many.parquet"
    rows = [row | {"other": b"x"} for row in ROWS]
    pq.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row["ground_truth"], str)]), one)
    pq.write_table(pa.Table.from_pylist([row | {"ground_truth": list(row["ground_truth"])} for row in rows]), many)
    assert [(own.line, own.truths, own.label) for own in read_examples(one)] == [(0, ("4",), True), (1, ("5",), False)]
    assert read_examples(many)[1].truths == ("B", "C")


def test_tables_of_text_are_read_without_quotes_and_their_lines_are_counted(tmp_path: Path):
    path = tmp_path / "examples.tsv"
    for text in (TSV, TSV.replace("\n", "\r\n"), "\ufeff" + TSV):
        path.write_bytes(text.encode())
        assert [(one.line, one.answer, one.label) for one in read_examples(path)] == [(2, "four", True), (4, '"5" \'', False)]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.tsv", HEAD + "rule\t4\t4\n", r"a\.tsv:2: expected 4 cells .*, got 3; part them"),
        ("a.tsv", "style\tanswer\tlabel\nrule\t4\ttrue\n", r"a\.tsv:2: column ground_truth: expected a ground .*got none"),
        ("a.tsv", HEAD + "rule\t4\t4\tmaybe\n", r"a\.tsv:2: column label: expected true or false, got 'm"),
        ("a.tsv", HEAD + "bleu\t4\t4\ttrue\n", r"a\.tsv:2: column style: expected one of rule, choice"),
        ("a.tsv", HEAD, "has no examples"),
        ("a.tsv", "", "has no examples"),
        ("a.jsonl", '{"style": "rule"}\n{"style"', r"a\.jsonl:1: column answer|a\.jsonl:1: column ground_truth"),
        ("a.jsonl", '\n{"style"', r"a\.jsonl:2: expected a JSON object"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: expected a JSON object, got list"),
        ("a.jsonl", '{"style": "rule", "answer": 4, "ground_truth": "4", "label": true}', r":1: column answer: .* got 4"),
        ("a.jsonl", '{"style": "rule", "answer": "4", "ground_truth": [4], "label": true}', r":1: column ground_truth: exp"),
        ("a.parquet", "no table", r"a\.parquet: cannot be read as Parquet"),
        ("a.csv", "", r"ends in \.tsv, \.jsonl, \.parquet"),
        ("missing.tsv", None, "cannot read .*No such file"),
    ],
)  # fmt: skip
def test_what_is_no_example_is_one_line_that_names_it(tmp_path: Path, name: str, text: str | None, says: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says) as caught:
        read_examples(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_judge_is_compared_with_the_labels_style_by_style():
    found = asyncio.run(
        check_examples(
            [
                Example(1, "rule", "", "4", ("4",), True),
                Example(2, "exact_match", "", "four apples and a pear", ("4",), True),
                Example(3, "rule", "", "5", ("4",), False),
                Example(4, "choice", "Which?\nA. cat\nB. dog", "B", ("A",), False),
                Example(5, "choice", "Which?\nA. cat\nB. dog", "B", ("B",), False),
                Example(6, "rule", "", " ", ("4",), True),
            ],
            ScoreConfig(),
        )
    )
    assert found.styles == {
        "rule": Confusion(right_said_right=1, missed=2, wrong_said_wrong=1),
        "choice": Confusion(invented=1, wrong_said_wrong=1),
    }
    assert [(one.example.line, one.judge, one.reason) for one in found.disagreements] == [
        (2, "rule", "equals no ground truth"),
        (5, "choice", "equals the ground truth 'B'"),
        (6, "", "no answer"),
    ]
    assert (found.exit_code, found.failures, found.cost.requests) == (1, {}, 0)


def test_failures_are_counted_by_reason_and_never_as_a_verdict():
    replies = itertools.cycle([completion("CORRECT"), Reply(503, "down"), completion("It is CORRECT.")])
    with serving(JudgeServer(lambda task: next(replies))) as url:
        found = asyncio.run(check_examples(examples(*"abcdef"), llm(url, concurrency=1)))
    assert found.styles == {"llm": Confusion(right_said_right=2, unjudged=4)}
    assert found.failures == {"HTTP status 503": 2, "expected CORRECT or INCORRECT and nothing else": 2}
    assert (found.exit_code, found.cost.requests) == (1, 6)


def test_a_judge_that_contradicts_itself_is_found_by_asking_again(tmp_path: Path):
    def fickle(task: dict[str, Any]) -> Reply:
        again = sum(own["candidate_answer"] == task["candidate_answer"] for own in server.tasks)
        return completion("INCORRECT" if task["candidate_answer"] == "b" and again == 2 else "CORRECT")

    server = JudgeServer(fickle)
    with serving(server) as url:
        config = llm(url, cache=tmp_path / "verdicts")
        once = asyncio.run(check_examples(examples("a", "b", "c"), config))
        assert (once.exit_code, once.contradictions) == (0, ())
        server.tasks.clear()
        thrice = asyncio.run(check_examples(examples("a", "b", "c"), config, repeats=3))
    assert (thrice.exit_code, thrice.contradictions, thrice.disagreements) == (1, (3,), ())
    assert thrice.cost.requests == 9  # past the cache


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, bad = tmp_path / "good.tsv", tmp_path / "bad.tsv"
    good.write_text(TSV)
    bad.write_text(TSV.replace("false", "true"))
    assert cli.main(["judge", "check", str(good)]) == 0
    assert "rule            2           1          0           0          1           0" in capsys.readouterr().out
    assert cli.main(["judge", "check", str(bad), "--json", "log.progress=false"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["styles"]["rule"] == {"right_said_right": 1, "missed": 1, "invented": 0, "wrong_said_wrong": 0, "unjudged": 0}
    assert [one["example"]["line"] for one in told["disagreements"]] == [4]
    assert cli.main(["judge", "check", str(bad), "score.judge=llm"]) == 2
    assert "set score.llm.base_url to an OpenAI-compatible endpoint" in capsys.readouterr().err
    assert cli.main(["judge", "check", str(bad), "--repeats", "0"]) == 2


def test_what_is_recorded_is_replayed_without_the_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, file = tmp_path / "examples.tsv", tmp_path / "kept.sqlite"
    path.write_text(TSV)
    asked = [str(path), "score.judge=llm", "score.llm.model=grader", "--json"]

    def told(*words: str) -> tuple[int, dict[str, Any]]:
        code = cli.main(["judge", "check", *asked, *words])
        return code, json.loads(capsys.readouterr().out or "{}")

    server = JudgeServer(lambda task: completion("CORRECT"))
    with serving(server) as url:
        code, first = told(f"score.llm.base_url={url}", f"tools.record={file}")
        assert told(f"score.llm.base_url={url}", f"tools.record={file}")[1]["cost"]["requests"] == 0
    assert code == 1 and first["cost"]["requests"] == 2
    code, second = told(f"tools.replay={file}")
    assert code == 1 and (second["styles"], second["disagreements"]) == (first["styles"], first["disagreements"])
    for words, said in (
        (["--repeats", "2"], "has one answer for each question"),
        (["score.number_tolerance=0.1"], "has no answer for judge llm"),
    ):
        assert cli.main(["judge", "check", *asked, f"tools.replay={file}", *words]) == 2
        assert said in capsys.readouterr().err


def test_the_settings_may_stand_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "good.tsv").write_text(TSV)
    server = JudgeServer()
    with serving(server) as url:
        (tmp_path / "my.yaml").write_text(f"score: {{judge: llm, llm: {{base_url: '{url}', model: grader}}}}\n")
        code = cli.main(["judge", "check", str(tmp_path / "good.tsv"), str(tmp_path / "my.yaml"), "score.llm.retries=0"])
    out = capsys.readouterr().out
    assert code == 1 and "line 2: rule: 'four' for '4' is right, but llm grader: says INCORRECT for the ground truth '4'" in out
    assert "cost: 2 requests, 0 tokens in, 0 out, " in out


def test_a_judge_that_cannot_be_reached_is_told_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "good.tsv").write_text(TSV)
    with serving(JudgeServer()) as url:
        pass  # nobody listens there now
    settings = ["score.judge=llm", f"score.llm.base_url={url}", "score.llm.model=m", "score.llm.retries=0"]
    assert cli.main(["judge", "check", str(tmp_path / "good.tsv"), *settings]) == 1
    out = capsys.readouterr().out
    assert "no verdict: 2 x no connection\n  the first: no connection (" in out
    assert "; start it, or set score.llm.base_url\n" in out
