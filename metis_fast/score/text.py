"""How judges read a text: wrappers taken off, one character for one meaning, words and marks as tokens."""

from __future__ import annotations

import itertools
import re
import unicodedata
from typing import NamedTuple

from text_to_num import alpha2digit  # number words, which the package text2num reads

from metis_fast.score.chemistry import without_subscripts

# NFKC would turn 10² into 102 and 3½ into 31/2.
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_BASE = re.compile(r"(?<=\d)[₀-₉]+")  # 1101₂, which NFKC would make 11012
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_PLAIN = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_MIXED_FRACTION = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
_SAME = str.maketrans(
    {
        **dict.fromkeys("−–—‒―﹣－", "-"),
        **dict.fromkeys("’‘ʼ′`´", "'"),
        **dict.fromkeys("“”„″«»「」『』", '"'),
        **dict.fromkeys("⁄∕", "/"),
        "∶": ":",
    }
)
_QUOTED = re.compile(r"""^(?:"([^"]*)"|'([^']*)'|\*+([^*]+)\*+)$""", re.DOTALL)

_LATEX_WRAPPER = re.compile(
    r"\\(?:boxed|fbox|text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname)\*?\s*\{([^{}]*)\}"
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_LATEX_FRACTION = re.compile(r"(\d?)\\[dtc]?frac\s*(?:\{([^{}\\]*)\}|(\d))\s*(?:\{([^{}\\]*)\}|(\d))")
_PLAIN_PART = re.compile(r"\s*(?:-?\d+(?:\.\d+)?|[a-zA-Z]|[a-zA-Z]{3,})\s*")
_MORE_OF_A_FORMULA = re.compile(r"[\w.^!'({\[]|\\(?!text|mathrm|mbox|right|[,;:!%$\s\])}])")
_LATEX_MARKS = (
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![a-zA-Z])"), ""),
    (re.compile(r"\s?\^\s?\{?\s?\\circ\s?\}?|\s?\\(?:degree|circ)(?![a-zA-Z])"), "°"),
    (re.compile(r"\\times(?![a-zA-Z])|(?<=[\d)}])\s*\\cdot\s*(?=[\d({])"), "×"),  # a cross product is no dot product
    (re.compile(r"\\cdot(?![a-zA-Z])"), "·"),
    (re.compile(r"\\pi(?![a-zA-Z])"), "π"),
    (re.compile(r"\\sqrt\s?\{(\d+|[a-z])\}(?![\w.^!(\\])"), r"√\1"),
    (re.compile(r"\\geq?(?![a-zA-Z])"), "≥"),
    (re.compile(r"\\leq?(?![a-zA-Z])"), "≤"),
    (re.compile(r"\\[lc]?dots(?![a-zA-Z])"), "..."),
    (re.compile(r"\\!|\\(?:quad|qquad|thinspace|,|;|:|\s)"), " "),
    (re.compile(r"\\([%$#&_{}])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"_\{(\w*)\}(?!\w)"), r"_\1"),
    (re.compile(r"\^\{(\d?[+-])\}"), r"^\1"),  # a charge
    (re.compile(r"\^\{([+-]?\d+|[a-zA-Z])\}(?![\w.(])"), r"^\1"),
    (re.compile(r"\^\{([^{}]*)\}"), r"^(\1)"),
)
_FORMULA = re.compile(r"^(?:\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\])$", re.DOTALL)
_ROUNDS = 4  # of wrappers within wrappers: $\boxed{\text{"A"}}$

_SCALES = ("hundred", "thousand", "million", "billion", "trillion")
_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty", "fifty", "sixty"),
    *("seventy", "eighty", "ninety", *_SCALES),
)
_HAS_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_NUMBER_WORDS)})\b", re.IGNORECASE)
_ONE_OF_A_SCALE = re.compile(rf"\ba(?=\s+(?:{'|'.join(_SCALES)}|dozen)\b)", re.IGNORECASE)
_DIGIT_AND_SCALE = re.compile(rf"\d\s*(?:{'|'.join(_SCALES)})\b", re.IGNORECASE)  # "5 million" would become "5 1000000"
_MAX_WORDS_CHARS = 2000  # longer texts are no numbers in words

