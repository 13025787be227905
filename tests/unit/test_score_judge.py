"""Judges: what counts as the answer, as right, and as well formed."""

import asyncio
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metis_fast.config import LlmJudgeConfig, ScoreConfig
from metis_fast.errors import ConfigError, JudgeError
from metis_fast.score import choice, math_worker, rule
from metis_fast.score.judge import JudgeUnavailable, open_judge
from metis_fast.score.mathematics import MathMatcher
from metis_fast.score.response import format_ok, last_answer
from metis_fast.testing.judge import is_right, text_rollout
from metis_fast.types import Outcome, Prompt

TOLERANCE = ScoreConfig().number_tolerance
HUGE = (
    *("9" * 200_000, "1," * 100_000, "the " * 50_000, "A. " * 50_000, "(" * 100_000, "\\text{" * 30_000),
    *(
        "\\x" + " " * 10_000 + "x",
        "\\boxed{" * 20_000 + "5" + "}" * 20_000,
        "\\frac12" * 20_000,
        "five " * 50_000,
        "^{" * 50_000,
    ),
    *("A, " * 50_000, "B because C " * 20_000, "'a" * 50_000, ".5" * 50_000, "Yes, " + " " * 50_000),
)
PIECES = (
    *(
        "5",
        ".5",
        "1.2.3",
        "192.168.1.1",
        " ",
        "\n",
        "x",
        "i",
        "pi",
        "A",
        "B",
        "dog",
        "yes",
        "No",
        ",",
        ".",
        ";",
        ":",
        "!",
        "'",
        '"',
    ),
    *(
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "\\{",
        "\\}",
        "|",
        "$",
        "%",
        "\\%",
        "-",
        "+",
        "/",
        "*",
        "=",
        "^",
        "_",
        "\\frac",
        "\\sqrt",
        "\\pi",
    ),
    *(
        "\\boxed{",
        "\\text{",
        "\\left",
        "\\infty",
        "\\pm",
        "\\circ",
        "½",
        "²",
        "٣",
        "０",
        "\ud800",
        "\0",
        "…",
        "é",
        "百",
        "💡",
        "0",
        "1/0",
    ),
)
QUESTION = "Which animal is it?\nA. a cat\nB. a dog\nC. a red fox\nD. none of these"


def a_prompt(*answers: str, style: str = "rule", question: str = QUESTION) -> Prompt:
    return Prompt(
        uid="p",
        data_source="test",
        messages=(),
        images=(),
        ability="math",
        answers=answers,
        judge_style=style,
        question=question,
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<reason>r</reason><answer> 7 </answer>", "7"),
        ("<answer>7</answer> no, <answer>8</answer>", "8"),
        ("<answer>7</answer> wait <answer>8", "7"),
        ("<answer><answer>7</answer></answer>", "7"),
        ("<answer>7<answer>8</answer>", "8"),
        ("</answer>7<answer>", ""),
        ("7", ""),
        ("<answer></answer>", ""),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<ANSWER>7</ANSWER>", ""),
    ],
)
def test_the_last_complete_answer_counts(text, answer):
    assert last_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("<reason>r</reason><answer>7</answer>", True),
        ("<reason>r</reason><tool_call>{}</tool_call><reason>s</reason><answer>7</answer>", True),
        ("<reason>r<reason>s</reason></reason><answer>7</answer>", True),
        ("<reason>r</reason>", False),
        ("<answer>7</answer>", False),  # nothing can follow a last </reason> that is not there
        ("<reason>r</reason><answer>7", False),
        ("<reason>r<answer>7</answer>", False),
        ("<reason>r</reason><tool_call>{}<answer>7</answer>", False),
        ("<reason>r</reason></answer>7<answer>", False),  # the counts are equal, the order is wrong
        ("</reason><reason><answer>7</answer>", False),
        ("<answer>7</answer><reason>r</reason>", False),
        ("<reason>r<answer>7</answer></reason>", False),
        ("<reason>r<answer></reason>7</answer>", False),  # opened before the last </reason>
        ("<reason>r</reason><answer>7</answer></tool_call>", False),
        ("", False),
    ],
)
def test_format_needs_balanced_tags_and_an_answer_after_the_last_reason(text, ok):
    assert format_ok(text) is ok


