"""Our rule for multiple choice: the option that a reply chooses, by letter or by its text; no verdict where that is unclear."""

from __future__ import annotations

import re
from collections.abc import Mapping

from metis_fast.evaluate.question import RIGHT, WRONG, Question, Verdict
from metis_fast.evaluate.scorers.reply import final_answer
from metis_fast.score import choice

_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")
NO_ANSWER = Verdict(0.0, "no answer in the reply")
UNREAD = Verdict(None, "the reply names no single option clearly")


def option_rule(question: Question, reply: str) -> Verdict:
    """Right or wrong where the reply chooses one option; an empty answer is wrong, an unclear one has no verdict."""
    answer = final_answer(reply).text
    if not answer:
        return NO_ANSWER
    chosen = chosen_options(answer, question.options)
    if len(chosen) != 1:
        return UNREAD
    return RIGHT if chosen == [question.answer] else WRONG


def chosen_options(answer: str, options: Mapping[str, str]) -> list[str]:
    """The options that an answer may mean; one where it is clear."""
    if (letter := _LETTER.fullmatch(answer)) and letter[1] in options:  # most replies: not worth the work below
        return [letter[1]]
    known = dict(options)
    return [letter for letter in known if choice.equal(answer, letter, known, 0.0)]


def letters_rule(question: Question, reply: str) -> Verdict:
    """For answers of one or several letters whose options stand in the image: all of them and no other."""
    answer = final_answer(reply).text
    if not answer:
        return NO_ANSWER
    letters, rest = choice.read_choice(answer)
    gold = frozenset(letter for letter in question.answer.upper() if letter.isalpha())
    if not letters or rest:
        return UNREAD
    return RIGHT if letters == gold else WRONG
