"""Corpora in the types and layouts that other programs write, and what is wrong with them said when a tool opens."""

from __future__ import annotations

import datetime
import io
import json
import os
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from modes import modes_count
from PIL import Image

from metis_fast.config import ImageSearchConfig, TextSearchConfig
from metis_fast.errors import ToolSetupError
from metis_fast.tools.corpus import TEXT, Corpus
from metis_fast.tools.image_search import ImageSearch
from metis_fast.tools.results import ImageSearchResult, Page
from metis_fast.tools.text_search import TextSearch
from metis_fast.types import ImageBlob, ToolName

INDEX = pa.int32()


def write(path: Path, **columns: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def texts(path: Path) -> list[str]:
    return [text for (text,) in Corpus.open(ToolName.TEXT_SEARCH, path, {"text": TEXT}).texts("text")]


def png(seed: int) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((60, 40), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def first_title(tool: ImageSearch, image: bytes) -> str:
    found = tool.search(ImageBlob.of(image))
    assert isinstance(found, ImageSearchResult) and found.pages[0].image is not None
    return found.pages[0].title


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["a", None, "水"], pa.string(), ["a", "", "水"]),
        (["a", None, "b"], pa.large_string(), ["a", "", "b"]),
        (["a", None, "b"], pa.string_view(), ["a", "", "b"]),
        (["a", None, "a"], pa.dictionary(INDEX, pa.string()), ["a", "", "a"]),
        (["a", None, "a"], pa.dictionary(INDEX, pa.large_string()), ["a", "", "a"]),
        (["[1]", None, '{"a": 1}'], pa.json_(), ["[1]", "", '{"a": 1}']),
        ([None, None], pa.null(), ["", ""]),
        ([1999, None, -3], pa.int16(), ["1999", "", "-3"]),
        ([2**64 - 1], pa.uint64(), ["18446744073709551615"]),
        ([3.0, None, float("nan"), 2.5, float("inf")], pa.float64(), ["3", "", "", "2.5", "inf"]),
        ([3.0, None], pa.float16(), ["3", ""]),
        ([True, None], pa.bool_(), ["True", ""]),
        ([Decimal("3.10"), None], pa.decimal128(5, 2), ["3.10", ""]),
        ([datetime.date(2020, 2, 29), None], pa.date32(), ["2020-02-29", ""]),
        ([["a", "b"], None, ["c", None], []], pa.list_(pa.string()), ["a\nb", "", "c\n", ""]),
        ([["a", "b"], None], pa.large_list(pa.large_string()), ["a\nb", ""]),
        ([["a", "b"], None], pa.list_(pa.string(), 2), ["a\nb", ""]),
        ([["a", "b"], None], pa.list_view(pa.string_view()), ["a\nb", ""]),
        ([["a"], None], pa.list_(pa.dictionary(INDEX, pa.string())), ["a", ""]),
        ([[["a", "b"], ["c"]]], pa.list_(pa.list_(pa.string())), ["a\nb\nc"]),
    ],
    ids=str,
)
def test_a_text_column_may_be_of_any_type_that_reads_as_text(
    tmp_path: Path, values: list[object], kind: pa.DataType, expected: list[str]
) -> None:
    assert texts(write(tmp_path / "corpus.parquet", text=pa.array(values, kind))) == expected


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary(4),
        pa.struct([("text", pa.string())]),
        pa.list_(pa.struct([("text", pa.string())])),
        pa.list_(pa.binary()),
        pa.map_(pa.string(), pa.string()),
        pa.timestamp("ns"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["title", "link", "text"])
