"""How judges read a text: wrappers taken off, one character for one meaning, words and marks as tokens."""

from __future__ import annotations

import re
import unicodedata

from text_to_num import alpha2digit  # number words, which the package text2num reads

# NFKC would turn 10² into 102 and 3½ into 31/2.
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
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
_QUOTED = re.compile(r"""^(?:"([^"]*)"|'([^']*)'|\*+([^*]+)\*+|_+([^_]+)_+)$""", re.DOTALL)

_LATEX_WRAPPER = re.compile(
    r"\\(?:boxed|fbox|text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname)\*?\s*\{([^{}]*)\}"
)
_LATEX_FRACTION = re.compile(r"(\d?)\\[dtc]?frac\s*(?:\{([^{}\\]*)\}|(\d))\s*(?:\{([^{}\\]*)\}|(\d))")
_LATEX_MARKS = (
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![a-zA-Z])"), ""),
    (re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?|\s*\\(?:degree|circ)(?![a-zA-Z])"), "°"),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "×"),
    (re.compile(r"\\!|\\(?:quad|qquad|thinspace|,|;|:|\s)"), " "),
    (re.compile(r"\\([%$#&_{}])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\^\{([^{}]*)\}"), r"^\1"),
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

_TOKEN = re.compile(r"\d*\.\d+|\d+|[^\W\d_]+|\S")
_JOINED = re.compile(r"(?<=[^\W\d_])\.(?=[^\W\d_])|(?<=[^\W\d_])'|'(?=[^\W\d_])|\.{2,}|…")  # U.S.A., don't, wait...
_SPACE = re.compile(r"\s+")


def _without_latex(text: str) -> str:
    def fraction(found: re.Match[str]) -> str:
        over, under = found[2] or found[3] or "", found[4] or found[5] or ""
        whole = f"{found[1]} " if found[1] else ""
        plain = all(re.fullmatch(r"\s*-?[\w.]+\s*", part) for part in (over, under))
        return f"{whole}{over.strip()}/{under.strip()}" if plain else f"{whole}({over})/({under})"

    for _ in range(_ROUNDS):
        text = _LATEX_WRAPPER.sub(r"\1", _LATEX_FRACTION.sub(fraction, text))
    for mark, plain in _LATEX_MARKS:
        text = mark.sub(plain, text)
    return text


def _inside(found: re.Match[str]) -> str:
    return next(part for part in found.groups() if part is not None).strip()


def fold(text: str) -> str:
    """Text with one character for each meaning, without what only wraps it; case and punctuation stay.

    NFKC (superscripts become ^), one kind of minus, quote and digit; LaTeX text, fractions, degrees and spacing as plain
    text; quotes, Markdown marks, dollar signs and brackets around the whole taken off, and a full stop at its end.
    """
    text = _SUPERSCRIPT.sub(lambda found: "^" + found[0].translate(_PLAIN), _MIXED_FRACTION.sub(" ", text))
    text = unicodedata.normalize("NFKC", text.translate(_SAME)).translate(_SAME)
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in text)
    text = text.strip()
    for _ in range(_ROUNDS):
        before = text
        if "\\" in text or "{" in text:
            text = _without_latex(text).strip()
        if formula := _FORMULA.match(text):
            text = _inside(formula)
        if quoted := _QUOTED.match(text):
            text = _inside(quoted)
        if len(text) > 2 and text[0] + text[-1] == "()" and not any(char in "()," for char in text[1:-1]):
            text = text[1:-1].strip()
        if len(text) > 1 and text[-1] in ".。" and text[-2:] != "..":
            text = text[:-1].rstrip()
        if text == before:
            break
    return text


def digits_for_words(text: str) -> str:
    """English number words as digits: "twenty-one dogs" -> "21 dogs"."""
    text = _ONE_OF_A_SCALE.sub("one", text)
    if len(text) > _MAX_WORDS_CHARS or not _HAS_NUMBER_WORD.search(text) or _DIGIT_AND_SCALE.search(text):
        return text
    return alpha2digit(text.lower(), "en", threshold=0)


def _is_word(token: str) -> bool:
    """Of two letters or more; a single one may be a label, an option or a variable, beside which every mark counts."""
    return len(token) > 1 and token[0].isalpha()


def _kept(token: str, before: str, after: str) -> str:
    """What stands for a token in the normalised text, by its neighbours; "" for nothing."""
    if token[0].isalnum() or unicodedata.category(token)[0] not in "PS":
        return token
    if token in "'\"":
        return token if before[-1:].isdigit() else ""
    match token:
        case "&":
            return "and"
        case "." | "_":
            return ""
        case "!" | "?" | "¿" | "¡":
            return token if before[-1:].isdigit() else ""  # 5! is 120
        case "-" if not before and _is_word(after):
            return ""
        case "-" | "," | ";" | "、" | "(" | ")" | "[" | "]":
            if token in ",;、" and (not before or not after):
                return ""
            return "" if _is_word(before) or _is_word(after) else token.replace(";", ",").replace("、", ",")
        case ":":
            return token if before[-1:].isdigit() and after[:1].isdigit() else ""
    return token  # of symbols and the rest: C# is not C, and a/b is not a b


def normalise(text: str) -> str:
    """Text as the rule judge compares it: case, number words, articles, and punctuation that means nothing evened out.

    Marks count between numbers and single letters ("1, 2" is not "12", "A, B" is not "AB"), and so do all symbols; between
    words, commas, hyphens and brackets are space. "the" goes, and "a" or "an" before a word at the beginning (not the A of
    "Vitamin A" or "A Team"). "" where nothing but punctuation was there.
    """
    folded = digits_for_words(fold(text))
    tokens = _TOKEN.findall(_JOINED.sub("", folded))
    around = ["", *tokens, ""]
    kept = [_kept(token, around[i], around[i + 2]) for i, token in enumerate(tokens)]
    if len(tokens) > 1 and tokens[0] in ("a", "an", "A", "An") and _is_word(tokens[1]):
        is_name = tokens[0][0].isupper() and tokens[1][0].isupper()
        kept[0] = kept[0] if is_name else ""
    words = [token.casefold() for token in kept if token]
    return " ".join([word for word in words if word != "the"] or words)


def one_line(text: str) -> str:
    """Folded text, its white space as single spaces."""
    return _SPACE.sub(" ", fold(text))
