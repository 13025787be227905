"""Past searches: our cache, shared by processes, and the reference's."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from searching import KEY, found, keys, settings, source_over

from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.rollout.protocols import Metis
from metis_fast.testing.search import Reply, SearchServer, serving, some_pages
from metis_fast.tools.results import Page, TextSearchResult
from metis_fast.tools.search.cache import ReferenceCache, SearchCache, read_result
from metis_fast.tools.search.keys import NO_KEY
from metis_fast.tools.search.providers import PROVIDERS
from metis_fast.tools.search.web import WebText

pytestmark = pytest.mark.usefixtures("keys")
__all__ = ["keys"]
PAGES = (Page(1, "A <b> \\ title", "https://example.org/?a=1&b=(2)", 'A "snippet" ∂'), Page(3, "B", "", ""))


# -- ours -----------------------------------------------------------------------------------------------------------------


def test_what_was_found_once_is_asked_for_by_no_later_run(tmp_path: Path) -> None:
    server = SearchServer(find=lambda query: [] if query == "nothing" else some_pages(query), key=KEY)
    with serving(server) as address:
        config = settings("serper", address, cache=tmp_path / "searches.sqlite")
        for _ in range(2):
            source = WebText(config)
            assert len(found(source, 'blue "heron"').pages) == 10 and found(source, "nothing").pages == ()
            source.close()
    assert [request.json["q"] for request in server.received] == ["blue heron", "nothing"]


@pytest.mark.parametrize(
    ("provider", "changes"),
    [
        ("serper", {"max_results": 9}),
        ("serpapi", {"url": "http://h/serper"}),
        ("serper", {"url": "http://other"}),
        ("http", {"url": "http://h/serper"}),
    ],
)
def test_other_settings_are_other_searches(provider: str, changes: dict[str, object]) -> None:
    def version(name: str, **changes: object) -> str:
        return PROVIDERS[name](settings(name, "http://h", **changes), NO_KEY).version

    assert version("serper") != version(provider, **changes)
    assert version("http") != version("http", http={"results": "x"})
    assert version("serper") == version("serper", timeout_s=1, cache="x", api_key_env="OTHER")


def test_pages_come_back_as_they_were(tmp_path: Path) -> None:
    cache = SearchCache(tmp_path / "deep" / "searches.sqlite")
    cache.put("v", "serper", "q", PAGES)
    cache.put("v", "serper", "none", ())
    again = SearchCache(tmp_path / "deep" / "searches.sqlite")
    assert (again.get("v", "q"), again.get("v", "none"), again.get("w", "none")) == (PAGES, (), None)
    cache.close()
    again.close()
    again.close()


def _write(path: Path, number: int) -> None:
    cache = SearchCache(path)
    for i in range(50):
        cache.put("v", "serper", f"{number} {i}", PAGES)
        cache.put("v", "serper", f"shared {i}", PAGES)
    cache.close()


def test_a_new_file_that_another_process_is_making_is_waited_for(tmp_path: Path) -> None:
    """SQLite's own time-out does not cover the change to a write-ahead log."""
    path = tmp_path / "searches.sqlite"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, other.execute, ["ROLLBACK"])
    timer.start()
    cache = SearchCache(path)
    cache.put("v", "serper", "q", PAGES)
    assert cache.get("v", "q") == PAGES
    cache.close()
    timer.join()
    other.close()


