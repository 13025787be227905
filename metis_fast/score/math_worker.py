"""A process that compares mathematical answers. `mathematics.py` runs this file; it imports nothing of the package.

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

from math_verify import LatexExtractionConfig, parse, verify

CPU_SECONDS = 3.0  # a comparison takes 1 to 50 ms; some that need sympy's simplification take a second
_MEMORY_BYTES = 4 << 30  # address space; sympy itself needs well under 1 GiB
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def _as_latex(text: str) -> str:
    """The whole answer as one formula, or the one formula in it.

    math-verify would pick the last number out of "3 or 5"; that must not match 5.
    """
    if "\\boxed" in text:
        return text
    formulas = _MATH.findall(text)
    if len(formulas) == 1:
        return f"${''.join(formulas[0])}$"
    bare = re.sub(r"\$|\\[()\[\]]", "", text)
    return f"${bare}$"


def compare(answer: str, gold: str) -> str:
    """ "equal" or "different" by math-verify; "unparsed" where either text is no formula."""
    config = (LatexExtractionConfig(),)
    # No time-outs of math-verify's own: they replace the handler of SIGALRM and cannot stop what takes long.
    got, wanted = (parse(_as_latex(text), config, "no_fallback", parsing_timeout=0) for text in (answer, gold))
    if not got or not wanted:
        return "unparsed"
    return "equal" if verify(wanted, got, timeout_seconds=0) else "different"


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
