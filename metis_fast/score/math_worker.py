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

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational

from metis_fast.score import units
from metis_fast.score.math_formula import links, members, nothing, point, read, without_names, without_unit
from metis_fast.score.math_marks import (
    UNREAD,
    contradict,
    differ_in_case,
    differ_in_product,
    differ_in_words,
    is_prose,
    say_other_things,
    shape,
)
from metis_fast.score.math_products import without_groups, written_out
from metis_fast.score.math_spelling import both_signs, is_clock, is_in_doubt, ratio, same_spelling, with_fractions

CPU_SECONDS = 3.0  # a comparison takes 1 to 50 ms; some that need sympy's simplification take a second
_MEMORY_BYTES = 4 << 30  # address space; sympy itself needs well under 1 GiB
# math-verify's own removal of units takes "million", too, and makes 5 cm of 5 m.
_NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
_CONFIG = (LatexExtractionConfig(normalization_config=_NORMALIZATION),)
_APPROXIMATED = re.compile(r"(.+?)\s*(?:\\approx|≈)\s*(-?\d+(?:\.\d+)?)\s*", re.DOTALL)
# What sympy raises on odd operands.
_SYMPY_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

_Part = sympy.Basic | sympy.MatrixBase | str  # of what math-verify reads
_FLOAT = 1e-12  # relative: what a decimal number with all its digits may be off


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
    if isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase):
        return one.shape != other.shape or all(map(_is_equal, one.flat(), other.flat()))
    if isinstance(one, sympy.Eq) and not isinstance(other, sympy.Eq):
        return _is_equal(one.rhs, other)
    if isinstance(other, sympy.Eq) and not isinstance(one, sympy.Eq):
        return _is_equal(one, other.rhs)
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
    answer, gold = with_fractions(answer), with_fractions(gold)
    one, other = read(answer), read(gold)
    nothings = [nothing(text) or nothing(formula or "") for text, formula in ((answer, one), (gold, other))]
    if any(nothings):
        return "equal" if nothings[0] == nothings[1] else "different"
    if one is None or other is None:
        return "unparsed"
    if same_spelling(one, other):
        return "equal"
    if is_prose(one) or is_prose(other) or any(map(is_in_doubt, (answer, gold))):
        return "unparsed"
    (one, unit), (other, other_unit) = (without_unit(without_groups(text)) for text in (one, other))
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
    one, other = map(both_signs, without_names(one, other))
    if differ_in_product(one, other) or say_other_things(one, other):
        return "different"
    if UNREAD.search(one) or UNREAD.search(other) or differ_in_words(one, other):
        return "unparsed"
    if contradict(one, other) or differ_in_case(one, other):
        return "different"
    try:
        return _compare_ratios(one, other) if ratio(one) and ratio(other) else _compare_lists(one, other)
    except _SYMPY_ERRORS:
        return "unparsed"


def _compare_ratios(answer: str, gold: str) -> str:
    """By their quotients, one after the other: math-verify would divide 1:2:3, and by 1:3 get 1:6."""
    if is_clock(answer) or is_clock(gold):
        return "equal" if [int(part) for part in ratio(answer)] == [int(part) for part in ratio(gold)] else "different"
    (first, *parts), (gold_first, *gold_parts) = ratio(answer), ratio(gold)
    if len(parts) != len(gold_parts):
        return "different"
    quotients = zip(parts, gold_parts, strict=True)
    results = {_compare(rf"\frac{{{one}}}{{{first}}}", rf"\frac{{{other}}}{{{gold_first}}}") for one, other in quotients}
    return "unparsed" if "unparsed" in results else "different" if "different" in results else "equal"


def _compare_lists(answer: str, gold: str) -> str:
    """`_compare`, and of lists where something stands twice, each part with one of its own: 1, 2, 2 is not 1, 1, 2."""
    result = _compare(answer, gold)
    if result != "equal" or "\\{" in answer + gold or {shape(answer)[0], shape(gold)[0]} != {"listed"}:
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
        end = written_out((links(formula) or [formula.rpartition("=")[2]])[-1])
        value = parse(f"${end}$", _CONFIG, "no_fallback", parsing_timeout=0)
        if not value or not isinstance(value[0], sympy.Expr) or not value[0].is_number:
            return None
        gap = abs(sympy.N(value[0], 30) - sympy.Rational(digits))
        if not gap <= sympy.Rational(1, 10 ** len(digits.partition(".")[2])) / 2:
            return None
    elif re.search(r"\\approx|≈", formula):  # another kind of approximation, of which math-verify takes the first side
        return None
    sides = links(formula)
    if not sides:
        return formula
    return sides[-1] if all(_compare(*pair) == "equal" for pair in itertools.pairwise(sides)) else None


def _compare(answer: str, gold: str) -> str:
    answer, gold = written_out(answer) or "", written_out(gold) or ""
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