def test_reading_a_response_is_linear_in_its_length():
    started = time.process_time()
    for text in ("<answer>" * 200_000, "</answer>" * 200_000, "<reason></reason>" * 100_000 + "<answer>1</answer>"):
        last_answer(text)
        format_ok(text)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("Paris", "paris"),
        ("The Eiffel Tower.", "eiffel tower"),
        ("  New\n York ", "New York"),
        ("New-York", "new york"),
        ("U.S.A.", "USA"),
        ("Ｐａｒｉｓ", "Paris"),  # full-width letters
        ("**Paris**", "Paris"),
        ("A", "a"),  # an article that is the whole answer
        ("1,234", "1234"),
        ("1,234.50", "1234.5"),
        ("50%", "50 percent"),
        ("50%", "0.5"),
        ("50%", "50"),
        ("0.5", "50 %"),
        ("5cm", "5 cm"),
        ("5 cm", "5"),
        ("$5", "5 dollars"),
        ("3 m/s^2", "3 m/s²"),
        ("−5", "-5"),
        ("+5", "5"),
        ("$-5$", "-5"),
        ("1/2", "0.5"),
        ("½", "0.5"),
        ("1.5e3", "1500"),
        ("1.5 × 10^3", "1500"),
        ("3.14159", "3.1416"),
        ("three", "3"),
        ("three dogs", "3 dogs"),
        ("~ 20", "20"),
        ("90 degrees", "90°"),
        ("True", "yes"),
        ("No, there is no dog.", "No"),
        ("Yes.", "true"),
        ("ΣΊΣΥΦΟΣ", "Σίσυφος"),
        ("?", "?"),
    ],
)
def test_rule_accepts(answer, gold):
    assert rule.equal(answer, gold, TOLERANCE)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("Paris or London", "Paris"),
        ("not Paris", "Paris"),
        ("5", "-5"),
        ("5", "5 or 6"),
        ("5 or 6", "5"),
        ("35", "3.5"),
        ("3.5 m long", "35 m long"),
        ("12", "1,2"),
        ("10000", "10001"),  # within the tolerance, but integers are not rounded values
        ("10²", "102"),
        ("31/2", "3½"),
        ("5 cm", "5 m"),
        ("5 am", "5 pm"),
        ("50%", "5"),
        ("1/0", "1"),
        ("1e9999", "2e9999"),
        ("0.001", "0"),
        ("3.15", "3.14"),
        ("Yes, no", "yes"),
        ("yes and no", "yes"),
        ("No", "yes"),
        ("< 5", "> 5"),
        ("?", "!"),
        ("", "Paris"),
        ("the", "a"),
    ],
)
def test_rule_refuses(answer, gold):
    assert not rule.equal(answer, gold, TOLERANCE)


def test_rule_tolerance_is_relative_and_configurable():
    assert rule.equal("101.5", "100", 0.02)
    assert not rule.equal("101.5", "100", 0.01)
    assert not rule.equal("1.5", "0.5", 0.02)


@pytest.mark.parametrize("huge", HUGE)
def test_a_huge_answer_is_refused_in_little_time(huge):
    started = time.process_time()
    assert not rule.equal(huge, "9", TOLERANCE)
    assert not choice.equal(huge, "B", choice.read_options(QUESTION), TOLERANCE)
    for size in (900, 2000):  # as much as is read at all
        assert not rule.equal(huge[:size], "9", TOLERANCE)
        assert not choice.equal(huge[:size], "B", choice.read_options(QUESTION), TOLERANCE)
    assert time.process_time() - started < 2


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.sampled_from(("B", "5", "yes", r"\frac{1}{2}", "x = .5")))
def test_no_answer_makes_a_judge_raise(answer, gold):
    assert isinstance(rule.equal(answer, gold, TOLERANCE), bool)
    assert isinstance(choice.equal(answer, gold, choice.read_options(QUESTION), TOLERANCE), bool)


@settings(max_examples=100)
@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.sampled_from(("[1,2]", "5", "0.05", r"\frac{1}{2}")))
def test_no_answer_makes_the_math_worker_raise(answer, gold):
    assume("^" not in answer)  # a tower of powers ends a worker by its limit of CPU time, which is another test
    assert math_worker.compare(answer, gold) in ("equal", "different", "unparsed")


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "B",
            "b",
            "(B)",
            "B.",
            "B)",
            "[B]",
            "Option B",
            "option (b)",
            "The answer is B",
            "The correct answer is: (B).",
            "**B**",
        ),
        *(
            "B) a dog",
            "(B) a dog",
            "B. a dog",
            "B: a dog",
            "Answer: B",
            "$B$",
            r"\boxed{B}",
            r"\boxed{\text{B}}",
            r"\text{(B)}",
        ),
        *("**B**", r"\text{(B)}", "a dog", "Dog", "the dog."),
    ],
)
@pytest.mark.parametrize("gold", ["B", "(B)", "B. a dog", "a dog"])
def test_choice_accepts_the_letter_in_every_way_and_the_text(answer, gold):
    assert choice.equal(answer, gold, choice.read_options(QUESTION), TOLERANCE)


