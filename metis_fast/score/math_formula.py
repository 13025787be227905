"""The formula in a mathematical answer: what wraps it, leads in to it or follows it taken off. Nothing is evaluated."""

from __future__ import annotations

import re

from metis_fast.score.python_math import as_latex

_DELIMITER = re.compile(r"\$+|\\[()\[\]]")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
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
_MEMBER = re.compile(r"^(\$?)\s*[a-zA-Z]\s*(?:∈|\\in(?![a-z]))\s*")  # x ∈ [0, 1]
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
_EQUALS = re.compile(r"(?<![<>!=:])=(?!=)")


def is_empty(text: str) -> bool:
    return _EMPTY.fullmatch(_WRAPPER.sub(r"\1", text).strip(" .$")) is not None


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
    unboxed = _unboxed(text.strip().strip("`").strip())
    if unboxed is None:
        return None
    text = _MEMBER.sub(r"\1", _SIGNS.sub("-", _CONSTANT.sub(r"\1 ", _FULL_STOP.sub("", unboxed))))
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


def _touches_a_digit(text: str, found: re.Match[str]) -> bool:
    return text[: found.start()].rstrip()[-1:].isdigit() or text[found.end() :].lstrip()[:1].isdigit()


def without_unit(formula: str) -> tuple[str, str]:
    """A formula and the unit in \\text{} at its end."""
    found = _UNIT.fullmatch(formula) or _PLAIN_UNIT.fullmatch(formula)
    power = re.sub(r"[\s{}]", "", found[3] or "") if found else ""
    return (found[1], found[2] + power) if found else (formula, "")


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
