"""What math-verify leaves out of formulas, and takes for equal: marks, words, brackets, names, the case of letters."""

from __future__ import annotations

import re
from collections import Counter

from metis_fast.score.math_formula import has_a_name

# Of these math-verify takes no notice: the rule judge compares them as text.
UNREAD = re.compile(
    r"['′″]|\\prime(?![a-z])|\\[dt]?frac\s*\{\s*(?:d|\\partial)|\d\s*(?:\\right)?[)}]?\s*_"  # f'(x); 1101_2
    r"|\\(?:lim|limsup|liminf|sup|inf|max|min|argmax|argmin)\s*(?:_|\\limits)"
    r"|[A-Z)\]}]\s*\^\s*\{?\s*(?:T|H|\\top|\\intercal|\\dagger|\*)(?![a-zA-Z])|\.{2,}|…|\\[lcdv]?dots(?![a-z])"
    r"|\\(?:mathbf|boldsymbol|vec|overrightarrow|bm|hat)[^=]*\\(?:times|cross|wedge)(?![a-z])|[A-Z}]\s*(?:\\times|×)\s*[A-Z\\]"
    r"|(?<![a-zA-Z\\])[\w)}]\s*\^\s*(?:\{[^{}]*\}|\w)\s*_"  # 2^{n}_{2}
    r"|!!|!\s*\)\s*!|\^\s*\{\s*\(\s*\w{1,3}\s*\)\s*\}|(?<![A-Za-z\\])[fghFGH]\s*\^\s*\{\s*-\s*1\s*\}\s*(?:\\left)?\("  # x^{(2)}
    r"|(?<![A-Za-z\\])(?:E|\\mathbb\s*\{E\})\s*(?:\\left)?[\[(]"  # an expected value
    r"|\d\s+(?:to|for|by|per|of|from|vs|versus|against|until|through|over|out|in|into|at|with)\s+[-\d(\\]"
)
_UNEQUAL = re.compile(r"\\neq?(?![a-z])|!=|≠|\\not(?![a-z])")
_CONGRUENT = re.compile(r"\\equiv(?![a-z])|≡")
_RELATION = re.compile(r"[<>≤≥]|\\[lg](?:eq?|t)(?![a-z])")
_AND, _OR = re.compile(r"\band\b|\\land(?![a-z])|\\wedge|∧"), re.compile(r"\bor\b|\\lor(?![a-z])|\\vee|∨")
_DEGREES = re.compile(r"°|\\circ(?![a-z])|\\degree")
_ANGLE = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)")
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mbox|mathbf|mathit)\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z*]+\}|\\[a-zA-Z]+")
_KNOWN_WORDS = frozenset(
    (
        *("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "asin", "acos"),
        *("atan", "log", "ln", "exp", "sqrt", "pi", "oo", "inf", "infinity", "alpha", "beta", "gamma", "delta", "theta"),
        *("lambda", "mu", "phi", "omega", "and", "or", "frac", "max", "min", "gcd", "lcm", "det", "mod", "lim"),
    )
)
_DOT = re.compile(r"[A-Za-z}|)]\s*\\cdot\s*(?:\\|[A-Za-z(])")
_CROSS = re.compile(r"[A-Za-z}|)]\s*\\(?:times|wedge)\s*(?:\\|[A-Za-z(])")
_AT_A_VALUE = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*\([^()]*\d[^()]*\)")  # f(1), P(X = 1)
_CASED = re.compile(r"(?i)\\(?:gamma|delta|theta|lambda|xi|pi|sigma|upsilon|phi|psi|omega)(?![a-z])")


def _words(formula: str) -> Counter[str]:
    return Counter(re.findall(r"[^\W\d_]{2,}", _COMMAND.sub(" ", formula))) - Counter(dict.fromkeys(_KNOWN_WORDS, 99))


def differ_in_words(one: str, other: str) -> bool:
    """Whether words differ, which the parser takes for products: `tea` and `eat`, `5 \\text{ million}` and 5."""
    if any(_stands_between(text) for text in (one, other)):
        return True
    texts = [_words(" ".join(_TEXT.findall(text))) for text in (one, other)]
    words, other_words = _words(one), _words(other)
    differ = (words - other_words) + (other_words - words)
    anagrams = words != other_words and Counter("".join(sorted(word)) for word in words.elements()) == Counter(
        "".join(sorted(word)) for word in other_words.elements()
    )
    return texts[0] != texts[1] or anagrams or any(len(word) > 3 for word in differ)


def _stands_between(formula: str) -> bool:
    """Whether words other than "and" and "or" stand between two parts: 3 \\text{ to } 5 is another range than 5 to 3."""
    inside = list(_TEXT.finditer(formula))
    return any(
        re.search("[a-z]{2}", text[1])
        and text[1].strip() not in ("and", "or")
        and re.search(r"\w", formula[: text.start()])
        and re.search(r"\w", formula[text.end() :])
        for text in inside
    )


def is_prose(text: str) -> bool:
    words = _words(text)
    return words.total() > 1 and re.search(r"[\d=+*/^\\<>_]", text) is None


def shape(formula: str) -> tuple[str, int]:
    """How a list is written, with brackets of its own ("bracketed") or as a set or without any ("listed"), "" where it is
    none; and how many sets are within it."""
    text = re.sub(r"\\(?:left|right)(?![a-z])|\s", "", formula).removesuffix(".")
    sets = text.count(r"\{")
    depth, whole, comma = 0, True, False
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        comma = comma or (char == "," and depth <= 1)
        whole = whole and (depth > 0 or i == len(text) - 1 or char == "\\")
    if text.startswith(r"\{") and whole:
        return "listed", sets - 1
    if text[:1] in ("(", "[") and whole and comma:
        return "bracketed", sets
    return "listed" if comma and "=" not in text and not whole and "begin" not in text else "", sets


def _is_an_equation(formula: str) -> bool:
    left, mark, _ = re.sub(r"_\s*\{[^{}]*=[^{}]*\}", "", formula).partition("=")  # not of a sum from i = 1
    return bool(mark) and left[-1:] not in ("<", ">", "!") and not has_a_name(formula)


def contradict(one: str, other: str) -> bool:
    """Whether two formulas differ in what math-verify leaves out."""
    shapes = shape(one), shape(other)
    brackets = {shape for shape, _ in shapes} == {"bracketed", "listed"}
    angles = bool(_DEGREES.search(one)) != bool(_DEGREES.search(other)) and bool(_ANGLE.search(one) or _ANGLE.search(other))
    equations = ("=" in one) != ("=" in other) and (_is_an_equation(one) or _is_an_equation(other))
    congruent = bool(_CONGRUENT.search(one)) != bool(_CONGRUENT.search(other))
    joined = any(_AND.search(text) and _OR.search(another) for text, another in ((one, other), (other, one)))
    conditions = joined and _RELATION.search(one) is not None
    unequal = bool(_UNEQUAL.search(one)) != bool(_UNEQUAL.search(other))
    parts = "\\{" not in one + other and shapes[0][0] == shapes[1][0] == "listed" and one.count(",") != other.count(",")
    pairs = {text.strip()[:1] + text.strip()[-1:] for text in (one, other)} == {"[]", "()"}
    return (
        pairs
        or congruent
        or conditions
        or parts
        or brackets
        or angles
        or equations
        or unequal
        or shapes[0][1] != shapes[1][1]
        or (":" in one) != (":" in other)
    )


def _letters(formula: str) -> set[str]:
    """Letters and Greek commands of what stands behind a name; words are none."""
    text = re.sub(r"(?<![\\A-Za-z])[A-Za-z]{3,}", " ", re.sub(r"^\s*[A-Za-z]\w*\s*=", "", formula))
    return set(_CASED.findall(text)) | set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", text)))


def differ_in_case(one: str, other: str) -> bool:
    """Whether letters differ in case alone, which math-verify folds: `\\pi R^2` and `\\pi r^2`."""
    letters, others = _letters(one), _letters(other)
    return letters != others and {letter.casefold() for letter in letters} == {letter.casefold() for letter in others}


def differ_in_product(one: str, other: str) -> bool:
    """Whether one has a dot where the other has a cross, between letters or vectors."""
    dots, crosses = (tuple(bool(mark.search(text)) for text in (one, other)) for mark in (_DOT, _CROSS))
    return (dots[0] and crosses[1]) or (dots[1] and crosses[0])


def _names(formula: str) -> set[str]:
    return set(re.findall(r"([A-Za-z]\w*)\s*=(?!=)", formula))


def say_other_things(one: str, other: str) -> bool:
    """Whether values belong to other names, or stand at the end of a chain: `a = 2, b = 1` and 1, 2; `x = 3 = 5` and 5."""
    names, others = _names(one), _names(other)
    if names != others and max(len(names), len(others)) > 1:
        return True
    lefts = [re.sub(r"\s|\\(?:left|right)", "", text.partition("=")[0]) for text in (one, other) if "=" in text]
    if len(lefts) == 2 and lefts[0] != lefts[1] and all(_AT_A_VALUE.fullmatch(left) for left in lefts):
        return True
    return any(
        len(re.findall(r"(?<![<>!=])=(?!=)|\\approx", text)) > 1 and not re.search(r",|;|\bor\b|\band\b|\\text", text)
        for text in (one, other)
    )
