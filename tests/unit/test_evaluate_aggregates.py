"""Figures of marks: what has no verdict is no zero, several rollouts are one question, composites need all of their parts."""

from __future__ import annotations

import pytest

from metis_fast.evaluate.aggregates import by_tag, grouped_units, mean, micro, reasons, units_of
from metis_fast.evaluate.benchmarks import BENCHMARKS
from metis_fast.evaluate.question import Figure, Mark, Question, Verdict


def question(index: str, cluster: str = "", **tags: str) -> Question:
    return Question(index, f"question {index}", {}, "A", cluster or index, tags)


def marks(values: dict[str, list[float | None]], scorer: str = "rule") -> list[Mark]:
    return [
        Mark(index, rollout, scorer, value, "" if value is not None else "nobody can tell")
        for index, found in values.items()
        for rollout, value in enumerate(found)
    ]


def named(figures: tuple[Figure, ...]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


def test_a_mark_without_a_value_is_no_zero_and_bounds_say_what_it_could_be():
    questions = [question(name) for name in "abcd"]
    (figure,) = micro()(questions, marks({"a": [1.0], "b": [0.0], "c": [1.0], "d": [None]}))
    assert figure.value == pytest.approx(2 / 3)
    assert (figure.n, figure.missing) == (3, 1)
    assert (figure.low, figure.high) == pytest.approx((0.5, 0.75))
    assert "1 of 4 without a verdict" in figure.note


def test_rollouts_are_averaged_in_their_question_first():
    questions = [question("a"), question("b")]
    (figure,) = micro()(questions, marks({"a": [1.0, 1.0, None, 0.0], "b": [0.0]}))
    assert figure.value == pytest.approx((2 / 3 + 0) / 2)
    assert (figure.n, figure.clusters) == (2, 2)


def test_a_question_that_was_not_asked_is_in_no_figure():
    (figure,) = micro()([question("a"), question("b")], marks({"a": [1.0]}))
    assert (figure.value, figure.n, figure.missing, figure.error) == (1.0, 1, 0, None)
    (figure,) = micro()([question("a")], marks({"a": [None]}))
    assert (figure.value, figure.low, figure.high) == (None, 0.0, 1.0)


def test_marks_of_other_questions_or_of_two_scorers_are_refused():
    with pytest.raises(ValueError, match="not among the questions"):
        units_of([question("a")], marks({"b": [1.0]}))
    with pytest.raises(ValueError, match="one scorer at a time"):
        units_of([question("a")], [*marks({"a": [1.0]}), *marks({"a": [1.0]}, "vlmeval")])


def test_groups_come_in_the_order_given_and_then_by_name():
    units = units_of([question(name, kind=name) for name in "dbca"], marks({name: [1.0] for name in "abcd"}))
    assert [figure.name for figure in by_tag(units, "kind", ("c", "x"), prefix="k/")] == ["k/c", "k/a", "k/b", "k/d"]


def test_a_composite_needs_a_verdict_on_each_of_its_parts_in_the_same_rollout():
    questions = [question("a1", "a"), question("a2", "a"), question("b1", "b"), question("b2", "b")]
    found = marks({"a1": [1.0, 1.0, None], "a2": [1.0, 0.0, 1.0], "b1": [1.0], "b2": [None]})
    units = grouped_units(questions, found, lambda q: q.cluster, lambda parts: min(parts.values()))
    assert [unit.value for unit in units] == [0.5, None]
    assert mean("all", units).missing == 1


def wemath(composite: str, steps: int, right: str) -> tuple[list[Question], list[Mark]]:
    """right: 1, 0 or - for each step, and for the whole."""
    roles = [*map(str, range(1, steps + 1)), "multi"]
    questions = [question(f"{composite}{role}", composite, steps=str(steps), role=role) for role in roles]
    values = {"1": 1.0, "0": 0.0, "-": None}
    return questions, marks({q.index: [values[bit]] for q, bit in zip(questions, right, strict=True)})


def test_wemath_tells_the_four_kinds_strictly_and_loosely():
    made = [
        wemath(name, len(right) - 1, right)
        for name, right in {"cm": "111", "ig": "110", "ik": "100", "half": "101", "rote": "0001", "gap": "1-1"}.items()
    ]
    figures = named(BENCHMARKS["wemath"].aggregate([q for qs, _ in made for q in qs], [m for _, ms in made for m in ms]))
    assert [figures[f"strict/{kind}"].value for kind in ("CM", "IG", "IK", "RM")] == pytest.approx([0.2, 0.2, 0.2, 0.4])
    assert [figures[f"loose/{kind}"].value for kind in ("CM", "IG", "IK", "RM")] == pytest.approx([0.4, 0.2, 0.2, 0.2])
    assert figures["score (strict)"].value == pytest.approx((1 + 0.5) / 5)
    assert figures["score (loose)"].value == pytest.approx((2 + 0.5) / 5)
    assert figures["strict/RM rate"].value == pytest.approx(2 / 3)
    assert figures["score (strict)"].missing == 1
    assert "the whole has 525" in figures["score (strict)"].note
    assert (figures["S1"].n, figures["S2"].n, figures["S3"].n) == (12, 5, 1)


def test_a_composite_whose_parts_are_not_all_in_the_file_is_in_no_score():
    questions, found = wemath("a", 2, "111")
    figures = named(BENCHMARKS["wemath"].aggregate(questions[:2], found[:2]))
    assert figures["score (strict)"].value is None
    assert figures["accuracy"].value == 1.0


def test_the_worst_case_of_dynamath_takes_one_wrong_variant():
    questions = [question(f"{p}/{v}", p, variant=str(v), subject="algebra", level="x") for p in "ab" for v in range(10)]
    values: dict[str, list[float | None]] = {q.index: [1.0] for q in questions}
    values["a/3"] = [0.0]
    figures = named(BENCHMARKS["dynamath"].aggregate(questions, marks(values)))
    assert figures["average"].value == pytest.approx(0.95)
    assert (figures["worst case"].value, figures["worst case"].n) == (0.5, 2)
    assert figures["average"].clusters == 2
    values["a/3"] = [None]
    figures = named(BENCHMARKS["dynamath"].aggregate(questions, marks(values)))
    assert (figures["worst case"].value, figures["worst case"].missing) == (1.0, 1)


def test_hrbench_is_the_mean_of_its_cycles_and_clusters_by_question():
    questions = [question(f"{c}{q}", "same text", cycle=str(c), category="single") for c in range(4) for q in range(3)]
    values: dict[str, list[float | None]] = {q.index: [float(q.index[1] != "0")] for q in questions}
    figures = named(BENCHMARKS["hrbench4k"].aggregate(questions, marks(values)))
    assert figures["overall"].value == pytest.approx(2 / 3)
    assert figures["overall"].clusters == 3  # questions with the same text are told apart by their place in a cycle
    assert figures["all four orders right"].n == 3
    values |= {"00": [None], "01": [None]}
    figures = named(BENCHMARKS["hrbench4k"].aggregate(questions, marks(values)))
    assert figures["overall"].value == pytest.approx((1 + 3 * 2 / 3) / 4)  # a cycle counts alike with what it has
    assert figures["all four orders right"].missing == 2


def test_mathverse_leaves_text_only_out_of_the_overall_figure():
    questions = [
        question(f"{p}{v}", p, version=v, subject="s") for p in "ab" for v in ("Vision Only", "Text Lite", "Text Only")
    ]
    values: dict[str, list[float | None]] = {q.index: [float(q.tags["version"] != "Text Only")] for q in questions}
    figures = named(BENCHMARKS["mathverse"].aggregate(questions, marks(values)))
    assert (figures["overall"].value, figures["version/Text Only"].value) == (1.0, 0.0)
    assert "2 of the five versions" in figures["overall"].note
    assert figures["overall"].clusters == 2


def test_reasons_are_counted_most_frequent_first():
    found = [
        Mark("a", 0, "rule", None, "x"),
        Mark("b", 0, "rule", 0.0, "y"),
        Mark("c", 0, "rule", None, "x"),
        Mark("d", 0, "rule", 1.0),
    ]
    assert list(reasons(found).items()) == [("x", 2), ("y", 1)]


def test_a_verdict_without_a_value_needs_a_reason_and_a_value_is_a_share():
    with pytest.raises(ValueError, match="needs a reason"):
        Verdict(None)
    for value in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            Verdict(value)
