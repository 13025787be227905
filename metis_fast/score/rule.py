"""The rule judge: equality of numbers and their units, of normalised text, and of yes and no in their usual words."""

from __future__ import annotations

import re

from metis_fast.score import chemistry, dates, numbers
from metis_fast.score.text import fold, normalise, one_line, without_accents
from metis_fast.types import Prompt

_BOOLEANS = {
    **dict.fromkeys(("yes", "yeah", "yep", "true", "correct"), True),
    **dict.fromkeys(("no", "nope", "false", "incorrect"), False),
}
_FIRST_CLAUSE = re.compile(r"(\w+)\s*[,.;:!]\s*(.*)", re.DOTALL)


_WORD = re.compile(r"[\w']+")
_IS_RIGHT = re.compile(r"(?:^|\b(?:is|was|are|be)\s+|'s\s+)right\b")
_TAKES_BACK = frozenset(
    (
        *("but", "wait", "maybe", "actually", "perhaps", "unless", "except", "excluding", "probably", "possibly", "likely"),
        *("although", "though", "however", "know", "unsure", "uncertain", "unclear", "think", "guess", "suppose", "believe"),
        *("if", "or", "depends", "depending", "sometimes", "partly", "partially", "almost", "either", "both", "sorry", "oops"),
        *("correction", "rather", "instead", "otherwise", "until", "could", "might", "may", "doubt", "hmm", "question", "yet"),
        *("still", "second", "reconsider", "mistake", "joking", "kidding", "opposite", "contrary", "aber", "mais", "pero"),
    )
)
_NEGATIONS = frozenset(
    (
        *("not", "never", "no", "none", "nobody", "nothing", "nowhere", "neither", "nor", "hardly", "barely", "scarcely"),
        *(
            "cannot",
            "cant",
            "wont",
            "isnt",
            "arent",
            "dont",
            "doesnt",
            "didnt",
            "wasnt",
            "werent",
            "without",
            "wrong",
            "untrue",
        ),
        *(
            "fail",
            "fails",
            "failed",
            "lack",
            "lacks",
            "lacking",
            "absent",
            "missing",
            "zero",
            "refuted",
            "excluded",
            "excludes",
        ),
        *("nein", "nicht", "kein", "non", "pas", "nunca", "jamais", "impossible", "unlikely"),
    )
)
_AFFIRMS = re.compile(  # "No, it does"
    r"(?:it|they|he|she|there|this|that|these|those|we|you|i)\s+(?:is|are|am|was|were|does|do|did|has|have|had|can|will|would|exists?)"
    r"(?:\s+(?:so|indeed|one|exist|match|it|(?:contain|include|have|show)\s+(?:it|one|them)))?\s*[.!]*"
)
_FEWEST_CHARS = 1000  # an answer of up to this many, or four times the ground truth's, is read at all


def _is_taken_back(value: bool, rest: str) -> bool:
    if re.match(r"\d", rest) or not rest.isascii():  # "No. 5"
        return True
    words = _WORD.findall(rest)
    if any(_BOOLEANS.get(word, value) != value or word in _TAKES_BACK for word in words):
        return True
    denied = any(word in _NEGATIONS or word.endswith("n't") for word in words)
    if value:
        return denied
    if _AFFIRMS.fullmatch(rest):
        return True
    return bool(_IS_RIGHT.search(rest)) or (denied and any(_BOOLEANS.get(word) is False and word != "no" for word in words))


def _read_boolean(text: str) -> bool | None:
    """Yes or no, alone or as a first clause ("No, there is none") that nothing after it takes back ("Yes, probably not")."""
    text = fold(text).casefold()
    alone = _BOOLEANS.get(text.rstrip(".!"))
    if alone is not None:
        return alone
    clause = _FIRST_CLAUSE.fullmatch(text)
    value = _BOOLEANS.get(clause[1]) if clause else None
    if clause is None or value is None:
        return None
    return None if _is_taken_back(value, clause[2]) else value


def equal(answer: str, gold: str, tolerance: float) -> bool:
    """Whether two texts say the same: the same number, or the same words, or the same of yes and no.

    tolerance: relative, for numbers; see `numbers.equal`. An answer much longer than the ground truth is not equal.
    """
    if len(answer) > max(_FEWEST_CHARS, 4 * len(gold)):
        return False
    folded, gold_folded = one_line(answer), one_line(gold)
    date, gold_date = dates.read(folded), dates.read(gold_folded)
    if date is not None and gold_date is not None:
        return date == gold_date
    same_number = numbers.equal(answer, gold, tolerance)
    if same_number is not None:
        return same_number
    text, gold_text = normalise(answer), normalise(gold)
    gold_boolean = _BOOLEANS.get(gold_text)
    if gold_boolean is not None:
        return _read_boolean(answer) == gold_boolean
    if text.isascii() != gold_text.isascii():
        text, gold_text = without_accents(text), without_accents(gold_text)
    if text != gold_text or chemistry.differ(*map(chemistry.without_subscripts, (folded, gold_folded))):
        return False
    return bool(text) or folded == gold_folded


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
