"""Judges by kinds of spelling: generated answers that mean the same are right, and others never are.

Each judge has 2,000 pairs of either sort. What is generated here knows nothing of how the judges read.
"""

from __future__ import annotations

import asyncio
import csv
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metis_fast.config import ScoreConfig
from metis_fast.score import choice, rule
from metis_fast.score.judge import StyleJudge, open_judge
from metis_fast.score.mathematics import MathMatcher
from metis_fast.testing.judge import text_rollout
from metis_fast.types import Ability, Prompt

TOLERANCE = ScoreConfig().number_tolerance


@pytest.fixture(scope="module")
def judge() -> Iterator[StyleJudge]:
    judge = open_judge(ScoreConfig(), {"rule", "choice", "math"})
    yield judge
    judge.close()


PAIRS = settings(max_examples=2000)
SOME = settings(max_examples=300)  # of formulas, at 10 ms each; all 2,000 in the slow test

UNITS = {
    "metre": ("m", "meters", "metres", "meter"),
    "centimetre": ("cm", "centimeters", "centimetres"),
    "kilogram": ("kg", "kilograms", "kilogram"),
    "gram": ("g", "grams"),
    "hour": ("h", "hours", "hrs", "hr"),
    "minute": ("min", "minutes", "mins"),
    "second": ("s", "seconds", "sec", "secs"),
    "km/h": ("km/h", "kmh", "kph", "kilometers per hour", "km per hour"),
    "m/s": ("m/s", "meters per second", "metres per second"),
    "square metre": ("m²", "m^2", "square meters", "sq m", "square metres"),
    "cubic metre": ("m³", "cubic meters", "m^3"),
    "celsius": ("°C", "degrees Celsius", "℃", "degrees C"),
    "fahrenheit": ("°F", "degrees Fahrenheit"),
    "litre": ("L", "liters", "litres"),
    "mile": ("miles", "mile", "mi"),
    "foot": ("ft", "feet"),
    "megabyte": ("MB", "megabytes"),
    "megabit": ("Mb", "megabits"),
    "watt": ("W", "watts"),
    "dog": ("dogs",),
    "cat": ("cats",),
    "apple": ("apples",),
}
MONEY = {
    "dollar": ("${}", "{} dollars", "USD {}", "{} USD", "US${}", r"\${}"),
    "euro": ("€{}", "{} euros", "EUR {}", "{} EUR", "{}€"),
    "pound": ("£{}", "GBP {}"),
    "yen": ("JPY {}", "{} yen"),
}
WORDS = ("paris", "london", "red fox", "new york", "eiffel tower", "blue whale", "north", "mercury", "saint helena", "iron")
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "hundred": 10**2, "trillion": 10**12}
ONES = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """Of 1 to 999,999."""
    if number >= 1000:
        rest = in_words(number % 1000) if number % 1000 else ""
        return f"{in_words(number // 1000)} thousand {rest}".strip()
    if number >= 100:
        rest = in_words(number % 100) if number % 100 else ""
        return f"{in_words(number // 100)} hundred {rest}".strip()
    if number < 20:
        return ONES[number - 1]
    ten = TENS[number // 10 - 2]
    return f"{ten}-{in_words(number % 10)}" if number % 10 else ten


def grouped(number: int, mark: str) -> str:
    return f"{number:,}".replace(",", mark)


@st.composite
def whole_spellings(draw: st.DrawFn, number: int) -> str:
    """Ways to write a positive integer."""
    ways = [str(number), f"{number}.0", f"+{number}", f"**{number}**", f"${number}$", rf"\boxed{{{number}}}", f" {number}. "]
    ways += [rf"\text{{{number}}}", f"`{number}`", f'"{number}"', f"({number})", f"{number}/1"]
    if number >= 1000:
        ways += [grouped(number, mark) for mark in (",", " ", "'", "\u202f", "\u00a0", "’", "{,}")]
    if number < 1_000_000:
        ways += [in_words(number), in_words(number).title()]
    ways += [f"{number // scale} {name}" for name, scale in SCALES.items() if number % scale == 0 and number >= scale]
    if number % 100_000 == 0:
        ways += [f"{number / 10**6:g} million"]
    ways.append("".join(chr(ord("０") + int(digit)) for digit in str(number)))  # full width
    ways.append("".join("٠١٢٣٤٥٦٧٨٩"[int(digit)] for digit in str(number)))
    return draw(st.sampled_from(ways))


WHOLE = st.one_of(
    st.integers(1, 30), st.integers(1, 5000), st.integers(1, 90).map(lambda n: n * 100_000), st.integers(1, 10**9)
)
DECIMAL = st.integers(1, 10**6).filter(lambda n: n % 1000).map(lambda n: Fraction(n, 1000))


@st.composite
def decimal_spellings(draw: st.DrawFn, number: Fraction) -> str:
    """Ways to write a decimal of at most three places."""
    text = f"{float(number):.3f}".rstrip("0")
    ways = [text, text + "0", f"+{text}", rf"\boxed{{{text}}}", f"{number.numerator}/{number.denominator}", f"${text}$"]
    ways += [rf"\frac{{{number.numerator}}}{{{number.denominator}}}", f"{float(number) * 1000:g}e-3"]
    ways += [f"{float(number) * 1000:.10g} × 10^-3", f"{float(number) * 1000:.10g}×10⁻³"]
    if number < 1:
        ways.append(text.removeprefix("0"))
    return draw(st.sampled_from(ways))


@st.composite
def number_spellings(draw: st.DrawFn, number: Fraction | int) -> str:
    if isinstance(number, int):
        return draw(whole_spellings(number))
    return draw(decimal_spellings(number))


NUMBER = st.one_of(WHOLE, DECIMAL)


def two_of(draw: st.DrawFn, forms: tuple[str, ...]) -> tuple[str, str]:
    """Two that may be the same one."""
    return draw(st.sampled_from(forms)), draw(st.sampled_from(forms))


def two_others(draw: st.DrawFn, forms: Sequence[str]) -> tuple[str, str]:
    """Two that are not the same one."""
    one, other, *_ = draw(st.permutations(forms))
    return one, other


@st.composite
def equal_answers(draw: st.DrawFn) -> tuple[str, str]:
    """Two spellings of one answer."""
    number = draw(st.integers(2, 10_000))
    match draw(st.sampled_from(("number", "unit", "money", "percent", "word", "sign"))):
        case "number":
            value = draw(NUMBER)
            return draw(number_spellings(value)), draw(number_spellings(value))
        case "sign":
            return two_of(draw, tuple(form.format(number) for form in ("-{}", "−{}", "- {}", "$-{}$", "–{}", "minus {}")))
        case "unit":
            one, other = two_of(draw, draw(st.sampled_from(sorted(UNITS.values()))))
            space, another = two_of(draw, (" ", ""))
            return f"{number}{space}{one}", f"{number}{another}{other}"
        case "money":
            one, other = two_of(draw, draw(st.sampled_from(sorted(MONEY.values()))))
            return one.format(number), other.format(f"{number:,}")
        case "percent":
            forms = ("{}%", r"{}\%", "{} percent", "{} per cent", "{}％", "{} %", "{} pct")
            return two_of(draw, tuple(form.format(number) for form in forms))
    word = draw(st.sampled_from(WORDS))
    forms = (word, word.title(), word.upper(), f"the {word}", f"The {word.title()}.", f"**{word}**", f'"{word}"')
    forms += (f"a {word}", rf"\text{{{word}}}", f"{word}!", f"  {word} ", word.replace(" ", "-"))
    return two_of(draw, forms)


@st.composite
def different_answers(draw: st.DrawFn) -> tuple[str, str]:
    """Two spellings of different answers, as near to each other as they get."""
    number, other = draw(st.integers(1, 10_000)), draw(st.integers(1, 10_000))
    assume(number != other)
    a, b = two_others(draw, "ABCDEFGH")
    word, another = two_others(draw, WORDS)
    match draw(
        st.sampled_from(("numbers", "digit", "scale", "unit", "money", "label", "listed", "marks", "sign", "words", "time"))
    ):
        case "numbers":
            one, two = draw(NUMBER), draw(NUMBER)
            assume(one != two and one * 100 != two and two * 100 != one)
            return draw(number_spellings(one)), draw(number_spellings(two))
        case "digit":
            places = draw(st.integers(1, 3))
            return f"{number}.{draw(st.integers(1, 9)):0{places}d}", f"{number}.{'0' * places}"
        case "scale":
            return two_others(draw, [f"{number} {name}".strip() for name in ("", *SCALES)])
        case "unit":
            one, two = (draw(st.sampled_from(UNITS[name])) for name in two_others(draw, sorted(UNITS)))
            return f"{number} {one}", f"{number} {two}"
        case "money":
            one, two = (draw(st.sampled_from(MONEY[name])) for name in two_others(draw, sorted(MONEY)))
            return one.format(number), two.format(number)
        case "label":
            base = draw(st.sampled_from(("Vitamin", "Plan", "Hepatitis", "Type", "Group", "Figure", "Class", "Terminal")))
            forms = [base, f"{base} {a}", f"{base} {b}", f"{base} {a}{b}", a, f"{base} {number}", f"{a}#", f"{a}++"]
            return two_others(draw, forms)
        case "listed":
            return two_others(draw, [a, f"{a}, {b}", f"{a}/{b}", f"{a} {b} {a}", f"{b}, {a}, {b}", f"{a} or {a}{b}"])
        case "marks":
            forms = ["{0}", "{0}!", "{0}^2", "√{0}", "{0}x", "{0}i", "1/{1}", "1 {1}", "{0}:1{0}", "{0}π", "> {0}", "< {0}"]
            forms += ["{0}-{1}", "{0}, {1}", "{0} or {1}", "({0}, {1}]"]
            return two_others(draw, [form.format(number, number + 1) for form in forms[number == 1 :]])
        case "sign":
            return two_others(draw, [f"{number}", f"-{number}"])
        case "words":
            forms = [word, another, f"{word} and {another}", f"{word} or {another}", f"not {word}", f"{word} {number}"]
            return two_others(draw, [*forms, f"{word} {a}"])
    forms = ["{}:30", "{}.30", "{}:30 pm", "{}:30 am", "{} pm", "{} am", "{}", "{} 30", "{}-30", "{}/30"]
    hour = draw(st.integers(1, 12))
    return two_others(draw, [form.format(hour) for form in forms])


ROWS = list(
    csv.DictReader(
        (Path(__file__).parent / "judge_answers.tsv").read_text().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE
    )
)
APPLES = "How many apples?\n" + "\n".join(f"{chr(65 + i)}. {word} apples" for i, word in enumerate(ONES[:10]))


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['style']}-{row['answer']}-{row['ground_truth']}" for row in ROWS])
def test_answers_as_users_met_them(judge: StyleJudge, row: dict[str, str]) -> None:
    prompt = Prompt("p", "test", (), (), Ability.MATH, (row["ground_truth"],), row["style"], APPLES)
    verdict = asyncio.run(judge.judge(prompt, text_rollout("p", [f"<reason>r</reason><answer>{row['answer']}</answer>"])))
    assert verdict.correct == (row["equal"] == "true")


