"""text_search over small corpora."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_fast.config import TextSearchConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.tools.text_search import TextSearch
from metis_fast.types import Observation, Outcome

Row = tuple[str, str, str]
PAGES: Sequence[Row] = (
    ("Ouagadougou", "https://example.org/ouaga", "The capital of Burkina Faso. " + "A city of markets. " * 40),
    ("Burkina Faso", "https://example.org/bf", "A country in West Africa."),
    ("Capitals of Africa", "", "Burkina Faso: Ouagadougou. Burkina Faso borders Mali. " + "Burkina Faso Burkina Faso. " * 30),
    ("Zürich", "https://example.org/zh", "A lake and a large station."),
)


def write(path: Path, rows: Sequence[Row]) -> Path:
    titles, links, texts = zip(*rows, strict=True)
    pq.write_table(pa.table({"title": titles, "link": links, "text": texts}), path)
    return path


def tool(path: Path, **changes: int) -> TextSearch:
    return TextSearch(TextSearchConfig.model_validate({"corpus": path, **changes}))


def titles(observation: Observation) -> list[str]:
    return [result.split("\n")[0].split(". ", 1)[1] for result in observation.text.split("\n\n")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("corpus") / "pages.parquet", PAGES)


@pytest.fixture(scope="module")
def search(pages: Path) -> TextSearch:
    return tool(pages)


def test_a_single_result_is_title_link_snippet(pages: Path) -> None:
    got = tool(pages, max_results=1).search("burkina faso")
    assert got == Observation("Burkina Faso\nhttps://example.org/bf\nA country in West Africa.")


def test_several_results_are_numbered_and_an_empty_link_leaves_no_line(search: TextSearch) -> None:
    first, second, third = search.search("ouagadougou africa").text.split("\n\n")
    lines = [result.split("\n") for result in (first, second, third)]
    assert [line[0].split(". ")[0] for line in lines] == ["1", "2", "3"]
    unlinked = next(line for line in lines if line[0].endswith("Capitals of Africa"))
    assert len(unlinked) == 2 and "https" not in unlinked[1]


@pytest.mark.parametrize("title", [page[0] for page in PAGES])
@pytest.mark.parametrize("change", [str.lower, str.upper, lambda title: f'"{title}"?'])
def test_a_query_that_equals_a_title_returns_that_page_first(search: TextSearch, title: str, change) -> None:
    assert titles(search.search(change(title)))[0] == title


def test_an_equal_title_beats_any_number_of_words_in_bodies(tmp_path: Path) -> None:
    loud = [(f"Red fox {number}", "", "red fox " * 500) for number in range(40)]
    corpus = write(tmp_path / "corpus.parquet", [*loud, ("The red fox", "", "nothing else"), *loud])
    assert titles(tool(corpus).search("the red fox"))[0] == "The red fox"


def test_words_of_the_title_count_more_than_words_of_the_body(tmp_path: Path) -> None:
    corpus = write(
        tmp_path / "corpus.parquet", [("Lakes", "", "about the heron bird"), ("Heron facts", "", "about a bird too")]
    )
    assert titles(tool(corpus).search("heron"))[0] == "Heron facts"


def test_word_forms_and_accents_match(search: TextSearch) -> None:
    assert titles(search.search("zurich"))[0] == "Zürich" and titles(search.search("stations"))[0] == "Zürich"


def test_snippet_is_short_and_holds_the_words_searched_for(tmp_path: Path) -> None:
    text = "filler words here. " * 200 + "The okapi lives in the Congo. " + "more filler text. " * 200
    corpus = write(tmp_path / "corpus.parquet", [("Animal", "", text)])
    title, snippet = tool(corpus, max_results=1, snippet_chars=80).search("okapi").text.split("\n")
    assert title == "Animal" and "okapi" in snippet and len(snippet) <= 80


@pytest.mark.parametrize("query", ["", "  ", "?!", "xylophone"])
def test_nothing_found_is_a_result(search: TextSearch, query: str) -> None:
    assert search.search(query) == Observation("No results.", outcome=Outcome.TOOL_RESULT)


@given(st.text(max_size=60) | st.text(alphabet='+-&|!(){}[]^"~*?:\\/ AND OR NOT title burkina', max_size=60))
@settings(max_examples=150)
def test_no_query_breaks_the_search(search: TextSearch, query: str) -> None:
    assert search.search(query).outcome is Outcome.TOOL_RESULT


def test_query_syntax_has_no_meaning(search: TextSearch) -> None:
    assert search.search("title:zürich -lake AND NOT station*").text == search.search("title zürich lake and not station").text


def test_equals_come_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.parquet", [("Same page", f"link{number}", "equal text") for number in range(300)])
    results = tool(corpus, max_results=5).search("equal").text.split("\n\n")
    assert [result.split("\n")[1] for result in results] == [f"link{number}" for number in range(5)]


def test_the_index_is_kept_and_a_changed_corpus_is_indexed_anew(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.parquet", [("Old", "", "first text")])
    assert titles(tool(corpus).search("text")) == ["Old"]
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    made = folder.stat().st_mtime_ns
    assert titles(tool(corpus).search("text")) == ["Old"] and folder.stat().st_mtime_ns == made
    times = corpus.stat()
    write(corpus, [("New", "", "first text")])
    os.utime(corpus, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time: the content decides
    assert titles(tool(corpus).search("text")) == ["New"]


def test_builds_at_the_same_time_leave_one_index_and_no_rest(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.parquet", PAGES)
    got: list[str] = []
    threads = [threading.Thread(target=lambda: got.append(tool(corpus).search("lake").text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4 and len(set(got)) == 1 and "Zürich" in got[0]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_index_is_our_error(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.parquet", PAGES)
    tool(corpus).search("lake")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "meta.json").write_text("{")
    with pytest.raises(InfrastructureError, match="index"):
        tool(corpus).search("lake")


def test_a_corpus_that_cannot_serve_is_refused_when_opened(tmp_path: Path) -> None:
    with pytest.raises(ToolSetupError, match=r"set tools\.text_search\.corpus or remove text_search from tools\.enabled"):
        TextSearch(TextSearchConfig())
    with pytest.raises(ToolSetupError, match="absent"):
        tool(tmp_path / "absent.parquet")
    (tmp_path / "other.parquet").write_text("not a table")
    with pytest.raises(ToolSetupError, match="not a Parquet file"):
        tool(tmp_path / "other.parquet")
    pq.write_table(pa.table({"title": ["a"], "text": ["b"]}), tmp_path / "short.parquet")
    with pytest.raises(ToolSetupError, match="no column 'link'"):
        tool(tmp_path / "short.parquet")
