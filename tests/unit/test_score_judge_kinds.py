"""Judges by kinds of spelling: generated answers that mean the same are right, and others never are.

Each judge has 2,000 pairs of either sort. What is generated here knows nothing of how the judges read.
"""

from __future__ import annotations

import asyncio
import csv
import datetime
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metis_fast.config import ScoreConfig
from metis_fast.score import rule
from metis_fast.score.judge import StyleJudge, open_judge
from metis_fast.testing.judge import text_rollout
from metis_fast.types import Prompt

TOLERANCE = ScoreConfig().number_tolerance


@pytest.fixture(scope="module")
def judge() -> Iterator[StyleJudge]:
    judge = open_judge(ScoreConfig(), {"rule", "choice", "math"})
    yield judge
    judge.close()


PAIRS = settings(max_examples=2000)
SOME = settings(max_examples=400)  # all 2,000 in the slow test

UNITS = {
    "metre": ("m", "meters", "metres", "meter"),
    "centimetre": ("cm", "centimeters", "centimetres"),
    "kilogram": ("kg", "kilograms", "kilogram"),
    "gram": ("g", "grams"),
    "hour": ("h", "hours", "hrs", "hr"),
    "minute": ("min", "minutes", "mins"),
    "second": ("s", "seconds", "sec", "secs"),
    "km/h": ("km/h", "kmh", "kph", "kilometers per hour", "km per hour"),
    "m/s": ("m/s", "meters per second", "metres per second"),
    "square metre": ("m²", "m^2", "square meters", "sq m", "square metres"),
    "cubic metre": ("m³", "cubic meters", "m^3"),
    "celsius": ("°C", "degrees Celsius", "℃", "degrees C"),
    "fahrenheit": ("°F", "degrees Fahrenheit"),
    "litre": ("L", "liters", "litres"),
    "mile": ("miles", "mile", "mi"),
    "foot": ("ft", "feet"),
    "megabyte": ("MB", "megabytes"),
    "megabit": ("Mb", "megabits"),
    "watt": ("W", "watts"),
    "dog": ("dogs",),
    "cat": ("cats",),
    "apple": ("apples",),
}
MONEY = {
    "dollar": ("${}", "{} dollars", "USD {}", "{} USD", "US${}", r"\${}"),
    "euro": ("€{}", "{} euros", "EUR {}", "{} EUR", "{}€"),
    "pound": ("£{}", "GBP {}"),
    "yen": ("JPY {}", "{} yen"),
}
WORDS = ("paris", "london", "red fox", "new york", "eiffel tower", "blue whale", "north", "mercury", "saint helena", "iron")
WORDS += ("lord of the rings", "man at work")
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "hundred": 10**2, "trillion": 10**12}
ONES = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


# Words behind a number that change it: scales, parts, doubts, in some languages.
CHANGES = (
    *("millions", "thousands", "dozens", "hundreds", "tens", "lakh", "lakhs", "crore", "quadrillion", "milliards", "Millionen"),
    *("Tausend", "mille", "mil", "millones", "миллионов", "тысяч", "مليون", "万", "億", "百万元", "千万円", "万公里", "分之一"),
    *("tenth", "tenths", "eighth", "hundredth", "billionths", "fifth", "permille", "ppm", "tau", "squared", "factorial", "MM"),
    *("negative", "wrong", "maybe", "excluding", "at most", "or so", "or more", "roughly", "not", "minus", "K", "B", "am"),
    *("lacs", "bils", "thous", "megas", "picos", "twenties", "sevens", "doubles", "Series", "Monkeys"),
    *("times", "pairs", "per thousand", "below zero", "as well", "billion or so", "xyz", "abc", "以上", "左右"),
)
HEDGES = (
    *("not really", "probably not", "never", "I do not know", "but not in this case", "wait", "actually it is the other way"),
    *(
        "unless it rains",
        "except on Sundays",
        "although I doubt it",
        "maybe",
        "isn't it?",
        "or perhaps not",
        "I don't think so",
    ),
    *("scratch that", "in some cases", "only when it rains", "I lied", "he denies it", "the claim is a myth", "it is invalid"),
    *("hang on", "apparently", "few", "to some extent", "it is. I take that back", "it was, in your dreams"),
)
# Letters whose case counts, in whatever stands around them.
SYMBOLS = (
    *(("Aa", "AA"), ("Ff", "ff"), ("AaBb", "AABB"), ("mm", "Mm"), ("mW", "MW"), ("kb/s", "KB/s"), ("f(x)", "F(x)")),
    *((r"\Delta", r"\delta"), ("CO + O2", "Co + O2"), ("2CO", "2Co"), ("V = 5", "v = 5"), ("x1", "X1")),
)
PLURALS = (("planes", "plans"), ("canes", "cans"), ("capes", "caps"), ("tubes", "tubs"), ("notes", "not"), ("wines", "wins"))
NO_BOOLEANS = ("No. V", "No. A", "No. one", "No. B12", "No. #5", "No one is there", "No, of course it is", "No, that holds")
NAMED = ("{}", "The answer is {}", "Answer: {}", "Final answer: {}", "So the answer is {}.", "x = {}", "**Answer:** {}")
CASES = (
    ("mW", "MW"),
    ("Kb", "KB"),
    ("kb", "kB"),
    ("Mb/s", "MB/s"),
    ("mbps", "MBps"),
    ("mg", "Mg"),
    ("mm", "Mm"),
    ("mPa", "MPa"),
)
CONSTANTS = ("pi", "infinity", "ln 2", "sin(x)", "alpha", "tau", r"\pi", "ab", "Cl", "voltage", "temperature")


