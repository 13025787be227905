"""Past results of text searches: our own, in SQLite, and those of the reference, in JSON lines."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from metis_fast.errors import InfrastructureError, ToolSetupError, one_line
from metis_fast.tools.results import Page
from metis_fast.tools.search.reply import clean

_LOG = logging.getLogger(__name__)
_WAIT_S = 30.0  # for another process that writes
_TABLE = """CREATE TABLE IF NOT EXISTS searches
    (key TEXT PRIMARY KEY, provider TEXT NOT NULL, query TEXT NOT NULL, pages TEXT NOT NULL, time REAL NOT NULL)"""


class SearchCache:
    """Past results, in memory or in a SQLite file that processes and runs share. Thread-safe.

    What cannot be written is told once and forgotten: the results are there, and the next search asks again.

    Raises:
        ToolSetupError: the file cannot be opened or written, or is no such cache.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._complained = False
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path or ":memory:", timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
            _switch_to_wal(self._database)
            self._database.execute("PRAGMA synchronous = OFF")  # what a power cut takes is asked for again
            self._database.execute(_TABLE)
            self._database.execute("SELECT key, pages FROM searches LIMIT 1").fetchone()
        except (sqlite3.Error, OSError) as error:
            if hasattr(self, "_database"):  # it opens whatever it is given, and finds out at the first statement
                self._database.close()
            raise ToolSetupError(
                f"tools.text_search.cache={path} cannot be used: {one_line(error)}; give a writable SQLite file, or none"
            ) from None

    def get(self, version: str, query: str) -> tuple[Page, ...] | None:
        """What is known of a query; None where there is nothing, or nothing that can be read.

        version: `Provider.version`.

        Raises:
            InfrastructureError: the file can no longer be read.
        """
        try:
            with self._lock:
                row = self._database.execute("SELECT pages FROM searches WHERE key = ?", (_key(version, query),)).fetchone()
        except sqlite3.Error as error:
            raise InfrastructureError(f"tools.text_search.cache={self._path} cannot be read: {one_line(error)}") from None
        return None if row is None else _from_json(row[0])

    def put(self, version: str, provider: str, query: str, pages: Sequence[Page]) -> None:
        """Keep the results of a query."""
        text = json.dumps([[page.rank, page.title, page.link, page.snippet] for page in pages])
        values = (_key(version, query), provider, query, text, time.time())
        try:
            with self._lock:
                self._database.execute("INSERT OR REPLACE INTO searches VALUES (?, ?, ?, ?, ?)", values)
        except sqlite3.Error as error:
            if not self._complained:
                _LOG.warning(
                    "tools.text_search.cache=%s cannot be written: %s; searches are not kept", self._path, one_line(error)
                )
            self._complained = True

    def close(self) -> None:
        """Close the file. May be called twice."""
        with self._lock:
            self._database.close()


