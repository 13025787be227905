"""The settings of a run's config.yaml, of whatever version, as flat names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

_MOST = 10_000  # more than any config has; YAML's aliases can make billions


def leaves(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Dotted key -> value."""
    return dict(islice(_leaves(tree, ""), _MOST))


def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
