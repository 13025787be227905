"""VLMEvalKit's rules as they behave in the package ms-vlmeval 0.0.20, quirks included, for comparison.

Not as it does: where it draws an option at random, there is no match here; where it would stop with an error, there is no
verdict. What it leaves to its judge has no verdict from its rule. docs/other-kits.md lists what differs from our rules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from metis_fast.evaluate.asking import kept_options
from metis_fast.evaluate.question import RIGHT, WRONG, Question, Verdict

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILED = "Failed to obtain answer via API"
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4  # a letter counts if its first place is among so many words at the end
NO_MATCH = "Z"
_PREFIXES = (  # two pairs are one string each in VLMEvalKit, as a comma lacks between them
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
UNMATCHED = Verdict(0.0, "VLMEvalKit matches no option (exact_matching: wrong; with a judge it asks, then draws one at random)")
ASKS = Verdict(None, "VLMEvalKit's rule reads nothing and asks its judge")
BREAKS = Verdict(None, "VLMEvalKit stops with an error here")
NOTHING = Verdict(0.0, "no answer, which VLMEvalKit reads from its file as nan")


def infer_option(reply: str, options: Mapping[str, str]) -> str | None:
    """The option by its letter, else by its text; "Z": explicitly none; None: no match."""
    return _by_letter(reply, options) or _by_text(reply, options)


def _by_letter(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter that stands as a word of its own, where no other letter does, and near the end."""
    if _FAILED in reply:
        return None
    if any(refusal in reply for refusal in _REFUSALS):
        return NO_MATCH
    words = reply.translate(_MARKS).split()
    named = [letter for letter in options if letter in words]
    if not named:
        return NO_MATCH if NO_MATCH in words else None
    return named[0] if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS else None


def _by_text(reply: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text stands in a reply that is not too long, in any case, also amid a word."""
    if len(reply) > 2 * sum(map(len, options.values())):
        return None
    lowered = reply.lower()
    named = [letter for letter, text in options.items() if text.lower() in lowered]
    return named[0] if len(named) == 1 else None


def option_rule(question: Question, reply: str) -> Verdict:
    """V*, HR-Bench, SEED-Bench-2-Plus with `exact_matching`."""
    letter = infer_option(reply, kept_options(question))
    if letter is None or letter == NO_MATCH:
        return UNMATCHED
    return RIGHT if letter == question.answer else WRONG


def judged_option_rule(question: Question, reply: str) -> Verdict:
    """The same with a judge, which is asked where the rule reads nothing."""
    letter = infer_option(reply, kept_options(question))
    return ASKS if letter is None else RIGHT if letter == question.answer else WRONG


def first_letter(reply: str) -> str:
    """What MME-RealWorld and TreeBench read: the first of the characters A to E, in any word; "" for none.

    Without one, a part of "(a)" is A: an empty reply too.
    """
    if tagged := _TAGGED.search(reply):
        reply = tagged[1].strip().upper()
    text = reply.strip()
    for prefix in _PREFIXES:
        text = text.replace(prefix, "")
    if found := re.search("[ABCDE]", text):
        return found[0]
    if len(text.split()) > 10:
        return ""
    return next((letter for letter in "ABCDE" if text.lower() in f"({letter.lower()})"), "")


def first_letter_rule(question: Question, reply: str) -> Verdict:
    """MME-RealWorld and TreeBench; without a letter wrong."""
    letter = first_letter(reply)
    if not letter:
        return Verdict(0.0, "VLMEvalKit reads no letter and counts it as wrong")
    return RIGHT if letter == question.answer else WRONG


def behind_answer_rule(question: Question, reply: str) -> Verdict:
    """WeMath without a judge: the first character behind the last "Answer", marks left out, if it is one of A to H."""
    rest = re.sub("[><:.]", "", reply.split("Answer")[-1].strip()).strip()
    letter = rest[:1] if rest[:1] and rest[:1] in "ABCDEFGH" else ""
    return RIGHT if letter == question.answer else WRONG


def mathvista_rule(question: Question, reply: str) -> Verdict:
    """MathVista before its judge. Of free answers only a right one is taken without asking, and a right 0 is not."""
    if question.options:
        letter = infer_option(reply, question.options)
        return ASKS if letter is None else RIGHT if letter == question.answer else WRONG
    value = mathvista_value(question, reply)
    return RIGHT if value and not _is_zero(question.answer) else ASKS


def mathvista_value(question: Question, reply: str) -> bool:
    """Whether a free answer is right in the end: text and lists never are."""
    kind = question.extra.get("answer_type", "")
    try:
        if kind == "integer":
            return int(reply) == int(question.answer)
        if kind == "float":
            return float(reply) == float(question.answer)
    except ValueError:
        pass
    return False


def _is_zero(text: str) -> bool:
    try:
        return float(text) == 0
    except ValueError:
        return False


def dynamath_text(reply: str) -> str:
    """What DynaMath's reader makes of a reply: from the first brace to the last, without backslashes."""
    start, stop = reply.find("{"), reply.rfind("}")
    return (reply[start : stop + 1] if 0 <= start < stop else reply).replace("\\", "")


def dynamath_short_answer(text: str, kind: str) -> str | float | None:
    """Of a short answer: its number up to the first space (π counts), its one letter of A to E, or all of it; None: unread.

    Raises:
        ValueError: VLMEvalKit stops there (digits that are no number, like ²).
    """
    if kind == "float":
        if text.isdigit():
            return float(text)
        head = text.split(" ")[0]
        try:
            return float(head.split("π")[0]) * math.pi if "π" in head else float(head)
        except ValueError:
            return None
    if kind == "multiple choice":
        if len(text) == 1:
            return text.upper()
        found = [letter for letter in "ABCDE" if letter in text.upper()]
        return found[0] if len(found) == 1 else None
    return text


def dynamath_read(reply: str, kind: str) -> str | float | None:
    """The short answer of the JSON that was asked for, else of the reply as a whole; None: unread.

    Raises:
        ValueError: VLMEvalKit stops there.
    """
    text = dynamath_text(reply)
    try:
        tree = json.loads(text, strict=False)
    except (ValueError, RecursionError):  # of thousands of brackets
        tree = None
    short = tree.get("short answer") if isinstance(tree, dict) else None
    if short is not None:
        if kind not in ("float", "multiple choice"):
            if not isinstance(short, str):
                raise ValueError("a short answer that is no text")
            return short
        if isinstance(short, str):
            try:
                found = dynamath_short_answer(short, kind)
            except ValueError:
                found = None
            if found is not None:
                return found
    return dynamath_short_answer(text, kind)


def dynamath_compare(question: Question, short: str | float) -> Verdict:
    """Numbers within 0.001, letters exactly, a text if it is a part of the truth (the empty one, too)."""
    if not isinstance(short, str):
        try:
            return RIGHT if abs(short - float(question.answer)) <= 0.001 else WRONG
        except ValueError:
            return BREAKS
    if question.extra.get("answer_type") == "multiple choice":
        return RIGHT if short == question.answer else WRONG
    return RIGHT if short.lower() in question.answer.lower() else WRONG


def dynamath_rule(question: Question, reply: str) -> Verdict:
    """DynaMath before its judge. Of an empty reply its files make "nan", so that it is no part of the true text."""
    if not reply.strip() and question.extra.get("answer_type") == "text":
        return NOTHING
    try:
        short = dynamath_read(reply, question.extra.get("answer_type", ""))
    except ValueError:
        return BREAKS
    return ASKS if short is None else dynamath_compare(question, short)
