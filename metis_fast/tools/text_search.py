"""The `text_search` tool: BM25 over a local corpus, with tantivy.

A result is `title`, `link` and `snippet`, one a line; the link's line is left out where it is empty. Results are numbered if
the tool may return more than one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import tantivy

from metis_fast.config import TextSearchConfig
from metis_fast.errors import InfrastructureError
from metis_fast.tools.corpus import check_corpus, derived_folder, page_text
from metis_fast.types import Observation, ToolName

_LAYOUT = "2"  # raise when the schema below or its meaning changes
_TOKENIZER = "words"
_MAX_WORDS = 64  # of a query; later ones add cost, not meaning
_TITLE_BOOST = 4.0  # a word of the title says more about a page than one of its body
# Above any sum of BM25 scores of 64 words in two fields, and small enough that float32 keeps three decimals of the rest.
_SAME_TITLE_SCORE = 10_000.0


def _analyzer(stem: bool = True) -> tantivy.TextAnalyzer:
    """Words; `stem` folds their endings, which finds more but takes two names such as "Puck" and "Pucked" for one."""
    filters = [tantivy.Filter.remove_long(64), tantivy.Filter.lowercase(), tantivy.Filter.ascii_fold()]
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for item in [*filters, tantivy.Filter.stemmer("English")] if stem else filters:
        builder = builder.filter(item)
    return builder.build()


def _same_title(words: tantivy.TextAnalyzer, text: str) -> str:
    """What a title and a query that equals it have in common: their unstemmed words, as one term."""
    return " ".join(words.analyze(text))


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for name in ("title", "text"):
        builder.add_text_field(name, stored=True, tokenizer_name=_TOKENIZER)
    builder.add_text_field("link", stored=True, tokenizer_name="raw")
    builder.add_text_field("same_title", tokenizer_name="raw", index_option="basic")  # the words of the title as one term
    builder.add_unsigned_field("row", stored=True)
    return builder.build()


@dataclass(frozen=True, slots=True)
class _Index:
    searcher: tantivy.Searcher
    schema: tantivy.Schema
    analyzer: tantivy.TextAnalyzer
    exact: tantivy.TextAnalyzer


def _build(corpus: Path, folder: Path) -> None:
    schema, exact = _schema(), _analyzer(stem=False)
    index = tantivy.Index(schema, path=str(folder))
    index.register_tokenizer(_TOKENIZER, _analyzer())
    writer = index.writer(heap_size=128 << 20, num_threads=1)  # one thread: documents stay in the corpus's order
    row = 0
    for batch in pq.ParquetFile(corpus).iter_batches(batch_size=4096, columns=["title", "link", "text"]):
        for record in batch.to_pylist():
            title, link, text = (str(record[name] or "") for name in ("title", "link", "text"))
            same = _same_title(exact, title)
            writer.add_document(tantivy.Document(title=title, link=link, text=text, same_title=same, row=row))
            row += 1
    writer.commit()
    writer.wait_merging_threads()


class TextSearch:
    """One per run; the index is built or opened by the first search. Thread-safe."""

    def __init__(self, config: TextSearchConfig) -> None:
        """Check the corpus.

        Raises:
            ToolSetupError: it is not set, missing, or lacks a column.
        """
        self._config = config
        self._corpus = check_corpus(ToolName.TEXT_SEARCH, config.corpus, ("title", "link", "text"))
        self._lock = threading.Lock()
        self._index: _Index | None = None

    def _opened(self) -> _Index:
        with self._lock:
            if self._index is None:
                try:
                    folder = derived_folder(self._corpus, "index", _LAYOUT, lambda path: _build(self._corpus, path))
                    index = tantivy.Index.open(str(folder))
                except (OSError, ValueError) as error:  # tantivy raises ValueError for a damaged or unwritable index
                    raise InfrastructureError(f"cannot build or open the index beside {self._corpus}: {error}") from None
                index.register_tokenizer(_TOKENIZER, _analyzer())
                self._index = _Index(index.searcher(), index.schema, _analyzer(), _analyzer(stem=False))
            return self._index

    def open_index(self) -> None:
        """Build or open the index now. Raises as `search`."""
        self._opened()

    def search(self, query: str) -> Observation:
        """The best pages for the words of `query`; what is not a word does not count, and nothing in it is syntax.

        Raises:
            InfrastructureError: the index cannot be built or read.
        """
        index = self._opened()
        words = index.analyzer.analyze(query)
        title = _same_title(index.exact, query)
        hits = self._best(index, self._query(index.schema, words, title)) if words else []
        if not hits:
            return Observation("No results.")
        snippets = tantivy.SnippetGenerator.create(index.searcher, self._query(index.schema, words, None), index.schema, "text")
        snippets.set_max_num_chars(self._config.snippet_chars)
        results = []
        for number, document in enumerate(hits, start=1):
            title, link, text = (str(document.get_first(name) or "") for name in ("title", "link", "text"))
            snippet = snippets.snippet_from_doc(document).fragment() or text  # no fragment: only the title matched
            lines = [page_text(title), page_text(link), page_text(snippet[: self._config.snippet_chars])]
            head = f"{number}. " if self._config.max_results > 1 else ""
            results.append(head + "\n".join([lines[0], *(line for line in lines[1:] if line)]))
        return Observation("\n\n".join(results))

    def _query(self, schema: tantivy.Schema, words: list[str], title: str | None) -> tantivy.Query:
        """title: what a page's `same_title` would be; None searches the text alone."""
        fields = ("text",) if title is None else ("title", "text")
        boosts = {"title": _TITLE_BOOST, "text": 1.0}
        clauses = [
            (tantivy.Occur.Should, tantivy.Query.boost_query(tantivy.Query.term_query(schema, field, word), boosts[field]))
            for word in dict.fromkeys(words[:_MAX_WORDS])
            for field in fields
        ]
        if title is not None:
            same = tantivy.Query.term_query(schema, "same_title", title, index_option="basic")
            clauses.append((tantivy.Occur.Should, tantivy.Query.const_score_query(same, _SAME_TITLE_SCORE)))
        return tantivy.Query.boolean_query(clauses)

    def _best(self, index: _Index, query: tantivy.Query) -> list[tantivy.Document]:
        """The best documents; among equals the one that stands first in the corpus."""
        wanted = limit = self._config.max_results
        while True:
            hits = index.searcher.search(query, limit=limit, count=False).hits
            # Equals at the cut: look further, so that the corpus's order decides and not the index's.
            if len(hits) < limit or (limit > wanted and hits[-1][0] < hits[wanted - 1][0]):
                break
            limit *= 4
        documents = [(-score, index.searcher.doc(address)) for score, address in hits]
        documents.sort(key=lambda item: (item[0], item[1].get_first("row")))
        return [document for _, document in documents[:wanted]]
