"""The math judge by kinds of formula: spellings of one formula are equal, and others never are."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metis_fast.config import ScoreConfig
from metis_fast.score.mathematics import MathMatcher
from metis_fast.testing.judge import is_right
from metis_fast.types import Prompt

TOLERANCE = ScoreConfig().number_tolerance
PAIRS = settings(max_examples=2000)
SOME = settings(max_examples=300)  # of formulas, at 10 ms each
FEW = settings(max_examples=100)  # all 2,000 in the slow test

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
    (lambda n, p: p, ("√{p}", r"x = \sqrt{{{p}}}", "$√{p}$", "√({p})")),
    (lambda n, p: n, (r"{n}^3", r"{n} \cdot {n}^2", r"y = {n}^3 = {n} \cdot {n}^2")),
    (lambda n, p: (n, p), ("P(-{n}, {p})", "(-{n}, {p})", "P = (-{n}, {p})")),
    (
        lambda n, p: (n, p),
        (
            "Matrix([[{n}, 1], [0, -{p}]])",
            r"\begin{{pmatrix}} {n} & 1 \\ 0 & -{p} \end{{pmatrix}}",
            "array([[{n}, 1], [0, -{p}]])",
        ),
    ),
    (lambda n, p: (n, p), (r"{n}\frac{{1}}{{{p}}}", "{n} 1/{p}", r"{n} + \frac{{1}}{{{p}}}", r"x = {n}\frac1{{{p}}}")),
    (lambda n, p: (n, p), (r"\sqrt{{{p}}}({n})", r"{n}\sqrt{{{p}}}", r"\left({n}\right)\sqrt{{{p}}}")),
    (lambda n, p: n * p, (r"({n})({p})\sqrt{{13}}", r"{n}({p})\sqrt{{13}}", r"{n} \cdot {p}\sqrt{{13}}")),
    (lambda n, p: n, (r"\text{{(B) }}{n}\sqrt{{17}}", r"{n}\sqrt{{17}}", r"AB = {n}\sqrt{{17}}")),
    (lambda n, p: n, (r"{n}\pi", r"{n}\pi\text{{ cm}}", r"{n}\pi cm", r"The area is {n}\pi.")),
)
N, P = st.integers(2, 60), st.sampled_from((2, 3, 5, 7, 11))
FORMULA = st.sampled_from(FORMULAS)


def spelt(ways: tuple[str, ...], way: int, n: int, p: int) -> str:
    return ways[way % len(ways)].format(n=n, p=p, m=n + p)


@pytest.fixture(scope="module")
def matches() -> Iterator[Callable[[str, str], bool]]:
    matcher = MathMatcher(TOLERANCE)

    def run(answer: str, gold: str) -> bool:
        return asyncio.run(is_right(matcher, Prompt("p", "test", (), (), "math", (gold,), "math", ""), answer))

    yield run
    matcher.close()


def _takes_every_spelling(matches: Callable[[str, str], bool], data: st.DataObject) -> None:
    _, ways = data.draw(FORMULA)
    n, p = data.draw(N), data.draw(P)
    answer, gold = (spelt(ways, data.draw(st.integers(0, 11)), n, p) for _ in "ab")
    assert matches(answer, gold), (answer, gold)


# Formulas that differ in what a parser leaves out; {n} is a number, {p} a small one.
UNLIKE = (
    *(
        (form, "{n}")
        for form in ("- ${n}$", "not $x={n}$", r"x \ne ${n}$", "either 5 or ${n}$", "less than ${n}$", "${n}$ or 1")
    ),
    *((form, "{n}") for form in ("${n}$ million", "${n}$!", "1/${n}$", "2${n}$", "it is not ${n}$", r"not \boxed{{{n}}}")),
    *(
        (form, "{n}")
        for form in (r"{n}\text{{ million}}", r"{n}\text{{ or more}}", r"{n}\ldots", "{n}_2", "{n}_{{8}}", "({n})_8")
    ),
    *((form, "{n}") for form in ("2+2={n}", "2x={n}", r"\pm {n}", "x > {n}", "{n} dozen", "{n}'", r"\boxed{{1}}\boxed{{{n}}}")),
    *(("2${n}$", "2{n}"), (r"2\boxed{{{n}}}", "2{n}"), ("{n}:{p}", "{n}/{p}"), ("{n} cm", "{n} m"), ("{n} am", "{n} pm")),
    *(
        ("{n},1", "({n},1)"),
        (r"\{{{n},1\}}", "({n},1)"),
        (r"\{{1,\{{{n}\}}\}}", r"\{{1,{n}\}}"),
        ("[i,{n}]", "[1,{n}]"),
    ),
    *(("f'(x)={n}", "f(x)={n}"), ("{n}AB", "{n}BA"), (r"\angle ABC = {n}", r"\angle CBA = {n}"), ("{n}A^T", "{n}A")),
    *((r"\sin {n}", r"\sin {n}^\circ"), (r"\vec{{a}}\times\vec{{b}}", r"\vec{{b}}\times\vec{{a}}")),
    *((r"{n}\pi\text{{ cm}}", r"{n}\pi\text{{ m}}"), (r"\frac{{1}}{{{n}}}x", r"\frac{{1}}{{{n}x}}")),
    *(("{n},1,1", "{n},{n},1"), (r"\lim_{{x\to 0}} f(x)/{n}", r"\lim_{{x\to 1}} f(x)/{n}"), ("x = {n} = 2", "2")),
    *((r"\sqrt{{{n}}} \approx 0.5", r"\sqrt{{{n}}}"), ("A({n}, 1)", "({n}, 2)"), (r"\max_x {n}x", r"\max_y {n}x")),
    *(("{n} {p}", "{m}"), (r"{n} \quad {p}", "{m}"), ("({n})({p})", "{m}"), ("[{n}][{p}]", "{m}"), ("{n}{{{p}}}", "{m}")),
    *(
        (r"{n}(\frac{{1}}{{2}})", r"{n}\frac{{1}}{{2}}"),
        ("x = 1.41421356", r"\sqrt{{2}}"),
        (r"x = 0.3333333", r"\frac{{1}}{{3}}"),
    ),
    *((r"x = \frac1{{2^{{9{n}}}}}", r"\frac1{{2^{{8{n}}}}}"), ("{n} to 5{p}", "5{p} to {n}"), ("x={n},{p},{p}", "{n},{p}")),
    *((r"{n} \text{{ for }} 5{p}", r"5{p} \text{{ for }} {n}"), (r"x^{{({n})}}", "x^{n}"), ("{n}!!", "({n}!)!")),
    *((r"x<{n} \text{{ and }} x>{n}", r"x<{n} \text{{ or }} x>{n}"), (r"f^{{-1}}({n})", r"\frac{{1}}{{f({n})}}")),
    *(("E[X^{n}]", "E[X]^{n}"), *((form, "{n}") for form in ("xy={n}", "|x|={n}", r"\log_2 x={n}", r"x\equiv {n}", "x+y={n}"))),
    *((f"[{decimal}, {{n}}]", f"[{exact}, {{n}}]") for decimal, exact in (("0.33333333", "1/3"), ("1.41421356", r"\sqrt 2"))),
    *((r"\pi", "3.14159265358979"), ("{n} tea", "{n} eat"), ("x != {n}", "x = {n}"), (r"{n}\pi", r"-{n}\pi")),
)


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


@FEW
@given(st.data())
def test_math_takes_every_spelling_of_a_formula(matches: Callable[[str, str], bool], data: st.DataObject) -> None:
    _takes_every_spelling(matches, data)


@SOME
@given(st.sampled_from(UNLIKE), st.integers(3, 60), P, st.booleans())
def test_math_takes_no_formula_that_says_more(
    matches: Callable[[str, str], bool], pair: tuple[str, str], n: int, p: int, turned: bool
) -> None:
    one, other = (form.format(n=n, p=p, m=n + p) for form in pair)
    assert not (matches(other, one) if turned else matches(one, other))


@FEW
@given(st.data())
def test_math_takes_no_other_formula_for_it(matches: Callable[[str, str], bool], data: st.DataObject) -> None:
    _takes_no_other(matches, data)


@pytest.mark.slow  # five minutes
@PAIRS
@given(st.data())
def test_math_judges_two_thousand_pairs_of_either_sort(matches: Callable[[str, str], bool], data: st.DataObject) -> None:
    _takes_every_spelling(matches, data)
    _takes_no_other(matches, data)
