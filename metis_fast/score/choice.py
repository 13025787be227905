"""The multiple-choice judge: letters in the ways that models write them, or the text of the option."""

from __future__ import annotations

import itertools
import re
import unicodedata

from metis_fast.score import rule
from metis_fast.score.text import fold
from metis_fast.types import Prompt

Letters = frozenset[str]
NONE: Letters = frozenset()

_MAX_CHARS = 2000  # a longer answer is no choice
_ROUNDS = 3  # of marks within marks: (`B`)
_WRAPPED = re.compile(r"^(?:\(([^()]*)\)|\[([^\[\]]*)\]|<([^<>]*)>|【([^【】]*)】|\{([^{}]*)\}|\$([^$]*)\$?)$")
_LEAD_IN = re.compile(
    r"^(?:(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)?(?:answers?|options?|choices?)\b"
    r"(?:\s+(?:is|are|would be)\b)?\s*:?\s*"
    r"|it(?:'s|\s+is)\s+|(?:正确)?(?:答案|选项|选择)(?:是|为)?\s*:?\s*|选\s*(?=[A-Z(]))",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"\s*(?:[,;、/&+]|\band\b|和|与|及)\s*|\s+")
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\].:]*")
# A delimiter is needed before the option's text: "A dog" is an article and a noun.
_LETTER_AND_TEXT = re.compile(
    r"(?:[(\[]([A-Za-z])[)\]]\s*[.:,-]?\s*|([A-Za-z])(?:\s*[).:,]\s*|\s+-+\s+|\s+(?=\()))(.+)", re.DOTALL
)
_LETTER_AND_REASON = re.compile(
    r"[(\[]?([A-Za-z])[)\].:]*\s*[,;-]?\s*(?:(?:because|since|as|for|given|due\s+to)\b|因为|由于)(.*)",
    re.DOTALL | re.IGNORECASE,
)
_LETTER_IS_RIGHT = re.compile(
    r"[(\[]?([A-Z])[)\]]?\s+(?:is|looks|seems)\s+(?:the\s+)?(?:correct|right|best|true)(?:\s+(?:answer|option|choice|one))?"
)
_LETTER_BEFORE_TEXT = re.compile(r"([A-Z])\s+(.+)", re.DOTALL)
_ANOTHER_LETTER = re.compile(r"(?:^|[\s(\[,;/])[A-Z](?:[).:\]]|\s*$)")
_ANOTHER_CHOICE = re.compile(
    r"\b(?:answers?|options?|choices?|choose|pick|so|thus|hence|therefore|rather|instead|actually)\W+(?:is\W+|it\W+is\W+|the\W+)*"
    r"(?:answers?\W+is\W+|option\W+)?[(\[]?[A-Z]\b(?!\w)",
    re.IGNORECASE,
)
_OPTION = re.compile(r"(?:^|(?<=[\s(\[]))([A-Z])\s?[).:\]、]\s*(?=\S)")


def _unwrap(text: str) -> str:
    text = fold(text)
    for _ in range(_ROUNDS):
        before = text
        if wrapped := _WRAPPED.match(text):
            text = fold(next(part for part in wrapped.groups() if part is not None))
        text = fold(_LEAD_IN.sub("", text, count=1)) or text
        if text == before:
            break
    return text.lstrip("$")


def _read_letters(text: str) -> Letters:
    """The letters of a text that is letters and nothing else: "B", "A, C", "(A) and (C)", "AC"."""
    if re.fullmatch(r"[A-Z]{2,}", text):  # capitals in order, so that it is no word
        return frozenset(text) if all(a < b for a, b in itertools.pairwise(text)) else NONE
    parts = [part for part in _SEPARATOR.split(text) if part]
    found = [_LETTER.fullmatch(part) for part in parts]
    return frozenset(letter[1].upper() for letter in found if letter) if parts and all(found) else NONE


def read_choice(text: str, options: dict[str, str] | None = None) -> tuple[Letters, str]:
    """The letters that a text chooses and the option's text after a single one; (none, text) where it names none clearly.

    options: of the question; where they are known, other letters are none.
    """
    if len(text) > _MAX_CHARS:
        return NONE, text
    text = _unwrap(text)
    letters, rest = _read(text, options or {})
    return (NONE, text) if options and not letters <= options.keys() else (letters, rest)


def _read(text: str, options: dict[str, str]) -> tuple[Letters, str]:
    if letters := _read_letters(text):
        return letters, ""
    if (found := _LETTER_AND_REASON.fullmatch(text)) and not _ANOTHER_CHOICE.search(found[2]):
        return frozenset(found[1].upper()), ""
    if found := _LETTER_IS_RIGHT.fullmatch(text):
        return frozenset(found[1]), ""
    if found := _LETTER_AND_TEXT.fullmatch(text):
        if _ANOTHER_LETTER.search(found[3]) or _ANOTHER_CHOICE.search(found[3]):
            return NONE, text
        letter = (found[1] or found[2]).upper()
        return frozenset(letter), found[3].strip().removeprefix("(").removesuffix(")")
    if (found := _LETTER_BEFORE_TEXT.fullmatch(text)) and rule.equal(found[2], options.get(found[1], ""), 0.0):
        return frozenset(found[1]), found[2]
    return NONE, text


def read_options(question: str) -> dict[str, str]:
    """The options of a question, letter -> text: marks "A." / "(A)" / "A)" in order from A; {} if there are fewer than two."""
    question = unicodedata.normalize("NFKC", question)
    marks: list[re.Match[str]] = []
    for mark in _OPTION.finditer(question):
        if len(marks) < 26 and mark[1] == chr(ord("A") + len(marks)):
            marks.append(mark)
    if len(marks) < 2:
        return {}
    stops = [mark.start() for mark in marks[1:]] + [len(question)]
    return {
        mark[1]: question[mark.end() : stop].split("\n")[0].strip(" \t([,;") for mark, stop in zip(marks, stops, strict=True)
    }


def equal(answer: str, gold: str, options: dict[str, str], tolerance: float) -> bool:
    """Whether an answer chooses what the ground truth says, all of its letters and no other; either of them may be letters,
    an option's text, or both. A letter beside the text of another option is no choice.
    """
    letters, text = _chosen(answer, options, tolerance)
    gold_letters, gold_text = _chosen(gold, options, tolerance)
    if letters and gold_letters:
        return letters == gold_letters
    if len(letters) > 1 or len(gold_letters) > 1:
        return False
    text, gold_text = (
        "".join(options.get(letter, given) for letter in chosen) if chosen else given
        for chosen, given in ((letters, text), (gold_letters, gold_text))
    )
    return bool(text) and bool(gold_text) and rule.equal(text, gold_text, tolerance)


def _chosen(text: str, options: dict[str, str], tolerance: float) -> tuple[Letters, str]:
    """`read_choice`, with the letter of an option that the whole text is."""
    letters, rest = read_choice(text, options)
    named = frozenset(letter for letter, option in options.items() if rule.equal(rest, option, tolerance)) if rest else NONE
    if not letters:
        return (named, "") if len(named) == 1 else (NONE, rest)
    contradicts = len(letters) == 1 and bool(named) and not letters <= named
    return (NONE, "") if contradicts else (letters, rest)


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
