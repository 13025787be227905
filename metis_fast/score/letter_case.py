"""Where the case of letters counts in a text: in symbols (mW, Aa, CO, f(x)), but not in words (USB, the Of of a title)."""

from __future__ import annotations

import re

from metis_fast.score import chemistry, units
from metis_fast.score.text import Word, without_accents, words

_UNIT = re.compile(r"[pnuµmcdkKMGT](?:[mgslLWVANJbBFTC]|Hz|Pa|eV|Wh|bps)")  # a metric prefix and a symbol
_GENOTYPE = re.compile(r"(?i)(?!ii$)(?:([a-z])\1)+")  # AaBb; World War II is none
_MARKS = frozenset("=+*^<>|_×·√!'≥≤~")
_ELEMENTS_AND_WORDS = frozenset(("al", "am", "as", "at", "be", "he", "in", "la", "md", "mt", "no", "os"))


def _runs(parts: list[Word]) -> list[str]:
    """Letters and digits that stand together, a LaTeX command with its backslash."""
    runs: list[str] = []
    for part in parts:
        if part.glued and runs and part.text.isalnum() and (runs[-1][-1].isalnum() or runs[-1] == "\\"):
            runs[-1] += part.text
        else:
            runs.append(part.text)
    return runs


def _is_plain(run: str) -> bool:
    return run.islower() or run.isupper() or (run[:1].isupper() and run[1:].islower())


def _may_differ(one: str, other: str, before: str, after: str, last: str) -> bool:
    """Whether two runs that differ in case alone are one word, between `before` and `after`, which `last` follows."""
    folded = one.casefold()
    one, other = one.lstrip("0123456789"), other.lstrip("0123456789")
    if "\\" in one or _GENOTYPE.fullmatch(one) or (len(one) == 2 and one[1].isdigit()):  # x1
        return False
    if len(one) == 1:
        is_article = folded in ("a", "i") and len(after) > 1 and after.isalpha()
        is_prefix = after == "-" and len(last) > 2 and last.isalpha()  # X-ray
        return (folded == one.casefold() and not before + after) or is_article or is_prefix
    if chemistry.differ(one, other) and folded not in _ELEMENTS_AND_WORDS:
        return False
    if _UNIT.fullmatch(one) and _UNIT.fullmatch(other):
        return units.same(one, other)
    plain = _is_plain(one), _is_plain(other)
    if len(one) == 2:
        return all(plain) and not _MARKS & {before, after}
    return all(plain) or (any(plain) and (len(one) > 4 or not (one.istitle() or other.istitle())))


def same_words(one: str, other: str) -> bool:
    """Whether two texts have the same words, in whatever case words may have. Texts without any words have none."""
    parts, others = words(one), words(other)
    if one.isascii() != other.isascii():
        parts, others = ([Word(without_accents(word.text), word.glued) for word in listed] for listed in (parts, others))
    if not parts or [part.text.casefold() for part in parts] != [part.text.casefold() for part in others]:
        return False
    runs, other_runs = _runs(parts), _runs(others)
    if len(runs) != len(other_runs):
        runs, other_runs = ([part.text for part in listed] for listed in (parts, others))
    around = ["", *runs, "", ""]
    return all(
        mine == theirs or _may_differ(mine, theirs, before, after, last)
        for mine, theirs, (before, _, after, last) in zip(
            runs, other_runs, (around[i : i + 4] for i in range(len(runs))), strict=True
        )
    )


def has_words(text: str, part: str) -> bool:
    """Whether the words of a text have those of another one in a row."""
    wanted, found = ([word.text for word in words(given)] for given in (part, text))
    rows = (found[i : i + len(wanted)] for i in range(len(found) - len(wanted) + 1))
    return bool(wanted) and any(all(map(_same_word, row, wanted)) for row in rows)


def _same_word(one: str, other: str) -> bool:
    return one == other or (one.casefold() == other.casefold() and _may_differ(one, other, "x", "x", ""))
