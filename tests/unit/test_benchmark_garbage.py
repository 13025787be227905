"""Whatever a model or a judge writes, scorers and judge forms end in a verdict."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metis_fast.evaluate.benchmarks import BENCHMARKS
from metis_fast.evaluate.question import Question

PIECES = (
    *(
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "\\boxed{",
        "}",
        "{",
        '{"short answer": ',
        '"',
        "A",
        "B",
        "(C)",
        "Z",
        ".",
    ),
    *(
        "The answer is",
        "Answer",
        "2π",
        "1e999",
        "²",
        "nan",
        "-",
        "/",
        "[1, ",
        "]",
        "\n",
        "\\",
        "\x00",
        "🙂",
        "٣",
        "<box>[1,2,3,4]</box>",
    ),
)
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=8).map("".join)
QUESTIONS = {
    "options": Question("0", "Which?", {"A": "one", "B": "2", "C": "None"}, "B", "0", {}, {"boxes": "[[1, 2, 3, 4]]"}),
    "float": Question("0", "How much?", {}, "1.25", "0", {}, {"answer_type": "float", "precision": "2", "within": "0.001"}),
    "list": Question("0", "Which?", {}, "[1, 2]", "0", {}, {"answer_type": "list"}),
    "integer": Question("0", "How many?", {}, "0", "0", {}, {"answer_type": "integer", "unit": "cm"}),
    "text": Question("0", "What?", {}, "Not Applicable", "0", {}, {"answer_type": "text"}),
    "multiple choice": Question("0", "Which?", {}, "B", "0", {}, {"answer_type": "multiple choice"}),
}
KINDS = {"mathvista": ("options", "float", "list", "integer", "text"), "dynamath": ("float", "text", "multiple choice"),
         "logicvista": ("multiple choice",), "charxiv-dq": ("text",), "charxiv-rq": ("integer",)}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "mathverse"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(reply=TEXTS, judged=TEXTS)
def test_every_text_ends_in_a_verdict(name: str, reply: str, judged: str):
    check(name, reply, judged)


def check(name: str, reply: str, judged: str) -> None:
    """All rules of a benchmark, and its judges."""
    benchmark = BENCHMARKS[name]
    for kind in KINDS.get(name, ("options",)):
        question = QUESTIONS[kind]
        for score in benchmark.scorers.values():
            assert score(question, reply) == score(question, reply)
        for form in benchmark.judges.values():
            answers: list[str] = []
            for call in form.calls:
                answers.append("" if call(question, reply, answers) is None else judged)
            verdict = form.read(question, reply, answers)
            assert verdict.value in (0.0, 1.0) or verdict.reason


@pytest.mark.parametrize("piece", ["<reason>", "\\boxed{", "[", '{"a": ', "{", "-"])
def test_a_model_that_repeats_itself_to_the_end_gets_a_verdict(piece: str):
    """Soon: nothing here takes the square of the length. And no depth of brackets is too much."""
    text = piece * (24_000 // len(piece))
    for name in ("vstar", "mathvista", "dynamath", "charxiv-dq"):
        check(name, text, text)
        check(name, f"<answer>{text}</answer>", text + "}" * 24_000)


@settings(max_examples=10, deadline=None)
@given(reply=TEXTS, judged=st.tuples(TEXTS, TEXTS))
def test_every_formula_ends_in_a_verdict(reply: str, judged: tuple[str, str]):
    question = Question("0", "Find x.", {}, "x^2", "0", {}, {"question_for_eval": "Find x."})
    verdict = BENCHMARKS["mathverse"].scorers["rule"](question, reply)
    assert verdict.value in (0.0, 1.0) or verdict.reason
    assert BENCHMARKS["mathverse"].judges["vlmeval"].read(question, reply, judged).value in (0.0, 1.0, None)