def test_processes_write_one_file_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "searches.sqlite"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write, args=(path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 3
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT COUNT(*) FROM searches").fetchone() == (200,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


@pytest.mark.parametrize("stored", ["{", "null", "[[1, 2, 3, 4]]", '[["1", "t", "l", "s"]]', "[[1]]", "7", b"\xff"])
def test_a_damaged_entry_is_asked_for_again(tmp_path: Path, stored: object) -> None:
    server, path = SearchServer(), tmp_path / "searches.sqlite"
    with source_over(server, "serper", cache=path) as source:
        good = found(source, "x")
        database = sqlite3.connect(path)
        database.execute("UPDATE searches SET pages = ?", (stored,))
        database.commit()
        database.close()
        assert found(source, "x") == good and found(source, "x") == good
    assert len(server.received) == 2


def test_a_file_that_is_no_cache_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, but longer than the header of one is " * 10)
    with sqlite3.connect(tmp_path / "other") as database:
        database.execute("CREATE TABLE searches (a TEXT)")
    database.close()
    for name in ("text", "other", "text/below"):
        with pytest.raises(ToolSetupError, match=r"^tools\.text_search\.cache=.* cannot be used: .*; give a writable SQLite"):
            SearchCache(tmp_path / name)


def test_a_cache_that_cannot_be_written_any_more_is_told_once_and_searches_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with source_over(SearchServer(), "serper", cache=tmp_path / "searches.sqlite") as source:
        source._cache._database.execute("PRAGMA query_only = ON")
        assert [len(found(source, query).pages) for query in "abc"] == [10, 10, 10]
    assert caplog.text.count("cannot be written") == 1


# -- the reference's ------------------------------------------------------------------------------------------------------


def as_published(query: str, pages: Sequence[Page]) -> str:
    """The reference's text."""
    texts = [f"Page {page.rank}. [Title: {page.title}](Link: {page.link})\nSnippet: {page.snippet}\n" for page in pages]
    return f"A Google search for '{query}' found {len(pages)} results:\n\n## Web Results\n" + "\n".join(texts)


def line(query: str, result: object) -> str:
    return json.dumps({"query": query, "result": result, "timestamp": 1_700_000_000.5})


_ONE_LINE = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"]), min_size=1, max_size=30)


@given(st.lists(st.tuples(_ONE_LINE, _ONE_LINE, _ONE_LINE), min_size=1, max_size=5), _ONE_LINE)
def test_the_text_of_results_is_read_back_into_pages(entries: list[tuple[str, str, str]], query: str) -> None:
    pages = tuple(
        Page(rank, *(text.replace("<image>", "").replace("](Link: ", "") or "x" for text in entry))
        for rank, entry in enumerate(entries, start=1)
        if rank != 2  # the reference leaves out pages without a snippet, and keeps their number
    )
    assert read_result(as_published(query, pages)) == pages


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        ("No results found for 'x'.", ()),
        ("No results found for 'x'. HTTP 429 quota exceeded", None),
        ("A Google search for 'x' found 10 results:\n\n## Web Results\n<html>captcha</html>", None),
        ("A Google search for 'x' found 10 results:\n\n## Web Results\n", None),
        ("A Google search for 'x' found 2 results:\n\n## Web Results\nPage 1. [Title: long tit", None),
        (
            "A Google search for 'x' found 2 results:\n\n## Web Results\nPage 1. [Title: a](Link: l)\nSnippet: s\n\n"
            "Page 2. [Title: b](Li",
            None,
        ),
        (
            "A Google search for 'x' found 2 results:\n\n## Web Results\nPage 1. [Title: a\nb](Link: l)\nSnippet: s\n\n"
            "Page 2. [Title: c](Link: m)\nSnippet: t\n",
            (Page(1, "a b", "l", "s"), Page(2, "c", "m", "t")),
        ),
        ("Search failed for 'x': 503", None),
        ("", None),
        ("A Google search for 'x' found 0 results:\n\n## Web Results\n", ()),
        (
            "A Google search for 'a\nb' found 1 results:\n\n## Web Results\n"
            "Page 4. [Title: T [1]](2)](Link: https://e.org/a_(b))\nSnippet: two\n\nlines <image>\n",
            (Page(4, "T [1]](2)", "https://e.org/a_(b)", "two lines < image >"),),
        ),
        (
            "A Google search for 'x' found 2 results:\r\n\r\n## Web Results\r\nPage 1. [Title: T](Link: l)\r\nSnippet: s\r\n",
            (Page(1, "T", "l", "s"),),
        ),
    ],
)
def test_other_texts_of_the_reference(text: str, pages: tuple[Page, ...] | None) -> None:
    assert read_result(text) == pages


