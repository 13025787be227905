"""Formulas as they are spelt: the same one in other words of LaTeX, both signs, ratios, and what may be read in two ways."""

from __future__ import annotations

import re

from metis_fast.score.math_products import with_braces

_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits)(?![a-zA-Z])")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_ROOT = re.compile(r"\\sqrt\s*(\d|[a-zA-Z](?![a-zA-Z]))")
_ONE_CHAR = re.compile(r"([\^_])\s*\{\s*(\w)\s*\}")
_THIN = re.compile(r"\\[,;:! ]|~")
_SPACE = re.compile(r"\s+")
_SIGNS = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])|[±∓]")
_SEVERAL = re.compile(r"[,;=<>:|&]|\\(?:text|begin|leq?|geq?|lt|gt|in|or|and|quad)(?![a-zA-Z])|\b(?:or|and)\b")
_NO_RATIO = re.compile(r"[,;=<>|&]|\\(?:text|begin|mid|to|colon|\{|leq?|geq?|in)(?![a-zA-Z])")
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?")
_FACTOR = r"(?:\d+(?:\.\d+)?|[a-zA-Z](?![a-zA-Z]{3})|\\pi(?![a-zA-Z])|π)(?:\s*\^\s*(?:\{[^{}]*\}|\w))?"
_APART = re.compile(r"(?<![\w.}/^])(\d+)\s*/\s*(\d+)\s+(?=[a-zA-Zπ√(\\])")  # 1/2 x
_IN_DOUBT = re.compile(  # 1/2x, a/b c, 4/3\pi r^3, 1/2(x + 1)
    rf"(?<=[\w)}}π])\s*/\s*{_FACTOR}(?:\s|\\[,;:! ]|\\left)*"
    r"(?:(?!(?:or|and)\b)[a-zA-Zπ√(]|\\(?!(?:c?dot|times|text|mathrm|leq?|geq?|lt|gt|pm|mp|right|quad|in|cup|cap|approx|div|circ)"
    r"(?![a-zA-Z]))[a-zA-Z])"
)
_WIDE = re.compile(r"\\q?quad(?![a-zA-Z])")
_JOINED = re.compile(r"(?:[,;.]|\\text\s*\{[^{}]*\}|\b(?:or|and))\s*$")
_JOINS = re.compile(r"\s*(?:[,;(]|\\(?:text|mathrm)\b|(?:or|and)\b)")


def _canonical(formula: str) -> str:
    formula = _ROOT.sub(r"\\sqrt{\1}", with_braces(_FRACTION.sub(r"\\frac", _SIZES.sub("", formula))))
    formula = _ONE_CHAR.sub(r"\1\2", _THIN.sub(" ", formula)).strip()
    return _SPACE.sub(lambda gap: " " if _counts(formula, gap) else "", formula)


def _counts(formula: str, gap: re.Match[str]) -> bool:
    """Whether a space tells something: 1 2 is not 12, 1, 200 not 1,200, \\pi r not \\pir."""
    before, after = formula[gap.start() - 1], formula[gap.end()]
    return (before.isalnum() or before == ",") and after.isalnum()


def same_spelling(one: str, other: str) -> bool:
    """Whether two formulas are one, but for spaces, sizes of brackets, kinds of fractions and braces around one character."""
    return _canonical(one) == _canonical(other)


def with_fractions(text: str) -> str:
    """Two numbers and a slash, with a space behind them, as a fraction: 1/2 bh, but not 1/2bh."""
    return _APART.sub(r"\\frac{\1}{\2} ", text)


def both_signs(formula: str) -> str:
    """The two values of a formula with one plus-minus as a list; any other formula as it is."""
    signs = list(_SIGNS.finditer(formula))
    if len(signs) != 1 or _SEVERAL.search(formula):
        return formula
    before, after = formula[: signs[0].start()], formula[signs[0].end() :]
    plus = "+" if before.strip() else ""
    return f"{before}{plus}{after}, {before}-{after}"


def ratio(formula: str) -> list[str]:
    """The parts of a:b or a:b:c; [] for what is none."""
    parts = [part.strip() for part in formula.split(":")]
    return parts if len(parts) > 1 and all(parts) and not _NO_RATIO.search(formula) else []


def is_clock(formula: str) -> bool:
    """Whether it may be a time of day: 12:30 is no 2:5 there."""
    return _CLOCK.fullmatch(re.sub(r"\s", "", formula)) is not None


def is_in_doubt(formula: str) -> bool:
    """Whether it may be read in two ways: a factor behind a slash and another one, or formulas side by side."""
    if _IN_DOUBT.search(formula) or ("\\\\" in formula and "\\begin" not in formula):
        return True
    return any(
        formula[: gap.start()].strip()
        and formula[gap.end() :].strip()
        and not _JOINED.search(formula[: gap.start()])
        and not _JOINS.match(formula[gap.end() :])
        for gap in _WIDE.finditer(formula)
    )
