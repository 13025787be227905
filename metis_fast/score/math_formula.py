"""The formula in a mathematical answer: what wraps it, leads in to it or follows it taken off. Nothing is evaluated."""

from __future__ import annotations

import re

from metis_fast.score.python_math import as_latex

_DELIMITER = re.compile(r"\$+|\\[()\[\]]")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")

# What may stand before a formula and say no more than it.
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore|then)\b,?\s*)?(?:we\s+(?:get|have|find|obtain)\s*)?"
    r"(?:(?:(?:the|my|our|your)\s+)?(?:(?:final|correct|exact|required|desired|simplified|numerical)\s+)*"
    r"(?:answers?|values?|results?|solutions?|roots?|sum|product|area|volume|probability|length|expression|number)\s*"
    r"(?:of\s+[a-zA-Z]\s*)?)?(?:it\s+)?(?:(?:is|are|equals)\b|[:=])?\s*(?:[a-zA-Z]\s*=)?",
    re.IGNORECASE,
)
_MORE_WORDS = re.compile(r"(?!(?:and|or)\b)\b[^\W\d_]{2,}", re.IGNORECASE)

# What says that there is no solution.
_EMPTY = re.compile(
    r"(?:there (?:is|are) )?no (?:real |such |integer |valid )*(?:solutions?|values?|roots?)(?: exists?)?|empty set"
    r"|∅|\\emptyset|\\varnothing|\{\s*\}|\\\{\s*\\\}",
    re.IGNORECASE,
)
_WRAPPER = re.compile(r"\\(?:text|mathrm|boxed)\{([^{}]*)\}")
_DOES_NOT_EXIST = re.compile(r"(?:(?:the )?limit )?(?:DNE|does not exist|doesn't exist)", re.IGNORECASE)
_OPTION = re.compile(r"^\s*\$?\s*\\text(?:bf)?\s*\{\s*\(?[A-Z]\)\s*\}(?:\s|\\[ ,;])*(?=.)")  # \text{(B) } 5
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")
_MEMBER = re.compile(r"^[a-zA-Z]\s*(?:∈|\\in(?![a-z]))\s*(?=[(\[])")  # x ∈ [0, 1]
_FULL_STOP = re.compile(r"(?<=[\w)}\]$])\.(?=\$*$)")
_ROOT = re.compile(r"√\s*(?:(\d+(?:\.\d+)?|[a-zA-Z])(?![\w.π(\\])|\(([^()]*)\))")  # √2x may be the root of either
_SIGNS = re.compile(r"\+\s*-")  # 14 + -1i
_CONSTANT = re.compile(r"\\mathrm\s*\{([eid])\}")
_UNIT = re.compile(
    r"(.*[\d)}\]a-zA-Z])(?:\s|\\[,;:! ])*\\(?:text|textrm|mathrm|mbox)\s*\{\s*([^{}\d]{2,}?)\s*\}\s*(\^\s*\{?[23]\}?)?\s*",
    re.DOTALL,
)
_PLAIN_UNIT = re.compile(  # without \text; other letters are factors
    r"(.*(?:[\d)}\]]|\\pi|\bpi|π))\s*(?<![a-z])((?:(?:sq(?:uare|\.)?|cubic)\s+)?"
    r"(?:[kcm]m|kg|m[lL]|(?:centi|milli|kilo)?met(?:er|re)s?|inch(?:es)?|feet|ft|miles?|units?|degrees?|radians?|seconds?|hours?))"
    r"\s*(\^\s*\{?[23]\}?)?",
    re.DOTALL,
)
_POINT = re.compile(r"[A-Z]\s*=?\s*(?=(?:\\left)?\(.*\d.*,|(?:\\left)?\(.*,.*\d)")
_NAME = re.compile(
    r"""\s*(?:(?:m\s*)?\\angle\s*[A-Z]{1,3}
    |\\(?:vec|bar|hat|mathbf|over(?:line|rightarrow))\s*\{?\s*[A-Za-z]{1,2}\s*\}?
    |\\(?:text|mathrm|textbf)\s*\{[^{}\d]*\}
    |(?!\\?(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|lg|exp|sqrt|det|dim|max|min|gcd|lcm|deg|pi|infty|pm|sum|prod|int
      |not|neq?|approx|sim|leq?|geq?|lt|gt|in|notin|equiv)(?![a-z]))
      (?:\\[a-zA-Z]+|[A-Za-z]{4,}(?:\s+[A-Za-z]+)*|[A-Z]{2}|[A-Za-z])
    |\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))
    (?:_(?:\{[\w,\s]*\}|\w))?(?:\s*(?:\\left)?\([^()=]*\))?\s*""",
    re.VERBOSE,
)
_INDEXED = re.compile(r"([a-z])_\{?[1-9]\}?\s*=(?!=)")
_EQUALS = re.compile(r"(?<![<>!=:])=(?!=)")


def nothing(text: str) -> str:
    """Which nothing a text is: "empty" where there is no solution, "undefined" where a limit does not exist, "" for others."""
    bare = _WRAPPER.sub(r"\1", text).strip(" .$")
    return "empty" if _EMPTY.fullmatch(bare) else "undefined" if _DOES_NOT_EXIST.fullmatch(bare) else ""


def _says_no_more(before: str, after: str) -> bool:
    """Whether the text around a formula leaves its meaning as it is: "The answer is $6$.", but not "not $6$" or "- $6$"."""
    before, after = (_DELIMITER.sub("", part).strip(" *`\n\t") for part in (before, after))
    return _LEAD_IN.fullmatch(before) is not None and after in ("", ".")


