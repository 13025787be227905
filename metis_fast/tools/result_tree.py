"""Results as plain values that JSON has, in which an image is its SHA-256: for whoever sends them or keeps them.

What is read back is what the annotations of its class say, and nothing else: the other side may have sent anything.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from metis_fast.types import ImageBlob

T = TypeVar("T")
FindImage = Callable[[str], ImageBlob]
"""Gives an image by its hash; raises TreeError, or an error of its own, where it has none."""


class TreeError(ValueError):
    """Values that are no result of the class that they are said to be of."""


@cache
def hints_of(kind: type) -> Mapping[str, Any]:
    """The annotations of a dataclass's fields."""
    return get_type_hints(kind)


def to_tree(value: object) -> object:
    """Of a dataclass: its fields by name; of a tuple, a list. Raises TypeError where a field holds something else."""
    if isinstance(value, ImageBlob):
        return value.sha256
    if is_dataclass(value):
        return {one.name: to_tree(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, tuple):
        return [to_tree(one) for one in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"expected a field of a result, got {type(value).__name__}")


def images_of(value: object) -> Iterator[ImageBlob]:
    """Those of a result, in order; the same one may come twice."""
    if isinstance(value, ImageBlob):
        yield value
    elif is_dataclass(value):
        for one in fields(value):
            yield from images_of(getattr(value, one.name))
    elif isinstance(value, tuple):
        for part in value:
            yield from images_of(part)


def from_tree(kind: type[T], tree: Mapping[str, object], image: FindImage) -> T:
    """Inverse of `to_tree`, of a dataclass.

    Raises:
        TreeError: it is none of that class.
    """
    hints = hints_of(kind)
    if tree.keys() - hints.keys():
        raise TreeError(f"{kind.__name__} has no {', '.join(sorted(map(repr, tree.keys() - hints.keys())))[:200]}")
    try:
        return kind(**{name: value_of(hints[name], part, image) for name, part in tree.items()})
    except TypeError:
        raise TreeError(f"{kind.__name__} needs {', '.join(sorted(hints.keys() - tree.keys()))}") from None


def value_of(hint: Any, value: object, image: FindImage) -> Any:
    """`value` as the annotation `hint` says; nothing is converted that is not written that way by `to_tree`.

    Raises:
        TreeError: it is something else.
    """
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for one in of:
            try:
                return value_of(one, value, image)
            except TreeError:
                continue
        raise TreeError(f"expected {hint}, got {type(value).__name__}")
    if origin is tuple and isinstance(value, list):
        kinds = of[:1] * len(value) if of[1:] == (...,) else of
        if len(kinds) != len(value):
            raise TreeError(f"expected {len(kinds)} values, got {len(value)}")
        return tuple(value_of(kind, one, image) for kind, one in zip(kinds, value, strict=True))
    if hint is ImageBlob and isinstance(value, str):
        return image(value)
    if isinstance(hint, type) and is_dataclass(hint) and hint is not ImageBlob and isinstance(value, dict):
        return from_tree(hint, value, image)
    if isinstance(hint, type) and issubclass(hint, StrEnum) and isinstance(value, str):
        try:
            return hint(value)
        except ValueError:
            raise TreeError(f"expected one of {', '.join(hint)}, got {value[:100]!r}") from None
    if hint is type(None) and value is None:
        return None
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if origin is None and type(value) is hint:  # `bool` is no `int` here
        return value
    raise TreeError(f"expected {hint}, got {type(value).__name__}")
