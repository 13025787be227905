"""The multiple-choice judge: a letter from A to H in the ways that models write it, or the text of the option."""

from __future__ import annotations

import re

from metis_fast.score import rule
from metis_fast.types import Prompt

_WRAPPER = re.compile(r"\\(?:boxed|text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}|\$([^$]*)\$|\*\*([^*]*)\*\*")
_LEAD_IN = r"(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*(?:option\s+)?"
_LETTER_ALONE = re.compile(rf"(?:{_LEAD_IN})?[(\[]?([A-H])[)\].:]*", re.IGNORECASE)
# A delimiter is needed before the option's text: "A dog" is an article and a noun.
_LETTER_AND_TEXT = re.compile(
    rf"(?:{_LEAD_IN})?(?:[(\[]([A-H])[)\]][.:]?|([A-H])[).:](?=\s))\s*(.+)", re.IGNORECASE | re.DOTALL
)
_ANOTHER_LETTER = re.compile(r"(?:^|[\s(\[,;/])[A-H](?:[).:\]]|\s*$)")
_OPTION = re.compile(r"(?:^|(?<=[\s(\[]))([A-H])[).:\]]\s*(?=\S)")


def _unwrap(text: str) -> str:
    for _ in range(3):  # \boxed{\text{A}} and the like
        text = _WRAPPER.sub(lambda found: next(part for part in found.groups() if part is not None), text)
    return text.strip().removesuffix(".")


def read_choice(text: str) -> tuple[str, str]:
    """The letter that a text chooses and the option's text after it; ("", text) where it names no letter or several."""
    text = _unwrap(text)
    if alone := _LETTER_ALONE.fullmatch(text):
        return alone[1].upper(), ""
    found = _LETTER_AND_TEXT.fullmatch(text)
    if found is None or _ANOTHER_LETTER.search(found[3]):
        return "", text
    return (found[1] or found[2]).upper(), found[3].strip()


def read_options(question: str) -> dict[str, str]:
    """The options of a question, letter -> text: marks "A." / "(A)" / "A)" in order from A; {} if there are fewer than two."""
    marks: list[re.Match[str]] = []
    for mark in _OPTION.finditer(question):
        if mark[1] == chr(ord("A") + len(marks)):
            marks.append(mark)
    if len(marks) < 2:
        return {}
    stops = [mark.start() for mark in marks[1:]] + [len(question)]
    return {
        mark[1]: question[mark.end() : stop].split("\n")[0].strip(" \t([,;") for mark, stop in zip(marks, stops, strict=True)
    }


def equal(answer: str, gold: str, options: dict[str, str], tolerance: float) -> bool:
    """Whether an answer chooses what the ground truth says; either of them may be a letter, an option's text, or both.

    A letter decides over the text beside it.
    """
    letter, text = read_choice(answer)
    gold_letter, gold_text = read_choice(gold)
    if letter and gold_letter:
        return letter == gold_letter
    if letter:
        text = options.get(letter, text)
    if gold_letter:
        gold_text = options.get(gold_letter, gold_text)
    return bool(text) and bool(gold_text) and rule.equal(text, gold_text, tolerance)


class ChoiceMatcher:
    """Judge style "choice"."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance

    async def matches(self, prompt: Prompt, answer: str) -> bool:
        """Whether the answer chooses one of the ground truths, by letter or by the option's text in `prompt.question`."""
        options = read_options(prompt.question)
        return any(equal(answer, gold, options, self._tolerance) for gold in prompt.answers)

    async def check(self) -> None:
        """Nothing can be missing."""

    def close(self) -> None:
        """Nothing to close."""
