"""Words of any script, as the index of `text_search` knows them and as a query asks for them.

Scripts with spaces give words. Those without (Chinese, Japanese, Thai, ...), and Korean, whose words take endings, give single
signs, which a query asks for by pairs or triples that follow each other: the bigrams of Lucene's CJKAnalyzer, by position.
"""

from __future__ import annotations

import re
import unicodedata

import tantivy

MAX_UNITS = 64
"""What counts of a query; more of it adds cost, not meaning."""
_MAX_BYTES = 256  # of a word; longer ones are none

# Blocks of letters, without digits and punctuation: Han, kana, bopomofo, hangul; Thai, Lao, Burmese, Khmer, Balinese, Javanese.
_PAIRS = (
    "\u1100-\u11ff\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f"
    "\u3131-\u318e\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_TRIPLES = (  # alphabets: two letters say little
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ecf\u0edc-\u0edf\u1000-\u103f\u1050-\u108f\u109a-\u109f\u1780-\u17d3\u1b05-\u1b4c"
    "\ua984-\ua9c0\ua9e0-\ua9ef\uaa60-\uaa7f"
)
_RUN = re.compile(f"([{_PAIRS}]+|[{_TRIPLES}]+)")

# Of these, `_folded` would change nothing that the index's own filters (lower case, ASCII for accented Latin) do not.
_LATIN = re.compile(
    "[\0-\u00ac\u00ae-\u00b4\u00b6-\u012f\u0131-\u0148\u014a-\u017f\u2000-\u200c\u2010-\u205f\u2061-\u20cf\u2100-\u2125"
    "\u2127-\u2129\u212c-\u2bff]*"
)
# Letters that Unicode has once more for their form or width. Not all of NFKC, which makes one word of "Metis™".
_FORMS = re.compile("[\u2e80-\u2fdf\ufb50-\ufdff\ufe70-\ufefc\uff01-\uffef]+")
# Marks on letters, which tantivy takes for the end of a word or writers leave out: accents, points, nukta, virama. Not the
# voicing of kana (class 8), nor vowels and tones of Thai and its like (84 to 132).
_ON_LETTERS = "".join(c for c in map(chr, range(0x300, 0x12000)) if unicodedata.combining(c) not in (0, 8, *range(84, 133)))
# With them: tatweel, soft hyphen, joiners, marks of direction, variants.
_MARKS = re.compile(f"[{_ON_LETTERS}\u0640\u00ad\u200d-\u200f\u2060\ufe00-\ufe0f\ufeff]|(?<=[\u0900-\u0dff])\u200c")


def _folded(text: str) -> str:
    text = _FORMS.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text).casefold()
    return unicodedata.normalize("NFC", _MARKS.sub("", unicodedata.normalize("NFD", text)))


def prepared(text: str) -> str:
    """A text for `analyzer`: its letters without case, marks and width, and spaces around every sign."""
    if text.isascii() or _LATIN.fullmatch(text):
        return text
    return _RUN.sub(lambda run: f" {' '.join(run[0])} ", _folded(text))


def analyzer(stem: bool = True) -> tantivy.TextAnalyzer:
    """Of prepared text. `stem` folds English endings, which finds more but takes "Puck" and "Pucked" for one name."""
    filters = [tantivy.Filter.remove_long(_MAX_BYTES), tantivy.Filter.lowercase(), tantivy.Filter.ascii_fold()]
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for item in [*filters, tantivy.Filter.stemmer("English")] if stem else filters:
        builder = builder.filter(item)
    return builder.build()


def query_units(words: tantivy.TextAnalyzer, query: str) -> list[tuple[str, ...]]:
    """What a query looks for, each once and at most `MAX_UNITS`: words, and signs that follow each other.

    words: an `analyzer` that stems.
    """
    units: list[tuple[str, ...]] = []
    for number, part in enumerate(_RUN.split(query if query.isascii() else _folded(query))):
        terms = words.analyze(prepared(part))
        size = 1 if number % 2 == 0 else 2 if re.match(f"[{_PAIRS}]", part) else 3
        units += [tuple(terms[start : start + size]) for start in range(max(1, len(terms) - size + 1))]
    return [unit for unit in dict.fromkeys(units) if unit][:MAX_UNITS]
