"""Parquet files as the Hugging Face hub has them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

_SHARDS = 2
_GROUP_ROWS = 16  # of images as 64-bit integers: 128 MiB for images of a megabyte

T = TypeVar("T")


def write_shards(folder: Path, rows: Sequence[T], table_of: Callable[[Sequence[T]], pa.Table]) -> None:
    """Write `data/train-00000-of-0000N.parquet` and its like, replacing what is there. table_of: some rows."""
    place = folder / "data"
    place.mkdir(parents=True, exist_ok=True)
    for old in place.glob("*.parquet"):
        old.unlink()
    shards = min(_SHARDS, len(rows))
    edges = [len(rows) * shard // shards for shard in range(shards + 1)]
    for shard, (start, stop) in enumerate(itertools.pairwise(edges)):
        path = place / f"train-{shard:05d}-of-{shards:05d}.parquet"
        groups = [rows[at : min(at + _GROUP_ROWS, stop)] for at in range(start, stop, _GROUP_ROWS)]
        with pq.ParquetWriter(path, table_of(groups[0][:1]).schema, compression="snappy") as writer:
            for group in groups:
                writer.write_table(table_of(group))
