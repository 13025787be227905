"""The choice judge by kinds of spelling: every way to write the right letters is right, and no other answer is."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metis_fast.config import ScoreConfig
from metis_fast.score import choice

TOLERANCE = ScoreConfig().number_tolerance

QUESTIONS = {
    "loops": {"A": "a while loop", "B": "a for loop", "C": "recursion"},
    "blood": {"A": "O", "B": "AB", "C": "A"},
    "signs": {"A": "-5", "B": "5", "C": "3", "D": "0.5", "E": "-3"},
    "units": {"A": "5 mW", "B": "5 MW", "C": "about 5 mW", "D": "about 5 MW"},
    "genes": {"A": "Bb", "B": "BB", "C": "bb"},
    "cities": {"A": "Paris", "B": "London", "C": "Rome"},
    "none": {},
}


@pytest.mark.parametrize(
    ("question", "answer", "gold", "right"),
    [
        *(("loops", answer, "B", True) for answer in ("a for loop", "A for loop", "for loop", "B. a for loop")),
        *(("loops", answer, "A", False) for answer in ("a for loop", "A for loop", "A for effort", "a given number")),
        *(("blood", answer, "B", True) for answer in ("AB", "B. AB", "(B) AB")),
        *(("blood", "AB", "A, B", False), ("blood", "O", "A", True)),
        *(("signs", f"{letter}-5", "B", False) for letter in ("(B) ", "(B)", "**(B)** ", "The answer is (B) ", "[B] ", "B. ")),
        *(("signs", f"{letter}-5", "A", True) for letter in ("(A) ", "[A] ", "A) ", "A. ", r"\textbf{(A)}\ ")),
        *(("signs", "(B) .5", "B", False), ("signs", "(D) .5", "D", True), ("signs", "(C) - 3", "C", True)),
        *(("signs", "(B),5", "B", True), ("signs", "B.-5", "B", False), ("signs", "(C): -3", "C", False)),
        *(("units", "B. 5 mW", "B", False), ("units", "A. 5 mW", "A", True), ("units", "about 5 MW", "C", False)),
        *(("genes", "BB", "A", False), ("genes", "BB", "B", True), ("genes", "C. Bb", "C", False)),
        *(("cities", f"B{mark}", "B", False) for mark in ("+", "++", "&", "/", " and", "=")),
        *(("cities", answer, "B", True) for answer in ("B,", "B is the answer", "应该选B", "B\n\nLondon is the capital")),
        *(("cities", answer, "A, B", True) for answer in ("A and B are correct", "both A and B")),
        *(
            ("cities", f"B{rest}", "B", False)
            for rest in (": the trap", ": London is a trap", ", it is an error", "\n\nParis", ", as we skip it")
        ),
        *(("none", answer, answer[0], False) for answer in ("C++", "B. Franklin", "E. coli", "I, Robot", "C: drive")),
        *(("none", "B. Paris", "B. Paris", True), ("none", "B", "B. Paris", True), ("none", "B, because it fits", "B", True)),
    ],
)
def test_what_is_beside_a_letter_counts(question: str, answer: str, gold: str, right: bool) -> None:
    assert choice.equal(answer, gold, QUESTIONS[question], TOLERANCE) is right


LETTER_FORMS = (
    *("{}", "({})", "{}.", "{})", "[{}]", "`{}`", "<{}>", "（{}）", "${}$", "${}", "**{}**", r"\boxed{{{}}}", r"\text{{{}}}"),
    *("选项{}", "答案是{}"),
    *("Option {}", "option {}.", "The answer is {}", "The correct answer is: ({}).", "Answer: {}", "{} is correct", "【{}】"),
    *("{}, because the others are wrong", "{} because it fits", "{} - it fits", "My answer: {}", "Final answer: {}"),
)
OPTION_TEXTS = (
    *("one apple", "two pears", "three red foxes", "none of these", "a dog", "12 cm", "15 cm", "Paris", "the sea", "7", "8"),
    "x + 1",
)


@st.composite
def questions(draw: st.DrawFn) -> dict[str, str]:
    """Options of a question of two to twelve."""
    texts = draw(st.permutations(OPTION_TEXTS))[: draw(st.integers(2, 12))]
    mark = draw(st.sampled_from(("{}. {}", "({}) {}", "{}) {}", "{}: {}", "{}．{}", "{}、{}")))
    lines = [mark.format(chr(ord("A") + i), text) for i, text in enumerate(texts)]
    options = choice.read_options("Which one?\n" + "\n".join(lines))
    assert list(options.values()) == texts
    return options


@st.composite
def letters_written(draw: st.DrawFn, letters: list[str]) -> str:
    if len(letters) > 1:
        mark = draw(st.sampled_from((", ", ",", " and ", " & ", ";", "、", " ", "/")))
        order = draw(st.permutations(letters))
        listed, bracketed = mark.join(order), mark.join(f"({letter})" for letter in order)
        return draw(st.sampled_from((listed, bracketed, "".join(sorted(letters)), f"The answers are {listed}")))
    return draw(st.sampled_from(LETTER_FORMS)).format(letters[0])


@settings(max_examples=200)  # of three pairs each
@given(st.data())
def test_choice_takes_every_spelling_of_the_letters_and_no_other_letters(data: st.DataObject) -> None:
    options = data.draw(questions())
    size = data.draw(st.sampled_from((1, 1, 1, 2, 3)).filter(lambda size: size <= len(options)))
    right = data.draw(st.permutations(sorted(options)))[:size]
    gold = data.draw(st.sampled_from((", ".join(right), "".join(sorted(right)))))
    assert choice.equal(data.draw(letters_written(right)), gold, options, TOLERANCE)
    if size == 1:
        text = options[right[0]]
        for answer in (text, f"{right[0]}. {text}", f"({right[0]}) {text}", f"{right[0]} - {text}", f"{right[0]}: {text}"):
            assert choice.equal(answer, gold, options, TOLERANCE), answer

    chosen = data.draw(st.permutations(sorted(options)))[: data.draw(st.integers(1, min(3, len(options))))]
    assume(set(chosen) != set(right))
    assert not choice.equal(data.draw(letters_written(chosen)), gold, options, TOLERANCE)
    assert not choice.equal(f"{right[0]} or {chosen[0]}", gold, options, TOLERANCE) or right[0] == chosen[0]
    if len(chosen) == 1:
        assert not choice.equal(options[chosen[0]], gold, options, TOLERANCE)


SPOILT = (
    *("{} as well as {}", "{}, as {} is also right", "{} for now, but {} is better", "{} because of X. No, {}.", "{} or {}"),
    *(
        "{} because it is wrong, {}",
        "{} ({} is also right)",
        "{0}: false",
        "{0}: incorrect",
        "{0} - not this one",
        "{0} (wrong)",
    ),
    *("{}\n\n{}", "{} since it could be {}", "{}, given that {} fits", "not {0}", "{0}, never", "{0} is wrong", "{0}-{1}"),
)


@settings(max_examples=200)
@given(st.data())
def test_choice_takes_no_letter_that_is_taken_back(data: st.DataObject) -> None:
    options = data.draw(questions())
    right, other = data.draw(st.permutations(sorted(options)))[:2]
    text = options[other]
    forms = [form.format(right, other) for form in SPOILT]
    forms += [f"{right} because {text}", f"{right}. It is {text}", f"{right}: {text}", f"{right}) {text}"]
    assert not choice.equal(data.draw(st.sampled_from(forms)), right, options, TOLERANCE)
    reason = data.draw(st.sampled_from((f"{other} is wrong", "the others are wrong", "it fits", f"{other} isn't right")))
    assert choice.equal(f"{right}, because {reason}", right, options, TOLERANCE)
