"""The settings that a tool server and its clients have to share: what a run's record says of its tools has to be true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from metis_fast.config import ToolsConfig, by_content, deciding
from metis_fast.errors import ToolSetupError
from metis_fast.tools.corpus import content_hash, files_of
from metis_fast.types import ToolName

_MOST = 3  # differences in a message
_LONGEST = 80  # characters of a value in a message
_SHARED = ("own", "mcp", "max_output_chars")  # of tools that are not built in


def settings_of(config: ToolsConfig) -> dict[str, object]:
    """The settings that decide what the tools answer, with sections of the enabled built-in ones. Without paths: corpora lie
    where the server runs."""
    every = deciding(config)
    return {name: every[name] for name in (*dict.fromkeys(map(str, config.enabled)), *_SHARED)}


def contents_of(config: ToolsConfig) -> dict[str, str]:
    """Key and `content_hash` of every file that decides what the enabled tools answer, and that is here; one second for 1.5 GB.

    Raises:
        ToolSetupError: one cannot be read.
    """
    found: dict[str, str] = {}
    sections = {ToolName.TEXT_SEARCH: config.text_search, ToolName.IMAGE_SEARCH: config.image_search}
    for tool, section in sections.items():
        for key, path in by_content(section, f"tools.{tool}.") if tool in config.enabled else ():
            if path is not None and path.exists():
                try:
                    found[key] = content_hash(files_of(path))
                except OSError as error:
                    raise ToolSetupError(f"{key}={path} cannot be read: {error.strerror}; mend it, or name another") from None
    return found


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
