"""Numbers as people write them: read exactly, compared by value, by rounding, or within a tolerance.

docs/equality.md has the grammar.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from metis_fast.score import units
from metis_fast.score.text import digits_for_words, one_line

# Longer texts are no numbers; this also bounds the work of the expressions below.
_MAX_CHARS = 100
_MAX_POWER_BITS = 1 << 14

_SCALES = {
    **{"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{"mn": 10**6, "mln": 10**6, "bn": 10**9},
}
_SCALE_WORDS = "hundred|thousand|million|billion|trillion|dozen|(?-i:[mM]n|[mM]ln|[bB]n)"  # mN is a millinewton
_SCALES_OF_MONEY = {"k": 10**3, "m": 10**6, "mm": 10**6, "b": 10**9, "t": 10**12}  # elsewhere m is a metre
_PARTS = {  # text2num reads "one fifth" as 1 and an ordinal
    f"{over}{mark}{under}": f"{value}/{whole}"
    for whole, name in enumerate(("half", "third", "quarter", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"), 2)
    for under in (name, f"{name}s", *(("fourth", "fourths") if whole == 4 else ()))
    for value, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), 1)
    if under.endswith("s") == (value > 1)
    for over in ((word, "a", "an") if value == 1 else (word,))
    for mark in (" ", "-")
} | {"half": "1/2"}
_AND_A_PART = re.compile(r"(.+?)[ -]and[ -]((?:an? )?[a-z -]+)", re.IGNORECASE)  # three and a half
_WORD_SIGN = re.compile(r"^(?:minus|negative)\s+", re.IGNORECASE)
_POWER_OF_A_LENGTH = re.compile(r"(?<=\d)(\s?(?:[kcmd]?m|ft|in|mi|yd))([23])$")  # km2
_NUMBER = re.compile(
    rf"""[~≈=]?\s*(?P<sign>[+-]?)\s*(?P<currency>{units.CURRENCY_MARK})?\s*(?P<sign2>-?)
    (?:(?P<mixed>\d+)[ ](?P<part>\d+)\ ?/\ ?(?P<whole>\d+)
      |(?P<european>[1-9]\d{{0,2}}(?:[. ]\d{{3}})+,\d+)
      |(?P<value>(?:[1-9]\d{{0,2}}(?:(?:,\d{{3}})+|(?:[ ]\d{{3}})+|(?:'\d{{3}})+|(?:_\d{{3}})+)
          |(?=[\d,]*,0)[1-9]\d?(?:,\d\d)+,\d{{3}})(?:\.\d+)?
        |\d+(?:\.\d*)?|\.\d+))
    (?:e(?P<exp>[+-]?\d{{1,4}})|\s*[x×*·]\s*10\s*(?:\^|\*\*)\s*\(?(?P<exp10>[+-]?\d{{1,4}})\)?
      |\ ?(?:\^|\*\*)\ ?\(?(?P<power>[+-]?\d{{1,4}})\)?)?
    (?:\s*/\s*(?P<over>\d+(?:\.\d+)?))?
    (?:[\s-]*(?P<scale>{_SCALE_WORDS})\b)?
    \s*(?P<unit>%|per\s?cent|(?:(?:square|cubic|sq\.?|cu\.?|us|swiss|pounds?|degrees?)\s+)?[^\W\d_][^\W\d_/*·]*
        (?:\s(?:squared|cubed))?(?:\^-?\d)?(?:(?:\s?/\s?|\sper\s)[^\W\d_]+(?:\^-?\d)?)?
      |°\s?[^\W\d_]?|["']|{units.CURRENCY_MARK}|¢)?""",
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written.

    unit: "" where none was given. whole: an integer without decimal point, which is never a rounded value. place: the value of
    its last digit, where it may be a rounded value. digits: significant ones. apart: a space stands before the unit.
    """

    value: Fraction
    unit: str
    whole: bool
    place: Fraction | None
    digits: int
    apart: bool = True


def _power(base: Fraction, exponent: int) -> Fraction | None:
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size * abs(exponent) > _MAX_POWER_BITS or (base == 0 and exponent <= 0):
        return None
    return base**exponent


def _is_score(one: str, other: str) -> bool:
    """50/50; or a blood pressure, or eyesight: 120/80, 20/40, which as a quotient would be in lowest terms, or of 100."""
    if one == other:
        return len(one) > 1
    if not (one.isdigit() and other.isdigit()) or other.strip("0") == "1":
        return False
    return int(one) >= 20 and int(other) >= 20 and math.gcd(int(one), int(other)) > 1


def _is_no_number(found: re.Match[str]) -> bool:
    """Whether it is a date, a code, a score, a season or a telephone number (01/02, 007, 50/50, 2020/21, +1 555 123); or has
    two signs."""
    codes = [part for part in (found["value"], found["over"], found["part"]) if part]
    score = found["over"] is not None and _is_score(found["value"] or "", found["over"])
    improper = found["mixed"] and int(found["part"]) >= int(found["whole"])
    telephone = found["sign"] == "+" and " " in (found["value"] or found["european"] or "")
    signs = bool(found["sign"] and found["sign2"])
    season = re.fullmatch(r"[12]\d{3}/\d\d", "/".join(codes)) is not None and (int(codes[0]) + 1) % 100 == int(codes[1])
    return season or score or telephone or signs or bool(improper) or any(re.match(r"0\d", code) for code in codes)


def _value(found: re.Match[str], written: str) -> Fraction | None:
    value: Fraction | None = Fraction(written) if written else Fraction(int(found["mixed"]))
    if found["mixed"]:
        value = None if int(found["whole"]) == 0 else value + Fraction(int(found["part"]), int(found["whole"]))
    elif found["power"]:
        value = _power(value, int(found["power"]))
    if value is not None and (exponent := found["exp"] or found["exp10"]):
        value *= Fraction(10) ** int(exponent)
    if value is not None and found["over"]:
        value = None if Fraction(found["over"]) == 0 else value / Fraction(found["over"])
    return value


def read(text: str) -> Number | None:
    """The number that the whole text is, with its unit; None where it is something else."""
    if len(text) > 4 * _MAX_CHARS:  # before any work; wrappers may take the rest
        return None
    text = one_line(text)
    if (found := _AND_A_PART.fullmatch(text)) and (part := _PARTS.get(found[2].lower())):
        text = f"{digits_for_words(found[1])} {part}"
    text = _POWER_OF_A_LENGTH.sub(r"\1^\2", _WORD_SIGN.sub("-", _PARTS.get(text.lower(), digits_for_words(text))))
    if len(text) > _MAX_CHARS or (found := _NUMBER.fullmatch(text)) is None or _is_no_number(found):
        return None
    written = found["value"] or ""
    if found["european"]:
        written = found["european"].replace(".", "").replace(" ", "").replace(",", ".")
    written = re.sub(r"[, '_]", "", written)
    value = _value(found, written)
    if value is None:
        return None
    unit, scale = found["unit"] or "", _SCALES[found["scale"].lower()] if found["scale"] else 1
    if found["currency"]:
        if unit.lower() in _SCALES_OF_MONEY and not found["scale"]:
            unit, scale = "", _SCALES_OF_MONEY[unit.lower()]
        if unit and not units.same(unit, found["currency"]):
            return None
        unit = found["currency"]
    if "-" in (found["sign"], found["sign2"]):
        value = -value
    decimal = bool(written) and not found["over"] and not found["power"]
    exponent = int(found["exp"] or found["exp10"] or 0)
    pointed = "." in written or exponent != 0
    place = None
    if decimal and pointed:
        place = Fraction(10) ** (exponent - len(written.partition(".")[2])) * scale
    apart = text[found.start("unit") - 1 : found.start("unit")] == " "
    return Number(value * scale, unit, decimal and not pointed, place, len(written.replace(".", "").lstrip("0")), apart)


def _is_rounded(short: Number, long: Number) -> bool:
    """Whether `short` is `long` with fewer digits: at least four, or three of a fraction that has no end."""
    if short.place is None or abs(short.value - long.value) > short.place / 2:
        return False
    if long.place is not None:
        return long.place < short.place and short.digits >= 4
    denominator = long.value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return short.digits >= (3 if denominator > 1 else 4)


def _close(one: Number, other: Number, tolerance: float, rounding: bool) -> bool:
    if one.value == other.value:
        return True
    if one.whole and other.whole:
        return False
    if abs(one.value - other.value) <= Fraction(tolerance) * max(abs(one.value), abs(other.value)):
        return True
    return rounding and (_is_rounded(one, other) or _is_rounded(other, one))


def _hundredth(number: Number) -> Number:
    place = None if number.place is None and not number.whole else (number.place or 1) / Fraction(100)
    return Number(number.value / 100, "", False, place, number.digits)


def equal(answer: str, gold: str, tolerance: float, *, rounding: bool = True) -> bool | None:
    """Whether two numbers are equal; None where either text is no number.

    tolerance: relative, beyond rounding; two integers are compared exactly. rounding: 3.1416 equals 3.14159, 0.333 equals 1/3.
    """
    one, other = read(answer), read(gold)
    if one is None or other is None:
        return None
    percents = [units.PERCENT in units.names(number.unit) for number in (one, other)]
    if any(percents) and not all(percents):  # "50%" is 0.5, and is 50 where the question asked for percent
        share, plain = (one, other) if percents[0] else (other, one)
        if plain.unit:
            return False
        return _close(share, plain, tolerance, rounding) or _close(_hundredth(share), plain, tolerance, rounding)
    if one.unit and other.unit:
        if not units.same(one.unit, other.unit):
            return False
    elif one.unit or other.unit:
        named = one if one.unit else other
        decade = named.unit == "s" and not named.apart and named.value % 10 == 0  # the 80s
        if decade or not units.may_be_left_out(named.unit, one=named.value == 1, apart=named.apart):
            return False
    return _close(one, other, tolerance, rounding)
