"""A process that compares mathematical answers; `mathematics.py` runs it.

Reads one JSON list [answer, gold] a line, writes one line for each: "equal", "different", or "unparsed".

It is a process of its own because a policy can write 9**9**9**9: no signal handler and no thread time-out interrupts the
integer power inside, and it holds the interpreter lock meanwhile. Here the kernel ends the process, at a limit of CPU
seconds (so a busy machine changes no verdict) or of memory; the reader of the pipe sees that and starts another one.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import sys

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational

from metis_fast.score.python_math import as_latex

CPU_SECONDS = 3.0  # a comparison takes 1 to 50 ms; some that need sympy's simplification take a second
_MEMORY_BYTES = 4 << 30  # address space; sympy itself needs well under 1 GiB
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


# What says that there is no solution.
_EMPTY = re.compile(
    r"(?:there (?:is|are) )?no (?:real |such |integer |valid )*(?:solutions?|values?|roots?)(?: exists?)?|empty set"
    r"|∅|\\emptyset|\\varnothing|\{\s*\}|\\\{\s*\\\}",
    re.IGNORECASE,
)
_WRAPPER = re.compile(r"\\(?:text|mathrm|boxed)\{([^{}]*)\}")
_MEMBER = re.compile(r"^(\$?)\s*[a-zA-Z]\s*(?:∈|\\in(?![a-z]))\s*")  # x ∈ [0, 1]
_Part = sympy.Basic | sympy.MatrixBase | str  # of what math-verify reads
_SIGNS = re.compile(r"\+\s*-")  # 14 + -1i
_FLOAT = 1e-6  # relative: what a decimal number with digits enough may be off


def _is_empty(text: str) -> bool:
    return _EMPTY.fullmatch(_WRAPPER.sub(r"\1", text).strip(" .$")) is not None


def _as_latex(text: str) -> str:
    """The whole answer as one formula, or the one formula in it.

    math-verify would pick the last number out of "3 or 5"; that must not match 5.
    """
    text = _MEMBER.sub(r"\1", _SIGNS.sub("-", text.strip().strip("`").strip()))
    if (formula := as_latex(text)) is not None:
        return f"${formula}$"
    if "\\boxed" in text:
        return text
    formulas = _MATH.findall(text)
    if len(formulas) == 1:
        return f"${''.join(formulas[0])}$"
    bare = re.sub(r"\$|\\[()\[\]]", "", text)
    return f"${bare}$"


def _is_equal(one: object, other: object) -> bool:
    """Whether two things that math-verify takes for equal are: it rounds to six decimals, where 1 / 2**98 equals 1 / 2**99."""
    if isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr):
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
    """ "equal" or "different" by math-verify; "unparsed" where either text is no formula."""
    if _is_empty(answer) or _is_empty(gold):
        return "equal" if _is_empty(answer) and _is_empty(gold) else "different"
    config = (LatexExtractionConfig(),)
    # No time-outs of math-verify's own: they replace the handler of SIGALRM and cannot stop what takes long.
    got, wanted = (parse(_as_latex(text), config, "no_fallback", parsing_timeout=0) for text in (answer, gold))
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
