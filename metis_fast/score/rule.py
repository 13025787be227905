"""The rule judge: equality of numbers and their units, of normalised text, and of yes and no in their usual words."""

from __future__ import annotations

import re

from metis_fast.score import chemistry, dates, numbers
from metis_fast.score.letter_case import same_words
from metis_fast.score.protocol import Cost, Match, by_truth
from metis_fast.score.text import fold, normalise, one_line, without_accents
from metis_fast.types import Prompt

_BOOLEANS = {
    **dict.fromkeys(("yes", "yeah", "yep", "true", "correct"), True),
    **dict.fromkeys(("no", "nope", "false", "incorrect"), False),
}
_VERB = r"(?:is|are|was|were|does|do|did|has|have|had|can|will)(?:n't)?\b"
# "Yes, the dog is on the left": a subject and its verb.
_CLAUSE = re.compile(
    r"(?P<boolean>\w+)(?:\s*(?P<mark>[,.;!])|\s+-+)?\s+(?P<rest>(?:"
    rf"(?:it|they|he|she|there|this|that|these|those)(?:'s\b|\s+{_VERB})"
    r"|(?:i|we|you)\s+(?:can(?:not|'t)?\s+|do(?:n't| not)\s+)?see"
    rf"|(?:the|an?|this|that|these|those|all|(?P<digits>\d+))\s+(?:[\w'-]+\s+){{1,4}}?{_VERB}"
    r").*)",
    re.DOTALL,
)
_WORD = re.compile(r"[\w']+")
# What turns a clause round, or speaks of truth rather than of the question's matter.
_UNSURE = frozenset(
    (
        *("but", "wait", "maybe", "actually", "perhaps", "unless", "except", "excluding", "probably", "possibly", "likely"),
        *("although", "though", "however", "know", "unsure", "uncertain", "unclear", "think", "guess", "suppose", "believe"),
        *("if", "or", "depends", "depending", "sometimes", "partly", "partially", "almost", "either", "both", "sorry", "oops"),
        *("correction", "rather", "instead", "otherwise", "until", "could", "might", "may", "doubt", "hmm", "question", "yet"),
        *("still", "second", "reconsider", "mistake", "joking", "kidding", "opposite", "contrary", "aber", "mais", "pero"),
        *("when", "only", "provided", "assuming", "some", "rarely", "few", "supposedly", "apparently", "seldom", "while"),
        *("claim", "claims", "statement", "assertion", "premise", "proposition", "answer", "myth", "lie", "lies", "joke"),
        *("hoax", "denied", "denies", "deny", "valid", "accurate", "holds", "agree", "case", "fake", "so", "indeed"),
    )
)
_TURNS_ROUND = re.compile(r"(?:in|un|im|il|ir|dis|mis|non)(?!to\b|side|doors|frared|strument|der|age|dustr|terior|sect)\w{4,}")
_NEGATIONS = frozenset(
    (
        *("not", "never", "no", "none", "nobody", "nothing", "nowhere", "neither", "nor", "hardly", "barely", "scarcely"),
        *("cannot", "cant", "wont", "isnt", "arent", "dont", "doesnt", "didnt", "wasnt", "werent", "without", "wrong"),
        *("fail", "fails", "failed", "lack", "lacks", "lacking", "absent", "missing", "zero", "refuted", "excluded"),
        *("excludes", "nein", "nicht", "kein", "non", "pas", "nunca", "jamais", "false", "incorrect"),
    )
)
_IS_RIGHT = re.compile(r"(?:^|\b(?:is|was|are|be)\s+|'s\s+)right\b(?! of)")
_AFFIRMS = re.compile(  # "No, it does"; "No, the dog is"
    r".*\b(?:is|are|am|was|were|does|do|did|has|have|had|can|will|exists?|there|here|it|them|one|match|too|see)[\s.!]*",
    re.DOTALL,
)
_LEAD_IN = re.compile(
    r"\**(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+|my\s+)?(?:final\s+|correct\s+)?answer\b\**\s*(?:is\b\s*:?|[:=])\**\s*"
    r"|in\s+(?=[12]\d{3}$)",
    re.IGNORECASE,
)
_NAME_OF_A_VALUE = re.compile(r"[A-Za-z]\s?=\s?(?=[-+.\d])")  # x = 42
_FEWEST_CHARS = 1000  # an answer of up to this many, or four times the ground truth's, is read at all


def _follows(value: bool, rest: str) -> bool:
    """Whether a sentence behind yes or no is a plain one that agrees with it, as far as its words say."""
    words = _WORD.findall(rest)
    if re.search(r"[,:;()-]|[.!?]\s", rest):  # more than a plain sentence
        return False
    if not without_accents(rest).isascii() or "?" in rest or _IS_RIGHT.search(rest):
        return False
    if any(word in _UNSURE or _TURNS_ROUND.fullmatch(word) or word in ("yes", "true", "correct") for word in words):
        return False
    denials = sum(word in _NEGATIONS or word.endswith("n't") for word in words)
    return denials == 0 if value else denials == 1 or (denials == 0 and _AFFIRMS.fullmatch(rest) is None)


def _read_boolean(text: str) -> bool | None:
    """Yes or no, alone or before a plain sentence that agrees ("No, there is none"); not "No. 5", nor "Yes, probably not"."""
    text = fold(text).casefold()
    alone = _BOOLEANS.get(text.rstrip(".!"))
    if alone is not None:
        return alone
    clause = _CLAUSE.fullmatch(text)
    value = _BOOLEANS.get(clause["boolean"]) if clause else None
    if clause is None or value is None or (clause["digits"] and clause["mark"] != ","):
        return None
    return value if _follows(value, clause["rest"]) else None


def _without(lead_in: re.Pattern[str], text: str) -> str:
    line = one_line(text)
    found = lead_in.match(line)
    return line[found.end() :] if found and found.end() < len(line) else text


def equal(answer: str, gold: str, tolerance: float) -> bool:
    """Whether two texts say the same: the same number, or the same words, or the same of yes and no.

    tolerance: relative, for numbers; see `numbers.equal`. An answer much longer than the ground truth is not equal.
    """
    if len(answer) > max(_FEWEST_CHARS, 4 * len(gold)):
        return False
    answer, gold = _without(_LEAD_IN, answer), _without(_LEAD_IN, gold)
    if ("=" in answer) != ("=" in gold):
        answer, gold = _without(_NAME_OF_A_VALUE, answer), _without(_NAME_OF_A_VALUE, gold)
    folded, gold_folded = one_line(answer), one_line(gold)
    date, gold_date = dates.read(folded), dates.read(gold_folded)
    if date is not None and gold_date is not None:
        return date == gold_date
    same_number = numbers.equal(answer, gold, tolerance)
    if same_number is not None:
        return same_number
    gold_boolean = _BOOLEANS.get(normalise(gold))
    if gold_boolean is not None:
        return _read_boolean(answer) == gold_boolean
    if chemistry.differ(*map(chemistry.without_subscripts, (folded, gold_folded))):
        return False
    return same_words(answer, gold) or (folded == gold_folded and not normalise(gold))


class RuleMatcher:
    """Judge style "rule"."""

    cost: Cost = Cost()

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance

    async def compare(self, prompt: Prompt, answer: str) -> Match:
        """Whether the answer equals one of the ground truths by `equal`."""
        same = (gold for gold in prompt.answers if equal(answer, gold, self._tolerance))
        return by_truth("rule", next(same, None))

    async def check(self) -> None:
        """Nothing can be missing."""

    def close(self) -> None:
        """Nothing to close."""
