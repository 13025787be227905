"""The agent's system text: a file's, or one in the form of the published rows, in words of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from metis_fast.data.parquet import PromptFiles
from metis_fast.data.row import BadRowError
from metis_fast.errors import ConfigError, DataError
from metis_fast.types import ToolName

_MARK = "{tools}"
_OFFERS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    ToolName.PYTHON: (
        "Runs Python code in a session that lasts as long as the conversation. The images are there as image_1, image_2 and so "
        "on. What is printed, and every image that is shown, comes back.",
        {"code": "part = image_1.crop((0, 0, 200, 100))\npart"},
    ),
    ToolName.TEXT_SEARCH: ("Searches for pages about a query.", {"query": "year in which the Eiffel Tower was opened"}),
    ToolName.IMAGE_SEARCH: (
        "Searches for pages that show the image of the question. It takes no arguments, and works once.",
        {},
    ),
}
"""Built-in tools: what a model is told of each, and the arguments of an example."""
_ROLE = "You are an assistant that looks closely, thinks, and answers questions, about images too."
_GUIDELINES = (
    "Answer at once where what you see and know is enough.",
    "Look closer with a tool where something is too small or too unclear to be read.",
    "Compute or search with a tool where you are likely to be wrong without.",
    "Call a tool only for what you do not have yet.",
)
_CALLING = "Then either call one tool in <tool_call>...</tool_call>, or give"


class SystemText:
    """path: of a file, see `serve.system`; None: the text of ours.

    Raises:
        ConfigError: it cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._text: str | None = None
        self._to_the_letter = path is not None and path.suffix == ".parquet"
        if path is not None:
            self._text = (_published if self._to_the_letter else _written)(path)

    def of(self, tools: Sequence[str]) -> str:
        """For an agent with these tools. Those that are not built in describe themselves (`tools.describe`)."""
        sections = _sections([tool for tool in tools if tool in _OFFERS])
        if self._text is not None and self._to_the_letter:
            return self._text
        if self._text is not None:
            return self._text.replace(_MARK, sections).strip()
        guidelines = "\n".join(f"{number}. {line}" for number, line in enumerate(_GUIDELINES, 1))
        output = (
            "# Output Format\nBegin each message with your thoughts in <reason>...</reason>. "
            f"{_CALLING if tools else 'Then give'} the final answer in <answer>...</answer>."
        )
        parts = (_ROLE, sections, f"# Decision Guidelines\n{guidelines}" if tools else "", output)
        return "\n\n".join(part for part in parts if part)


def _written(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ConfigError(f"serve.system: cannot read {path}: {reason}; name a text file") from None


def _published(path: Path) -> str:
    """The system message of the first row, to the letter."""
    try:
        files = PromptFiles([path], any_style=True)
        first = files.read(0).messages[0] if len(files) else None
    except (BadRowError, DataError) as error:
        raise ConfigError(f"serve.system: {error}") from None
    if first is None or first.role != "system":
        raise ConfigError(
            f"serve.system: expected a first row of {path} that begins with a system message, found none; name another file"
        )
    return first.content


def _sections(tools: Sequence[str]) -> str:
    if not tools:
        return ""
    offers = "You may call " + ("the following tool, once or several times." if len(tools) == 1 else "the following tools.")
    return "\n\n".join([f"# Tools\n{offers}", *map(_section, tools)])


def _section(tool: str) -> str:
    purpose, arguments = _OFFERS[tool]
    call = json.dumps({"name": str(tool), "arguments": arguments})
    return f"## {tool}\n{purpose}\nFormat: <tool_call>{call}</tool_call>"
