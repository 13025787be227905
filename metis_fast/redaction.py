"""Texts of others without our keys: what an endpoint, a provider or a tool server says may repeat the key it was sent."""

from __future__ import annotations

import re
from functools import cache
from html.entities import html5

SHORTEST = 8
"""Characters of a key that is looked for: a shorter one is a word like `EMPTY`, and hiding it would spoil texts."""
_HIDDEN = "[key]"


def redact(text: str, key: str) -> str:
    """`text` without `key`, however it is spelt there: as it is, or as addresses, JSON and HTML spell its signs, once or
    several times over. Before a text is cut, since half a key would not be found. A key shorter than `SHORTEST` stays."""
    return _spellings(key).sub(_HIDDEN, text) if len(key) >= SHORTEST else text


def redact_body(body: bytes, key: str) -> bytes:
    """As `redact`; every byte that is not of the key stays as it is."""
    text = redact(body.decode("latin-1"), key)  # one character a byte, and keys are ASCII
    if "\0" in text:
        dense = text.replace("\0", "")
        if (redacted := redact(dense, key)) != dense:  # UTF-16, or 32
            text = redacted
    return text.encode("latin-1")


@cache
def _spellings(key: str) -> re.Pattern[str]:
    return re.compile("".join(map(_spelt, key)), flags=re.IGNORECASE)


def _spelt(sign: str) -> str:
    """A pattern. Repetitions have limits, since a text of backslashes alone would else take the square of its length."""
    if sign.isalnum():
        return sign
    code = ord(sign)
    names = "".join(f"{name}|" for name, meant in html5.items() if meant == sign and name.endswith(";"))
    entity = rf"{_AMPERSAND}(?:amp;){{0,3}}(?:{names}#0{{0,6}}{code};|#x0{{0,6}}{code:x};)"
    return rf"(?:\\{{0,15}}{re.escape(sign)}|%(?:25){{0,4}}{code:02x}|\\{{1,15}}u{code:04x}|{entity})"


_AMPERSAND = r"(?:&|%(?:25){0,4}26|\\{1,15}u0026)"
