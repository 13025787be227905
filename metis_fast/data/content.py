"""Data known by what is in it: a digest of every row, kept with a run, whatever file, row group or Arrow type holds the row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from hashlib import blake2b
from pathlib import PurePath
from typing import Any

from metis_fast.image_source import NoImageError, from_integers, is_inline, is_integers

DIGEST_BYTES = 8


def row_digest(row: Mapping[str, object]) -> bytes:
    """Digest of a row's columns, as plain Python values. [DIGEST_BYTES]

    Nulls count as missing, 2.0 as 2, and of the path of an image its last part alone: these change when a table is written
    anew or moved, and mean the same. An image that comes as a path is known by that name; its file is not read.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    for name, value in sorted(row.items()):
        if not _is_missing(value):
            _feed(digest, name)
            _feed(digest, _without_folders(value) if name == "images" else value)
    return digest.digest()


def _is_missing(value: object) -> bool:
    """Null, NaN (what pandas makes of a null among numbers), or an empty list; a struct of nothing else."""
    match value:
        case None | []:
            return True
        case float():
            return math.isnan(value)
        case dict():
            return all(map(_is_missing, value.values()))
    return False


def _without_folders(images: object) -> object:
    entries = images if isinstance(images, list) and not is_integers(images) else [images]
    return [_without_folder(entry) for entry in entries]


def _without_folder(image: object) -> object:
    match image:
        case {"bytes": list(numbers)} | list(numbers) if is_integers(numbers):  # where one of the rows beside it is a bad one
            with suppress(NoImageError):
                return from_integers(numbers)
            return numbers
        case {"bytes": bytes(data) | str(data)} | bytes(data) if data:
            return data  # where writers put a path beside the bytes, it says where they once came from
        case {"path": str(text)} | str(text):
            return text if is_inline(text) else PurePath(text).name
        case _:
            return image


def _feed(digest: blake2b, value: object) -> None:
    match value:
        case bytes():
            digest.update(b"b%d:" % len(value))
            digest.update(value)
        case str():
            _feed(digest, value.encode("utf-8", "surrogatepass"))
        case list():
            digest.update(b"[%d:" % len(value))
            for item in value:
                _feed(digest, item)
        case dict():
            items = sorted((str(key), item) for key, item in value.items() if not _is_missing(item))
            digest.update(b"{%d:" % len(items))
            for key, item in items:
                _feed(digest, key)
                _feed(digest, item)
        case float() if value.is_integer():
            digest.update(b"#%d;" % int(value))
        case bool() | int() | float() | Decimal() | None:
            digest.update(f"#{value!r};".encode())
        case _:
            _feed(digest, f"{type(value).__name__} {value}")  # dates and the like


@dataclass(frozen=True, slots=True)
class DataRecord:
    """What a run keeps of its data; `to_json` and `from_json` for its file.

    names: (name, rows) of every file. groups: (rows, bytes) of every row group, on which the shuffled order depends, with
    cache_bytes. stamps: (bytes, time of change in ns) of every file. rows: the digests of all rows, one behind another, as they
    are now; began: as they were when the run began.
    """

    names: tuple[tuple[str, int], ...]
    groups: tuple[tuple[int, int], ...]
    cache_bytes: int
    stamps: tuple[tuple[int, int], ...]
    rows: bytes
    began: bytes

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return len(self.rows) // DIGEST_BYTES

    def differing(self, rows: bytes, of: bytes | None = None) -> list[int]:
        """Numbers of the rows that are not those of other digests of as many rows. of: in place of this record's `rows`."""
        mine, places = self.rows if of is None else of, range(0, len(rows), DIGEST_BYTES)
        return [i for i, at in enumerate(places) if mine[at : at + DIGEST_BYTES] != rows[at : at + DIGEST_BYTES]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "names": self.names,
            "groups": self.groups,
            "cache_bytes": self.cache_bytes,
            "stamps": self.stamps,
            "rows": self.rows.hex(),
            "began": self.began.hex(),
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> DataRecord:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: not such a tree.
        """
        return DataRecord(
            names=tuple((str(name), int(rows)) for name, rows in tree["names"]),
            groups=tuple((int(rows), int(size)) for rows, size in tree["groups"]),
            cache_bytes=int(tree["cache_bytes"]),
            stamps=tuple((int(size), int(time)) for size, time in tree["stamps"]),
            rows=bytes.fromhex(tree["rows"]),
            began=bytes.fromhex(tree["began"]),
        )
