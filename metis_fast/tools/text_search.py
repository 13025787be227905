"""The `text_search` tool over a local corpus: BM25, with tantivy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import tantivy

from metis_fast.config import TextSearchConfig
from metis_fast.errors import ToolSetupError
from metis_fast.tools.corpus import TEXT, Corpus, page_text
from metis_fast.tools.derived import derived_folder
from metis_fast.tools.results import Page, TextSearchResult
from metis_fast.tools.words import analyzer, prepared, query_units
from metis_fast.types import ToolName

_LAYOUT = f"3 {version('tantivy')}"  # raise the number when the schema below, its meaning or `words` changes
_TOKENIZER = "words"
_TITLE_BOOST = 4.0  # a word of the title says more about a page than one of its body
# Above any sum of BM25 scores of 64 words in two fields, and small enough that float32 keeps three decimals of the rest.
_SAME_TITLE_SCORE = 10_000.0

_Units = Sequence[tuple[str, ...]]


def _same_title(words: tantivy.TextAnalyzer, text: str) -> str:
    """What a title and a query that equals it have in common: their unstemmed words, as one term."""
    return " ".join(words.analyze(prepared(text)))


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for name in ("title", "text"):  # prepared
        builder.add_text_field(name, tokenizer_name=_TOKENIZER)
    builder.add_text_field("same_title", tokenizer_name="raw", index_option="basic")  # the words of the title as one term
    builder.add_bytes_field("page", stored=True)  # title, link and text as they are, in JSON
    builder.add_unsigned_field("row", stored=True)
    return builder.build()


def _build(corpus: Corpus, folder: Path) -> None:
    exact = analyzer(stem=False)
    index = tantivy.Index(_schema(), path=str(folder))
    index.register_tokenizer(_TOKENIZER, analyzer())
    writer = index.writer(heap_size=128 << 20, num_threads=1)  # one thread: documents stay in the corpus's order
    try:
        for row, page in enumerate(corpus.texts("title", "link", "text")):
            title, _, text = page
            document = tantivy.Document(
                title=prepared(title), text=prepared(text), same_title=_same_title(exact, title), row=row
            )
            document.add_bytes("page", json.dumps(page, ensure_ascii=False).encode())
            writer.add_document(document)
        writer.commit()
    finally:
        writer.wait_merging_threads()  # ends all its threads: none writes into a folder that is being removed


class TextSearch:
    """One per run. Thread-safe."""

    def __init__(self, config: TextSearchConfig) -> None:
        """Check the corpus; build its index, or open the one that is there.

        Raises:
            ToolSetupError: the corpus is not set, missing or damaged, lacks a column or has one that is not text; a row is not
                UTF-8; or the index can be written nowhere.
        """
        self._config = config
        corpus = Corpus.open(ToolName.TEXT_SEARCH, config.corpus, {"title": TEXT, "link": TEXT, "text": TEXT})
        key = hashlib.sha256(f"{_LAYOUT}:{corpus.content_hash()}".encode()).hexdigest()
        folder = derived_folder(corpus.path, "index", key, lambda path: _build(corpus, path))
        try:
            index = tantivy.Index.open(str(folder))
        except ValueError as error:
            raise ToolSetupError(f"cannot open the index {folder}: {' '.join(str(error).split())}; delete it") from None
        self._words, self._exact = analyzer(), analyzer(stem=False)
        index.register_tokenizer(_TOKENIZER, self._words)
        self._searcher, self._schema = index.searcher(), index.schema

    def search(self, query: str) -> TextSearchResult:
        """The best pages for the words of `query`; what is not a word does not count, and nothing in it is syntax."""
        query = query.encode("utf-8", "replace").decode()  # JSON may hold half a pair of surrogates
        units = query_units(self._words, query)
        found = self._best(self._query(units, _same_title(self._exact, query))) if units else []
        if not found:
            return TextSearchResult(query, ())
        snippets = tantivy.SnippetGenerator.create(self._searcher, self._query(units, None), self._schema, "text")
        snippets.set_max_num_chars(self._config.snippet_chars)
        pages = []
        for rank, (title, link, text) in enumerate(found, start=1):
            # tantivy's fragments begin with a word, but know nothing of signs that follow each other, nor of folded text.
            words_only = all(len(unit) == 1 for unit in units)
            fragment = snippets.snippet_from_doc(tantivy.Document(text=text)).fragment() if words_only else ""
            snippet = (fragment or self._window(text, units))[: self._config.snippet_chars]
            pages.append(Page(rank, page_text(title), page_text(link), page_text(snippet)))
        return TextSearchResult(query, tuple(pages))

    def _window(self, text: str, units: _Units) -> str:
        """The part of a snippet's length in which most of `units` stand; the first among equals."""
        size = self._config.snippet_chars
        wanted = [f" {' '.join(unit)} " for unit in units]

        def found(start: int) -> int:
            terms = f" {' '.join(self._words.analyze(prepared(text[start : start + size])))} "
            return sum(unit in terms for unit in wanted)

        # Half a length apart: whatever is at most that long stands in one of them whole.
        start = max(range(0, max(1, len(text) - size // 2), max(1, size // 2)), key=found)
        return text[start : start + size]

    def _query(self, units: _Units, title: str | None) -> tantivy.Query:
        """title: what a page's `same_title` would be; None searches the text alone."""
        fields = ("text",) if title is None else ("title", "text")
        boosts = {"title": _TITLE_BOOST, "text": 1.0}
        clauses = [
            (tantivy.Occur.Should, tantivy.Query.boost_query(self._unit_query(field, unit), boosts[field]))
            for unit in units
            for field in fields
        ]
        if title is not None:
            same = tantivy.Query.term_query(self._schema, "same_title", title, index_option="basic")
            clauses.append((tantivy.Occur.Should, tantivy.Query.const_score_query(same, _SAME_TITLE_SCORE)))
        return tantivy.Query.boolean_query(clauses)

    def _unit_query(self, field: str, unit: tuple[str, ...]) -> tantivy.Query:
        if len(unit) == 1:
            return tantivy.Query.term_query(self._schema, field, unit[0])
        return tantivy.Query.phrase_query(self._schema, field, list(unit))

    def _best(self, query: tantivy.Query) -> list[tuple[str, str, str]]:
        """Title, link and text of the best pages; among equals the one that stands first in the corpus."""
        wanted = limit = self._config.max_results
        while True:
            hits = self._searcher.search(query, limit=limit, count=False).hits
            # Equals at the cut: look further, so that the corpus's order decides and not the index's.
            if len(hits) < limit or (limit > wanted and hits[-1][0] < hits[wanted - 1][0]):
                break
            limit *= 4
        documents = [(-score, self._searcher.doc(address)) for score, address in hits]
        documents.sort(key=lambda item: (item[0], item[1].get_first("row")))
        return [tuple(json.loads(document.get_all("page")[0])) for _, document in documents[:wanted]]
