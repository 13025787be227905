"""The built-in tools as sources of a toolbox, and what a model may be told of them.

Published rows describe them in words of their own; what stands here is for other clients of a toolbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from metis_fast.config import PythonToolConfig
from metis_fast.tools.protocol import ToolSpec
from metis_fast.tools.python_tool import PythonServer, PythonTool
from metis_fast.tools.results import ImageSearchResult, PythonResult, Refusal, Refused, TextSearchResult
from metis_fast.tools.search import ImageSource, TextSource
from metis_fast.tools.tool import ToolPrompt
from metis_fast.types import ToolName

ALIASES: Mapping[str, ToolName] = {"search": ToolName.TEXT_SEARCH}
"""Other names that agents use."""


def _schema(**texts: str) -> dict[str, object]:
    """Of an object with these texts and nothing else. texts: name -> what it is."""
    properties = {name: {"type": "string", "description": what} for name, what in texts.items()}
    return {"type": "object", "properties": properties, "required": list(texts), "additionalProperties": False}


SPECS: Mapping[ToolName, ToolSpec] = {
    ToolName.PYTHON: ToolSpec(
        ToolName.PYTHON.value,
        "Runs Python code in a session that lasts as long as the conversation. The images of the prompt are there as image_1, "
        "image_2 and so on. What is printed, and every image that is shown, comes back.",
        _schema(code="Python code"),
    ),
    ToolName.TEXT_SEARCH: ToolSpec(
        ToolName.TEXT_SEARCH.value, "Searches for pages about a query.", _schema(query="words to search for")
    ),
    ToolName.IMAGE_SEARCH: ToolSpec(
        ToolName.IMAGE_SEARCH.value, "Searches for pages with the image of the prompt. Works once a conversation.", _schema()
    ),
}


class PythonSource:
    """`python`: a sandboxed session a rollout. A `ToolSource`."""

    tools: Sequence[ToolSpec] = (SPECS[ToolName.PYTHON],)

    def __init__(self, server: PythonServer, config: PythonToolConfig, gate: Callable[[], asyncio.Semaphore]) -> None:
        """gate: limits the calls that run at the same time."""
        self.server, self.config, self.gate = server, config, gate

    def session(self, prompt: ToolPrompt) -> _PythonSession:
        """See `ToolSource`."""
        return _PythonSession(self, prompt)

    def close(self) -> None:
        """Stop the server."""
        self.server.close()


class _PythonSession:
    def __init__(self, source: PythonSource, prompt: ToolPrompt) -> None:
        config = source.config
        sizes = prompt.seen if config.images == "seen" else ()
        self._gate = source.gate
        self._python = PythonTool(source.server, prompt.images, config.timeout_s, config.max_output_chars, sizes)

    async def call(self, name: str, arguments: Mapping[str, object]) -> PythonResult:
        """See `ToolSession.call`."""
        async with self._gate():
            return await self._python.call(str(arguments["code"]))

    async def close(self) -> None:
        """Kill the session, if one runs, and wait until it is gone."""
        await self._python.close()


class TextSearchSource:
    """`text_search`. A `ToolSource`; rollouts share all of it."""

    tools: Sequence[ToolSpec] = (SPECS[ToolName.TEXT_SEARCH],)

    def __init__(self, source: TextSource) -> None:
        self._source = source

    def session(self, prompt: ToolPrompt) -> _TextSearchSession:
        """See `ToolSource`."""
        return _TextSearchSession(self._source)

    def close(self) -> None:
        """Close what searches opened."""
        self._source.close()


class _TextSearchSession:
    def __init__(self, source: TextSource) -> None:
        self._source = source

    async def call(self, name: str, arguments: Mapping[str, object]) -> TextSearchResult | Refused:
        """See `ToolSession.call`."""
        return await self._source.search(str(arguments["query"]))

    async def close(self) -> None:
        """A search leaves nothing."""


class ImageSearchSource:
    """`image_search`: for the image of the prompt, once a rollout. A `ToolSource`."""

    tools: Sequence[ToolSpec] = (SPECS[ToolName.IMAGE_SEARCH],)

    def __init__(self, source: ImageSource) -> None:
        self._source = source

    def session(self, prompt: ToolPrompt) -> _ImageSearchSession:
        """See `ToolSource`."""
        return _ImageSearchSession(self._source, prompt)

    def close(self) -> None:
        """Close what searches opened."""
        self._source.close()


class _ImageSearchSession:
    def __init__(self, source: ImageSource, prompt: ToolPrompt) -> None:
        self._source, self._prompt, self._searched = source, prompt, False

    async def call(self, name: str, arguments: Mapping[str, object]) -> ImageSearchResult | Refused:
        """See `ToolSession.call`."""
        if self._searched:
            return Refused("image_search can be called only once; its result is above.", Refusal.REPEATED, name)
        result = await self._source.search(self._prompt.images, self._prompt.extra)
        self._searched = not isinstance(result, Refused)  # nor does an infrastructure error use up the one call
        return result

    async def close(self) -> None:
        """A search leaves nothing."""
