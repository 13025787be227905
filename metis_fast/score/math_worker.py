"""A process that compares mathematical answers; `mathematics.py` runs it.

Reads one JSON list [answer, gold] a line, writes one line for each: "equal", "different", or "unparsed".

It is a process of its own because a policy can write 9**9**9**9: no signal handler and no thread time-out interrupts the
integer power inside, and it holds the interpreter lock meanwhile. Here the kernel ends the process, at a limit of CPU
seconds (so a busy machine changes no verdict) or of memory; the reader of the pipe sees that and starts another one.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import resource
import signal
import sys
from collections import Counter

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational

from metis_fast.score import units
from metis_fast.score.math_formula import is_empty, links, members, point, read, without_unit

CPU_SECONDS = 3.0  # a comparison takes 1 to 50 ms; some that need sympy's simplification take a second
_MEMORY_BYTES = 4 << 30  # address space; sympy itself needs well under 1 GiB
# math-verify's own removal of units takes "million", too, and makes 5 cm of 5 m.
_NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
_CONFIG = (LatexExtractionConfig(normalization_config=_NORMALIZATION),)
_APPROXIMATED = re.compile(r"(.+?)\s*(?:\\approx|≈)\s*(-?\d+(?:\.\d+)?)\s*", re.DOTALL)
# What sympy raises on odd operands.
_SYMPY_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

# Of these math-verify takes no notice: the rule judge compares them as text.
_UNREAD = re.compile(
    r"['′″]|\\prime(?![a-z])|\\[dt]?frac\s*\{\s*(?:d|\\partial)|\d\s*(?:\\right)?[)}]?\s*_"  # f'(x); 1101_2
    r"|\\(?:lim|limsup|liminf|sup|inf|max|min|argmax|argmin)\s*(?:_|\\limits)"
    r"|[A-Z)\]}]\s*\^\s*\{?\s*(?:T|H|\\top|\\intercal|\\dagger|\*)(?![a-zA-Z])|\.{2,}|…|\\[lcdv]?dots(?![a-z])"
    r"|\\(?:mathbf|boldsymbol|vec|overrightarrow|bm|hat)[^=]*\\(?:times|cross|wedge)(?![a-z])|[A-Z}]\s*(?:\\times|×)\s*[A-Z\\]"
)
_UNEQUAL = re.compile(r"\\neq?(?![a-z])|!=|≠|\\not(?![a-z])")
_DEGREES = re.compile(r"°|\\circ(?![a-z])|\\degree")
_ANGLE = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)")
_NAMELESS = re.compile(r"\s*[-+]?\s*\d|.*?[-+*/^]|.*?\\(?:times|cdot|div|sqrt|d?frac)(?![a-z])")  # no name before "="
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mbox|mathbf|mathit)\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z*]+\}|\\[a-zA-Z]+")
_KNOWN_WORDS = frozenset(
    (
        *(
            "sin",
            "cos",
            "tan",
            "cot",
            "sec",
            "csc",
            "sinh",
            "cosh",
            "tanh",
            "arcsin",
            "arccos",
            "arctan",
            "asin",
            "acos",
            "atan",
        ),
        *(
            "log",
            "ln",
            "exp",
            "sqrt",
            "pi",
            "oo",
            "inf",
            "infinity",
            "alpha",
            "beta",
            "gamma",
            "delta",
            "theta",
            "lambda",
            "mu",
        ),
        *("phi", "omega", "and", "or", "frac", "max", "min", "gcd", "lcm", "det", "mod", "lim"),
    )
)


_DOT = re.compile(r"[A-Za-z}|)]\s*\\cdot\s*(?:\\|[A-Za-z(])")
_CROSS = re.compile(r"[A-Za-z}|)]\s*\\(?:times|wedge)\s*(?:\\|[A-Za-z(])")
_CASED = re.compile(r"(?i)\\(?:gamma|delta|theta|lambda|xi|pi|sigma|upsilon|phi|psi|omega)(?![a-z])")
_Part = sympy.Basic | sympy.MatrixBase | str  # of what math-verify reads
_FLOAT = 1e-6  # relative: what a decimal number with digits enough may be off


def _words(formula: str) -> Counter[str]:
    return Counter(re.findall(r"[^\W\d_]{2,}", _COMMAND.sub(" ", formula))) - Counter(dict.fromkeys(_KNOWN_WORDS, 99))


def _differ_in_words(one: str, other: str) -> bool:
    """Whether words differ, which the parser takes for products: `tea` and `eat`, `5 \\text{ million}` and 5."""
    texts = [_words(" ".join(_TEXT.findall(text))) for text in (one, other)]
    words, other_words = _words(one), _words(other)
    differ = (words - other_words) + (other_words - words)
    anagrams = words != other_words and Counter("".join(sorted(word)) for word in words.elements()) == Counter(
        "".join(sorted(word)) for word in other_words.elements()
    )
    return texts[0] != texts[1] or anagrams or any(len(word) > 3 for word in differ)


def _is_prose(text: str) -> bool:
    words = _words(text)
    return words.total() > 1 and re.search(r"[\d=+*/^\\<>_]", text) is None


def _shape(formula: str) -> tuple[str, int]:
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


def _has_no_name(formula: str) -> bool:
    left, mark, _ = formula.partition("=")
    return bool(mark) and left[-1:] not in ("<", ">", "!") and _NAMELESS.match(left) is not None


def _contradict(one: str, other: str) -> bool:
    """Whether two formulas differ in what math-verify leaves out."""
    shapes = _shape(one), _shape(other)
    brackets = {shape for shape, _ in shapes} == {"bracketed", "listed"}
    angles = bool(_DEGREES.search(one)) != bool(_DEGREES.search(other)) and bool(_ANGLE.search(one) or _ANGLE.search(other))
    equations = ("=" in one) != ("=" in other) and (_has_no_name(one) or _has_no_name(other))
    unequal = bool(_UNEQUAL.search(one)) != bool(_UNEQUAL.search(other))
    parts = "\\{" not in one + other and shapes[0][0] == shapes[1][0] == "listed" and one.count(",") != other.count(",")
    pairs = {text.strip()[:1] + text.strip()[-1:] for text in (one, other)} == {"[]", "()"}
    return (
        pairs
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


def _differ_in_case(one: str, other: str) -> bool:
    """Whether letters differ in case alone, which math-verify folds: `\\pi R^2` and `\\pi r^2`."""
    letters, others = _letters(one), _letters(other)
    return letters != others and {letter.casefold() for letter in letters} == {letter.casefold() for letter in others}


def _differ_in_product(one: str, other: str) -> bool:
    """Whether one has a dot where the other has a cross, between letters or vectors."""
    dots, crosses = (tuple(bool(mark.search(text)) for text in (one, other)) for mark in (_DOT, _CROSS))
    return (dots[0] and crosses[1]) or (dots[1] and crosses[0])


def _names(formula: str) -> set[str]:
    return set(re.findall(r"([A-Za-z]\w*)\s*=(?!=)", formula))


def _says_other_things(one: str, other: str) -> bool:
    """Whether values belong to other names, or stand at the end of a chain: `a = 2, b = 1` and 1, 2; `x = 3 = 5` and 5."""
    names, others = _names(one), _names(other)
    if names != others and max(len(names), len(others)) > 1:
        return True
    lefts = [re.sub(r"\s", "", text.partition("=")[0]) for text in (one, other) if "=" in text]
    if len(lefts) == 2 and lefts[0] != lefts[1] and any(re.search(r"\([^()]*\d", left) for left in lefts):
        return True
    return any(
        len(re.findall(r"(?<![<>!=])=(?!=)|\\approx", text)) > 1 and not re.search(r",|;|\bor\b|\band\b|\\text", text)
        for text in (one, other)
    )


def _is_rounded(one: sympy.Expr, other: sympy.Expr) -> bool:
    """Whether one is a decimal number and the other an irrational one, which it can only be near to."""
    return isinstance(one, sympy.Float) and other.is_rational is not True and not other.has(sympy.Float)


def _is_equal(one: object, other: object) -> bool:
    """Whether two things that math-verify takes for equal are: it rounds to six decimals, where 1 / 2**98 equals 1 / 2**99."""
    if isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr):
        if _is_rounded(one, other) or _is_rounded(other, one):
            return False
        if one.free_symbols or other.free_symbols or not (one.is_number and other.is_number):
            return True
        if isinstance(one, sympy.Rational) and isinstance(other, sympy.Rational):
            return one == other
        gap, size = abs(sympy.N(one - other, 30)), max(abs(sympy.N(one, 30)), abs(sympy.N(other, 30)))
        inexact = one.has(sympy.Float) or other.has(sympy.Float)
        return not (gap.is_comparable and size.is_comparable) or bool(gap <= (_FLOAT if inexact else 1e-15) * size)
    if isinstance(one, sympy.FiniteSet) and isinstance(other, sympy.FiniteSet):
        return all(any(_is_equal(a, b) for b in other.args) for a in one.args)
    if isinstance(one, sympy.Basic) and isinstance(other, sympy.Basic) and type(one) is type(other):
        same = len(one.args) == len(other.args)
        return not same or all(_is_equal(a, b) for a, b in zip(one.args, other.args, strict=True))
    return True


def _one_symbol_a_name(part: _Part) -> _Part:
    """The parser has symbols of one name that differ (real or not, by what stands before them), and reads i as one of them."""
    if not isinstance(part, sympy.Basic) or part.has(Relational):  # which a replacement would evaluate
        return part
    known = {"i": sympy.I}
    return part.xreplace({symbol: known.get(str(symbol), sympy.Symbol(str(symbol), real=True)) for symbol in part.free_symbols})


def compare(answer: str, gold: str) -> str:
    """ "equal" or "different" by math-verify; "unparsed" where either text is no formula, or of what it leaves out."""
    if is_empty(answer) or is_empty(gold):
        return "equal" if is_empty(answer) and is_empty(gold) else "different"
    one, other = read(answer), read(gold)
    if one is None or other is None or _is_prose(one) or _is_prose(other):
        return "unparsed"
    (one, unit), (other, other_unit) = without_unit(one), without_unit(other)
    if unit != other_unit:
        same = units.same(unit, other_unit) if unit and other_unit else units.may_be_left_out(unit or other_unit)
        if not same or units.PERCENT in units.names(unit) ^ units.names(other_unit):
            return "different"
    try:
        ends = [_end_of_chain(text) for text in (one, other)]
    except _SYMPY_ERRORS:
        return "unparsed"
    if ends[0] is None or ends[1] is None:
        return "different"
    one, other = ends[0], ends[1]
    (name, bare), (other_name, other_bare) = point(one), point(other)
    if name == other_name or not (name and other_name):
        one, other = bare, other_bare
    if _differ_in_product(one, other) or _says_other_things(one, other):
        return "different"
    if _UNREAD.search(one) or _UNREAD.search(other) or _differ_in_words(one, other):
        return "unparsed"
    if _contradict(one, other) or _differ_in_case(one, other):
        return "different"
    try:
        return _compare_lists(one, other)
    except _SYMPY_ERRORS:
        return "unparsed"


def _compare_lists(answer: str, gold: str) -> str:
    """`_compare`, and of lists where something stands twice, each part with one of its own: 1, 2, 2 is not 1, 1, 2."""
    result = _compare(answer, gold)
    if result != "equal" or "\\{" in answer + gold or {_shape(answer)[0], _shape(gold)[0]} != {"listed"}:
        return result
    left = members(gold)
    for part in members(answer):
        twin = next((i for i, other in enumerate(left) if _compare(part, other) == "equal"), None)
        if twin is None:
            return "different" if _repeats(members(answer)) or _repeats(members(gold)) else result
        del left[twin]
    return result


def _repeats(parts: list[str]) -> bool:
    return any(_compare(one, other) == "equal" for one, other in itertools.combinations(parts, 2))


def _end_of_chain(formula: str) -> str | None:
    """What x = 2 + 3 = 5 or x = \\sqrt{2} \\approx 1.41 comes to, 5 and \\sqrt{2}; None where its sides are not equal."""
    if found := _APPROXIMATED.fullmatch(formula):
        formula, digits = found[1], found[2]
        value = parse(f"${(links(formula) or [formula.rpartition('=')[2]])[-1]}$", _CONFIG, "no_fallback", parsing_timeout=0)
        if not value or not isinstance(value[0], sympy.Expr) or not value[0].is_number:
            return None
        gap = abs(sympy.N(value[0], 30) - sympy.Rational(digits))
        if not gap <= sympy.Rational(1, 10 ** len(digits.partition(".")[2])) / 2:
            return None
    sides = links(formula)
    if not sides:
        return formula
    return sides[-1] if all(_compare(*pair) == "equal" for pair in itertools.pairwise(sides)) else None


def _compare(answer: str, gold: str) -> str:
    # No time-outs of math-verify's own: they replace the handler of SIGALRM and cannot stop what takes long.
    got, wanted = (parse(f"${text}$", _CONFIG, "no_fallback", parsing_timeout=0) for text in (answer, gold))
    if not got or not wanted:
        return "unparsed"
    got, wanted = ([_one_symbol_a_name(part) for part in parts] for parts in (got, wanted))
    if not verify(wanted, got, timeout_seconds=0):
        return "different"
    return "equal" if _is_equal(wanted[0], got[0]) else "different"


def main() -> None:
    """Serve until standard input closes."""
    logging.disable(logging.CRITICAL)  # math-verify warns that it has no time-out
    if sys.platform == "linux":  # macOS refuses a limit of address space; the one of CPU seconds holds there too
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes our input
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        result = compare(answer, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(result, flush=True)


if __name__ == "__main__":
    main()
