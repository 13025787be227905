"""Data is known by what is in it: rows keep their digest through every way of writing them, and lose it when they change."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from metis_fast.data.content import DataRecord
from metis_fast.data.cursor import prompt_cursor
from metis_fast.data.parquet import Layout, PromptFiles
from metis_fast.errors import DataError


def png(grey: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), grey).save(out, "PNG")
    return out.getvalue()


def rows(num: int = 7) -> list[dict[str, Any]]:
    return [
        {
            "data_source": "unit",
            "prompt": [{"role": "user", "content": f"<image> {i} + 1?"}],
            "images": [{"bytes": png(i), "path": f"/somewhere/{i}.png"}],
            "ability": "math",
            "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
            "extra_info": {"index": i, "level": float(i)},
        }
        for i in range(num)
    ]


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def record(*paths: Path) -> DataRecord:
    return PromptFiles(paths).record()


def moved(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"images": [{"bytes": one["bytes"], "path": None} for one in row["images"]]} for row in rows]


REWRITTEN: dict[str, Callable[[Path], DataRecord]] = {
    "another folder and name": lambda folder: record(write(folder / "deep" / "other.parquet", rows())),
    "row groups of two": lambda folder: record(write(folder / "a.parquet", rows(), row_group_size=2)),
    "two files": lambda folder: record(write(folder / "a.parquet", rows()[:3]), write(folder / "b.parquet", rows()[3:])),
    "gzip": lambda folder: record(write(folder / "a.parquet", rows(), compression="gzip")),
    "columns in another order": lambda folder: record(
        write(folder / "a.parquet", [dict(reversed(row.items())) for row in rows()])
    ),
    "a null field more": lambda folder: record(
        write(folder / "a.parquet", [row | {"extra_info": row["extra_info"] | {"new": None}} for row in rows()])
    ),
    "a column that nobody reads": lambda folder: record(write(folder / "a.parquet", [row | {"note": "x"} for row in rows()])),
    "no path beside the bytes": lambda folder: record(write(folder / "a.parquet", moved(rows()))),
    "integers as floats": lambda folder: record(
        write(folder / "a.parquet", [row | {"extra_info": {"index": float(i), "level": i}} for i, row in enumerate(rows())])
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_rows_that_are_written_anew_are_the_same_rows(tmp_path: Path, name: str) -> None:
    assert REWRITTEN[name](tmp_path / "new").rows == record(write(tmp_path / "a.parquet", rows())).rows


@pytest.mark.parametrize("column", ["data_source", "prompt", "images", "ability", "reward_model", "extra_info"])
def test_a_row_that_changed_in_any_column_is_found_by_its_number(tmp_path: Path, column: str) -> None:
    changed = rows()
    changed[4] |= {column: rows(9)[8][column] if column not in ("data_source", "ability") else "search"}
    before, now = record(write(tmp_path / "a.parquet", rows())), record(write(tmp_path / "b.parquet", changed))
    assert before.differing(now.rows) == [4]


def test_two_rows_that_changed_places_differ(tmp_path: Path) -> None:
    changed = rows()
    changed[1], changed[5] = changed[5], changed[1]
    before, now = record(write(tmp_path / "a.parquet", rows())), record(write(tmp_path / "b.parquet", changed))
    assert before.differing(now.rows) == [1, 5]


def test_values_do_not_run_into_one_another(tmp_path: Path) -> None:
    a, b = rows(2), rows(2)
    a[0]["reward_model"] = {"ground_truth": ["ab", "c"], "style": "rule"}
    b[0]["reward_model"] = {"ground_truth": ["a", "bc"], "style": "rule"}
    for one in (a, b):
        one[1]["reward_model"] = {"ground_truth": ["2"], "style": "rule"}
    assert record(write(tmp_path / "a.parquet", a)).differing(record(write(tmp_path / "b.parquet", b)).rows) == [0]


def test_a_record_survives_json(tmp_path: Path) -> None:
    before = record(write(tmp_path / "a.parquet", rows()))
    assert DataRecord.from_json(json.loads(json.dumps(before.to_json()))) == before


def test_files_that_nobody_touched_are_not_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows())
    files, read = PromptFiles([path]), []
    before = files.record(tick=read.append)
    assert sum(read) == 7 and files.record(before, read.append) == before and sum(read) == 7
    write(path, rows()[::-1])
    assert PromptFiles([path]).record(before, read.append).rows != before.rows and sum(read) == 14


def test_a_file_that_is_cut_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows(40), compression="none")
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot read row group 0"):
        PromptFiles([path]).record()


def test_a_run_keeps_names_and_order_when_its_data_is_cut_into_other_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows(20), row_group_size=3)
    old = PromptFiles([tmp_path / "a.parquet"], cache_bytes=2000)
    assert "groups" in old.layout.fingerprint
    cursor = prompt_cursor(old, seed=3)
    expected = [prompt.uid for prompt in cursor.next(4)]
    place, coming = cursor.state(), [prompt.uid for prompt in cursor.next(30)]
    new = PromptFiles(
        [
            write(tmp_path / "x" / "p.parquet", rows(20)[:11]),
            write(tmp_path / "x" / "q.parquet", rows(20)[11:], row_group_size=2),
        ]
    )
    new.go_on(old.record())
    resumed = prompt_cursor(new, seed=3)
    resumed.restore(place)
    assert [prompt.uid for prompt in resumed.next(30)] == coming and expected[0].startswith("a:")


def test_a_set_that_is_mixed_as_a_whole_has_one_order_whatever_its_row_groups(tmp_path: Path) -> None:
    one = PromptFiles([write(tmp_path / "a.parquet", rows(20))])
    many = PromptFiles([write(tmp_path / "b.parquet", rows(20), row_group_size=3)])
    questions = [[prompt.question for prompt in prompt_cursor(files, seed=5).next(50)] for files in (one, many)]
    assert questions[0] == questions[1] and one.layout.fingerprint == many.layout.fingerprint == "20 rows"


def test_rows_before_the_last_one_keep_their_order_when_that_is_taken_away(tmp_path: Path) -> None:
    whole = PromptFiles([write(tmp_path / "a.parquet", rows(20))])
    without = PromptFiles([write(tmp_path / "b.parquet", rows(19))])
    orders = [[prompt.question for prompt in prompt_cursor(files, seed=5).next(len(files))] for files in (whole, without)]
    assert [question for question in orders[0] if question != "19 + 1?"] == orders[1]


def test_what_an_order_depends_on_is_in_its_fingerprint() -> None:
    small = Layout(((3, 10), (4, 10)), 15)
    others = [
        Layout(((4, 10), (3, 10)), 15),
        Layout(((3, 10), (4, 11)), 15),
        Layout(((3, 10), (4, 10)), 16),
        Layout(((7, 9),), 15),
    ]
    assert small.fingerprint not in {one.fingerprint for one in others}


def text_image(data: bytes, field: str) -> dict[str, Any]:
    image = {"bytes": None, "path": None} | {field: base64.b64encode(data).decode()}
    return {"images": [image | ({"path": "a.png"} if field == "bytes" else {})]}


@pytest.mark.parametrize("field", ["bytes", "path"])
def test_images_as_text_are_known_by_the_whole_text(tmp_path: Path, field: str) -> None:
    """Base64 has slashes, and ends alike in many images."""
    jpegs = []
    for grey in (10, 90, 170):
        out = io.BytesIO()
        Image.new("L", (8, 8), grey).save(out, "JPEG")
        jpegs.append(out.getvalue())
    assert len({base64.b64encode(data).decode().rpartition("/")[2] for data in jpegs}) < 3
    records = [record(write(tmp_path / f"{i}.parquet", [rows(1)[0] | text_image(data, field)])) for i, data in enumerate(jpegs)]
    assert len({one.rows for one in records}) == 3


def test_what_writers_make_of_nothing_is_the_same(tmp_path: Path) -> None:
    base = [row | {"images": []} for row in rows(2)]
    digests = []
    for i, nothing in enumerate([None, float("nan")]):
        extra = [{"level": nothing}, {"level": 1.0}]
        changed = [row | {"extra_info": one} for row, one in zip(base, extra, strict=True)]
        digests.append(record(write(tmp_path / f"{i}.parquet", changed)))
    assert digests[0].rows == digests[1].rows
    single = record(write(tmp_path / "single.parquet", [row | {"images": row["images"][0]} for row in rows(2)]))
    assert single.rows == record(write(tmp_path / "listed.parquet", rows(2))).rows
