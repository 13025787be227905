"""Units of measure, currencies and nouns behind a number: which of them are the same one. No unit is converted."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from metis_fast.score import chemistry

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
_COINS: dict[str, tuple[str, ...]] = {"cent": ("¢", "cent", "cents"), "penny": ("pence", "penny", "pennies")}
CURRENCY_MARK = r"(?:U\.S\.|US|AU|A|CA|C|NZ|HK|S|R)?\$|[€£¥₹₩₽]|(?:" + "|".join(_CURRENCIES) + r"|RMB|Rs\.?)(?=[\s\d])"
"""What may stand before an amount, as a regular expression."""

# Spellings that pint does not know, or reads as something else.
_OTHER = {
    **dict.fromkeys(("kmh", "kmph", "kph"), "km/h"),
    **dict.fromkeys(("mph",), "mile/hour"),
    **dict.fromkeys(("mps",), "m/s"),
    **{unit: unit for unit in ("km", "cm", "kg")},  # KM
    **dict.fromkeys(("cc", "ccm"), "ml"),
    **{"kgs": "kg", "kms": "km", "cms": "cm", "gms": "g", '"': "inch", "'": "foot"},
    **dict.fromkeys(("sqft",), "foot^2"),
    **dict.fromkeys(("sqm",), "m^2"),
    **dict.fromkeys(("deg", "degrees", "°"), "degree"),
    **dict.fromkeys(("°c", "degree c", "degrees c", "degree celsius", "degrees celsius"), "degree_Celsius"),
    **dict.fromkeys(("°f", "degree f", "degrees f", "degree fahrenheit", "degrees fahrenheit"), "degree_Fahrenheit"),
}
_BY_CASE = {
    **{"kb": "kilobit", "Kb": "kilobit", "Mb": "megabit", "Gb": "gigabit", "Tb": "terabit"},  # pint has barns
    **{"KB": "kilobyte", "Cal": "kilocalorie"},
}
_RATES = {f"{prefix}{unit}ps": f"{prefix}{unit}/s" for prefix in "kKMGT" for unit in "bB"}  # pint has points
_AMBIGUOUS = {"C": ("coulomb", "degree_Celsius"), "F": ("farad", "degree_Fahrenheit")}
_MEASURED = re.compile(r"([^\W\d]+)(?:\^(-?\d))?(?:/([^\W\d]+)(?:\^(-?\d))?)?")
_AREAS = re.compile(r"^(square|sq\.?|cubic|cu\.?)\s+(.+)$|^(.+?)\s+(squared|cubed)$", re.IGNORECASE)

# What pint has as a unit, or looks like a plural, but changes the number before it: "5 X" is not "5".
_NOT_A_UNIT = frozenset(
    (
        *("cent", "cents", "¢", "pence", "penny", "pennies", '"', "'"),
        *("mil", "mils", "mill", "mm.", "mrd", "mn", "exact", "count", "counts", "pi", "tau", "fifth", "quarter", "quarters"),
        *(
            "hundreds",
            "thousands",
            "dozens",
            "scores",
            "tens",
            "ones",
            "twos",
            "pairs",
            "couples",
            "halves",
            "thirds",
            "fourths",
        ),
        *(
            "lakhs",
            "crores",
            "myriads",
            "milles",
            "cientos",
            "centenas",
            "docenas",
            "decenas",
            "dezenas",
            "milhares",
            "millares",
        ),
        *("miles de", "milliers", "centaines", "douzaines", "dizaines", "quarts", "tiers", "tercios", "cuartos", "quintos"),
        *("fifths", "decimals", "permilles", "percents", "percentages", "percentiles", "squares", "cubes", "powers", "roots"),
        *("factorials", "multiples", "minus", "plus", "times", "versus", "perhaps", "besides", "sometimes", "always", "is"),
        *("was", "has", "does", "as", "us", "at", "are", "in", "me", "he", "up", "mas", "pas", "this", "its", "yes", "plus"),
        *("moins", "menos", "mais", "fois", "veces", "vezes", "puis", "jamais", "excludes", "includes", "exceeds", "equals"),
        *(
            "grand",
            "grands",
            "gross",
            "grosses",
            "lots",
            "fold",
            "folds",
            "sigmas",
            "zeros",
            "zeroes",
            "nines",
            "others",
            "negatives",
            "positives",
            "nothings",
            "opposites",
            "inverses",
            "reciprocals",
            "am",
            "pm",
            "afterwards",
            "upwards",
            "onwards",
        ),
        *(
            "ad",
            "st",
            "nd",
            "rd",
            "th",
            "ppm",
            "ppb",
            "bps",
            "kk",
            "decade",
            "decades",
            "point",
            "max",
            "min.",
            "pct",
            "dpi",
            "hbar",
        ),
    )
)
_SCALES = frozenset(  # of whose plurals the same is true: numbers, metric prefixes, and what is short for millions
    (
        *("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty", "thirty"),
        *("forty", "fifty", "sixty", "seventy", "eighty", "ninety", "single", "double", "triple", "quadruple"),
        *("kilo", "mega", "giga", "tera", "peta", "exa", "hecto", "deca", "deci", "centi", "milli", "micro", "nano", "pico"),
        *("lac", "lakh", "crore", "thou", "mil", "mill", "mio", "mia", "mrd", "bil", "bio", "tri", "tril", "trill"),
    )
)
_CHANGES_A_NUMBER = re.compile(
    r"ss$|illi[ao]rds?$|ill?ion|illone|ths$|i[eè]mes$|avos$|^(?:multi|centi|deci|milli|micro|nano)s$"
)
_IRREGULAR = frozenset(
    (
        "people",
        "men",
        "women",
        "children",
        "teeth",
        "geese",
        "mice",
        "sheep",
        "fish",
        "deer",
        "oxen",
        "cattle",
        "aircraft",
        "dice",
    )
)
_SINGULAR = frozenset(  # often counted; of other words "1 X" may be "1 eighth"
    (
        *("animal", "apple", "ball", "banana", "bear", "bike", "bird", "boat", "book", "bottle", "box", "boy", "bus", "cake"),
        *("car", "cat", "chair", "child", "cow", "cup", "dog", "door", "elephant", "flower", "giraffe", "girl", "hat", "horse"),
        *("house", "item", "knife", "laptop", "man", "motorcycle", "object", "orange", "person", "phone", "pizza", "plane"),
        *("player", "sign", "student", "table", "train", "tree", "truck", "umbrella", "window", "woman", "word", "zebra"),
    )
)
_WITHOUT_DIMENSION = re.compile(r"(?:bit|byte|degree|radian|arcminute|arcsecond|turn)(?![a-z])")
# A number with another single letter may be algebra (5x, 5i, 5e), a seat (12A), a row or a latitude (45 N).
_DROPPED_LETTERS = frozenset("mgshlL°")
_DROPPED_LETTERS_APART = frozenset("VJ")
# So may one with two or three: 6ab, 3cd and 2at are products, though pint reads attobarns, candelas and atmospheres.
_DROPPED_SYMBOLS = frozenset(
    (
        *("mm", "cm", "dm", "km", "nm", "um", "µm", "μm", "ft", "yd", "mi", "nmi", "ly", "mg", "kg", "µg", "μg"),
        *("oz", "lb", "lbs", "ton", "ml", "mL", "cl", "cL", "dl", "dL", "kl", "ML", "gal", "cup", "tsp", "ms", "µs"),
        *("μs", "ns", "sec", "min", "hr", "hrs", "day", "yr", "yrs", "Hz", "kHz", "MHz", "GHz", "THz", "rpm", "kV"),
        *("mV", "mA", "kA", "Ah", "mAh", "kW", "mW", "MW", "GW", "TW", "hp", "Wh", "kWh", "MWh", "GWh", "kJ", "MJ"),
        *("GJ", "mJ", "cal", "eV", "keV", "MeV", "GeV", "Pa", "kPa", "MPa", "GPa", "hPa", "bar", "atm", "psi", "kN"),
        *("mN", "MN", "Nm", "mol", "dB", "dBm", "rad", "deg", "ohm", "lux", "bit", "kB", "KB", "MB", "GB", "TB"),
        *("PB", "Kb", "kb", "Mb", "Gb", "Tb", "MiB", "GiB", "KiB", "TiB", "Cal", "pcs", "yds", "wks", "fps"),
    )
)
_LENGTHS = frozenset(("m", "mm", "cm", "dm", "km", "ft", "in", "yd", "mi"))  # of whose symbols a power is an area, a volume


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
    if word in _BY_CASE:
        return _BY_CASE[word]
    exact = _spelt(word, case_sensitive=True)
    if exact:
        return exact[0]
    # hz is Hz; but Mw may be a megawatt or a milliwatt
    found = _spelt(word, case_sensitive=False)
    is_prefix_sure = not any(name.startswith(("mega", "milli")) for name in found[:1]) or word[:1].casefold() != "m"
    return found[0] if found and (is_prefix_sure or found[0] == word.casefold()) else ""


def _spelt(word: str, *, case_sensitive: bool) -> list[str]:
    # "cats" are no centi-technical-atmospheres: a plural s does not follow a symbol with a prefix
    return [
        prefix + name
        for prefix, name, plural in _registry().parse_unit_name(word, case_sensitive=case_sensitive)
        if not (prefix and plural) or word.lower().startswith(prefix)
    ]


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
        return frozenset(f"{name}^1/1^1" for name in _AMBIGUOUS[unit])
    found = {code for code, spellings in (_CURRENCIES | _COINS).items() if low in spellings}
    measured = _measured(_RATES.get(unit) or _OTHER.get(low, unit))
    if measured:
        found.add(measured)
    if low in ("am", "pm"):  # of the clock, or of attometres
        found.add(f"noun {low}")
    if found:
        return frozenset(found)
    return frozenset(f"noun {noun}" for noun in (low, *_singulars(low)))


def _singulars(noun: str) -> set[str]:
    """What a noun may be the plural of."""
    return {re.sub("(?<!s)s$", "", noun), re.sub("([sxzo]|[cs]h)es$", r"\1", noun), re.sub("ies$", "y", noun)}


def same(one: str, other: str) -> bool:
    """Whether two units as written are the same one, in whatever spelling."""
    return one == other or (not chemistry.differ(one, other) and bool(names(one) & names(other)))


def _is_sure(part: str, apart: bool, under: bool) -> bool:
    """Whether a unit, or one side of a quotient, is no algebra: 6a^2, 5x, 3ab, 4n/k. apart: as `may_be_left_out` has it.

    under: it stands behind the slash.
    """
    word, _, power = part.strip().partition("^")
    if not word.isalpha() or len(word) > 3:
        return True
    if power:
        is_length = word in _LENGTHS and power in ("2", "3") and (len(word) > 1 or apart or under)
        return is_length or (under and word == "s" and power == "2")  # m/s^2
    if len(word) == 1:
        return word in _DROPPED_LETTERS or ((apart or under) and word in _DROPPED_LETTERS_APART)
    low = word.casefold()
    return (
        word in _DROPPED_SYMBOLS
        or low in _OTHER
        or any(low in spellings for spellings in _CURRENCIES.values())
        or low in _SINGULAR | _IRREGULAR
    )


def may_be_left_out(unit: str, *, one: bool = False, apart: bool = True) -> bool:
    """Whether a number with this unit may equal one without any: "5 cm" or "5 dogs" and "5", but not "5 million", "5x", "5 pm".

    A noun is a plural in Latin letters behind a space, as other words may change the number. one: the number is 1, and a
    frequent noun may be a singular. apart: a space stands before the unit.
    """
    unit = _tidy(unit)
    low = unit.casefold()
    if not all(_is_sure(part, apart, i > 0) for i, part in enumerate(unit.split("/"))):
        return False
    if len(unit) == 1 and unit.isalpha():
        return True
    if low in _NOT_A_UNIT or _singulars(low) & _SCALES or unit == "MM" or _CHANGES_A_NUMBER.search(low):
        return False
    found = names(unit)
    if any(not name.startswith("noun ") for name in found):
        word = unit.split("/")[0].split("^")[0]
        as_written = word in _BY_CASE or low in _OTHER or " " in word or bool(_spelt(word, case_sensitive=True))
        return (as_written or bool(found & _CURRENCIES.keys())) and not any(_is_pure_number(name) for name in found)
    if not apart or not unit.isascii() or not unit.isalpha() or len(unit) < 3:
        return False
    if not unit.islower():  # 5 Series is a car
        return False
    return low in (_SINGULAR if one else _IRREGULAR) or (not one and low.endswith("s"))


def _is_pure_number(name: str) -> bool:
    """Whether a name of pint's is one of a number: ppm, count, pi."""
    if name == PERCENT or name in _CURRENCIES or _WITHOUT_DIMENSION.search(name):
        return False
    return bool(_registry().parse_units(name.split("/")[0].split("^")[0]).dimensionless)