@PAIRS
@given(equal_answers())
def test_rule_takes_every_spelling_of_an_answer(pair: tuple[str, str]) -> None:
    assert rule.equal(*pair, TOLERANCE)


@PAIRS
@given(different_answers())
def test_rule_takes_no_other_answer_for_it(pair: tuple[str, str]) -> None:
    assert not rule.equal(*pair, TOLERANCE)


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


@settings(max_examples=700)  # of three pairs each
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


# -- mathematics ------------------------------------------------------------------------------------------------------------

Value = Callable[[int, int], object]
FORMULAS: tuple[tuple[Value, tuple[str, ...]], ...] = (
    (lambda n, p: n, (r"\frac{{\pi}}{{{n}}}", "pi/{n}", "π/{n}", r"\pi/{n}")),
    (lambda n, p: n, (r"{n}\pi", "{n}*pi", "{n}π", "{n}pi", r"{n} \cdot \pi")),
    (lambda n, p: n, (r"-{n}\pi", "-{n}*pi", "−{n}π")),
    (lambda n, p: p, (r"\sqrt{{{p}}}", "sqrt({p})", "{p}**(1/2)", r"{p}^{{1/2}}")),
    (lambda n, p: (n, p), (r"\frac{{\sqrt{{{p}}}}}{{{n}}}", "sqrt({p})/{n}")),
    (lambda n, p: n, (r"e^{{{n}}} - 1", "exp({n}) - 1", "-1 + exp({n})")),
    (lambda n, p: n, (r"\frac{{1}}{{2^{{{n}}}}}", "1/2**{n}", "2**(-{n})", r"2^{{-{n}}}")),
    (lambda n, p: n, (r"x^{{{n}}} + 1", "x**{n} + 1", "1 + x^{{{n}}}")),
    (lambda n, p: (n, p), (r"{n}x + {p}", "{n}*x + {p}", "{p} + {n}x")),
    (lambda n, p: (n, p), (r"({n}, {p})", "({n},{p})", r"\left({n}, {p}\right)")),
    (lambda n, p: (n, p), (r"[{n}, {m}]", "[{n},{m}]", "x ∈ [{n}, {m}]", r"x \in [{n}, {m}]")),
    (lambda n, p: frozenset((n, p)), (r"\{{{n}, {p}\}}", r"\{{{p}, {n}\}}", "{{{n}, {p}}}")),
    (lambda n, p: round(math.log(n, p), 9), (r"\log_{{{p}}}({n})", "log({n}, {p})")),
    (lambda n, p: (n, p), (r"{n} + {p}i", "{n} + {p}*I", "{n}.0 + {p}.0i", "{p}i + {n}")),
    (lambda n, p: n, (r"{n}!", "factorial({n})")),
    (
        lambda n, p: 0,
        (r"\emptyset", "no solution", "No solutions", r"\varnothing", "no real solutions", r"\text{{no solution}}"),
    ),
    (lambda n, p: 0, (r"\infty", "oo")),
)
N, P = st.integers(2, 60), st.sampled_from((2, 3, 5, 7, 11))
FORMULA = st.sampled_from(FORMULAS)