# Of 30 and 4 the sum is no number; "one hundredth" is 1/100, or the 100th.
_NO_SUM = re.compile(
    rf"\b(?!(?:{'|'.join(_SCALES)})\b)(?:{'|'.join(_NUMBER_WORDS)})\s+and\s+(?:{'|'.join(_NUMBER_WORDS)})\b"
    r"|(?:hundred|thousand|illion)ths?\b",
    re.IGNORECASE,
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_FIRST_ORDINAL = re.compile(rf"(?:the )?({'|'.join(_ORDINALS)})\b", re.IGNORECASE)

# "No one" is no number, and "the one" is no 1.
_ONE_AS_A_PRONOUN = re.compile(r"\b(?:no|any|every|some|the|this|that|each|which|last)[\s-]+one\b", re.IGNORECASE)

_TOKEN = re.compile(r"\d*\.\d+|\d+|π|[^\W\d_π]+|\S")
# U.S.A., e.g., J. K. Rowling; neither a.b@c.com nor main.py
_TITLES = frozenset(("St", "Mt", "Dr", "Mr", "Mrs", "Ms"))
_INITIALS = re.compile(
    r"(?<![\w.@/-])(?:[A-Z](?:\.[A-Z]){2,}(?![\w@/])\.?|(?:[A-Z]\.){2,}(?![\w@/])|[a-z](?:\.[a-z])+\.(?![\w@/])"
    r"|[A-Z]\.(?: ?[A-Z]\.)*(?= ?[A-Z][a-z]))"
)
_NOT = re.compile(r"(?<=[a-z])(?<!\bca)(?<!\bwo)n't\b", re.IGNORECASE)  # don't is dont, but can't no cant
_ENDS_IN_INITIALS = re.compile(r"(?:^|\s)(?:[A-Z]\.){2,}$")
_NAME = re.compile(r"(?<=\b[OD])'(?=[A-Z][a-z])")  # O'Neil
_THOUSANDS = re.compile(r"(?<![\w.,(\[{])[1-9]\d{0,2}(?:,\d{3})+(?![\w,)\]}])")  # not of (1,200), which may be a point
# Words that are numbers or functions: beside them a mark is one of a formula, as beside x.
_OF_FORMULAS = frozenset(
    (
        *("pi", "tau", "phi", "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"),
        *("mu", "nu", "xi", "rho", "sigma", "upsilon", "chi", "psi", "omega", "inf", "infinity", "infty", "infinite", "oo"),
        *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "ln", "log", "lg"),
        *("exp", "sqrt", "cbrt", "root", "abs", "det", "gcd", "lcm", "lim", "min", "max", "mod", "unity", "half", "third"),
        *("quarter", "positive", "negative", "plus", "minus", "times", "over", "divided", "and", "or", "not", "nan", "null"),
    )
)
_LAST_MARKS = re.compile(r"([^\W\d_]{2,})\s?([!?.]+)$")
_QUESTION = re.compile(
    r"(?:who(?:se|m)?|what|where|when|why|how|which|is|are|was|were|do|does|did|can|could|will|would|should|shall|have|has)\s",
    re.IGNORECASE,
)
_TIMES = re.compile(r"(?<=\d)(?<!\b0)\s?[xX]\s?(?=\d)")  # 4 x 4
_LAST_AND = re.compile(r"(,[^,]+?),? and (?=[^,]+$)")  # a list: cat, dog and bird
_SPACE = re.compile(r"\s+")
_ACCENTED = re.compile(r"(?<![^\W\d_])[A-Za-z\u00c0-\u017f]{3,}(?![^\W\d_])")
_ACCENTS = re.compile("[\u0300-\u0327]")
_WITHOUT_STROKE = str.maketrans("øØłŁ", "oOlL")


def _fraction(found: re.Match[str]) -> str:
    """In brackets wherever it would take in what stands beside it: \\frac{1}{2}x is not 1/(2x), x^\\frac{1}{2} not x^1/2."""
    over, under = found[2] or found[3] or "", found[4] or found[5] or ""
    text = "/".join(part.strip() if _PLAIN_PART.fullmatch(part) else f"({part})" for part in (over, under))
    start, end = found.span()
    before, after = found.string[max(0, start - 9) : start].rstrip()[-1:], found.string[end : end + 9].lstrip()
    joined = _MORE_OF_A_FORMULA.match(after) and not re.match(r"[a-zA-Z]{2}", after)
    word = under.strip().isalpha() and after[:1].isalpha()
    text = f"({text})" if joined or word or before in ("^", "_", "/") else text
    return f"{found[1]} {text}" if found[1] else text


