"""The rule judge: equality of normalised text, numbers within a tolerance, yes and no in their usual words."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass

from metis_fast.types import Prompt

# NFKC would turn 10² into 102 and 3½ into 31/2.
_SUPERSCRIPTS = str.maketrans({char: f"^{digit}" for digit, char in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})
_MIXED_FRACTION = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
_MINUS_SIGNS = str.maketrans("−–—﹣－", "-----")
_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_WORD_NUMBER = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_BOOLEANS = {
    **dict.fromkeys(("yes", "yeah", "yep", "true", "correct"), True),
    **dict.fromkeys(("no", "nope", "false", "incorrect"), False),
}
_FIRST_CLAUSE = re.compile(r"(\w+)\s*[,.;:!]\s*(.*)", re.DOTALL)

# Longer texts are no numbers; this also bounds the work of the expression below.
_MAX_NUMBER_CHARS = 80
_NUMBER = re.compile(
    r"""[~≈=]?\s*(?P<sign>[+-]?)\s*(?P<currency>[$€£¥₹])?\s*(?P<sign2>-?)
    (?P<value>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)
    (?:e(?P<exp>[+-]?\d{1,4})|\s*[x×*]\s*10\^?\{?(?P<exp10>[+-]?\d{1,4})\}?)?
    (?:\s*[/⁄]\s*(?P<over>\d+(?:\.\d+)?))?
    \s*(?P<unit>%|per\s?cent|(?:(?:square|cubic|sq\.?|cu\.?)\s+)?[^\W\d_][^\W\d_/*·]*(?:(?:/|\s?per\s)[^\W\d_]+)?(?:\^?[23])?
      |°\s?[^\W\d_]?|[$€£¥₹])?\s*\.?""",
    re.VERBOSE,
)
_PERCENT = "%"
_UNIT_NAMES = {
    **dict.fromkeys(("percent", "percentage", "pct"), _PERCENT),
    **dict.fromkeys(("dollar", "dollars", "usd"), "$"),
    **dict.fromkeys(("euro", "euros", "eur"), "€"),
    **dict.fromkeys(("degree", "degrees"), "°"),
}


@dataclass(frozen=True, slots=True)
class _Number:
    """A number as written. unit: "" where none was given. whole: an integer, which is never a rounded value."""

    value: float
    unit: str
    whole: bool


def _fold(text: str) -> str:
    text = _MIXED_FRACTION.sub(" ", text.translate(_SUPERSCRIPTS))
    text = unicodedata.normalize("NFKC", text).translate(_MINUS_SIGNS).casefold()
    text = text.replace("\\%", "%").replace("\\$", "$").strip(" \t\n\"'`*")  # quotes and Markdown marks around it
    if len(text) > 2 and text[0] == text[-1] == "$":  # LaTeX
        text = text[1:-1].strip()
    return _WORD_NUMBER.sub(lambda word: str(_WORDS.index(word[0])), text)


def _even_out(char: str, before: str, after: str) -> str:
    """What stands in the normalised text for `char` between two neighbours."""
    if unicodedata.category(char)[0] != "P":
        return char
    if char == ".":
        return "." if after.isdigit() and not before.isalpha() else ""  # 3.5 is not 35, but U.S.A. is USA
    if char in "'’":
        return ""
    is_sign = char == "-" and not before.isalnum() and (after.isdigit() or after == ".")
    return char if is_sign or (char == _PERCENT and before.isdigit()) else " "


def normalise(text: str) -> str:
    """Text as the rule judge compares it: NFKC, case, articles, punctuation, number words and white space evened out.

    Signs, decimal points and percent signs stay; "" where nothing but punctuation was there.
    """
    text = f" {_fold(text)} "
    words = "".join(_even_out(char, text[i], text[i + 2]) for i, char in enumerate(text[1:-1]))
    return " ".join(_ARTICLE.sub(" ", words).split()) or " ".join(words.split())


def _read_number(text: str) -> _Number | None:
    text = _fold(text)
    if len(text) > _MAX_NUMBER_CHARS or (found := _NUMBER.fullmatch(text)) is None:
        return None
    value = float(found["value"].replace(",", ""))
    exponent = found["exp"] or found["exp10"]
    if exponent:
        value *= 10.0 ** min(int(exponent), 308)
    if found["over"]:
        if float(found["over"]) == 0:
            return None
        value /= float(found["over"])
    if "-" in (found["sign"], found["sign2"]):
        value = -value
    unit = found["unit"] or found["currency"] or ""
    unit = re.sub(r"\s+|\^", "", unit)
    whole = "." not in found["value"] and not exponent and not found["over"]
    return _Number(value, _UNIT_NAMES.get(unit, unit), whole) if math.isfinite(value) else None


def _same_unit(one: str, other: str) -> bool:
    return not one or not other or one == other or one.removesuffix("s") == other.removesuffix("s")


def _same_number(got: _Number, gold: _Number, tolerance: float) -> bool:
    if not _same_unit(got.unit, gold.unit):
        return False
    close = [math.isclose(got.value, gold.value, rel_tol=0.0 if got.whole and gold.whole else tolerance, abs_tol=0.0)]
    if (got.unit == _PERCENT) != (gold.unit == _PERCENT):  # "50%" is 0.5, and is 50 where the question asked for percent
        got_value = got.value / 100 if got.unit == _PERCENT else got.value
        gold_value = gold.value / 100 if gold.unit == _PERCENT else gold.value
        close.append(math.isclose(got_value, gold_value, rel_tol=max(tolerance, 1e-12), abs_tol=0.0))
    return any(close)


def _read_boolean(text: str) -> bool | None:
    """Yes or no, alone or as a first clause ("No, there is none") that nothing after it takes back ("Yes, no")."""
    text = _fold(text)
    alone = _BOOLEANS.get(text.rstrip(".!"))
    if alone is not None:
        return alone
    clause = _FIRST_CLAUSE.fullmatch(text)
    value = _BOOLEANS.get(clause[1]) if clause else None
    if clause is None or value is None:
        return None
    taken_back = any(_BOOLEANS.get(word, value) != value for word in re.findall(r"\w+", clause[2]))
    return None if taken_back else value


def equal_numbers(answer: str, gold: str, tolerance: float) -> bool | None:
    """Whether two numbers are equal up to a relative tolerance; None where either text is no number."""
    got, wanted = _read_number(answer), _read_number(gold)
    return None if got is None or wanted is None else _same_number(got, wanted, tolerance)


def equal(answer: str, gold: str, tolerance: float) -> bool:
    """Whether two texts say the same.

    tolerance: relative, for numbers; two integers are compared exactly. A unit counts where both texts have one.
    """
    same_number = equal_numbers(answer, gold, tolerance)
    if same_number is not None:
        return same_number
    text, gold_text = normalise(answer), normalise(gold)
    if text == gold_text:
        return bool(text) or _fold(answer) == _fold(gold)
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
