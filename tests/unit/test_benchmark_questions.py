"""Every benchmark, end to end without a model: its published forms give the same questions, and right answers are right."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from metis_fast.cli import main
from metis_fast.errors import ConfigError
from metis_fast.evaluate.benchmarks import BENCHMARKS, find
from metis_fast.evaluate.files.reading import QuestionSet, read
from metis_fast.evaluate.question import Mark, Question, Verdict, as_prompt
from metis_fast.evaluate.scorers import options, values
from metis_fast.evaluate.standin import Files, write_standins

NAMES = tuple(BENCHMARKS)


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    return write_standins(tmp_path_factory.mktemp("standins"), pixels=(96, 72))


def both(standins: dict[str, Files], name: str) -> tuple[QuestionSet, QuestionSet]:
    files = standins[name]
    return read(BENCHMARKS[name], files.tsv, any_md5=True), read(BENCHMARKS[name], files.hub, any_md5=True)


def told(question: Question) -> tuple[object, ...]:
    """What a question is, whichever file it comes from; templates of CharXiv are filled in one form only."""
    text = "" if "group" in question.tags and "emplate" in question.question else question.question
    tags = {name: value for name, value in question.tags.items() if name not in ("version",)}
    return text, tuple(question.options.items()), question.answer, tuple(sorted(tags.items())), question.images()[0].sha256


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("charxiv", "mathverse"))])
def test_both_forms_of_a_file_give_the_same_questions(standins: dict[str, Files], name: str):
    kit, hub = both(standins, name)
    assert Counter(map(told, kit.questions)) == Counter(map(told, hub.questions))
    sizes = [sorted(Counter(q.cluster for q in found.questions).values()) for found in (kit, hub)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["charxiv-dq", "charxiv-rq", "mathverse"])
def test_both_forms_give_the_same_truths_where_texts_differ(standins: dict[str, Files], name: str):
    kit, hub = both(standins, name)
    found = [Counter((q.answer, *sorted(q.tags.values()), q.images()[0].sha256) for q in one.questions) for one in (kit, hub)]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_are_right_and_wrong_ones_are_not(standins: dict[str, Files], name: str):
    benchmark = BENCHMARKS[name]
    found = read(benchmark, standins[name].hub, any_md5=True)
    for form in ("{}", "<reason>Seen.</reason>\n<answer>{}</answer>", "So the answer is {}."):
        marks = [Mark.of(q, 0, "rule", benchmark.scorers["rule"](q, form.format(q.answer))) for q in found.questions]
        assert {mark.value for mark in marks} == {1.0}, form
    figures = benchmark.aggregate(found.questions, marks)
    assert figures[0].value == 1.0
    assert len({figure.name for figure in figures}) == len(figures)
    empty = [Mark.of(q, 0, "rule", benchmark.scorers["rule"](q, "<answer></answer>")) for q in found.questions]
    assert {mark.value for mark in empty} == {0.0}
    assert {mark.reason for mark in empty} == {"no answer in the reply"}
    for question in found.questions:
        wrong = next((letter for letter in question.options if letter != question.answer), "17 zebras")
        assert benchmark.scorers["rule"](question, f"<answer>{wrong}</answer>").value != 1


@pytest.mark.parametrize("name", NAMES)
def test_prompts_show_the_question_and_every_option(standins: dict[str, Files], name: str):
    benchmark, text = BENCHMARKS[name], ""
    questions = read(benchmark, standins[name].tsv, any_md5=True).questions
    for question, prompt in itertools.product(questions, benchmark.prompts.values()):
        text = prompt(question)
        assert all(option in text for option in question.options.values())
    question = questions[-1]
    made = as_prompt(question, name, text, system="Look closely.")
    assert [message.role for message in made.messages] == ["system", "user"]
    assert made.messages[1].around_images == ("",) * len(made.images) + (text,)
    assert made.uid == f"{name}:{question.index}"


def test_charxiv_templates_say_where_to_look(tmp_path: Path):
    (files,) = write_standins(tmp_path, ["charxiv-dq"], count=1, pixels=(64, 64)).values()
    lines, layout, number, title = read(BENCHMARKS["charxiv-dq"], files.hub).questions
    assert lines.question.startswith("For the current plot, how many lines are there?")
    assert layout.question.startswith("What is the layout of the subplots?")
    assert number.question.startswith("What is the number of subplots?")
    assert title.question.startswith("For the current plot, what is its title?\n    * Your final answer")
    assert len({question.cluster for question in (lines, layout, number, title)}) == 1


def test_the_same_seed_gives_the_same_files(tmp_path: Path):
    made = [
        write_standins(tmp_path / name, ["vstar", "wemath"], 2, (64, 64), seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, same, other = ([path.read_bytes() for one in files.values() for path in (*one.tsv, *one.hub)] for files in made)
    assert first == same
    assert first != other


def test_benchmarks_are_found_by_any_of_their_names():
    assert find("V*Bench").name == "vstar"
    assert find("hrbench8k") is find("HRBench8K") is find("hr_bench_8k")
    assert find("MathVerse_MINI_Text_Lite").name == "mathverse"
    with pytest.raises(ConfigError, match="expected one of vstar, hrbench4k"):
        find("vstars")
    names = Counter(name.lower() for benchmark in BENCHMARKS.values() for name in {benchmark.name, *benchmark.aliases})
    assert max(names.values()) == 1


def test_known_md5s_are_whole_and_of_one_file():
    known = [md5 for benchmark in BENCHMARKS.values() for md5 in {md5 for file in benchmark.files for md5 in file.md5}]
    assert all(len(md5) == 32 and int(md5, 16) >= 0 for md5 in known)
    assert len(known) == len(set(known)) == 21


@pytest.mark.parametrize(
    ("answer", "truth", "more", "value"),
    [
        ("1.23", "1.2", {"precision": "1"}, 1), ("1.25", "1.2", {"precision": "1"}, 0), ("$1.2", "1.2", {"unit": "$"}, 1),
        ("5 cm", "5", {"unit": "cm"}, 1), ("50 mm", "5", {"unit": "cm"}, None), ("5 kg", "5", {"unit": "cm"}, None),
        ("5 million", "5", {}, 0), ("0.5", "50%", {}, 1), ("3.1415", "3.142", {"within": "0.001"}, 1),
        ("2π", "6.283", {"within": "0.001"}, 1),
        ("3π", "6.283", {"within": "0.001"}, 0), ("π/2", "1.571", {"within": "0.001"}, None), ("14 or 15", "14", {}, None),
        ("fourteen", "14", {}, 1), ("14.0", "14", {}, 1), ("14", "x", {}, None), ("-14", "14", {}, 0),
    ],
)  # fmt: skip
def test_numbers_are_right_wrong_or_unread(answer: str, truth: str, more: dict[str, str], value: float | None):
    assert values.compare_numbers(answer, truth, **more).value == value


@pytest.mark.parametrize(
    ("answer", "truth", "value"),
    [
        ("N/A", "Not Applicable", 1), ("3", "Not Applicable", 0), ("there is none", "Not Applicable", None), ("N/A", "3", 0),
        ("yes", "No", 0), ("Yes, it is", "yes", 1), ("Loss over time", "loss over time", 1),
        ("The loss", "Loss over time", None),
        ("0.75", ".75", 1), ("0.8", "0.75", 0), ("2π", "6.28", None), ("2π", "2π", 1), ("5 June 2019", "2019-06-05", 1),
        ("increases, then falls", "Increases then decreases", None), ("", "3", 0),
    ],
)  # fmt: skip
def test_texts_are_right_wrong_or_for_a_judge(answer: str, truth: str, value: float | None):
    assert values.compare(answer, truth).value == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [("[2007, 2008]", 1), ("2007 and 2008", 1), ("[2008, 2007]", 0), ("2007", None), ("[2007, 2009]", 0), ("(2007; 2008)", 1)],
)
def test_lists_are_compared_in_order(answer: str, value: float | None):
    assert values.list_rule(Question("0", "?", {}, "[2007, 2008]", "0"), f"<answer>{answer}</answer>").value == value


def test_formulas_are_compared_as_mathematics():
    question = Question("0", "Find the height.", {}, "2\\sqrt{3}", "0")
    assert values.formula_rule(question, "Thus \\boxed{\\sqrt{12}}").value == 1
    assert values.formula_rule(question, "Thus \\boxed{\\sqrt{13}}").value is None
    assert values.formula_rule(question, "<think>\\boxed{2\\sqrt{3}}") == options.NO_ANSWER


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("A, C", 1),
        ("C and A", 1),
        ("AC", 1),
        ("A", 0),
        ("A, B, C", 0),
        ("the first and the third", None),
        ("It is A because", 0),
    ],
)
def test_several_letters_have_to_be_the_same_ones(reply: str, value: float | None):
    assert options.letters_rule(Question("0", "?", {}, "A, C", "0"), reply).value == value


def test_a_dropped_option_is_shown_by_the_full_prompt_alone():
    question = Question("0", "Which?", {"A": "None", "B": "one"}, "A", "0")
    assert "None" not in BENCHMARKS["vstar"].prompts["vlmeval"](question)
    assert "A. None" in BENCHMARKS["vstar"].prompts["full"](question)
    assert BENCHMARKS["vstar"].scorers["vlmeval"](question, "A").value == 0  # VLMEvalKit can never be right here
    assert BENCHMARKS["vstar"].scorers["rule"](question, "A").value == 1


def test_charxiv_without_answers_has_no_rule_verdict():
    question = Question("0", "?", {}, "", "0", {}, {"grading_query": "Truth: 3. Response: {PREDICTION}"})
    assert BENCHMARKS["charxiv-dq"].scorers["rule"](question, "3").value is None
    form = BENCHMARKS["charxiv-dq"].judges["vlmeval"]
    assert form.calls[0](question, "it is {3}", ()) == "Truth: 3. Response: it is {3}"
    assert form.read(question, "3", ['{"extract_answer": "3", "score": 2}']) == Verdict(
        None, "the judge's reply cannot be read"
    )


def test_the_command_lists_checks_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["benchmark", "list", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(NAMES)
    assert main(["benchmark", "list"]) == 0
    assert "HR-Bench 4K, 800 rows" in capsys.readouterr().out
    assert main(["benchmark", "standin", str(tmp_path), "vstar", "treebench", "--count", "2", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    (kit,), (hub,) = written["vstar"]["tsv"], written["vstar"]["hub"]
    assert main(["benchmark", "check", kit]) == 2
    assert "expected MD5 b18854d7075574be06b631cd5f7d2d6a" in capsys.readouterr().err
    assert main(["benchmark", "check", kit, written["treebench"]["tsv"][0], "--any-md5"]) == 0
    assert "V*Bench: 2 questions" in capsys.readouterr().out
    assert main(["benchmark", "check", hub]) == 2
    assert "--benchmark NAME" in capsys.readouterr().err
    Path(kit).write_text(Path(kit).read_text("utf-8").replace("iVBOR", "aVBOR"), "utf-8")
    assert main(["benchmark", "check", kit, "--any-md5", "--json"]) == 1
    (bad,) = json.loads(capsys.readouterr().out)["vstar"]["bad_rows"]
    assert "cannot identify image file" in bad
    assert main(["benchmark", "check", kit, "--any-md5", "--no-images"]) == 0
    assert main(["benchmark", "check", hub, "--benchmark", "V*"]) == 0


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("The answer is B? No, C.", None), ("Answer: A or maybe B", None), ("the correct option is A, no wait, B", None),
        ("\\boxed{A} or \\boxed{B}", None), ("First \\boxed{A}.\nNo: \\boxed{B}", 1), ("It could be B", None), ("B or C", None),
        ("A. red\nB. blue", None), ("A. red\n\nB. blue\nC. dark blue", None), ("The answer is (B) dark blue", None),
        ("blue", 1),
        ("dark blue", 0), ("blue or dark blue", None), ("Option B is wrong. Option A is right.", None),
        ("**Final Answer**\nB", 1),
        ("<answer>A</answer> no: <answer>B</answer>", 1), ("<think>B</think>", 0), ("<think>A", 0), ("Let me see</think>B", 1),
    ],
)  # fmt: skip
def test_an_option_is_taken_only_where_it_is_clear(reply: str, value: float | None):
    question = Question("0", "Which colour?", {"A": "red", "B": "blue", "C": "dark blue", "D": "None"}, "B", "0")
    assert options.option_rule(question, reply).value == value


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    (example,) = re.findall(r"```py\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_standins(tmp_path, ["vstar"])["vstar"].tsv[0].rename("VStarBench.tsv")
    exec(compile(example.replace('tsv")]', 'tsv")], any_md5=True'), page, "exec"), {})
    name, value = capsys.readouterr().out.split()[:2]
    assert name == "overall"
    assert 0 < float(value) < 1
