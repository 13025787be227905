"""Where `text_search` and `image_search` look: a local corpus, a provider on the web, or a published cache.

`open_text_source` and `open_image_source` are the doors; the toolbox knows nothing else of them. Nothing heavy is imported
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from metis_fast.config import ImageSearchConfig, TextSearchConfig
    from metis_fast.tools.results import ImageSearchResult, Refused, TextSearchResult
    from metis_fast.types import ImageBlob


class TextSource(Protocol):
    """Finds pages for words. One per process; may be used from several event loops, one after the other."""

    async def search(self, query: str) -> TextSearchResult | Refused:
        """The best pages; none is a result. Refused: a query that cannot be searched for, which is the agent's mistake.

        Every text in it is one line, in which nothing stands for an image.

        Raises:
            InfrastructureError: the source cannot answer now.
        """
        ...

    def close(self) -> None:
        """Close files. Nothing may be searched for any more. May be called twice."""
        ...


class ImageSource(Protocol):
    """Finds pages that show what a prompt shows. One per process; may be used from several event loops."""

    async def search(self, images: Sequence[ImageBlob], extra: Mapping[str, object]) -> ImageSearchResult | Refused:
        """The best pages; none is a result. Refused: the prompt has no image that can be searched for.

        images, extra: those of the prompt (`Prompt.images`, `Prompt.extra`). Texts are as those of `TextSource`.

        Raises:
            InfrastructureError: the source cannot answer now.
        """
        ...

    def close(self) -> None:
        """Close files. Nothing may be searched for any more. May be called twice."""
        ...


def open_text_source(config: TextSearchConfig) -> TextSource:
    """What `tools.text_search` asks for. A local corpus is indexed here if it was not yet; no request is made.

    Raises:
        ToolSetupError: the corpus, the cache or the key is missing or cannot be used.
    """
    if config.provider == "local":
        from metis_fast.tools.search.local import LocalText  # at first use, here and below: they import indexes and HTTP

        return LocalText(config)
    from metis_fast.tools.search.web import WebText

    return WebText(config)


def open_image_source(config: ImageSearchConfig) -> ImageSource:
    """What `tools.image_search` asks for.

    Raises:
        ToolSetupError: the corpus or the cache is missing or cannot be used.
    """
    from metis_fast.tools.search.local import LocalImages

    if config.cache is None:
        return LocalImages(config)
    from metis_fast.tools.search.lookup import CachedImages

    return CachedImages(config, None if config.corpus is None else LocalImages(config))
