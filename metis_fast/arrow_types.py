"""Of what kind an Arrow type is, whichever of its spellings a writer chose (large, view, dictionary, extension), and its values
as plain Python ones."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
_MOST_LEVELS = 100  # of JSON: functions that call themselves for every level stay far from Python's limit


def stored(kind: pa.DataType) -> pa.DataType:
    """What an extension type (`arrow.json`) or a dictionary holds."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_string(kind: pa.DataType) -> bool:
    """Text of any length."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Bytes of any length."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_json(kind: pa.DataType) -> bool:
    """Text that is the JSON of a value of any type: what `datasets` makes of a column whose rows are of different types."""
    return isinstance(kind, pa.JsonType)


def item(kind: pa.DataType) -> pa.DataType | None:
    """What a list holds; None where it is no list."""
    return stored(kind.value_type) if any(is_list(kind) for is_list in _LISTS) else None


def as_list(array: Any) -> pa.ListArray | pa.LargeListArray:
    """A list of fixed size, or a view of lists, as a list of any size. array: of any kind of list."""
    if isinstance(array, pa.ListArray | pa.LargeListArray):
        return array
    if not isinstance(array, pa.ListViewArray | pa.LargeListViewArray):
        return array.cast(pa.large_list(array.type.value_type))
    # a cast of a view to a list of the same width makes one whose last offset is missing (pyarrow 26)
    null = array.is_null()
    sizes = np.where(null.to_numpy(zero_copy_only=False), 0, array.sizes.to_numpy(zero_copy_only=False))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), array.flatten(), mask=null if array.null_count else None)


def is_integers(kind: pa.DataType) -> bool:
    """A list of integers of any width: what becomes of bytes that went through JSON or Python lists."""
    inside = item(kind)
    return inside is not None and pa.types.is_integer(inside)


def is_map(kind: pa.DataType) -> bool:
    """Keys and values, whose keys are text."""
    return pa.types.is_map(kind) and is_string(stored(kind.key_type))


def unknown_extension(field: pa.Field) -> str:
    """The name of an extension type in a field, or in what it holds, of which only its author knows what is stored; or ""."""
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType):
        return "" if is_json(kind) else kind.extension_name
    if name := (field.metadata or {}).get(b"ARROW:extension:name"):  # of a type that pyarrow does not know
        return name.decode(errors="replace")
    if pa.types.is_map(kind):
        return unknown_extension(kind.key_field) or unknown_extension(kind.item_field)
    if pa.types.is_struct(kind):
        return next(filter(None, map(unknown_extension, kind)), "")
    return unknown_extension(kind.value_field) if item(kind) is not None else ""


def is_plain(kind: pa.DataType) -> bool:
    """Whether what Arrow makes of a value of this type is what its writer meant; else `plain` makes it so."""
    if is_json(kind) or pa.types.is_map(kind) or pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return False
    kind = stored(kind)
    if pa.types.is_struct(kind):
        return all(is_plain(field.type) for field in kind)
    return item(kind) is None or is_plain(kind.value_type)


def read_json(text: str) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: it is no JSON, or has more than 100 levels.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("JSON of too many levels") from None
    if text.count("[") + text.count("{") > _MOST_LEVELS:
        level, levels = [value], 0
        while level := [one for one in level if isinstance(one, dict | list)]:
            levels += 1
            if levels > _MOST_LEVELS:
                raise ValueError(f"JSON of more than {_MOST_LEVELS} levels")
            level = [entry for one in level for entry in (one.values() if isinstance(one, dict) else one)]
    return value


def plain(value: Any, kind: pa.DataType) -> Any:
    """A value as its writer meant it: JSON read, a map as a dict, floats of 16 and 32 bits as 0.1, not 0.10000000149011612.

    Raises:
        ValueError: text in a column of JSON that is none, or has more than 100 levels.
    """
    if value is None or is_plain(kind):
        return value
    if is_json(kind):
        return read_json(value)
    kind = stored(kind)
    if pa.types.is_map(kind):
        return {key: plain(entry, kind.item_type) for key, entry in value}
    if isinstance(value, dict) and pa.types.is_struct(kind):
        return {field.name: plain(value[field.name], field.type) for field in kind}
    if isinstance(value, list):
        return [plain(entry, kind.value_type) for entry in value]
    if isinstance(value, float):
        return float(str((np.float16 if pa.types.is_float16(kind) else np.float32)(value)))
    return value
