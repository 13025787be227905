"""Units of measure, currencies and nouns behind a number: which of them are the same one. No unit is converted."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pint import UnitRegistry

PERCENT = "%"
_PERCENTS = frozenset(("%", "percent", "per cent", "pct", "percentage"))

_CURRENCIES: dict[str, tuple[str, ...]] = {
    "USD": ("$", "us$", "u.s.$", "usd", "dollar", "dollars", "us dollar", "us dollars", "bucks"),
    "EUR": ("€", "eur", "euro", "euros"),
    "GBP": ("£", "gbp", "pound sterling", "pounds sterling", "pound", "pounds"),
    "JPY": ("¥", "jpy", "yen"),
    "CNY": ("¥", "cny", "rmb", "yuan", "元", "人民币"),
    "INR": ("₹", "inr", "rs", "rs.", "rupee", "rupees"),
    "KRW": ("₩", "krw", "won"),
    "RUB": ("₽", "rub", "ruble", "rubles", "rouble", "roubles"),
    "CHF": ("chf", "swiss franc", "swiss francs"),
    "AUD": ("a$", "au$", "aud"),
    "CAD": ("c$", "ca$", "cad"),
    "NZD": ("nz$", "nzd"),
    "HKD": ("hk$", "hkd"),
    "SGD": ("s$", "sgd"),
    "BRL": ("r$", "brl"),
}
CURRENCY_MARK = r"(?:U\.S\.|US|AU|A|CA|C|NZ|HK|S|R)?\$|[€£¥₹₩₽]|(?:" + "|".join(_CURRENCIES) + r"|RMB|Rs\.?)(?=[\s\d])"
"""What may stand before an amount, as a regular expression."""

# Spellings that pint does not know, or reads as something else.
_OTHER = {
    **dict.fromkeys(("kmh", "kmph", "kph"), "km/h"),
    **dict.fromkeys(("mph",), "mile/hour"),
    **dict.fromkeys(("mps",), "m/s"),
    **dict.fromkeys(("cc", "ccm"), "ml"),
    **dict.fromkeys(("sqft",), "foot^2"),
    **dict.fromkeys(("sqm",), "m^2"),
    **dict.fromkeys(("deg", "degrees", "°"), "degree"),
    **dict.fromkeys(("°c", "degree c", "degrees c", "degree celsius", "degrees celsius"), "degree_Celsius"),
    **dict.fromkeys(("°f", "degree f", "degrees f", "degree fahrenheit", "degrees fahrenheit"), "degree_Fahrenheit"),
}
_BITS = {"kb": "kilobit", "Mb": "megabit", "Gb": "gigabit", "Tb": "terabit"}  # pint has barns
_AMBIGUOUS = {"C": ("coulomb", "degree_Celsius"), "F": ("farad", "degree_Fahrenheit")}
_MEASURED = re.compile(r"([^\W\d]+)(?:\^(-?\d))?(?:/([^\W\d]+)(?:\^(-?\d))?)?")
_AREAS = re.compile(r"^(square|sq\.?|cubic|cu\.?)\s+(.+)$|^(.+?)\s+(squared|cubed)$", re.IGNORECASE)

# Words that change the number before them, so that "5 X" is not "5".
_NOT_A_UNIT = frozenset(
    (
        *("hundred", "thousand", "million", "billion", "trillion", "dozen", "score", "gross", "half"),
        *("third", "quarter", "halves", "thirds", "quarters", "fourths", "fifths", "sixths", "sevenths"),
        *("eighths", "ninths", "tenths", "hundredths", "thousandths", "millionths", "squared", "cubed", "factorial"),
        *("root", "plus", "minus", "times", "over", "and", "not", "but", "more"),
        *("less", "fewer", "least", "most", "below", "above", "under", "ago", "bce"),
        *("past", "am", "pm", "bc", "ad", "ce", "st", "nd", "rd"),
        *("th", "north", "south", "east", "west", "left", "right", "mod", "alpha"),
        *("beta", "gamma", "theta", "lambda", "sigma", "omega", "delta", "phi", "sin"),
        *("cos", "tan", "log", "sqrt", "inf", "choose"),
    )
)
_DROPPED_LETTERS = frozenset("mgshlLVAWJNKCF°")  # a number with another single letter may be algebra: 5x, 5i, 5e


@cache
def _registry() -> UnitRegistry:
    from pint import UnitRegistry  # it reads a thousand definitions, which only answers with two different units pay

    return UnitRegistry()


def _tidy(unit: str) -> str:
    unit = " ".join(unit.split()).rstrip(".")
    if found := _AREAS.match(unit):
        name, base = (found[1], found[2]) if found[1] else (found[4], found[3])
        unit = f"{base}^{2 if name.lower().startswith('sq') else 3}"
    return re.sub(r"\s*(?:/|\bper\b)\s*", "/", unit)


def _measured(unit: str) -> str:
    """The name that pint has for a unit of measure or a quotient of two, "" where it has none."""
    found = _MEASURED.fullmatch(unit)
    if found is None:
        return ""
    over, under = _named(found[1]), _named(found[3]) if found[3] else "1"
    return f"{over}^{found[2] or 1}/{under}^{found[4] or 1}" if over and under else ""


def _named(word: str) -> str:
    # as written first: Mb is not MB; but hz is Hz
    for exact in (True, False):
        for prefix, name, plural in _registry().parse_unit_name(word, case_sensitive=exact):
            # "cats" are no centi-technical-atmospheres: a plural s does not follow a symbol with a prefix
            if not (prefix and plural) or word.lower().startswith(prefix):
                return prefix + name
    return ""


@lru_cache(4096)  # of what agents write, a bounded number
def names(unit: str) -> frozenset[str]:
    """What a unit as written may be: names of currencies, units of measure, or the forms of a noun. "" has none."""
    if " ".join(unit.casefold().split()) in _PERCENTS:
        return frozenset((PERCENT,))
    unit = _tidy(unit)
    low = unit.casefold()
    if not unit:
        return frozenset()
    if unit in _AMBIGUOUS:
        return frozenset(_AMBIGUOUS[unit])
    found = {code for code, spellings in _CURRENCIES.items() if low in spellings}
    measured = _measured(_BITS.get(unit) or _OTHER.get(low, unit))
    if measured:
        found.add(measured)
    if found:
        return frozenset(found)
    nouns = {low, low.removesuffix("s"), low.removesuffix("es"), re.sub("ies$", "y", low)}
    return frozenset(f"noun {noun}" for noun in nouns)


def same(one: str, other: str) -> bool:
    """Whether two units as written are the same one, in whatever spelling."""
    return one == other or bool(names(one) & names(other))


def may_be_left_out(unit: str) -> bool:
    """Whether a number with this unit may equal one without any: "5 cm" and "5", but not "5 million", "5x" or "5 pm"."""
    unit = _tidy(unit)
    if len(unit) == 1 and unit.isalpha():
        return unit in _DROPPED_LETTERS
    if unit.casefold() in _NOT_A_UNIT:
        return False
    if any(not name.startswith("noun ") for name in names(unit)):
        return True
    return len(unit) > 2 and unit.isalpha()