def in_words(number: int) -> str:
    """Of 1 to 999,999."""
    if number >= 1000:
        rest = in_words(number % 1000) if number % 1000 else ""
        return f"{in_words(number // 1000)} thousand {rest}".strip()
    if number >= 100:
        rest = in_words(number % 100) if number % 100 else ""
        return f"{in_words(number // 100)} hundred {rest}".strip()
    if number < 20:
        return ONES[number - 1]
    ten = TENS[number // 10 - 2]
    return f"{ten}-{in_words(number % 10)}" if number % 10 else ten


def grouped(number: int, mark: str) -> str:
    return f"{number:,}".replace(",", mark)


@st.composite
def whole_spellings(draw: st.DrawFn, number: int) -> str:
    """Ways to write a positive integer."""
    ways = [str(number), f"{number}.0", f"+{number}", f"**{number}**", f"${number}$", rf"\boxed{{{number}}}", f" {number}. "]
    ways += [rf"\text{{{number}}}", f"`{number}`", f'"{number}"', f"({number})", f"{number}/1"]
    if number >= 1000:
        ways += [grouped(number, mark) for mark in (",", " ", "'", "\u202f", "\u00a0", "’", "{,}")]
    if number < 1_000_000:
        ways += [in_words(number), in_words(number).title()]
    ways += [f"{number // scale} {name}" for name, scale in SCALES.items() if number % scale == 0 and number >= scale]
    if number % 100_000 == 0:
        ways += [f"{number / 10**6:g} million"]
    ways.append("".join(chr(ord("０") + int(digit)) for digit in str(number)))  # full width
    ways.append("".join("٠١٢٣٤٥٦٧٨٩"[int(digit)] for digit in str(number)))
    return draw(st.sampled_from(ways))


WHOLE = st.one_of(
    st.integers(1, 30), st.integers(1, 5000), st.integers(1, 90).map(lambda n: n * 100_000), st.integers(1, 10**9)
)
DECIMAL = st.integers(1, 10**6).filter(lambda n: n % 1000).map(lambda n: Fraction(n, 1000))


@st.composite
def decimal_spellings(draw: st.DrawFn, number: Fraction) -> str:
    """Ways to write a decimal of at most three places."""
    text = f"{float(number):.3f}".rstrip("0")
    ways = [text, text + "0", f"+{text}", rf"\boxed{{{text}}}", f"{number.numerator}/{number.denominator}", f"${text}$"]
    ways += [rf"\frac{{{number.numerator}}}{{{number.denominator}}}", f"{float(number) * 1000:g}e-3"]
    ways += [f"{float(number) * 1000:.10g} × 10^-3", f"{float(number) * 1000:.10g}×10⁻³"]
    if number < 1:
        ways.append(text.removeprefix("0"))
    return draw(st.sampled_from(ways))


@st.composite
def number_spellings(draw: st.DrawFn, number: Fraction | int) -> str:
    if isinstance(number, int):
        return draw(whole_spellings(number))
    return draw(decimal_spellings(number))


NUMBER = st.one_of(WHOLE, DECIMAL)


def two_of(draw: st.DrawFn, forms: tuple[str, ...]) -> tuple[str, str]:
    """Two that may be the same one."""
    return draw(st.sampled_from(forms)), draw(st.sampled_from(forms))


def two_others(draw: st.DrawFn, forms: Sequence[str]) -> tuple[str, str]:
    """Two that are not the same one."""
    one, other, *_ = draw(st.permutations(forms))
    return one, other


MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
COMPOUNDS = ("CO_2", "H_2O", "Fe_2O_3", "Ca(OH)_2", "C_6H_{12}O_6", "NaHCO_3")
NAMES = ("J. K. Rowling", "J. R. R. Tolkien", "T. S. Eliot")
ACCENTS = (("Beyoncé", "Beyonce"), ("Malmö", "Malmo"), ("São Paulo", "Sao Paulo"), ("Curaçao", "Curacao"), ("Søren", "Soren"))
CHARGED = (("Fe^{3+}", "Fe3+", "Fe³⁺", "Fe^3+"), ("Na^+", "Na+", "Na⁺"), ("SO_4^{2-}", "SO4^2-", "SO₄²⁻"))


def dates(year: int, month: int, day: int) -> tuple[str, ...]:
    """Ways to write a date."""
    name, ordinal = MONTHS[month - 1], {1: "st", 2: "nd", 3: "rd"}.get(day % 10 if day not in (11, 12, 13) else 0, "th")
    ways = (f"{name} {day}, {year}", f"{day} {name} {year}", f"{name[:3]} {day}, {year}", f"{name} {day}{ordinal}, {year}")
    weekday = datetime.date(year, month, day).strftime("%A")
    ways += (f"{weekday}, {name} {day}, {year}", f"{year}/{month:02d}/{day:02d}")
    return (*ways, f"{day} {name[:3]} {year}", f"{year}-{month:02d}-{day:02d}", f"the {day}{ordinal} of {name}, {year}")


def times(hour: int, minute: int) -> tuple[str, ...]:
    """Ways to write a time in the afternoon."""
    ways = (
        f"{hour}:{minute:02d}",
        f"{hour - 12}:{minute:02d} pm",
        f"{hour - 12}:{minute:02d} P.M.",
        f"{hour - 12:02d}:{minute:02d}PM",
    )
    return ways if minute else (*ways, f"{hour - 12} pm", f"{hour - 12} p.m.")


@st.composite
def equal_answers(draw: st.DrawFn) -> tuple[str, str]:
    """Two spellings of one answer."""
    number = draw(st.integers(2, 10_000))
    match draw(
        st.sampled_from(
            (
                *("number", "unit", "money", "percent", "word", "sign", "date", "time", "compound", "name", "part"),
                *("named", "ordinal", "list", "half", "by", "charged", "boolean"),
            )
        )
    ):
        case "named":
            return draw(st.sampled_from(NAMED)).format(number), str(number)
        case "ordinal":
            first, place = draw(st.sampled_from((("1st", "first"), ("2nd", "second"), ("3rd", "third"), ("10th", "tenth"))))
            return two_of(draw, tuple(form.format(given) for form in ("{} place", "the {} place") for given in (first, place)))
        case "list":
            one, two, three = draw(st.permutations(WORDS))[:3]
            return two_of(draw, tuple(f"{one}, {two}{mark}{three}" for mark in (", ", " and ", ", and ")))
        case "half":
            return two_of(draw, (f"{in_words(number)} and a half", f"{number}.5", f"{number} 1/2", f"{number} and a half"))
        case "by":
            return two_of(draw, (f"{number} x 4", f"{number}x4", f"{number} × 4", rf"{number} \times 4"))
        case "charged":
            return two_of(draw, draw(st.sampled_from(CHARGED)))
        case "boolean":
            says, rest = draw(st.sampled_from((("yes", "there is a dog"), ("no", "there is no dog"), ("no", "it isn't"))))
            mark = draw(st.sampled_from((", ", ". ", " ", " - ", "; ")))
            return f"{says.title()}{mark}{rest}", says
        case "date":
            return two_of(draw, dates(draw(st.integers(1000, 2100)), draw(st.integers(1, 12)), draw(st.integers(1, 28))))
        case "time":
            return two_of(draw, times(draw(st.integers(13, 23)), draw(st.integers(0, 59))))
        case "compound":
            compound = draw(st.sampled_from(COMPOUNDS))
            plain = compound.replace("_", "").replace("{", "").replace("}", "")
            subscripts = plain.translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
            return two_of(draw, (compound, plain, f"${compound}$", rf"\mathrm{{{plain}}}", subscripts))
        case "name":
            name = draw(st.sampled_from(NAMES))
            joined = name.replace(". ", ".", name.count(".") - 1)
            forms = draw(st.sampled_from(((name, joined, name.replace(". ", "."), joined.upper()), *ACCENTS)))
            return two_of(draw, forms)
        case "part":
            over, under = draw(st.integers(1, 9)), draw(st.integers(3, 10))
            names = ("third", "quarter", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
            words = f"{ONES[over - 1]} {names[under - 3]}{'s' if over > 1 else ''}"
            return two_of(draw, (words, f"{over}/{under}", words.title(), words.replace(" ", "-")))
        case "number":
            value = draw(NUMBER)
            return draw(number_spellings(value)), draw(number_spellings(value))
        case "sign":
            return two_of(draw, tuple(form.format(number) for form in ("-{}", "−{}", "- {}", "$-{}$", "–{}", "minus {}")))
        case "unit":
            one, other = two_of(draw, draw(st.sampled_from(sorted(UNITS.values()))))
            space, another = two_of(draw, (" ", ""))
            return f"{number}{space}{one}", f"{number}{another}{other}"
        case "money":
            one, other = two_of(draw, draw(st.sampled_from(sorted(MONEY.values()))))
            return one.format(number), other.format(f"{number:,}")
        case "percent":
            forms = ("{}%", r"{}\%", "{} percent", "{} per cent", "{}％", "{} %", "{} pct")
            return two_of(draw, tuple(form.format(number) for form in forms))
    word = draw(st.sampled_from(WORDS))
    forms = (word, word.title(), word.upper(), f"the {word}", f"The {word.title()}.", f"**{word}**", f'"{word}"')
    forms += (f"a {word}", rf"\text{{{word}}}", f"{word}!", f"  {word} ", word.replace(" ", "-"))
    return two_of(draw, forms)


@st.composite
def different_answers(draw: st.DrawFn) -> tuple[str, str]:
    """Two spellings of different answers, as near to each other as they get."""
    number, other = draw(st.integers(1, 10_000)), draw(st.integers(1, 10_000))
    assume(number != other)
    a, b = two_others(draw, "ABCDEFGH")
    word, another = two_others(draw, WORDS)
    kinds = ("numbers", "digit", "scale", "unit", "money", "label", "listed", "marks", "sign", "words", "time")
    kinds += (
        "date",
        "clock",
        "letter",
        "compound",
        "identifier",
        "minus",
        "formula",
        "ellipsis",
        "brackets",
        "changes",
        "case",
        "hedge",
        "latex",
        "code",
        *("symbol", "base", "plural", "score", "joined", "no"),
    )
    match draw(st.sampled_from(kinds)):
        case "date":
            year, month, day = draw(st.integers(1000, 2100)), draw(st.integers(1, 12)), draw(st.integers(1, 28))
            another = draw(st.sampled_from(((year + 1, month, day), (year, month % 12 + 1, day), (year, month, day % 28 + 1))))
            return draw(st.sampled_from(dates(year, month, day))), draw(st.sampled_from(dates(*another)))
        case "symbol":
            frame = draw(st.sampled_from(("{}", "about {}", "{} gas", "value of {}")))
            return two_others(draw, [frame.format(symbol) for symbol in draw(st.sampled_from(SYMBOLS))])
        case "base":
            base = draw(st.integers(2, 16))
            subscript = str(base).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
            return two_others(draw, [f"{number}{subscript}", f"{number}{base}", f"{number}"])
        case "plural":
            return two_others(draw, [f"{number + 1} {noun}" for noun in draw(st.sampled_from(PLURALS))])
        case "score":
            pressure, under = draw(st.integers(20, 200)), draw(st.integers(20, 200))
            assume(Fraction(pressure, under).denominator < under and under != 100)
            quotient = Fraction(pressure, under)
            return f"{pressure}/{under}", draw(st.sampled_from((str(quotient), f"{float(quotient):.6g}")))
        case "joined":
            one = word.split()[0]
            return two_others(draw, [f"__{one}__", f"_{one}_", one, f"{one}_{a}", f"{one}.{a}", f"{a}.{b}", f"{a}{b}"])
        case "no":
            return draw(st.sampled_from(NO_BOOLEANS)), "no"
        case "clock":
            hour, minute = draw(st.integers(13, 23)), draw(st.integers(0, 59))
            nearly = (*times(hour, (minute + 1) % 60), f"{hour - 12}:{minute:02d} am", f"{hour - 12}:{minute:02d}", f"{hour}")
            return draw(st.sampled_from(times(hour, minute))), draw(st.sampled_from(nearly))
        case "letter":  # seats, latitudes, decades, seasons, coins
            forms = [f"{number}", f"{number}{a}", f"{number} {draw(st.sampled_from('NSWXYZ'))}", f"{number // 10 * 10}s"]
            forms += [f"{number} cents", f"{1000 + number % 1000}/{(number + 1) % 100:02d}", f"1,{other % 900 + 100}"]
            return two_others(draw, [*forms, f"1, {other % 900 + 100}"])
        case "compound":
            return two_others(
                draw, draw(st.sampled_from((("CO", "Co"), ("NaOH", "NAOH"), ("CoCl2", "COCl2"), ("CO2", "CO3", "CO_4"))))
            )
        case "identifier":
            one, two = word.split()[0], another.split()[0]
            forms = [f"{one}.{two}", f"{one}{two}", f"{one}.{two}@{one}.com", f"{one}{two}@{one}.com", f"{one}@{two}.com"]
            return two_others(draw, [*forms, f"{one}'{two}"])
        case "minus":
            what = draw(st.sampled_from(CONSTANTS))
            frame = draw(
                st.sampled_from(("{}", "e^{}", "x = {}", "{} + 1", "3 {}", "between {} and 3", "pH {}", "from {} to 9"))
            )
            what = draw(st.sampled_from((what, str(number))))
            return two_others(draw, [frame.format(what), frame.format(f"-{what}")])
        case "formula":
            forms = [a, f"{a}!", f"!{a}", f"{a}'", f"{a}''", f"{a}-", f"{a}+", f"{a}_2", f"{a}^2", f"~{a}", f"{a}*", f"|{a}|"]
            forms += [f"{a} != {b}", f"{a} = {b}", f"{a}'({b})", f"{a}({b})", f"{a}:{b}", f"{a} {b}", f"{a} - {b}", f"{a}{b}'"]
            return two_others(draw, forms)
        case "ellipsis":
            forms = ["{0}...{1}", "{0}..{1}", "{0}…{1}", "{0}{1}", "{0}, {1}", "{0}, {1}, ...", "{0}.{1}", "{0}.{1}..."]
            one, two = two_others(draw, [form.format(number, other) for form in forms])
            assume(
                one.replace("…", "...") != two.replace("…", "...") and {one, two} != {f"{number}{other}", f"{number}, {other}"}
            )
            return one, two
        case "brackets":
            forms = ["({0} + {1})/2", "{0} + {1}/2", "({0} + {1}) * 2", "{0} + {1} * 2", "({0} - {1})!", "{0} - {1}!"]
            forms += ["[{0}, {1}]", "({0}, {1})", "({0}, {1}]", "{{{0}, {1}}}", "{0}/({1} + 2)", "{0}/{1} + 2"]
            names = draw(st.sampled_from((("ab", "cd"), ("length", "width"), ("alpha", "beta"), ("x", "y"), (a, b))))
            return two_others(draw, [form.format(*names) for form in forms])
        case "changes":
            space = draw(st.sampled_from((" ", "")))
            return two_others(draw, [f"{number}", f"{number}{space}{draw(st.sampled_from(CHANGES))}"])
        case "case":
            amount = draw(st.sampled_from((str(number), in_words(number))))
            one, two = two_others(draw, draw(st.sampled_from(CASES)))
            return f"{amount} {one}", f"{number} {two}"
        case "hedge":
            says = draw(st.sampled_from(("Yes", "True", "yes", "Correct")))
            return f"{says}{draw(st.sampled_from((', ', '; ', '. ', ': ')))}{draw(st.sampled_from(HEDGES))}", says.lower()
        case "latex":
            one, two = (chr(ord(letter) + 32) for letter in (a, b))
            forms = [rf"\frac{{1}}{{{number}}}{one}", rf"\frac{{1}}{{{number}{one}}}", rf"\frac{{{one}}}{{{two}}}c"]
            forms += [
                rf"\frac{{{one}}}{{{two}c}}",
                rf"\boxed{{{number}}}\boxed{{{other}}}",
                f"{number}{other}",
                f"2^{{{number}}}1",
            ]
            forms += [f"2^{{{number}1}}", rf"2^{{\frac{{{number}}}{{2}}}}", f"2^{number}/2", rf"\frac{{1}}{{2}}{number}"]
            return two_others(draw, [*forms, f"1/2{number}"])
        case "code":
            forms = [
                f"{number}",
                f"00{number}",
                f"0{number}",
                f"{number}/0{other}",
                f"{number}.{other}.1.1",
                f"0{number}/{other}",
            ]
            return two_others(draw, forms)
        case "numbers":
            one, two = draw(NUMBER), draw(NUMBER)
            assume(one != two and one * 100 != two and two * 100 != one)
            return draw(number_spellings(one)), draw(number_spellings(two))
        case "digit":
            places = draw(st.integers(1, 3))
            return f"{number}.{draw(st.integers(1, 9)):0{places}d}", f"{number}.{'0' * places}"
        case "scale":
            return two_others(draw, [f"{number} {name}".strip() for name in ("", *SCALES)])
        case "unit":
            one, two = (draw(st.sampled_from(UNITS[name])) for name in two_others(draw, sorted(UNITS)))
            return f"{number} {one}", f"{number} {two}"
        case "money":
            one, two = (draw(st.sampled_from(MONEY[name])) for name in two_others(draw, sorted(MONEY)))
            return one.format(number), two.format(number)
        case "label":
            base = draw(st.sampled_from(("Vitamin", "Plan", "Hepatitis", "Type", "Group", "Figure", "Class", "Terminal")))
            forms = [base, f"{base} {a}", f"{base} {b}", f"{base} {a}{b}", a, f"{base} {number}", f"{a}#", f"{a}++"]
            return two_others(draw, forms)
        case "listed":
            return two_others(draw, [a, f"{a}, {b}", f"{a}/{b}", f"{a} {b} {a}", f"{b}, {a}, {b}", f"{a} or {a}{b}"])
        case "marks":
            forms = ["{0}", "{0}!", "{0}^2", "√{0}", "{0}x", "{0}i", "1/{1}", "1 {1}", "{0}:1{0}", "{0}π", "> {0}", "< {0}"]
            forms += ["{0}-{1}", "{0}, {1}", "{0} or {1}", "({0}, {1}]"]
            return two_others(draw, [form.format(number, number + 1) for form in forms[number == 1 :]])
        case "sign":
            return two_others(draw, [f"{number}", f"-{number}"])
        case "words":
            forms = [word, another, f"{word} and {another}", f"{word} or {another}", f"not {word}", f"{word} {number}"]
            return two_others(draw, [*forms, f"{word} {a}"])
    forms = ["{}:30", "{}.30", "{}:30 pm", "{}:30 am", "{} pm", "{} am", "{}", "{} 30", "{}-30", "{}/30"]
    hour = draw(st.integers(1, 12))
    return two_others(draw, [form.format(hour) for form in forms])


ROWS = list(
    csv.DictReader(
        (Path(__file__).parent / "judge_answers.tsv").read_text().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE
    )
)
APPLES = "How many apples?\n" + "\n".join(f"{chr(65 + i)}. {word} apples" for i, word in enumerate(ONES[:10]))


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['style']}-{row['answer']}-{row['ground_truth']}" for row in ROWS])
def test_answers_as_users_met_them(judge: StyleJudge, row: dict[str, str]) -> None:
    prompt = Prompt("p", "test", (), (), "math", (row["ground_truth"],), row["style"], APPLES)
    verdict = asyncio.run(judge.judge(prompt, text_rollout("p", [f"<reason>r</reason><answer>{row['answer']}</answer>"])))
    assert verdict.correct == (row["equal"] == "true")


@SOME
@given(equal_answers())
def test_rule_takes_every_spelling_of_an_answer(pair: tuple[str, str]) -> None:
    assert rule.equal(*pair, TOLERANCE)


@SOME
@given(different_answers())
def test_rule_takes_no_other_answer_for_it(pair: tuple[str, str]) -> None:
    assert not rule.equal(*pair, TOLERANCE)


@pytest.mark.slow
@PAIRS
@given(equal_answers(), different_answers())
def test_rule_judges_two_thousand_pairs_of_either_sort(same: tuple[str, str], other: tuple[str, str]) -> None:
    assert rule.equal(*same, TOLERANCE) and not rule.equal(*other, TOLERANCE)
