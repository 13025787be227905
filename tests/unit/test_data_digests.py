"""Digests of rows are made in threads, and are those that runs of earlier versions hold."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metis_fast.data import parquet
from metis_fast.data.content import row_digest
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import DataError


def write(path: Path, num: int = 300, row_group_size: int = 130) -> PromptFiles:
    """Rows of very different sizes: whoever does not wait for the large ones mixes up the order."""
    rows = [
        {
            "data_source": "unit",
            "prompt": [{"role": "user", "content": f"{i}?"}],
            "images": [{"bytes": bytes([i % 251]) * (300_000 if i % 9 == 0 else 3), "path": f"/somewhere/{i}.png"}],
            "ability": "math",
            "reward_model": {"ground_truth": str(i), "style": "rule"},
            "extra_info": {"index": i, "level": i / 4, "none": None},
        }
        for i in range(num)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return PromptFiles([path])


def test_digests_are_those_of_runs_that_began_before(tmp_path: Path) -> None:
    assert (
        write(tmp_path / "a.parquet", 4, 3).record().rows.hex()
        == "f80248e9fff1964862ba2a017b2b87c3bf40f5b4da3c23f315e38fe8e385feff"
    )


def test_threads_make_the_digests_in_the_order_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path / "a.parquet")
    expected = b"".join(row_digest(row.values) for group in files.row_groups for row in files.raw_rows(group))
    threads: set[str] = set()

    def noted(row: Any) -> bytes:
        threads.add(threading.current_thread().name)
        return row_digest(row)

    monkeypatch.setattr(parquet, "row_digest", noted)
    seen: list[int] = []
    assert files.record(tick=seen.append).rows == expected and sum(seen) == 300
    assert threads and all(name.startswith("digest") for name in threads)


def test_no_thread_outlives_a_reading_that_was_stopped(tmp_path: Path) -> None:
    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.parquet").record(tick=stop)
    damaged = write(tmp_path / "b.parquet")
    data = bytearray((tmp_path / "b.parquet").read_bytes())
    half = len(data) // 2
    data[half : half + 1000] = bytes(1000)
    (tmp_path / "b.parquet").write_bytes(data)
    with pytest.raises(DataError, match="cannot read row group"):
        damaged.record()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("digest")]
