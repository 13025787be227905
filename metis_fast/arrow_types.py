"""Of what kind an Arrow type is, whichever of its spellings a writer chose: large, view, dictionary, extension."""

from __future__ import annotations

import pyarrow as pa

_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


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


def item(kind: pa.DataType) -> pa.DataType | None:
    """What a list holds; None where it is no list."""
    return stored(kind.value_type) if any(is_list(kind) for is_list in _LISTS) else None
