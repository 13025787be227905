"""Tools in the system message of a prompt: which ones it offers, and others added in the form that it has.

Two forms are known: that of the published rows, a heading `## name` for each tool under `# Tools`; and that of chat templates,
JSON schemas between `<tools>` and `</tools>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from metis_fast.tools.arguments import example
from metis_fast.tools.protocol import ToolSpec
from metis_fast.types import Message, Prompt

_SECTION = re.compile(r"^#\s+Tools\b.*?$(.*?)(?=^#\s|\Z)", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^##\s+`?([A-Za-z_][\w.-]*)`?\s*$", re.MULTILINE)
_SCHEMAS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_NAME = re.compile(r'"name"\s*:\s*"([^"]+)"\s*,\s*"(?:description|parameters)"')
_TEMPLATE = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{schemas}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def offered_tools(prompt: Prompt) -> tuple[str, ...]:
    """Names of the tools that system messages offer, each once, in their order."""
    text = "\n".join(message.content for message in prompt.messages if message.role == "system")
    names = [name for section in _SECTION.findall(text) for name in _HEADING.findall(section)]
    names += [name for section in _SCHEMAS.findall(text) for name in _NAME.findall(section)]
    return tuple(dict.fromkeys(names))


def with_tools(prompt: Prompt, tools: Sequence[ToolSpec]) -> Prompt:
    """The prompt, offering these tools, too; those that it offers already stay as they are.

    They go into the first system message with a section of tools, in its form; else a section as chat templates write it is put
    behind the first system message, or into a new one.
    """
    offered = offered_tools(prompt)
    new = [tool for tool in tools if tool.name not in offered]
    if not new:
        return prompt
    messages = list(prompt.messages)
    systems = [number for number, message in enumerate(messages) if message.role == "system"]
    for number in systems:
        texts = list(messages[number].around_images)
        for place, text in enumerate(texts):
            if (longer := _extended(text, new)) is not None:
                messages[number] = _rewritten(messages[number], place, longer)
                return replace(prompt, messages=tuple(messages))
    section = _TEMPLATE.format(schemas="\n".join(map(_schema, new)))
    if systems:
        last = len(messages[systems[0]].around_images) - 1
        before = messages[systems[0]].around_images[last].rstrip("\n")
        messages[systems[0]] = _rewritten(messages[systems[0]], last, f"{before}\n\n{section}" if before else section)
    else:
        messages.insert(0, Message("system", section))
    return replace(prompt, messages=tuple(messages))


def _rewritten(message: Message, place: int, text: str) -> Message:
    """With another text at a place around its images."""
    texts = list(message.around_images)
    texts[place] = text
    return replace(message, content="<image>".join(texts), texts=tuple(texts) if message.texts else ())


def _extended(text: str, tools: Sequence[ToolSpec]) -> str | None:
    """A text with tools added to its section of them; None where it has none."""
    schemas = [found for found in _SCHEMAS.finditer(text) if _NAME.search(found[1])]
    if schemas:
        end = schemas[-1].end(1)
        before = text[:end].rstrip("\n")
        return f"{before}\n" + "\n".join(map(_schema, tools)) + f"\n{text[end:]}"
    sections = [found for found in _SECTION.finditer(text) if _HEADING.search(found[1])]
    if not sections:
        return None
    end = sections[-1].end(1)
    before, behind = text[:end].rstrip("\n"), text[end:]
    return "\n\n".join([before, *map(_heading, tools), *([behind] if behind else [])])


def _schema(tool: ToolSpec) -> str:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    return _plain(json.dumps({"type": "function", "function": function}, ensure_ascii=False))


def _heading(tool: ToolSpec) -> str:
    """As the published rows have it, and the schema, which says what an example cannot."""
    purpose = re.sub(r"^#", " #", tool.description, flags=re.MULTILINE)  # no heading
    call = json.dumps({"name": tool.name, "arguments": example(tool)}, ensure_ascii=False)
    schema = json.dumps(tool.schema, ensure_ascii=False)
    return _plain(f"## {tool.name}\n{purpose}\nArguments: {schema}\nFormat: ") + f"<tool_call>{_plain(call)}</tool_call>"


def _plain(text: str) -> str:
    """What a server says of its tools cannot stand for an image, nor end the section."""
    return re.sub(r"<(?=image>|/?tools>|/?tool_call>)", "< ", text)