def _switch_to_wal(database: sqlite3.Connection) -> None:
    """Of a new file only; SQLite's own time-out does not wait there for another process that does the same."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _key(version: str, query: str) -> str:
    return hashlib.sha256(json.dumps([version, query]).encode()).hexdigest()


def _from_json(text: object) -> tuple[Page, ...] | None:
    try:
        entries = json.loads(text) if isinstance(text, str) else None
        pages = tuple(Page(rank, title, link, snippet) for rank, title, link, snippet in entries or ())
    except (ValueError, TypeError, RecursionError):
        return None
    texts = [text for page in pages for text in (page.title, page.link, page.snippet)]
    sound = all(isinstance(text, str) for text in texts) and all(isinstance(page.rank, int) for page in pages)
    return pages if sound and isinstance(entries, list) else None


class ReferenceCache:
    """The reference's cache: JSON lines of `query`, `result` (its text for the agent), `timestamp`; a later line counts.

    Only places are kept in memory; a result is read when it is asked for. Thread-safe.

    Raises:
        ToolSetupError: the file cannot be read, or has no result.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[bytes, int] = {}  # digest of a query -> offset of its line
        self._lock = threading.Lock()
        skipped, first = 0, ""
        try:
            self._file = path.open("rb")
            offset = 0
            for number, line in enumerate(self._file, start=1):
                entry, problem = _entry(line)
                if entry is not None:
                    self._places[_digest(entry[0])] = offset
                elif line.strip():
                    skipped, first = skipped + 1, first or f"line {number}: {problem}"
                offset += len(line)
        except OSError as error:
            raise ToolSetupError(
                f"tools.text_search.reference_cache={path} cannot be read: {error.strerror or error}; set it to a file of JSON "
                "lines, or remove it"
            ) from None
        if not self._places:
            self._file.close()
            raise ToolSetupError(
                f"tools.text_search.reference_cache={path} has no result: expected lines like "
                f'{{"query": "...", "result": "...", "timestamp": 0}}, got {first or "an empty file"}; set it to another file'
            )
        if skipped:
            _LOG.warning("%s: %d lines have no result and are left out; the first, %s", path, skipped, first)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, query: str, count: int) -> tuple[Page, ...] | None:
        """At most `count` pages of a query, None where it is not there.

        Raises:
            InfrastructureError: the file changed, or can no longer be read.
        """
        offset = self._places.get(_digest(query))
        if offset is None:
            return None
        try:
            with self._lock:
                self._file.seek(offset)
                entry, _ = _entry(self._file.readline())
        except (OSError, ValueError) as error:
            raise InfrastructureError(f"{self._path} cannot be read: {one_line(error)}") from None
        if entry is None or _digest(entry[0]) != _digest(query):
            raise InfrastructureError(f"{self._path} changed in use; leave it as it is while runs read it")
        return tuple(page for page in entry[1] if page.rank <= count)

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()


def _digest(query: str) -> bytes:
    """The reference takes double quotes away before it searches, and perhaps before it keeps."""
    return hashlib.blake2b(" ".join(searched(query).split()).encode(), digest_size=16).digest()


def searched(query: str) -> str:
    """A query as it is searched for: without double quotes, which would ask for the exact words, and halves of surrogates."""
    return query.encode("utf-8", "replace").decode().replace('"', "")


def _entry(line: bytes) -> tuple[tuple[str, tuple[Page, ...]] | None, str]:
    """Query and pages of a line; or None and what is wrong with it."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, f"no JSON ({one_line(error)})"
    if not isinstance(value, dict) or not isinstance(value.get("query"), str) or not isinstance(value.get("result"), str):
        return None, "no query and result that are text"
    pages = read_result(value["result"])
    if pages is None:
        return None, f"a result that says {value['result'][:60]!r}"
    return (value["query"], pages), ""


_NOTHING = re.compile(r"No results found for '.*'\.", re.DOTALL)
_FOUND = re.compile(r"A Google search for '.*' found (\d{1,9}) results?:", re.DOTALL)
_START = re.compile(r"^(?=Page \d{1,6}\. \[Title: )", re.MULTILINE)
_NUMBER = re.compile(r"Page (\d{1,6})\. \[Title: ")


def read_result(text: str) -> tuple[Page, ...] | None:
    """Pages of the reference's text for the agent.

    None: it is another one, such as that of a search that failed, or is damaged. No pages: it says that there are none.
    """
    text = text.replace("\r\n", "\n")
    if _NOTHING.fullmatch(text.strip()):
        return ()
    head, mark, body = text.partition("\n\n## Web Results\n")
    found = _FOUND.fullmatch(head)
    if not mark or not found:
        return None
    before, *parts = _START.split(body)
    pages = [page for part in parts if (page := _page(part)) is not None]
    if before.strip() or len(pages) < len(parts) or (not parts and int(found[1]) > 0):
        return None
    return tuple(pages)


def _page(text: str) -> Page | None:
    """A page and its snippet. A title may hold line breaks; the link ends its line. None: it is cut off in them."""
    start = _NUMBER.match(text)
    title, mark, rest = text.partition("](Link: ")
    link, _, snippet = rest.partition("\n")
    if start is None or not mark or not link.rstrip().endswith(")"):
        return None
    words = clean(snippet.replace("\n", " ").removeprefix("Snippet:"))
    return Page(int(start[1]), clean(title[start.end() :]), clean(link.rstrip()[:-1]), words)
