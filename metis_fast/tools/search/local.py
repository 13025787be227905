"""The sources that answer from files of this machine, each search in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from metis_fast.config import ImageSearchConfig, TextSearchConfig
from metis_fast.tools.image_search import ImageSearch
from metis_fast.tools.results import ImageSearchResult, Refused, TextSearchResult
from metis_fast.tools.text_search import TextSearch
from metis_fast.types import ImageBlob

NO_IMAGE = "image_search needs an image in the prompt; there is none."


class LocalText:
    """A `TextSource` over `tools.text_search.corpus`.

    Raises:
        ToolSetupError: see `TextSearch`.
    """

    def __init__(self, config: TextSearchConfig) -> None:
        self._search = TextSearch(config)

    async def search(self, query: str) -> TextSearchResult | Refused:
        """See `TextSource`."""
        return await asyncio.to_thread(self._search.search, query)

    def close(self) -> None:
        """Nothing is open between searches."""


class LocalImages:
    """An `ImageSource` over `tools.image_search.corpus`: pages whose image looks like the prompt's first one.

    Raises:
        ToolSetupError: see `ImageSearch`.
    """

    def __init__(self, config: ImageSearchConfig) -> None:
        self._search = ImageSearch(config)

    async def search(self, images: Sequence[ImageBlob], extra: Mapping[str, object]) -> ImageSearchResult | Refused:
        """See `ImageSource`."""
        if not images:
            return Refused(NO_IMAGE)
        return await asyncio.to_thread(self._search.search, images[0])

    def close(self) -> None:
        """Nothing is open between searches."""