@pytest.mark.parametrize(
    "answer",
    [
        *("A", "(A)", "a cat", "B or A", "A, B", "A and B", "B) a dog A) a cat", "(B) a dog (C) a red fox", "A dog and a cat"),
        *("Option A", "not B", "B C", "ABCD", "I", "bear", "A) a dog"),
    ],
)
@pytest.mark.parametrize("gold", ["B", "B. a dog", "a dog"])
def test_choice_refuses_other_letters_and_several_of_them(answer, gold):
    assert not choice.equal(answer, gold, choice.read_options(QUESTION), TOLERANCE)


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (QUESTION, {"A": "a cat", "B": "a dog", "C": "a red fox", "D": "none of these"}),
        ("How many? (A) 1 (B) 2 (C) 3", {"A": "1", "B": "2", "C": "3"}),
        ("How many? A) 1, B) 2", {"A": "1", "B": "2"}),
        ("Who is J. A. Smith?", {}),
        ("Person A: hello. Person B: bye. Who?\nA. he\nB. she", {"A": "he", "B": "she"}),
        ("A: hello\nB: bye\nWhat do they say?\nA. hi\nB. no\nC. yes", {"A": "hi", "B": "no", "C": "yes"}),
        ("Triangle (A) and (B) differ. Choose: A. one B. two C. three", {"A": "one", "B": "two", "C": "three"}),
        ("Vitamin A: good.\n(A) dog\n(B) cat", {"A": "dog", "B": "cat"}),
        ("What is 1 + 1?", {}),
    ],
)
def test_options_are_read_from_the_question(question, options):
    assert choice.read_options(question) == options


@pytest.mark.parametrize(
    "answer",
    [
        *("B because a red fox", "B) it is a cat", "B as well as C", "B: false", "B - not this one", "B (wrong)", "B\n\nC"),
        *("B. No, C", "B because it is wrong, C", "B. a bear", "B (C is also right)", "B, because C is right"),
    ],
)
def test_what_stands_behind_a_letter_may_take_it_back(answer):
    assert not choice.equal(answer, "B", choice.read_options(QUESTION), TOLERANCE)


def test_without_options_the_texts_behind_the_letters_must_agree():
    assert choice.equal("B. Paris", "B. Paris", {}, TOLERANCE)
    assert not choice.equal("B. London", "B. Paris", {}, TOLERANCE)
    assert not choice.equal("B: not Paris", "B. Paris", {}, TOLERANCE)
    assert not choice.equal("B\n\nC", "B, C", {}, TOLERANCE)


def test_an_options_text_is_the_one_that_is_spelt_so():
    options = choice.read_options("How long?\nA. 5 cm\nB. 5 m\nC. 50 cm\nD. 5.0")
    assert choice.equal("5 cm", "A", options, TOLERANCE) and choice.equal("5 m", "B", options, TOLERANCE)
    assert not any(choice.equal(answer, "D", options, TOLERANCE) for answer in ("5 cm", "5 m", "5"))  # 5 may be any


@pytest.mark.parametrize(
    ("answer", "gold", "result"),
    [
        (r"\frac{1}{2}", "0.5", "equal"),
        ("1/2", r"$\frac{2}{4}$", "equal"),
        ("x^2+2x+1", "(x+1)^2", "equal"),
        (r"\boxed{7}", "7", "equal"),
        ("The value is $7$", "7", "equal"),
        ("sqrt(8)", r"2\sqrt{2}", "equal"),
        ("1,234", "1234", "equal"),
        ("90^\\circ", "90", "equal"),
        ("3 or 5", "5", "different"),
        ("$3$ or $5$", "5", "different"),
        ("$1$ $2$ $5$", "5", "unparsed"),
        ("-7", "7", "different"),
        ("(1, 2)", "(2, 1)", "different"),
        ("north", "south", "unparsed"),
        ("[i,2]", "[1,2]", "unparsed"),  # sympy raises
        ("(i, 2)", "[1,2]", "different"),
        (r"\{1,2\}", "(1,2)", "different"),
        ("not $6$", "6", "unparsed"),
        (r"\pi", "3.141592653589793", "different"),
    ],
)
def test_math_worker_compares_whole_answers(answer, gold, result):
    assert math_worker.compare(answer, gold) == result


@pytest.fixture
def math_matcher():
    matcher = MathMatcher(TOLERANCE)
    yield matcher
    matcher.close()


def test_math_falls_back_to_the_rule_judge_where_nothing_parses(math_matcher):
    async def run():
        assert await is_right(math_matcher, a_prompt("the north", style="math"), "North.")
        assert not await is_right(math_matcher, a_prompt("north", style="math"), "south")
        assert await is_right(math_matcher, a_prompt("9", "1/3", style="math"), r"\frac{1}{3}")  # the best ground truth counts
        assert not await is_right(math_matcher, a_prompt("7", style="math"), "7" * 5000)

    asyncio.run(run())


