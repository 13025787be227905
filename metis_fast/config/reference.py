"""The page of all settings (docs/settings.md), from the schema."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from metis_fast.config.schema import schema

_HEAD = """# All settings

A table for each section of a config file. [Configuration](configuration.md) says how files and command lines are read.
A run may go on with another value of what is marked *May change*, and of all that is under `workers`, `sync`, `gate`,
`checkpoint`, `log`, `rollout.vllm` and `train.megatron`: these decide no result. Files that are *known by content* may
lie elsewhere then, if they hold the same. `run.accept_changes` names what else may differ.
This page is what `metis-fast config --reference` prints.
"""


def reference() -> str:
    """Markdown: of every setting its values, its default and its meaning."""
    tree = schema()
    del tree["properties"]["base"]
    return "\n".join([_HEAD, *_sections(tree, "")]).rstrip() + "\n"


def _sections(node: dict[str, Any], path: str) -> Iterator[str]:
    inner: list[tuple[str, dict[str, Any]]] = []
    rows: list[str] = []
    for name, part in node["properties"].items():
        key = f"{path}.{name}" if path else name
        if "properties" in part:
            inner.append((key, part))
            continue
        items = part.get("items", {})
        if "properties" in items:
            inner.append((f"{key}[]", items))
        default = _default(part["default"]) if "default" in part else "must be given"
        free = " *May change.*" if "x-may-change" in part else " *Known by content.*" if "x-by-content" in part else ""
        rows.append(f"| `{name}` | {_values(part)} | {default} | {part['description'].replace('|', '&#124;')}{free} |")
    if rows:
        yield f"## {path}\n\n{_prose(node)}\n\n| key | values | default | meaning |\n| --- | --- | --- | --- |"
        yield from rows
        yield ""
    elif path:
        yield f"## {path}\n\n{_prose(node)}\n"
    for key, part in inner:
        yield from _sections(part, key)


def _prose(node: dict[str, Any]) -> str:
    return textwrap.fill(node["description"], 120, break_long_words=False, break_on_hyphens=False)


def _default(value: object) -> str:
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def _values(node: dict[str, Any]) -> str:
    """What a setting takes, in words."""
    if "enum" in node:
        return ", ".join(f"`{choice}`" for choice in node["enum"])
    if "anyOf" in node:
        return " or ".join(_values(part) for part in node["anyOf"])
    if "prefixItems" in node:
        return f"list of {len(node['prefixItems'])}: {_values(node['prefixItems'][0])}"
    match node.get("type"):
        case "array":
            return "list of sections, see below" if "properties" in node["items"] else f"list: {_values(node['items'])}"
        case "object":
            return "names and values"
        case "string":
            return "path" if node.get("format") == "path" else "text"
        case "integer":
            return f"whole number{_bounds(node)}"
        case "number":
            return f"number{_bounds(node)}"
        case "boolean":
            return "`true`, `false`"
        case kind:
            return "`null`" if kind == "null" else str(kind)


def _bounds(node: dict[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {node[key]:g}" for key, word in words.items() if node.get(key, sys.float_info.max) < sys.float_info.max]
    if node["type"] == "number" and not {"maximum", "exclusiveMaximum"} & node.keys():
        bounds.append("`.inf`")
    return f" {', '.join(bounds)}" if bounds else ""
