"""Which tools the text of a prompt offers, and whether it asks for an answer that can be judged."""

from __future__ import annotations

from collections.abc import Iterable

from metis_fast.prompt_tools import offered_tools
from metis_fast.types import Prompt, ToolName

__all__ = ["KNOWN_TOOLS", "asks_for_answer", "enabled", "offered_tools"]

KNOWN_TOOLS = frozenset({*(tool.value for tool in ToolName), "search"})
"""Names of built-in tools; `search` is another one of text_search in the published protocol."""


def enabled(tools: Iterable[ToolName]) -> frozenset[str]:
    """Those of `KNOWN_TOOLS` that a config enables."""
    names = {tool.value for tool in tools}
    return frozenset(names | {"search"} if ToolName.TEXT_SEARCH in names else names)


def asks_for_answer(prompt: Prompt) -> bool:
    """Whether a prompt tells where the answer has to stand; the first word of an answer elsewhere is never looked for."""
    return any("<answer>" in message.content for message in prompt.messages)