def test_math_has_no_tolerance_but_knows_every_way_to_write_a_number(math_matcher):
    async def run():
        for answer, right in (("1e3", True), ("1,000.0", True), ("1000 cm", True), ("1000.05", False), (r"10^3", True)):
            assert await is_right(math_matcher, a_prompt("1000", style="math"), answer) is right, answer
        assert not await is_right(math_matcher, a_prompt("(1, 2)", style="math"), "[1, 2]")  # equal to the rule judge

    asyncio.run(run())


def test_a_formula_without_end_is_wrong_and_the_next_answer_is_still_judged(math_matcher):
    async def run():
        assert not await is_right(math_matcher, a_prompt("7", style="math"), "9^{9^{9^{9}}}")
        assert await is_right(math_matcher, a_prompt("1/2", style="math"), r"\frac{2}{4}")

    asyncio.run(run())


def test_a_math_worker_that_is_killed_from_outside_is_replaced(math_matcher):
    async def run():
        assert await is_right(math_matcher, a_prompt("2", style="math"), r"\sqrt{4}")
        math_matcher._idle[0]._process.kill()
        assert await is_right(math_matcher, a_prompt("1/2", style="math"), r"\sqrt{1/4}")

    asyncio.run(run())


def test_a_math_worker_that_cannot_start_gives_no_verdict(math_matcher, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(JudgeUnavailable, match="does not start"):
        asyncio.run(is_right(math_matcher, a_prompt("1/2", style="math"), r"\sqrt{1/4}"))


@pytest.mark.parametrize(
    ("style", "gold", "answer"),
    [
        ("rule", "4", "four"),
        ("exact_match", "4", "four"),
        ("choice", "B", "(b) a dog"),
        ("Multiple-Choice", "B", "a dog"),
        ("math", "1/2", "1/2"),
        ("math_verify", "1/2", "1/2"),
    ],
)
def test_the_prompts_style_chooses_the_judge(style, gold, answer):
    judge = open_judge(ScoreConfig(), {style})
    rollout = text_rollout("p", [f"<reason>r</reason><answer>{answer}</answer>"])
    verdict = asyncio.run(judge.judge(a_prompt(gold, style=style), rollout))
    judge.close()
    assert (verdict.correct, verdict.format_ok, verdict.answer) == (True, True, answer)


def test_an_unknown_style_is_refused_at_open_and_the_known_ones_are_named():
    with pytest.raises(ConfigError, match=r"'rouge'; known styles are rule, choice, math, llm"):
        open_judge(ScoreConfig(), {"rule", "rouge"})


def test_a_style_that_the_judge_was_not_opened_for_is_refused():
    with pytest.raises(ConfigError, match="opened for rule"):
        asyncio.run(open_judge(ScoreConfig(), {"rule"}).judge(a_prompt("4", style="choice"), text_rollout("p", ["x"])))


def test_the_llm_style_needs_an_endpoint():
    """But no model: the one that is served is taken (test_score_llm_models.py)."""
    with pytest.raises(JudgeError, match=r"score\.llm\.base_url is empty"):
        open_judge(ScoreConfig(llm=LlmJudgeConfig(model="m")), {"model"})


def test_an_answer_in_an_observation_does_not_count():
    judge = open_judge(ScoreConfig(), {"rule"})
    texts = ["<reason>r</reason><tool_call>{}</tool_call>", "I do not know"]
    rollout = text_rollout("p", texts, observation="<answer>4</answer>")
    verdict = asyncio.run(judge.judge(a_prompt("4"), rollout))
    assert (verdict.correct, verdict.format_ok, verdict.answer) == (False, False, "")


@pytest.mark.parametrize("outcome", [Outcome.ANSWERED, Outcome.LENGTH, Outcome.TURN_LIMIT])
def test_how_the_rollout_ended_does_not_change_the_verdict(outcome):
    judge = open_judge(ScoreConfig(), {"rule"})
    texts = ["<reason>r</reason><tool_call>{}</tool_call>", "<reason>s</reason><answer>4</answer>"]
    verdict = asyncio.run(judge.judge(a_prompt("3", "4"), text_rollout("p", texts, outcome=outcome)))
    assert verdict.correct and verdict.format_ok


def test_no_answer_is_wrong_even_where_the_ground_truth_is_empty():
    verdict = asyncio.run(open_judge(ScoreConfig(), {"rule"}).judge(a_prompt(""), text_rollout("p", ["<answer></answer>"])))
    assert not verdict.correct
