"""Our rule for free answers. Right where both say the same; wrong where both are of a kind that can be told apart (numbers, yes
and no, dates, lists of numbers); no verdict on other words, which only a reader can tell."""

from __future__ import annotations

import asyncio
import atexit
import math
import re
from fractions import Fraction
from functools import cache

from metis_fast.evaluate.files.table import spelt
from metis_fast.evaluate.question import RIGHT, WRONG, Question, Verdict
from metis_fast.evaluate.scorers.options import NO_ANSWER
from metis_fast.evaluate.scorers.reply import final_answer
from metis_fast.score import dates, numbers, rule, units
from metis_fast.score.mathematics import MathMatcher
from metis_fast.score.protocol import JudgeUnavailable
from metis_fast.score.text import normalise, one_line
from metis_fast.types import Prompt

OTHER_WORDS = Verdict(None, "other words than the truth's; only a judge can tell")
OTHER_UNIT = Verdict(None, "another unit than the one asked for")
NO_NUMBER = Verdict(None, "a number is asked for, and no single one can be read")
NOT_APPLICABLE = re.compile(r"(?:the answer is )?(?:not applicable|n/?a)[.!]?", re.IGNORECASE)
_PI = re.compile(r"π|pi\b", re.IGNORECASE)
_TIMES_PI = re.compile(r"(-?\d+(?:\.\d+)?)?\s?[*×·]?\s?(?:π|\\?pi)")
_YES_OR_NO = frozenset(("yes", "no", "true", "false"))
_TOLERANCE = 0.0


def text_rule(question: Question, reply: str) -> Verdict:
    """A text, which may be a number, a date, or yes or no."""
    return compare(final_answer(reply).text, question.answer)


def compare(answer: str, truth: str) -> Verdict:
    """Two short texts."""
    if not answer:
        return NO_ANSWER
    if NOT_APPLICABLE.fullmatch(one_line(truth)):
        return RIGHT if NOT_APPLICABLE.fullmatch(one_line(answer)) else _unless_closed(answer)
    if NOT_APPLICABLE.fullmatch(one_line(answer)):
        return WRONG
    if rule.equal(answer, truth, _TOLERANCE):
        return RIGHT
    both = (one_line(answer), one_line(truth))
    if any(_PI.search(text) for text in both):  # to the reader of numbers, a unit
        return OTHER_WORDS
    if all(numbers.read(text) is not None for text in both) or all(dates.read(text) is not None for text in both):
        return WRONG
    if all(normalise(text) in _YES_OR_NO for text in both):
        return WRONG
    return OTHER_WORDS if numbers.read(both[1]) is None else NO_NUMBER


def _unless_closed(answer: str) -> Verdict:
    """Against "not applicable": a number is another answer, words may say the same."""
    return WRONG if numbers.read(one_line(answer)) is not None else OTHER_WORDS


def number_rule(question: Question, reply: str) -> Verdict:
    """A number. extra["precision"]: decimals to which the truth was rounded, so that more of them are right too;
    extra["within"]: an absolute tolerance; extra["unit"]: which may be given or left out."""
    answer = final_answer(reply).text
    if not answer:
        return NO_ANSWER
    return compare_numbers(answer, question.answer, **_limits(question))


def _limits(question: Question) -> dict[str, str]:
    return {name: question.extra.get(name, "") for name in ("unit", "precision", "within")}


def compare_numbers(answer: str, truth: str, unit: str = "", precision: str = "", within: str = "") -> Verdict:
    """Two numbers as text; see `number_rule`."""
    if pi := _TIMES_PI.fullmatch(one_line(answer)):
        answer = str(float(pi[1] or 1) * math.pi)
    given, gold = numbers.read(one_line(answer)), numbers.read(one_line(truth))
    if _PI.search(answer + truth):
        return NO_NUMBER
    if gold is None:
        return Verdict(None, "the truth is no number that can be read")
    if given is None:
        return NO_NUMBER
    wanted = gold.unit or unit
    if given.unit and wanted and not units.same(given.unit, wanted):
        return OTHER_UNIT  # 50 mm may be 5 cm, and 5 kg is not
    if numbers.equal(answer, f"{truth} {unit}" if unit and not gold.unit else truth, _TOLERANCE, rounding=False):
        return RIGHT
    if given.value == gold.value:
        return OTHER_UNIT if given.unit else RIGHT  # one that may not be left out
    off = abs(given.value - gold.value)
    if within:
        return RIGHT if off <= Fraction(within) else WRONG
    if precision and not gold.whole:
        return RIGHT if off < Fraction(1, 2) / 10 ** int(float(precision)) else WRONG
    return WRONG


def list_rule(question: Question, reply: str) -> Verdict:
    """A list of numbers or words, in order."""
    answer = final_answer(reply).text
    if not answer:
        return NO_ANSWER
    given, gold = _members(answer), _members(question.answer)
    if len(gold) < 2:
        return compare(answer, question.answer)
    if len(given) != len(gold):
        return Verdict(None, "no list of as many members as the truth has")
    verdicts = [compare(one, other) for one, other in zip(given, gold, strict=True)]
    if all(verdict.value == 1 for verdict in verdicts):
        return RIGHT
    return WRONG if any(verdict.value == 0 for verdict in verdicts) else OTHER_WORDS


def _members(text: str) -> list[str]:
    found = spelt(text.strip().rstrip("."))
    if isinstance(found, list):
        return [str(part) for part in found]
    return [part.strip(" '\"") for part in re.split(r"\s*(?:[,;]|\band\b)\s*", text.strip(" .[]()")) if part.strip(" '\"")]


@cache
def _mathematics() -> MathMatcher:
    matcher = MathMatcher(_TOLERANCE)
    atexit.register(matcher.close)
    return matcher


def formula_rule(question: Question, reply: str) -> Verdict:
    """A formula, a number or a text, compared as mathematics. It runs helper processes, and may take seconds."""
    answer = final_answer(reply).text
    if not answer:
        return NO_ANSWER
    plain = compare(answer, question.answer)
    if plain.value is not None:
        return plain
    prompt = Prompt("", "", (), (), "", (question.answer,), "math", question.question)
    try:
        same = asyncio.run(_mathematics().compare(prompt, answer)).correct
    except JudgeUnavailable as error:
        return Verdict(None, f"mathematics could not be compared: {error.reason}")
    return RIGHT if same else OTHER_WORDS