def test_another_type_is_refused_at_the_start(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    columns = {"title": ["a"], "link": ["b"], "text": ["c"]} | {name: pa.nulls(1, kind)}
    corpus = write(tmp_path / "corpus.parquet", **columns)
    with pytest.raises(ToolSetupError, match=rf"corpus\.parquet, has a column '{name}' of type .*; write it as string$"):
        TextSearch(TextSearchConfig(corpus=corpus))


def test_a_corpus_as_datasets_writes_it_is_searched(tmp_path: Path) -> None:
    features = {"info": {"features": {"title": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}}}
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(3):
        rows = range(4 * shard, 4 * shard + 4)
        table = pa.table(
            {
                "title": pa.array(rows, pa.int64()),
                "link": pa.nulls(4, pa.string()),
                "text": pa.array([[f"page {row}", "second paragraph"] for row in rows], pa.large_list(pa.large_string())),
                "image": pa.array(
                    [{"bytes": png(row), "path": f"{row}.png"} for row in rows],
                    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
                ),
            }
        ).replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, folder / f"train-{shard:05d}-of-00003.parquet", row_group_size=3)
    text = TextSearch(TextSearchConfig(corpus=folder, max_results=1))
    assert text.search("page 7").pages == (Page(1, "7", "", "page 7 second paragraph"),)
    image = ImageSearch(ImageSearchConfig(corpus=folder, max_results=1))
    assert [first_title(image, png(row)) for row in range(12)] == [str(row) for row in range(12)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
@pytest.mark.parametrize("shape", ["bytes", "struct", "only bytes", "path", "struct with path", "absolute path"])
def test_an_image_column_may_hold_bytes_or_paths(tmp_path: Path, kind: pa.DataType, shape: str) -> None:
    (tmp_path / "files").mkdir()
    for row in range(3):
        (tmp_path / "files" / f"{row}.png").write_bytes(png(row))
    data = pa.array([png(row) for row in range(3)], kind)
    base = tmp_path if shape == "absolute path" else Path()
    path = pa.array([str(base / "files" / f"{row}.png") for row in range(3)])
    column = {
        "bytes": data,
        "struct": pa.StructArray.from_arrays([data, pa.array(["gone.png"] * 3)], ["bytes", "path"]),
        "only bytes": pa.StructArray.from_arrays([data], ["bytes"]),
        "path": path,
        "absolute path": path,
        "struct with path": pa.StructArray.from_arrays([pa.nulls(3, kind), path], ["bytes", "path"]),
    }[shape]
    corpus = write(tmp_path / "corpus.parquet", title=["0", "1", "2"], link=[""] * 3, image=column)
    tool = ImageSearch(ImageSearchConfig(corpus=corpus, max_results=1))
    assert [first_title(tool, png(row)) for row in range(3)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "kind",
    [pa.int64(), pa.list_(pa.binary()), pa.struct([("data", pa.binary())])],
    ids=str,
)
def test_another_type_of_image_is_refused_at_the_start(tmp_path: Path, kind: pa.DataType) -> None:
    corpus = write(tmp_path / "corpus.parquet", title=["a"], link=["b"], image=pa.nulls(1, kind))
    with pytest.raises(ToolSetupError, match=r"has a column 'image' of type .*; it needs one image a row; write it as"):
        ImageSearch(ImageSearchConfig(corpus=corpus))


def test_images_that_cannot_be_read_are_counted_and_found_once_they_are_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    column = pa.array([{"path": "0.png"}, {"path": "1.png"}, {"path": None}])
    corpus = write(tmp_path / "corpus.parquet", title=["0", "1", "2"], link=[""] * 3, image=column)
    (tmp_path / "0.png").write_bytes(png(0))
    config = ImageSearchConfig(corpus=corpus, max_results=1)
    ImageSearch(config)
    assert re.search(r"2 of 3 images cannot be read .* first: \S+corpus\.parquet, row 1: .*No such file", caplog.text)
    (tmp_path / "1.png").write_bytes(png(1))
    assert first_title(ImageSearch(config), png(1)) == "1"


def test_a_corpus_of_which_no_image_can_be_read_is_refused(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.parquet", title=["0"], link=[""], image=["https://example.org/0.png"])
    with pytest.raises(ToolSetupError, match=r"has no image that can be read; .*corpus\.parquet, row 0: "):
        ImageSearch(ImageSearchConfig(corpus=corpus))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_text_that_is_not_utf_8_names_its_row(tmp_path: Path, kind: pa.DataType) -> None:
    raw = [b"good"] * 100 + [b"bad \xff"] + [b"good"]
    column = pa.Array.from_buffers(
        kind, 102, pa.array(raw, pa.large_binary() if kind == pa.large_string() else pa.binary()).buffers()
    )
    corpus = write(tmp_path / "corpus.parquet", title=["a"] * 102, link=[""] * 102, text=column)
    with pytest.raises(ToolSetupError, match=r"corpus\.parquet, row 100, column 'text': 'utf-8' codec .*; mend the row"):
        TextSearch(TextSearchConfig(corpus=corpus))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.parquet"]  # nothing half made stays


def test_a_corpus_without_pages_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, problem in [
        (tmp_path / "folder", r"is a folder without \*\.parquet files"),
        (write(tmp_path / "columns.parquet"), "has no column 'title'; it needs title, link, text, and has no columns"),
        (write(tmp_path / "rows.parquet", title=pa.nulls(0), link=pa.nulls(0), text=pa.nulls(0)), "has no rows"),
    ]:
        with pytest.raises(ToolSetupError, match=problem):
            TextSearch(TextSearchConfig(corpus=path))


@pytest.mark.parametrize(("make", "what"), [(Path.mkdir, "a folder"), (os.mkfifo, "a device or a pipe")])
def test_what_is_not_a_file_is_refused_and_named(tmp_path: Path, make: Callable[[Path], None], what: str) -> None:
    write(tmp_path / "corpus" / "a.parquet", title=["a"], link=["b"], text=["c"])
    make(tmp_path / "corpus" / "sub.parquet")
    with pytest.raises(
        ToolSetupError, match=rf"^the corpus of text_search, .*sub\.parquet, is {what}; it needs a Parquet file: "
    ):
        TextSearch(TextSearchConfig(corpus=tmp_path / "corpus"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none.parquet", r"the corpus of text_search, .*none\.parquet, is not there; set tools\.text_search\.corpus"),
        ("link.parquet", r"link\.parquet, is a link to gone, which is not there; set "),
        ("folder", r"folder/link\.parquet, is a link to gone, which is not there; set "),
        ("loop", r"cannot read the corpus of text_search, .*loop: Too many levels of symbolic links; set "),
        ("closed", r"cannot read the corpus of text_search, .*closed: Permission denied; set "),
        ("closed/a.parquet", r"cannot read the corpus of text_search, .*closed/a\.parquet: Permission denied; set "),
        ("x" * 300, r"cannot read the corpus of text_search, .*: File name too long; set tools\.text_search\.corpus"),
    ],
)
def test_a_corpus_that_cannot_be_looked_at_is_named(tmp_path: Path, path: str, said: str) -> None:
    for place in ("link.parquet", "folder/link.parquet"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "closed").mkdir(mode=0)
    try:
        with modes_count(), pytest.raises(ToolSetupError, match=said):
            TextSearch(TextSearchConfig(corpus=tmp_path / path))
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_corpus_that_is_a_device_is_refused() -> None:
    with pytest.raises(ToolSetupError, match=r"/dev/zero, is a device or a pipe"):
        TextSearch(TextSearchConfig(corpus=Path("/dev/zero")))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "a folder"),
        (os.mkfifo, "a device or a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a device or a pipe"),
        (lambda path: path.symlink_to("/proc/kmsg"), "cannot identify image file"),  # a file, says the kernel; reading it waits
        (lambda path: path.touch() or os.truncate(path, 300 << 20), "300 MiB, more than 256 MiB"),
    ],
    ids=["folder", "pipe", "device", "kernel", "large"],
)
def test_only_regular_files_of_a_sensible_size_are_read_as_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path / "bad.png")
    (tmp_path / "good.png").write_bytes(png(0))
    corpus = write(tmp_path / "corpus.parquet", title=["0", "1"], link=["", ""], image=["bad.png", "good.png"])
    tool = ImageSearch(ImageSearchConfig(corpus=corpus, max_results=1))
    assert reason in caplog.text and first_title(tool, png(0)) == "1"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 4, ["title", "link", "text", "text"])
    pq.write_table(table, tmp_path / "corpus.parquet")
    with pytest.raises(ToolSetupError, match="has several columns 'text'; rename all but one"):
        TextSearch(TextSearchConfig(corpus=tmp_path / "corpus.parquet"))


def test_a_damaged_page_is_one_line(tmp_path: Path) -> None:
    columns = {"title": ["a"] * 50, "link": ["b"] * 50, "text": [f"words {row}" for row in range(50)]}
    corpus = tmp_path / "corpus.parquet"
    pq.write_table(pa.table(columns), corpus, write_page_checksum=True, compression="none", use_dictionary=False)
    corpus.write_bytes(corpus.read_bytes().replace(b"words 33", b"w0rds 33"))
    with pytest.raises(ToolSetupError, match=r"^cannot read the corpus of text_search, .*; write the file anew$"):
        TextSearch(TextSearchConfig(corpus=corpus))
