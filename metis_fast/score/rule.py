"""The rule judge: equality of numbers and their units, of normalised text, and of yes and no in their usual words."""

from __future__ import annotations

import re

from metis_fast.score import numbers
from metis_fast.score.text import fold, normalise
from metis_fast.types import Prompt

_BOOLEANS = {
    **dict.fromkeys(("yes", "yeah", "yep", "true", "correct"), True),
    **dict.fromkeys(("no", "nope", "false", "incorrect"), False),
}
_FIRST_CLAUSE = re.compile(r"(\w+)\s*[,.;:!]\s*(.*)", re.DOTALL)


def _read_boolean(text: str) -> bool | None:
    """Yes or no, alone or as a first clause ("No, there is none") that nothing after it takes back ("Yes, no")."""
    text = fold(text).casefold()
    alone = _BOOLEANS.get(text.rstrip(".!"))
    if alone is not None:
        return alone
    clause = _FIRST_CLAUSE.fullmatch(text)
    value = _BOOLEANS.get(clause[1]) if clause else None
    if clause is None or value is None:
        return None
    taken_back = any(_BOOLEANS.get(word, value) != value for word in re.findall(r"\w+", clause[2]))
    return None if taken_back else value


def equal(answer: str, gold: str, tolerance: float) -> bool:
    """Whether two texts say the same: the same number, or the same words, or the same of yes and no.

    tolerance: relative, for numbers; see `numbers.equal`.
    """
    same_number = numbers.equal(answer, gold, tolerance)
    if same_number is not None:
        return same_number
    text, gold_text = normalise(answer), normalise(gold)
    if text == gold_text:
        return bool(text) or fold(answer) == fold(gold)
    gold_boolean = _BOOLEANS.get(gold_text)
    return gold_boolean is not None and _read_boolean(answer) == gold_boolean


class RuleMatcher:
    """Judge style "rule"."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance

    async def matches(self, prompt: Prompt, answer: str) -> bool:
        """Whether the answer equals one of the ground truths by `equal`."""
        return any(equal(answer, gold, self._tolerance) for gold in prompt.answers)

    async def check(self) -> None:
        """Nothing can be missing."""

    def close(self) -> None:
        """Nothing to close."""
