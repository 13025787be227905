"""Numbers side by side, which math-verify adds: 2(3) is a product, 3\\frac{1}{2} a mixed number, and 2 3 neither."""

from __future__ import annotations

import re

_GAP = r"(?:\s|~|(?<!\\)\\[ ,;:!]|\\q?quad(?![a-z])|\\(?:text|mathrm|mbox)\s*\{\s*\})"
_SHORT_FRACTION = re.compile(r"\\([dtc]?frac|d?binom)\s*(?:(\d)|\{([^{}]*)\})\s*(?:(\d)|(?=\{))")
_GROUPS = re.compile(r"(?<![\d.])[1-9]\d{0,2}(?:(?:\\[,!]|\{,\})\d{3})+(?!\d)")  # 1\,000
_GROUPS_IN_A_LIST = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,]*\d)")  # 1,000, 2,000
_MIXED = re.compile(
    rf"(?<![\w.)}}\]^\\])(\d+){_GAP}*(?:\\[dt]?frac\s*\{{\s*(\d+)\s*\}}\s*\{{\s*(\d+)\s*\}}"
    r"|(?<=[\s~])(\d+)\s*/\s*(\d+)(?![\w.(]))"
)
_BRACKETS = re.compile(r"\\(?:left|right)\s*(?=[()])")
_BRACED = re.compile(r"(?<![\w^_}\]])\{\s*(\d+)\s*\}")
_BRACKET = r"\([^(),]*\)"
_FACTOR = re.compile(
    rf"((?<![\w.^])\d+(?:\.\d+)?(?=\s*(?:{_BRACKET}|\\[dt]?frac))"
    rf"|(?:\\[dt]?frac\s*\{{[^{{}}]*\}}\s*\{{[^{{}}]*\}}|\\sqrt\s*\{{[^{{}}]*\}}|\\pi|(?<=[\d)}}])π)(?=\s*{_BRACKET})"
    rf"|{_BRACKET}(?=\s*(?:{_BRACKET}|\d|\\[dt]?frac|\\sqrt|\\pi)))"
)
_SIDE_BY_SIDE = re.compile(
    rf"(?<![\d_^.])\d+(?:\.\d+)?(?:{_GAP}+\d|\s*\{{\s*\d)|(?<![\\A-Za-z_^{{])[a-zA-Z]{_GAP}+\d"
    r"|[\d)\]]\s*(?:\\left)?\[\s*-?\d|\]\s*(?:\\left)?\(\s*-?\d"
)


def _braced(found: re.Match[str]) -> str:
    over, under = found[2] or found[3], found[4]
    return rf"\{found[1]}{{{over}}}" + (f"{{{under}}}" if under else "")


def _sum(found: re.Match[str]) -> str:
    whole, over, under = found[1], found[2] or found[4], found[3] or found[5]
    if int(over) < int(under):
        return rf"({whole}+\frac{{{over}}}{{{under}}})"
    return rf"{whole} \cdot \frac{{{over}}}{{{under}}}" if found[2] else found[0]


def with_braces(formula: str) -> str:
    """The formula with braces around the parts of its fractions: \\frac12."""
    return _SHORT_FRACTION.sub(_braced, formula)


def without_groups(formula: str) -> str:
    """The formula with the digits of its large numbers together: 1\\,000, and 1,000 in a list with spaces."""
    formula = _GROUPS.sub(_digits, formula)
    in_a_list = re.search(r",\s", formula) and "(" not in formula
    return _GROUPS_IN_A_LIST.sub(_digits, formula) if in_a_list else formula


def _digits(found: re.Match[str]) -> str:
    return re.sub(r"\D", "", found[0])


def written_out(formula: str) -> str | None:
    """The formula with "+" in its mixed numbers and a dot between other factors; None where numbers only stand side by side."""
    formula = _MIXED.sub(_sum, with_braces(_BRACED.sub(r"\1", formula)))
    if _SIDE_BY_SIDE.search(formula):
        return None
    without_left = _BRACKETS.sub("", formula)
    product = _FACTOR.sub(r"\1 \\cdot ", without_left)
    return formula if product == without_left else product
