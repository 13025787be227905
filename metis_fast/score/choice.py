"""The multiple-choice judge: letters in the ways that models write them, or the text of the option."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable

from metis_fast.score import rule
from metis_fast.score.letter_case import has_words, same_words
from metis_fast.score.protocol import Cost, Match, by_truth
from metis_fast.score.text import fold, normalise, one_line
from metis_fast.types import Prompt

Letters = frozenset[str]
NONE: Letters = frozenset()

_MAX_CHARS = 2000  # a longer answer is no choice
_ROUNDS = 3  # of marks within marks: (`B`)
_WRAPPED = re.compile(r"^(?:\(([^()]*)\)|\[([^\[\]]*)\]|<([^<>]*)>|【([^【】]*)】|\{([^{}]*)\}|\$([^$]*)\$?)$")
_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|hence|therefore)\b,?\s*)?(?:I\s+(?:think|believe|choose|pick|select|would\s+say|say)\s+(?:that\s+)?)?"
    r"(?:(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)?(?:answers?|options?|choices?)\b"
    r"(?:\s+(?:is|are|would be|must be)\b)?\s*:?\s*"
    r"|it(?:'s|\s+is)\s+|(?:应该|应)(?=选)|(?:正确)?(?:答案|选项|选择)(?:是|为)?\s*:?\s*|选\s*(?=[A-Z(]))?",
    re.IGNORECASE,
)
_BOLD_LETTER = re.compile(r"(?<![\w*])(\*\*|__|`)(\(?[A-Za-z][).:]*)\1(?![\w*])")
_SEPARATOR = re.compile(r"[^\S\n]*(?:[,;、/&+]|\band\b|和|与|及)[^\S\n]*|[^\S\n]+")  # what stands in lines is no list
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\].:]*")
# A delimiter is needed before the option's text: "A dog" is an article and a noun. What may be a sign or a decimal point,
# (B) -5, is one only with a space behind it.
_LETTER_AND_TEXT = re.compile(
    r"(?:[(\[]([A-Za-z])[)\]]\s*(?:[:,]\s*|[.-]+\s+)?"
    r"|([A-Za-z])(?:\s*[):,]\s*|\.(?!\d)\s*|\s+-+\s+|\s+(?=\()|\s*\n))(.+)",
    re.DOTALL,
)
# "a for loop" and "I as an assistant" are no reasons.
_LETTER_AND_REASON = re.compile(
    r"(?:[(\[]?([A-Za-z])[)\].:]*\s*[,;-]?\s*(?:(?:because|since)\b|因为|由于)"
    r"|(?:[(\[]?([A-Za-z])[)\].:]*\s*[)\].:,;-]|([BCDEFGHJ-Z]))\s*(?:as|for|given|due\s+to)\b)(.*)",
    re.DOTALL,
)
_LETTER_IS_RIGHT = re.compile(
    r"[(\[]?([A-Z])[)\]]?\s+(?:is|looks|seems)\s+(?:the\s+)?(?:(?:correct|right|best|true)(?:\s+(?:answer|option|choice|one))?"
    r"|(?:answer|option|choice))"
)
_LETTERS_ARE_RIGHT = re.compile(
    r"(?:both\s+)?(.+?)(?:\s+are\s+(?:both\s+)?(?:the\s+)?(?:correct|right|true)(?:\s+(?:answer|option|choice)s)?)?"
)
_LETTER_BEFORE_TEXT = re.compile(r"([A-Z])\s+(.+)", re.DOTALL)
_OTHERS_ARE_WRONG = re.compile(
    r"(?:\(?[A-Z]\)?(?:\s*(?:,|and|or|,\s*and)\s*\(?[A-Z]\)?)*|(?:(?:all|none\s+of)\s+)?(?:the\s+)?(?:others?|rest|remaining)"
    r"(?:\s+(?:options?|choices?|answers?|ones?))?)\s+"
    r"(?:is|are|was|were|do|does)\s*(?:n't|not)?\s*(?:all\s+)?(?:clearly\s+|both\s+)?(?:wrong|incorrect|false|impossible|right|correct|true|fit)\b"
)
_TAKES_BACK = re.compile(
    r"\b(?:not|no|never|none|neither|nor|wrong|incorrect|false|untrue|but|wait|however|actually|although|though|maybe|perhaps|or"
    r"|instead|rather|unless|except|also|too|well|both|either|better|now|eliminated|excluded|impossible|unlikely|ruled|cannot"
    r"|unsure|guess|doubt|know|probably|possibly|correction|sorry|oops|other|others|another|second|if|might|may|could|yes"
    r"|first|third|fourth|fifth|last|previous|next|former|latter|\d+(?:st|nd|rd|th)|contradict\w*|refut\w*|fail\w*|lack\w*|invalid"
    r"|inaccurate|untenable|unsupported|distractor\w*|worst|least|exclud\w*|reject\w*|opposite|out|disagree\w*"
    r"|trap|trick\w*|decoy|bait|mistak\w*|mislead\w*|irrelevant|discard\w*|dismiss\w*)\b|n't|[?!]",
    re.IGNORECASE,
)
_A_LETTER = re.compile(r"(?<![\w'])(?!I\s+(?!is\b|are\b)[a-z])(?:[A-Z]|[b-hj-z])(?![\w'])")  # not of "I counted"
_LITTLE_WORDS = frozenset(("a", "an", "the", "of", "to", "is", "it", "be", "as", "and", "i"))
# A reason that is in nobody's words.
_AFFIRMS = re.compile(
    r"(?:it|this|that)(?:'s|\s+(?:is|best|clearly|exactly|really|simply))*\s*(?:the\s+)?"
    r"(?:fits|matches|agrees|correct|right|true|best)\b(?:\s+(?:it|best|well|exactly|here|answer|option|choice|one|the\s+\w+))?[\s.!]*"
    r"|(?:is\s+)?(?:correct|right|true|best|only)[\s.!]*",
    re.IGNORECASE,
)
_MARKS = tuple(
    re.compile(rf"(?:^|(?<=[\s(\[])){mark}\s*(?=\S)", re.MULTILINE)
    for mark in (
        r"(?<=\()([A-Z])\s?\)",
        r"(?<=\[)([A-Z])\s?\]",
        r"(?<![(\[])([A-Z])\s?[)\]]",
        r"([A-Z])\s?\.",
        r"([A-Z])\s?[:、]",
    )
)
_SMALL_MARK = re.compile(r"^[ \t]*\(?([a-z])[).](?=\s)", re.MULTILINE)


def _unwrap(text: str) -> str:
    text = _BOLD_LETTER.sub(r"\2", fold(text))
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
    parts = _SEPARATOR.split(re.sub(r"[,;、\s]+$", "", text))
    found = [_LETTER.fullmatch(part) for part in parts]
    return frozenset(letter[1].upper() for letter in found if letter) if all(found) else NONE


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
    if found := _LETTER_AND_REASON.fullmatch(text):
        letter, reason = (found[1] or found[2] or found[3]).upper(), found[4].strip()
        if _supports(letter, reason, options):
            return frozenset(letter), ""
    if found := _LETTER_IS_RIGHT.fullmatch(text):
        return frozenset(found[1]), ""
    if (found := _LETTERS_ARE_RIGHT.fullmatch(text)) and (letters := _read_letters(found[1])):
        return letters, ""
    if found := _LETTER_AND_TEXT.fullmatch(text):
        letter, rest = (found[1] or found[2]).upper(), found[3].strip()
        if rest.startswith("(") and rest.endswith(")"):
            rest = rest[1:-1]
        if not options:
            return (NONE, text) if _TAKES_BACK.search(rest) else (frozenset(letter), rest)
        if named := _named(rest, options, 0.0):
            return (frozenset(letter), rest) if letter in named else (NONE, text)
        return (frozenset(letter), "") if _supports(letter, rest, options) else (NONE, text)
    if (found := _LETTER_BEFORE_TEXT.fullmatch(text)) and rule.equal(found[2], options.get(found[1], ""), 0.0):
        return frozenset(found[1]), found[2]
    return NONE, text


def _supports(letter: str, reason: str, options: dict[str, str]) -> bool:
    """Whether what is said after a letter speaks for it: in the words of its option, or as "it fits", or by "A is wrong"; and
    names no other option and takes nothing back."""
    rest = _OTHERS_ARE_WRONG.sub(lambda found: "" if _denies(found[0], letter) else found[0], reason)
    if _TAKES_BACK.search(rest) or any(found[0].upper() != letter for found in _A_LETTER.finditer(rest)):
        return False
    own = options.get(letter, "")
    others = [option for other, option in options.items() if other != letter]
    if any(has_words(rest, option) and not has_words(own, option) for option in others):
        return False
    said, mine = set(normalise(rest).split()), set(normalise(own).split())
    theirs = {word for option in others for word in normalise(option).split() if len(word) > 2 or word.isdigit()}
    if said & (theirs - mine) and not said & (mine - theirs):
        return False
    return not said or _AFFIRMS.fullmatch(rest) is not None or bool(said & (mine - theirs - _LITTLE_WORDS))


def _denies(clause: str, letter: str) -> bool:
    denied = re.search(r"n't|\bnot\b", clause) is not None
    wrong = re.search(r"(?:wrong|incorrect|false|impossible)$", clause) is not None
    named = re.findall(r"(?<!\w)[A-Z](?!\w)", clause)
    return denied != wrong and letter not in named and not clause.startswith("none")


def _last_run(marks: Iterable[re.Match[str]]) -> list[re.Match[str]]:
    """The last marks in order from A, of those that are at least two."""
    best: list[re.Match[str]] = []
    run: list[re.Match[str]] = []
    for mark in marks:
        if mark[1] == "A":
            run = []
        if len(run) < 26 and mark[1] == chr(ord("A") + len(run)):
            run.append(mark)
        if len(run) > 1:
            best = run
    return best


def _at_line_start(mark: re.Match[str]) -> bool:
    line = mark.string.rfind("\n", 0, mark.start()) + 1
    return not mark.string[line : mark.start()].strip(" \t([*")


def read_options(question: str) -> dict[str, str]:
    """The options of a question, letter -> text: marks "A." / "(A)" / "A)" / "a)" in order from A; {} if fewer than two.

    The marks are of one kind. Those at the beginning of lines go before others, longer runs before shorter, later before
    earlier ones: the question itself may be about the persons A and B.
    """
    question = unicodedata.normalize("NFKC", question)
    if _SMALL_MARK.search(question) and not any(kind.search(question) for kind in _MARKS):
        question = _SMALL_MARK.sub(lambda mark: mark[0].upper(), question)
    marks: list[re.Match[str]] = []
    for key in (_at_line_start, None):
        runs = [_last_run(filter(key, kind.finditer(question)) if key else kind.finditer(question)) for kind in _MARKS]
        marks = max(runs, key=lambda run: (len(run), run[0].start() if run else 0))
        if marks:
            break
    if not marks:
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
        unknown = text if not options else ""  # "E. coli" may be no choice of E
        return letters == gold_letters and (not unknown or rule.equal(unknown, gold_text, tolerance))
    if len(letters) > 1 or len(gold_letters) > 1:
        return False
    text, gold_text = (
        "".join(options.get(letter, given) for letter in chosen) if chosen else given
        for chosen, given in ((letters, text), (gold_letters, gold_text))
    )
    return bool(text) and bool(gold_text) and rule.equal(text, gold_text, tolerance)


def _named(text: str, options: dict[str, str], tolerance: float) -> Letters:
    """The options that a text is: as it is spelt, else in the same words, else equal to the rule judge."""
    same: tuple[Callable[[str], bool], ...] = (
        lambda option: one_line(text) == one_line(option),
        lambda option: same_words(text, option),
        lambda option: rule.equal(text, option, tolerance),
    )
    for is_same in same:
        if found := frozenset(letter for letter, option in options.items() if option and is_same(option)):
            return found
    return NONE


def _chosen(text: str, options: dict[str, str], tolerance: float) -> tuple[Letters, str]:
    """`read_choice`, with the letter of an option that the whole text is; nothing where it may be several."""
    bare = _unwrap(text) if len(text) <= _MAX_CHARS else ""
    whole = NONE if len(_read_letters(bare) & options.keys()) == 1 else _named(bare, options, tolerance)
    if len(whole) == 1:  # "a for loop"
        return whole, ""
    letters, rest = read_choice(text, options)
    named = _named(rest, options, tolerance) if rest and len(rest) <= _MAX_CHARS else NONE
    if not letters:
        return (NONE, rest) if not named else (named, "") if len(named) == 1 else (NONE, "")
    contradicts = len(letters) == 1 and bool(named) and not letters <= named
    return (NONE, "") if contradicts else (letters, rest)


class ChoiceMatcher:
    """Judge style "choice"."""

    cost: Cost = Cost()

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance

    async def compare(self, prompt: Prompt, answer: str) -> Match:
        """Whether the answer chooses one of the ground truths, by letter or by the option's text in `prompt.question`."""
        options = read_options(prompt.question)
        same = (gold for gold in prompt.answers if equal(answer, gold, options, self._tolerance))
        return by_truth("choice", next(same, None))

    async def check(self) -> None:
        """Nothing can be missing."""

    def close(self) -> None:
        """Nothing to close."""