def test_what_our_own_protocol_writes_is_read_back() -> None:
    result = TextSearchResult("blue heron", tuple(some_pages("blue heron")))
    text = Metis().word(result).text
    assert read_result(text) == tuple(page for page in result.pages if page.snippet)
    assert read_result(Metis().word(TextSearchResult("x", ())).text) == ()


def test_the_references_cache_is_asked_behind_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.jsonl"
    lines = [
        line("old", as_published("old", [Page(1, "first", "l", "s")])),
        line("failed", "Search failed for 'failed': 503"),
        "{damaged",
        line('the "quoted"  one', as_published("q", [Page(rank, f"t{rank}", "l", "s") for rank in (1, 2, 9)])),
        "",
        line("none", "No results found for 'none'."),
        line("old", as_published("old", [Page(1, "later", "l", "s")])),
    ]
    path.write_text("\n".join(lines))
    server = SearchServer()
    with source_over(server, "serper", reference_cache=path, max_results=5) as source:
        assert found(source, "old").pages == (Page(1, "later", "l", "s"),)
        assert [page.rank for page in found(source, "the quoted one").pages] == [1, 2]
        assert found(source, "none").pages == () and not server.received
        assert len(found(source, "failed").pages) == 5 and len(server.received) == 1
    assert "2 lines have no result and are left out; the first, line 2: a result that says" in caplog.text


def test_a_references_cache_that_cannot_be_read_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ToolSetupError, match=r"reference_cache=.*gone cannot be read: No such file"):
        ReferenceCache(tmp_path / "gone")
    for text, said in (("", "an empty file"), ('{"q": 1}', "line 1: no query and result"), ("\xff", "line 1: no JSON")):
        (tmp_path / "bad").write_bytes(text.encode("latin-1"))
        with pytest.raises(ToolSetupError, match=rf"has no result: expected lines like .*, got {said}.*; set it to another"):
            ReferenceCache(tmp_path / "bad")


def test_a_references_cache_that_changes_in_use_is_a_failure_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    path.write_text(line("one", as_published("one", PAGES)))
    cache = ReferenceCache(path)
    path.write_text(line("two", as_published("two", PAGES)))
    with pytest.raises(InfrastructureError, match="changed in use"):
        cache.get("one", 10)
    cache.close()


# -- offline --------------------------------------------------------------------------------------------------------------


def test_offline_answers_from_the_caches_alone_and_needs_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, path = SearchServer(), tmp_path / "searches.sqlite"
    (tmp_path / "cache.jsonl").write_text(line("old", as_published("old", [Page(1, "first", "l", "s")])))
    with source_over(server, "brightdata", cache=path) as source:
        online = found(source, "known")
        config = source._config.model_copy(update={"offline": True, "reference_cache": tmp_path / "cache.jsonl"})
    for name in ("BRIGHTDATA_API_TOKEN", "BRIGHTDATA_ZONE"):
        monkeypatch.delenv(name)
    source = WebText(config)  # the server is gone, too
    assert found(source, "known") == online and found(source, "old").pages[0].title == "first"
    with pytest.raises(InfrastructureError, match=r"is offline, and no cache has 'unknown'; set tools\.text_search\.offline"):
        found(source, "unknown")
    source.close()
    source.close()


def test_failures_are_not_kept(tmp_path: Path) -> None:
    server = SearchServer()
    server.replies.append(Reply(400, b""))
    with source_over(server, "serper", cache=tmp_path / "searches.sqlite") as source:
        with pytest.raises(InfrastructureError):
            found(source, "x")
        assert len(found(source, "x").pages) == 10