def spelt(ways: tuple[str, ...], way: int, n: int, p: int) -> str:
    return ways[way % len(ways)].format(n=n, p=p, m=n + p)


@pytest.fixture(scope="module")
def matches() -> Iterator[Callable[[str, str], bool]]:
    matcher = MathMatcher(TOLERANCE)

    def run(answer: str, gold: str) -> bool:
        return asyncio.run(matcher.matches(Prompt("p", "test", (), (), Ability.MATH, (gold,), "math", ""), answer))

    yield run
    matcher.close()


def _takes_every_spelling(matches: Callable[[str, str], bool], data: st.DataObject) -> None:
    _, ways = data.draw(FORMULA)
    n, p = data.draw(N), data.draw(P)
    answer, gold = (spelt(ways, data.draw(st.integers(0, 11)), n, p) for _ in "ab")
    assert matches(answer, gold), (answer, gold)


def _takes_no_other(matches: Callable[[str, str], bool], data: st.DataObject) -> None:
    (value, ways), (other_value, other_ways) = data.draw(FORMULA), data.draw(FORMULA)
    if data.draw(st.booleans()):  # mostly formulas of one kind
        other_value, other_ways = value, ways
    n, p, other_n, other_p = data.draw(N), data.draw(P), data.draw(N), data.draw(P)
    assume(other_ways is not ways or value(n, p) != other_value(other_n, other_p))
    assume(other_ways is ways or {ways[-1], other_ways[-1]} != {"log({n}, {p})", "factorial({n})"})  # log(2, 2) is 1
    answer = spelt(ways, data.draw(st.integers(0, 11)), n, p)
    gold = spelt(other_ways, data.draw(st.integers(0, 11)), other_n, other_p)
    assert not matches(answer, gold), (answer, gold)


@SOME
@given(st.data())
def test_math_takes_every_spelling_of_a_formula(matches: Callable[[str, str], bool], data: st.DataObject) -> None:
    _takes_every_spelling(matches, data)


@SOME
@given(st.data())
def test_math_takes_no_other_formula_for_it(matches: Callable[[str, str], bool], data: st.DataObject) -> None:
    _takes_no_other(matches, data)


@pytest.mark.slow  # five minutes
@PAIRS
@given(st.data())
def test_math_judges_two_thousand_pairs_of_either_sort(matches: Callable[[str, str], bool], data: st.DataObject) -> None:
    _takes_every_spelling(matches, data)
    _takes_no_other(matches, data)