def _unboxed(text: str) -> str | None:
    """The text with what its one box holds; None where there are several, or where words or digits beside it say more."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return text
    depth, end = 1, boxes[0].end()
    while end < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    before, inside, after = text[: boxes[0].start()], text[boxes[0].end() : end - 1], text[end:]
    if len(boxes) > 1 or depth:
        return None
    if _says_no_more(before, after):
        return inside
    if _MORE_WORDS.search(before + " " + after) or before[-1:].isalnum() or after[:1].isalnum():
        return None
    return f"{before} {{{inside}}} {after}"


def read(text: str) -> str | None:
    """The whole answer as one formula, or the one formula in it; None where words say more.

    math-verify would pick the last number out of "3 or 5"; that must not match 5.
    """
    formula = _read(text)
    return None if formula is None else _MEMBER.sub("", formula.strip().removeprefix("=").lstrip())


def _read(text: str) -> str | None:
    text = text.strip().strip("`").strip()
    unboxed = _unboxed(bold[1] if (bold := _BOLD.fullmatch(text)) else text)
    if unboxed is None:
        return None
    text = _SIGNS.sub("-", _CONSTANT.sub(r"\1 ", _FULL_STOP.sub("", unboxed)))
    text = _REPEATING.sub(_fraction, _OPTION.sub("", text).replace("∞", r"\infty "))
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)
    if (formula := as_latex(text)) is not None:
        return formula
    found = list(_MATH.finditer(text))
    if len(found) == 1 and _says_no_more(text[: found[0].start()], text[found[0].end() :]):
        return "".join(part or "" for part in found[0].groups())
    outside = _MATH.sub("  ", text)
    if found and (_MORE_WORDS.search(outside) or any(_touches_a_digit(text, one) for one in found)):
        return None
    lead = _LEAD_IN.match(text) if not found else None
    if lead and lead[0].rstrip().endswith(("is", "are", "equals", ":")):
        text = text[lead.end() :]
    return _DELIMITER.sub(" ", text)


def _fraction(found: re.Match[str]) -> str:
    """Of 0.1666…, with a line over the 6."""
    whole, once, again = found.groups()
    over = int(whole + once + again) - int(whole + once or 0)
    return rf"\frac{{{over}}}{{{(10 ** len(again) - 1) * 10 ** len(once)}}}"


def _touches_a_digit(text: str, found: re.Match[str]) -> bool:
    return text[: found.start()].rstrip()[-1:].isdigit() or text[found.end() :].lstrip()[:1].isdigit()


def without_unit(formula: str) -> tuple[str, str]:
    """A formula and the unit in \\text{} at its end."""
    found = _UNIT.fullmatch(formula) or _PLAIN_UNIT.fullmatch(formula)
    power = re.sub(r"[\s{}]", "", found[3] or "") if found else ""
    return (found[1], found[2] + power) if found else (formula, "")


def has_a_name(formula: str) -> bool:
    """Whether a single name stands before the "=": x, f(x), \\theta, area, the segment AB; but not 2x, xy, |x| or \\log x."""
    return _NAME.fullmatch(formula.partition("=")[0]) is not None


def without_names(one: str, other: str) -> tuple[str, str]:
    """Two formulas without their names, x = 5 and 5, where only one has any, or both the same."""
    named = [formula.partition("=") if _is_named(formula) else ("", "", formula) for formula in (one, other)]
    names = {re.sub(r"\s", "", name) for name, mark, _ in named if mark}
    if len(names) == 1 and all(mark or "=" not in formula for _, mark, formula in named):
        return named[0][2], named[1][2]
    indexed = [_INDEXED.findall(formula) for formula in (one, other)]
    if "=" not in one + other or ("=" in one and "=" in other):
        return one, other
    letters = indexed[0] or indexed[1]  # x_1 = 1, x_2 = 2, which are roots
    if len(set(letters)) == 1 and len(letters) == (one + other).count("="):
        return _INDEXED.sub("", one), _INDEXED.sub("", other)
    return one, other


def _is_named(formula: str) -> bool:
    return len(_EQUALS.findall(formula)) == formula.count("=") == 1 and has_a_name(formula)


def point(formula: str) -> tuple[str, str]:
    """The name of a point and its coordinates, of P(1, 2) and P = (1, 2); ("", formula) for what has none."""
    formula = formula.strip()
    found = _POINT.match(formula)
    bare = formula[found.end() :] if found else formula
    is_whole = bare.count("(") == bare.count(")") == 1 and bare.endswith(")")
    return (formula[0], bare) if found and is_whole else ("", formula)


def links(formula: str) -> list[str]:
    """The sides of a chain x = 2 + 3 = 5, apart from a name at its beginning; [] where it is none."""
    if re.search(r",|;|\bor\b|\band\b|\\text|\\approx|≈|\\begin", formula):
        return []
    sides = [side.strip() for side in _EQUALS.split(formula)]
    if len(sides) < 3 or not all(sides):
        return []
    return sides[1:] if re.fullmatch(r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?", sides[0]) else sides


def members(formula: str) -> list[str]:
    """What a list without brackets, or a set, has between its commas."""
    text = re.sub(r"\\(?:left|right)(?![a-z])", "", formula).strip().removesuffix(".")
    if text.startswith(r"\{") and text.endswith(r"\}"):
        text = text[2:-2]
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]
