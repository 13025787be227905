"""From the JSON of a reply to pages, and what it says if there are none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from metis_fast.tools.corpus import page_text
from metis_fast.tools.results import Page
from metis_fast.tools.search.failure import Failed
from metis_fast.tools.search.keys import NO_KEY, Key

_CHANGED = "the provider has changed its reply: report it, or read it with tools.text_search.provider=http"
_FEW = 3  # so many results without a single text are no accident


@dataclass(frozen=True, slots=True)
class Fields:
    """Where a provider's reply has what. Each is a path: names and positions, with dots between.

    results: of the list; empty: the reply is the list. title, link: of an entry, which always has both. snippets: of its text,
    the first that is there; a search engine has none for some pages.
    """

    results: str
    title: str = "title"
    link: str = "link"
    snippets: tuple[str, ...] = ("snippet",)


class _Entry(NamedTuple):
    """A result; a text is empty where there is none."""

    title: str
    link: str
    snippet: str

    @staticmethod
    def of(entry: object, fields: Fields) -> _Entry:
        snippets = [text for path in fields.snippets if (text := _text(at(entry, path)))]
        return _Entry(_text(at(entry, fields.title)), _text(at(entry, fields.link)), "".join(snippets[:1]))


def parse(body: bytes, key: Key) -> object:
    """The value of a reply in JSON.

    Raises:
        Failed: it is none. Another try may help: a proxy's page of HTML, a body that is cut off.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        # hidden before it is cut: half a key would not be found
        start = key.hide(body.decode(json.detect_encoding(body), errors="replace")).lstrip()[:200]
        what = "nothing" if not start else "HTML" if start.startswith("<") else "something else"
        reason = f"expected JSON, got {what}"
        said = start or (str(error) if body else "")
        raise Failed(reason, said, "see tools.text_search.url and the provider's status page", again=True) from None


def pages(value: object, fields: Fields, count: int, key: Key) -> tuple[Page, ...]:
    """At most `count` results, in their order.

    Raises:
        Failed: the list is not there, or its entries are not what `fields` says: the provider has changed its reply.
    """
    found = at(value, fields.results)
    if not isinstance(found, list):
        raise Failed(f"the reply has no list {fields.results or 'at its top'!r}", f"it has {_keys(value, key)}", _CHANGED)
    entries = [_Entry.of(entry, fields) for entry in found]
    for path, texts in ((fields.title, [one.title for one in entries]), (fields.link, [one.link for one in entries])):
        if entries and not any(texts):
            raise Failed(f"no result has {path!r}", f"the first has {_keys(found[0], key)}", _CHANGED)
    if len(entries) >= _FEW and not any(one.snippet for one in entries):
        expected = " or ".join(map(repr, fields.snippets))
        raise Failed(f"none of {len(entries)} results has {expected}", f"the first has {_keys(found[0], key)}", _CHANGED)
    return tuple(
        Page(rank, clean(one.title, key), clean(one.link, key), clean(one.snippet, key))
        for rank, one in enumerate(entries[:count], start=1)
    )


def clean(text: str, key: Key = NO_KEY) -> str:
    """A provider's text as one line: no `<image>`, no half of a surrogate pair, no key."""
    return page_text(key.hide(text.encode("utf-8", "replace").decode()))


def at(value: object, path: str) -> object:
    """What stands at a path; None where it leads to nothing."""
    for name in path.split(".") if path else ():
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, Sequence) and not isinstance(value, str) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def _text(value: object) -> str:
    """Numbers are text, too: a page may be called 1984; NaN, where a table of theirs has nothing, is none."""
    is_text = isinstance(value, (str, int, float)) and not isinstance(value, bool) and value == value
    return str(value) if is_text else ""


def _keys(value: object, key: Key) -> str:
    """The first names that a value has, without the key."""
    if not isinstance(value, Mapping):
        return f"no names, it is {'null' if value is None else type(value).__name__}"
    return key.hide(", ".join(map(str, list(value)[:12]))) or "no names"