def _unwrapped(found: re.Match[str]) -> str:
    """What is in the braces, apart from its neighbours; the wrapper of digits beside digits stays, as they are no number."""
    start, end = found.span()
    inside, before, after = found[1], found.string[max(0, start - 1) : start], found.string[end : end + 1]
    if (inside[:1].isdigit() and (before.isdigit() or before in ("}", "."))) or (inside[-1:].isdigit() and after.isdigit()):
        return found[0]
    left = " " if inside[:1].isalnum() and (before.isalnum() or before == "}") else ""
    return left + inside + (" " if inside[-1:].isalnum() and after.isalnum() else "")


def _without_latex(text: str) -> str:
    several = len(_BOX.findall(text)) > 1  # answers in two boxes are two answers
    for _ in range(_ROUNDS):
        text = _LATEX_FRACTION.sub(_fraction, text)
        text = text if several else _LATEX_WRAPPER.sub(_unwrapped, text)
    for mark, plain in _LATEX_MARKS:
        text = mark.sub(plain, text)
    return text


def _without_box(text: str) -> str:
    """What a box holds that is around the whole, braces in it or not."""
    box = _BOX.match(text)
    start = text.find("{") + 1
    if box is None or not start or text[box.end() : start - 1].strip() or not text.endswith("}"):
        return text
    depth = 1
    for i, char in enumerate(text[start:], start):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[start:-1].strip() if i == len(text) - 1 else text
    return text


def _inside(found: re.Match[str]) -> str:
    return next(part for part in found.groups() if part is not None).strip()


def fold(text: str) -> str:
    """Text with one character for each meaning, without what only wraps it; case and punctuation stay.

    NFKC (superscripts become ^), one kind of minus, quote and digit; LaTeX text, fractions, degrees and spacing as plain
    text; quotes, Markdown marks, dollar signs and brackets around the whole taken off, and a full stop at its end.
    """
    text = _BASE.sub(lambda found: "_" + found[0].translate(_SUBSCRIPTS), text)
    text = _SUPERSCRIPT.sub(lambda found: "^" + found[0].translate(_PLAIN), _MIXED_FRACTION.sub(" ", text))
    text = unicodedata.normalize("NFKC", text.translate(_SAME)).translate(_SAME)
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in text)
    text = _SPACE.sub(lambda found: "\n" if "\n" in found[0] else " ", text).strip()
    for _ in range(_ROUNDS):
        before = text
        text = _without_box(text)
        if "\\" in text or "{" in text:
            text = _without_latex(text).strip()
        if formula := _FORMULA.match(text):
            text = _inside(formula)
        if quoted := _QUOTED.match(text):
            text = _inside(quoted)
        if len(text) > 2 and text[0] + text[-1] == "()" and not any(char in "()," for char in text[1:-1]):
            text = text[1:-1].strip()
        if len(text) > 1 and text[-1] in ".。" and text[-2:] != ".." and not _ENDS_IN_INITIALS.search(text):
            text = text[:-1].rstrip()
        if text == before:
            break
    return text


def digits_for_words(text: str) -> str:
    """English number words as digits: "twenty-one dogs" -> "21 dogs"."""
    if ordinal := _FIRST_ORDINAL.match(text):
        place = _ORDINALS.index(ordinal[1].lower()) + 1
        text = f"{place}{('st', 'nd', 'rd', 'th')[min(place, 4) - 1]}{text[ordinal.end() :]}"
    text = _ONE_OF_A_SCALE.sub("one", text)
    if len(text) > _MAX_WORDS_CHARS or not _HAS_NUMBER_WORD.search(text):
        return text
    if _DIGIT_AND_SCALE.search(text) or _NO_SUM.search(text) or _ONE_AS_A_PRONOUN.search(text):
        return text
    return alpha2digit(text, "en", threshold=0)


def _is_word(token: str) -> bool:
    """Of two letters or more; a single one may be a label, an option or a variable, beside which every mark counts."""
    return len(token) > 1 and token[0].isalpha() and token.casefold() not in _OF_FORMULAS


def _are_words(one: str, other: str) -> bool:
    """Two words that a mark may join or part; of short ones or of capitals, AB-CD, it may be an operator."""
    capitals = any(len(word) < 3 and word.isupper() for word in (one, other))
    return _is_word(one) and _is_word(other) and len(one) + len(other) > 4 and not capitals


