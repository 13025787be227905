"""Files and `section.key=value` overrides as plain trees, with the place where each value stands.

Nothing is guessed here: scalars stay the text that was written (`section.Plain`) until the type of their setting reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from metis_fast.config.section import Plain, expand, is_nothing
from metis_fast.config.tree import known_keys, settings
from metis_fast.errors import ConfigError

_PREFIX = "tag:yaml.org,2002:"
_MERGE = f"{_PREFIX}merge"
_MAX_BYTES = 16 << 20  # of a config file
_SECTIONS = frozenset(key for key, section in settings() if section is not None)


@dataclass(frozen=True, slots=True)
class Source:
    """What one text says: plain values, and of each dotted key the place where it stands."""

    tree: dict[str, Any]
    places: dict[str, str]

    def over(self, low: Source) -> Source:
        """Both, where they differ this one."""
        return Source(merge(low.tree, self.tree), low.places | self.places)


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`low` with what `high` says; sections are merged, values replaced."""
    out = dict(low)
    for key, value in high.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def read_file(path: Path, named_in: str = "", seen: tuple[Path, ...] = ()) -> Source:
    """A config file, on top of its bases (`seen`: files on the way here; `named_in`: the place that names this one).

    Raises:
        ConfigError: it cannot be read, is not YAML, or its bases go in a circle.
    """
    text = _decode(path, f" (`base` in {named_in})" if named_in else "")
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` leads back to this file; remove one of the links")
    document = _Document(lambda mark: f"line {mark.line + 1} of {path}")
    tree = document.read(text, "", str(path))
    tree = {} if is_nothing(tree) else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections like `loss:`, got {shown(tree)}")
    source = Source(tree, document.places)
    if "base" not in tree:
        return source
    place, base = source.places["base"], tree.pop("base")
    if is_nothing(base):
        raise ConfigError(f"{place}: base: expected a path, got nothing")
    if not isinstance(base, str):
        raise ConfigError(f"{place}: `base` must be the path of another config, got {shown(base)}")
    try:
        below = path.parent / expand(base)
    except ValueError as error:
        raise ConfigError(f"{place}: base: {error}, got {shown(base)}") from None
    return source.over(read_file(below, place, (*seen, path.resolve())))


def read_override(override: str) -> Source:
    """`section.key=value`; the value is text as it was typed, unless it begins with a bracket, a brace or a quote (YAML).

    Raises:
        ConfigError: it has another form.
    """
    place = f"override {override!r}"
    key, equals, text = (part.strip() for part in override.partition("="))
    *parents, leaf = key.split(".")
    if not equals and text == "" and key.endswith((".yaml", ".yml")):
        raise ConfigError(f"{place}: the config file stands before the settings")
    if equals and any(part.isdigit() for part in (*parents, leaf)):
        raise ConfigError(f"{place}: a list is written whole: {re.split(r'[.][0-9]+', key)[0]}=[...]")
    if not equals or not all((*parents, leaf)):
        raise ConfigError(f"{place}: expected section.key=value, for example loss.w_tool=0.2, without blanks around the `=`")
    document = _Document(lambda mark: place)
    document.places[key] = place
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    value = document.read(text, key, place) if quoted or text[:1] in ("[", "{") else document.section(Plain(text), key)
    tree = {leaf: value}
    for parent in reversed(parents):
        tree = {parent: tree}
    return Source(tree, document.places)


def shown(value: object) -> str:
    """A value as part of one line."""
    text = "nothing" if isinstance(value, str) and not value else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _decode(path: Path, named_in: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: of characters that no name has
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read config {path}{named_in}: {reason}; give the path of a YAML file") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path} has more than {_MAX_BYTES >> 20} MiB; give the path of a config file")
    if b"\0" in data:
        raise ConfigError(f"{path} is not text, or not UTF-8; give the path of a YAML file that is saved as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"line {line} of {path} is not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8") from None


class _Loader(yaml.SafeLoader):
    """YAML's structure: what scalars mean is for settings to say, and a key stands once in its mapping."""

    yaml_implicit_resolvers = {"<": [(_MERGE, re.compile("^<<$"))]}  # noqa: RUF012  # as PyYAML has it

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        if node is not None and node.tag not in (_MERGE, *(_PREFIX + kind for kind in ("str", "seq", "map"))):
            tag = node.tag.replace(_PREFIX, "!!")
            raise ComposerError(None, None, f"remove the tag {tag}; settings know their types", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ComposerError(None, None, "expected the name of a setting before `:`", key.start_mark)
            if key.value in lines:
                twice = f"{key.value!r} is given twice, first in line {lines[key.value]}; keep one of them"
                raise ComposerError(None, None, twice, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


class _Document:
    """One YAML text. `place` says where a mark is."""

    def __init__(self, place: Callable[[yaml.Mark], str]) -> None:
        self.place = place
        self.places: dict[str, str] = {}

    def read(self, text: str, key: str, name: str) -> Any:
        """Plain values; `key`: what the text is the value of; `name`: of all of it.

        Raises:
            ConfigError: not YAML.
        """
        try:
            self.loader = _Loader(text)
            node = self._node(name)
            if not key and isinstance(node, yaml.MappingNode) and "variants" in (one.value for one, _ in node.value):
                raise ConfigError(f"{name} is an ablation, and no config: run it with metis-fast ablate {name}")
            return self._value(node, key) if node is not None else Plain()
        except yaml.MarkedYAMLError as error:
            what = " ".join(f"{error.context or ''} {error.problem}".split())
            hint = "; indent with blanks, not with tabs" if "'\\t'" in what else ""
            if not hint and "flow" in what and "${" in text:
                hint = "; between brackets and braces write $NAME, or quotes around ${NAME}"
            mark = error.problem_mark or error.context_mark
            raise ConfigError(f"{self.place(mark) if mark else name} is not valid YAML: {what}{hint}") from None
        except ReaderError as error:
            raise ConfigError(f"{name} is not text: it has the character U+{error.character:04X}; remove it") from None
        except RecursionError:
            raise ConfigError(f"{name} is not valid YAML: nested too deeply, or an anchor that contains itself") from None

    def _node(self, name: str) -> yaml.Node | None:
        try:
            return self.loader.get_single_node()
        except (OverflowError, ValueError):  # of `chr`, in PyYAML
            raise ConfigError(f"{name} is not valid YAML: an escape like \\U00110000 is no character") from None

    def section(self, value: Any, key: str) -> Any:
        """A value; that of a section is a mapping, and nothing at all changes nothing."""
        if key not in _SECTIONS or isinstance(value, dict):
            return value
        if is_nothing(value):
            return {}
        example = next(known for known in known_keys() if known.startswith(f"{key}."))
        raise ConfigError(f"{self.places[key]}: {key} is a section: expected settings like {example}, got {shown(value)}")

    def _value(self, node: yaml.Node, key: str) -> Any:
        if key:
            self.places.setdefault(key, self.place(node.start_mark))
        if isinstance(node, yaml.SequenceNode):
            return self.section([self._value(item, f"{key}.{i}") for i, item in enumerate(node.value)], key)
        if isinstance(node, yaml.MappingNode):
            self.loader.flatten_mapping(node)  # `<<`; what stands in the mapping itself comes last, and wins
            tree = {}
            for name, value in node.value:
                below = f"{key}.{name.value}" if key else name.value
                self.places[below] = self.place(name.start_mark)
                tree[name.value] = self._value(value, below)
            return tree
        assert isinstance(node, yaml.ScalarNode)
        if not node.style and node.value and node.end_mark.line > node.start_mark.line:
            raise ConfigError(
                f"{self.place(node.start_mark)}: {key}: expected one line; begin each line of a list with `- `, or quote text"
            )
        text = node.value.rstrip("\n") if node.style in ("|", ">") else node.value
        return self.section(text if node.style else Plain(text), key)
