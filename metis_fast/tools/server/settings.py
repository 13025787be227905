"""The settings that a tool server and its clients have to share: what a run's record says of its tools has to be true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from metis_fast.config import ToolsConfig, deciding

_MOST = 3  # differences in a message
_LONGEST = 80  # characters of a value in a message
_SHARED = ("own", "mcp", "max_output_chars")  # of tools that are not built in


def settings_of(config: ToolsConfig) -> dict[str, object]:
    """The settings that decide what the tools answer, with sections of the enabled built-in ones. Without paths: corpora lie
    where the server runs."""
    every = deciding(config)
    return {name: every[name] for name in (*dict.fromkeys(map(str, config.enabled)), *_SHARED)}


def different(ours: Mapping[str, object], theirs: Mapping[str, object]) -> str:
    """What differs, in words; empty: nothing."""
    found = list(_differences("tools", ours, theirs))
    return ", ".join([*found[:_MOST], *(["..."] if len(found) > _MOST else [])])


def _differences(key: str, ours: object, theirs: object) -> Iterator[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in dict.fromkeys((*ours, *theirs)):
            yield from _differences(f"{key}.{name}", ours.get(name), theirs.get(name))
    elif ours != theirs:
        yield f"{key} is {_short(theirs)} there and {_short(ours)} here"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
