"""Which tools the text of a prompt offers, and whether it asks for an answer that can be judged."""

from __future__ import annotations

import re

from metis_fast.types import Prompt, ToolName

KNOWN_TOOLS = frozenset({*(tool.value for tool in ToolName), "search"})
"""Names that are answered; `search` is another one of text_search in the published protocol."""

_SECTION = re.compile(r"^#\s+Tools\b.*?$(.*?)(?=^#\s|\Z)", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^##\s+`?([A-Za-z_][\w.-]*)`?\s*$", re.MULTILINE)
_SCHEMAS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_NAME = re.compile(r'"name"\s*:\s*"([^"]+)"\s*,\s*"(?:description|parameters)"')


def offered_tools(prompt: Prompt) -> tuple[str, ...]:
    """Names of the tools that system messages offer, each once, in their order.

    Either as the published ones do, with a heading `## name` for each under `# Tools`; or as chat templates do, with JSON
    schemas between `<tools>` and `</tools>`.
    """
    text = "\n".join(message.content for message in prompt.messages if message.role == "system")
    names = [name for section in _SECTION.findall(text) for name in _HEADING.findall(section)]
    names += [name for section in _SCHEMAS.findall(text) for name in _NAME.findall(section)]
    return tuple(dict.fromkeys(names))


def asks_for_answer(prompt: Prompt) -> bool:
    """Whether a prompt tells where the answer has to stand; the first word of an answer elsewhere is never looked for."""
    return any("<answer>" in message.content for message in prompt.messages)
