"""Search results in the words of the `compact` protocol. Texts of sources are one line each, and `<image>` stands in none."""

from __future__ import annotations

from metis_fast.tools.results import ImageSearchResult, TextSearchResult
from metis_fast.types import ImageBlob

NO_RESULTS = "No results."


def compact_text(result: TextSearchResult, numbered: bool) -> str:
    """Title, link and snippet of each page, a line each where there is one.

    numbered: as where the tool may give more than one page (`tools.text_search.max_results`), however many these are.
    """
    pages = [
        _head(place, numbered) + "\n".join(line for line in (page.title, page.link, page.snippet) if line)
        for place, page in enumerate(result.pages, start=1)
    ]
    return "\n\n".join(pages) or NO_RESULTS


def compact_images(result: ImageSearchResult, numbered: bool) -> tuple[str, tuple[ImageBlob, ...]]:
    """Title, link and `<image>` of each page, a line each where there is one; and the images, in that order.

    numbered: as where the tool may give more than one page, however many these are.
    """
    pages = []
    for place, page in enumerate(result.pages, start=1):
        lines = (_head(place, numbered) + page.title, page.link, "<image>" if page.image is not None else "")
        pages.append("\n".join(line for line in lines if line))
    return "\n\n".join(pages) or NO_RESULTS, tuple(page.image for page in result.pages if page.image is not None)


def _head(place: int, numbered: bool) -> str:
    return f"{place}. " if numbered else ""