def _kept(token: str, before: str, after: str, spaced: tuple[bool, bool]) -> str:
    """What stands for a token in the normalised text, by its neighbours and the spaces to them; "" for nothing."""
    if len(token) > 1 or token.isalnum() or unicodedata.category(token)[0] not in "PS":
        return token
    match token:
        case "&":
            return "and"
        case '"' if not before or (len(before) > 1 and before.isalpha() and (not after or any(spaced))):
            return ""
        case "." if before[:1].isalpha() and (not after or spaced[1]):
            return ""
        case "." if before in _TITLES and after[:1].isupper() and not after.isupper():
            return ""
        case "¿" | "¡" if not before and _is_word(after):
            return ""
        case "-" if not before and spaced[1] and _is_word(after) and len(after) > 2 and after[0].isupper():
            return ""  # of a list: "- Paris"; "- velocity" may be a negative one
        case "-" if not any(spaced) and _are_words(before, after):
            return ""
        case ":" if spaced == (False, True) and _are_words(before, after):
            return ""
        case "," | ";" | "、":
            return "" if not before or not after or _is_word(before) or _is_word(after) else ","
    return token  # of symbols and the rest: C# is not C, and a/b is not a b


_ASIDE = re.compile(r"\(([^\W\d_]{2,}(?: [^\W\d_]{2,})*)\)(?=$|[\s,])")


def _without_aside(found: re.Match[str]) -> str:
    plain = all(_is_word(word) for word in found[1].split())
    behind_a_word = re.fullmatch(r"[^\W\d_]{2} ", found.string[max(0, found.start() - 3) : found.start()])
    return found[1] if plain and behind_a_word else found[0]


def _without_dots(found: re.Match[str]) -> str:
    after = found.string[found.end() : found.end() + 1]
    return found[0].replace(".", "").replace(" ", "") + (" " if after.isalpha() else "")


def _without_last_marks(found: re.Match[str]) -> str:
    marks, before = found[2], found.string[: found.start()]
    listed = marks.startswith("..") and re.search("[,;、\\d]", before)
    asked = "?" in marks and not _QUESTION.match(before)  # "Paris?" is a guess, "Who is there?" may be what a sign says
    return found[0] if listed or asked or not _is_word(found[1]) else found[1]


class Word(NamedTuple):
    """What stands for a token of a text. glued: no space stands before it."""

    text: str
    glued: bool


def words(text: str) -> list[Word]:
    """The words and marks of a text as the rule judge compares them, their case kept; see `normalise`."""
    folded = _NAME.sub("", _NOT.sub("nt", without_subscripts(digits_for_words(one_line(text)))))
    folded = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), _INITIALS.sub(_without_dots, folded))
    folded = _ASIDE.sub(_without_aside, _LAST_MARKS.sub(_without_last_marks, _LAST_AND.sub(r"\1, ", folded)))
    folded = _TIMES.sub("×", folded).replace(">=", "≥").replace("<=", "≤")
    found = list(_TOKEN.finditer(folded))
    tokens = [token[0] for token in found]
    around = ["", *tokens, ""]
    gaps = [False, *(one.end() < other.start() for one, other in itertools.pairwise(found)), False]
    kept = [_kept(token, around[i], around[i + 2], (gaps[i], gaps[i + 1])) for i, token in enumerate(tokens)]
    if len(tokens) > 1 and tokens[0] in ("a", "an", "A", "An") and _is_word(tokens[1]):
        is_name = tokens[0][0].isupper() and tokens[1][0].isupper()
        kept[0] = kept[0] if is_name else ""
    listed = [Word(token, i > 0 and not gaps[i]) for i, token in enumerate(kept) if token]
    if all(unicodedata.category(word.text[0])[0] == "P" for word in listed):
        return []
    return [word for word in listed if word.text.casefold() != "the"] or listed


def normalise(text: str) -> str:
    """Text as the rule judge compares it: case, number words, articles, and punctuation that means nothing evened out.

    Marks count beside numbers, single letters and words of formulas ("1, 2" is not "12", "-pi" is not "pi"), and so do all
    symbols; between words, a comma, a hyphen that joins them, and brackets around words are space. "the" goes, and "a" or
    "an" before a word at the beginning (not the A of "Vitamin A" or "A Team"). "" where nothing but punctuation was there.
    """
    return " ".join(word.text.casefold() for word in words(text))


def one_line(text: str) -> str:
    """Folded text, its white space as single spaces."""
    return _SPACE.sub(" ", fold(text))


def without_accents(text: str) -> str:
    """Text with Latin letters of words of three or more without their accents: Beyonce for Beyoncé."""
    return _ACCENTED.sub(
        lambda found: _ACCENTS.sub("", unicodedata.normalize("NFD", found[0])).translate(_WITHOUT_STROKE), text
    )
