"""Texts that are asked, as VLMEvalKit writes them, and how rows of multiple-choice benchmarks become questions."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping

from metis_fast.data.row import MisfitError
from metis_fast.evaluate.benchmark import Prompt
from metis_fast.evaluate.files.table import Row
from metis_fast.evaluate.question import Question

NA_WORDS = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
        *("NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
"""Cells that pandas reads as missing, so that VLMEvalKit does not show an option like "None"; see `kept_options`."""
_OPTION = re.compile(r"\(?([A-H])[.)]\s*")
SELECT = "Please select the correct answer from the options above. \n"
LETTER = "Answer with the correct option's letter directly. \n"


def letter_options(row: Row, letters: str = string.ascii_uppercase) -> dict[str, str]:
    """Columns A, B, ... that have a value."""
    return {letter: row.text(letter) for letter in letters if row.value(letter) is not None}


def marked_options(entries: list[str]) -> dict[str, str]:
    """Options that carry their letter: "(A) red", "B. blue".

    Raises:
        MisfitError: one has no letter, or a letter comes twice.
    """
    options: dict[str, str] = {}
    for entry in entries:
        mark = _OPTION.match(entry.strip())
        if mark is None or mark[1] in options:
            raise MisfitError("options", "one letter of its own before each option", entry)
        options[mark[1]] = entry.strip()[mark.end() :].strip()
    return options


def checked_letter(row: Row, options: Mapping[str, str], *names: str) -> str:
    """The right letter, which has to be that of an option.

    Raises:
        MisfitError: it is none.
    """
    if not options:
        raise MisfitError("A", "options in columns A, B, ...", None)
    letter = row.text(*names).strip().strip("().").upper()
    if letter not in options:
        raise MisfitError(names[0], f"one of the letters {', '.join(options)}", row.text(*names))
    return letter


def kept_options(question: Question) -> dict[str, str]:
    """The options that VLMEvalKit shows and scores: those that pandas reads as missing are gone."""
    return {letter: text for letter, text in question.options.items() if text not in NA_WORDS}


def choice_prompt(ending: str) -> Prompt:
    """VLMEvalKit's prompt of multiple-choice questions. ending: the sentence behind the options."""
    return lambda question: _choice(question, kept_options(question), ending)


def full_choice_prompt(ending: str) -> Prompt:
    """The same with every option, an option "None" too."""
    return lambda question: _choice(question, question.options, ending)


def _choice(question: Question, options: Mapping[str, str], ending: str) -> str:
    hint = question.extra.get("hint")
    text = (f"Hint: {hint}\n" if hint else "") + f"Question: {question.question}\n"
    if not options:
        return text
    return text + "Options:\n" + "".join(f"{letter}. {option}\n" for letter, option in options.items()) + ending


def plain_prompt(question: Question) -> str:
    """The question as the file has it; options, where there are any, stand in it."""
    return question.question
