"""Published files of benchmarks: they stream, and what is wrong with one is one line that says what to do."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from metis_fast.errors import DataError
from metis_fast.evaluate.benchmarks import BENCHMARKS
from metis_fast.evaluate.files.jsonfile import JsonTable
from metis_fast.evaluate.files.parquet import ParquetTable
from metis_fast.evaluate.files.reading import expand, inspect, read
from metis_fast.evaluate.files.tsv import TsvTable
from metis_fast.evaluate.standin import write_parquet, write_tsv

VSTAR = BENCHMARKS["vstar"]


def encoded(color: str, size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 40).convert("RGB").save(out, "PNG")
    return out.getvalue() if color == "noise" else _plain(color, size)


def _plain(color: str, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


NOISE, RED = encoded("noise"), encoded("red")
TEXT = base64.b64encode(NOISE).decode()
ROW = {"index": 0, "image": TEXT, "question": "Which?", "A": "one", "B": "two", "answer": "A", "category": "x"}


def rows_of(path: Path, *changes: dict[str, object]) -> Path:
    return write_tsv(path, [{**ROW, "index": at, **change} for at, change in enumerate(changes or ({},))])


def images(path: Path, row: int = 0) -> list[bytes]:
    found = list(TsvTable(path).rows())[row]
    return [image.data for image in found.load_images()]


def complaint(path: Path, **options: bool) -> str:
    with pytest.raises(DataError) as caught:
        for question in read(VSTAR, [path], any_md5=options.get("any_md5", True)).questions:
            question.images()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_cells_with_tabs_quotes_and_line_ends_are_read_and_found_again(tmp_path: Path):
    odd = 'He said "no"\tand\nleft; ünï'
    path = rows_of(tmp_path / "a.tsv", {}, {"question": odd}, {"question": '"quoted"', "image": "0"})
    table = TsvTable(path)
    assert [row.cells["question"] for row in table.rows()] == ["Which?", odd, '"quoted"']
    assert [images(path, row) for row in range(3)] == [[NOISE]] * 3
    assert table.md5 == hashlib.md5(path.read_bytes()).hexdigest()
    assert not table.unfinished


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path: Path):
    path = rows_of(tmp_path / "a.tsv", {}, {})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [images(path, row) for row in range(2)] == [[NOISE]] * 2
    assert list(TsvTable(path).rows())[1].cells["category"] == "x"


def test_an_image_may_be_the_index_of_another_row_before_or_behind(tmp_path: Path):
    path = rows_of(tmp_path / "a.tsv", {"image": "first"}, {"image": TEXT, "index": "first"}, {"image": "first"})
    found = list(TsvTable(path).rows())
    assert [row.picture for row in found] == ["first"] * 3
    assert {image.data for row in found for image in row.load_images()} == {NOISE}


def test_rows_that_repeat_an_image_share_its_cluster(tmp_path: Path):
    """Errors are clustered by picture, and MME-RealWorld's files have the same one in each row that asks about it."""
    other = base64.b64encode(encoded("noise", (50, 40))).decode()
    path = rows_of(tmp_path / "a.tsv", {}, {"image": other}, {}, {"image": "2"})
    assert [question.cluster for question in read(VSTAR, [path], any_md5=True).questions] == ["0", "1", "0", "0"]
    row = {
        "question": "q",
        "multi-choice options": ["(A) one"],
        "answer": "A",
        "category": "Perception/OCR",
        "l2-category": "x",
    }
    rows = [{"index": at, "image": image, **row} for at, image in enumerate((TEXT, other, TEXT))]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    questions = read(BENCHMARKS["mme-realworld"], [tmp_path / "a.json"]).questions
    assert [question.cluster for question in questions] == ["0", "1", "0"]
    assert [question.images()[0].data == NOISE for question in questions] == [True, False, True]


def test_an_image_cell_may_be_a_list_of_images(tmp_path: Path):
    second = base64.b64encode(RED).decode()
    path = rows_of(tmp_path / "a.tsv", {"image": str([TEXT, second])}, {"image": json.dumps([TEXT])})
    assert images(path) == [NOISE, RED]
    assert images(path, 1) == [NOISE]


def test_base64_in_lines_or_in_the_other_alphabet_is_read(tmp_path: Path):
    lines = "\n".join(TEXT[at : at + 76] for at in range(0, len(TEXT), 76))
    other = TEXT.replace("+", "-").replace("/", "_")
    path = rows_of(tmp_path / "a.tsv", {"image": lines}, {"image": other}, {"image": f"data:image/png;base64,{TEXT}"})
    assert [images(path, row) for row in range(3)] == [[NOISE]] * 3


def test_options_of_any_script_and_null_characters_are_text(tmp_path: Path):
    change: dict[str, object] = {"question": "a\0b", "A": "🙂 Ünï", "B": "\u202eabc\u200b"}
    (question,) = read(VSTAR, [rows_of(tmp_path / "a.tsv", change)], any_md5=True).questions
    assert question.question == "a\0b"
    assert question.options == {"A": "🙂 Ünï", "B": "\u202eabc\u200b"}


def test_an_image_path_is_looked_for_beside_the_file(tmp_path: Path):
    (tmp_path / "red.png").write_bytes(RED)
    assert images(rows_of(tmp_path / "a.tsv", {"image": "red.png"})) == [RED]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": "17"}, ("row 1", "'17'", "index of another row")),
        ({"image": TEXT[:-1] + "!"}, ("row 1", "base64")),
        ({"image": TEXT[: len(TEXT) // 2 // 4 * 4 - 1]}, ("row 1", "base64")),
        ({"image": base64.b64encode(b"no image at all" * 200).decode()}, ("row 1", "cannot identify image file")),
        ({"image": "pictures/gone.png"}, ("row 1", "path of a file")),
        ({"image": ""}, ("row 1", "expected an image, got null")),
        ({"answer": "E"}, ("row 1", "letters A, B", "'E'")),
        ({"answer": "А"}, ("row 1", "letters A, B", "'А'")),  # Cyrillic
        ({"A": "", "B": ""}, ("row 1", "options in columns A, B")),
        ({"image": "1"}, ("row 1", "'1'", "index of another row")),  # itself
        ({"image": TEXT[:100] + "\0" * 40 + TEXT[140:]}, ("row 1", "base64")),
        ({"index": " "}, ("row 1", "expected an index, got none")),
        ({"category": ""}, ("row 1", "category")),
    ],
)
def test_what_is_wrong_with_a_row_is_one_line(tmp_path: Path, change: dict[str, object], words: tuple[str, ...]):
    text = complaint(rows_of(tmp_path / "a.tsv", {}, change))
    assert all(word in text for word in words), text


def test_a_reference_to_a_reference_is_refused(tmp_path: Path):
    text = complaint(rows_of(tmp_path / "a.tsv", {"image": "1"}, {"image": "2"}, {}))
    assert "row 0" in text
    assert "which row 0 refers to" in text
    assert "row 1" in complaint(rows_of(tmp_path / "b.tsv", {"image": "1"}, {"image": ""}))


def test_a_cut_file_is_found_wherever_it_was_cut(tmp_path: Path):
    whole = rows_of(tmp_path / "a.tsv", {}, {"question": 'a "b" c'}, {}).read_bytes()
    starts = [at for at, byte in enumerate(whole) if byte == 10]
    for cut in (len(whole) - len(TEXT) // 2, starts[1] + 4, starts[0] + 30, starts[0] - 4, 3, 0):
        path = tmp_path / "cut.tsv"
        path.write_bytes(whole[:cut])
        assert "get it again" in (text := complaint(path)) or "give a" in text
    whole = rows_of(tmp_path / "a.tsv", {"category": "relative_position"}).read_bytes()
    path.write_bytes(whole[:-5])  # amid the last cell: only the end of the line tells
    (first, *_) = inspect(VSTAR, [path], any_md5=True).warnings[1:]
    assert "its last line has no end" in first


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"index\timage\n0\t\xff\xfe\n")
    assert "UTF-8" in complaint(path)


def test_a_missing_column_is_named(tmp_path: Path):
    path = write_tsv(tmp_path / "a.tsv", [{name: value for name, value in ROW.items() if name != "category"}])
    assert "expected a column 'category'" in complaint(path)
    path = write_tsv(tmp_path / "b.tsv", [{name: value for name, value in ROW.items() if name != "answer"}])
    assert "'answer' or 'label'" in complaint(path)


def test_rows_need_indices_of_their_own_in_and_across_files(tmp_path: Path):
    assert "as in row 0" in complaint(rows_of(tmp_path / "a.tsv", {"index": 5}, {"index": 5}))
    rows_of(tmp_path / "b" / "x.tsv", {})
    rows_of(tmp_path / "b" / "y.tsv", {})
    assert "x.tsv, row 0" in complaint(tmp_path / "b")


def test_a_wrong_md5_is_refused_unless_it_is_wanted_and_a_right_one_is_named(tmp_path: Path):
    path = rows_of(tmp_path / "VStarBench.tsv")
    text = complaint(path, any_md5=False)
    assert "b18854d7075574be06b631cd5f7d2d6a" in text
    assert hashlib.md5(path.read_bytes()).hexdigest() in text
    assert "--any-md5" in text
    found = read(VSTAR, [path], any_md5=True)
    assert [file.known for file in found.files] == [""]
    assert "not a published one" in found.warnings[0]
    known = replace(VSTAR.files[0], md5=(hashlib.md5(path.read_bytes()).hexdigest(),), rows=1)
    found = read(replace(VSTAR, files=(known,)), [path])
    assert [file.known for file in found.files] == ["VStarBench"]
    assert found.warnings == ()


def test_a_file_that_users_build_themselves_may_have_another_md5(tmp_path: Path):
    row = {**ROW, "multi-choice options": str(["(A) one", "(B) two"]), "category": "Perception/OCR", "l2-category": "ocr"}
    found = read(BENCHMARKS["mme-realworld"], [write_tsv(tmp_path / "MME-RealWorld.tsv", [row])])
    assert "not a published one" in found.warnings[0]


def test_a_part_of_a_benchmark_is_no_score_of_the_whole(tmp_path: Path):
    assert "1 rows, and V*Bench has 191" in read(VSTAR, [rows_of(tmp_path / "a.tsv")], any_md5=True).warnings[-1]


def test_a_file_that_changes_meanwhile_is_found(tmp_path: Path):
    path = rows_of(tmp_path / "a.tsv", {}, {})
    (first, second) = read(VSTAR, [path], any_md5=True).questions
    rows_of(path, {}, {"question": "Another?"})
    assert first.images()
    with pytest.raises(DataError, match="row 1: changed since it was read first"):
        second.images()
    path.unlink()
    with pytest.raises(DataError, match="cannot be read again"):
        first.images()


def test_json_lists_stream_through_small_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("metis_fast.evaluate.files.jsonfile._CHUNK", 7)
    rows = [{"index": at, "image": TEXT * (at == 1) or "red.png", "question": "ünï \\" * at, "n": [at, {}]} for at in range(4)]
    (tmp_path / "red.png").write_bytes(RED)
    for name, text in (
        ("plain.json", json.dumps(rows)),
        ("indented.json", json.dumps(rows, indent=3, ensure_ascii=False)),
        ("under.json", json.dumps({"questions": rows}, ensure_ascii=False)),
        ("lines.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"),
    ):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        table = JsonTable(path)
        found = list(table.rows())
        assert [row.cells["question"] for row in found] == [row["question"] for row in rows]
        assert [row.load_images()[0].data for row in found] == [RED, NOISE, RED, RED]
        assert "image" in table.columns
        assert table.md5 == hashlib.md5(path.read_bytes()).hexdigest()
        path.write_text(text[: len(text) * 2 // 3], encoding="utf-8")
        with pytest.raises(DataError, match="get it again"):
            JsonTable(path)
    rest = json.dumps(rows)
    for text in (rest + rest, rest + "x", "[" * 100_000, rest.replace("0", "9" * 5000, 1)):
        path.with_suffix(".json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError) as caught:
            JsonTable(path.with_suffix(".json"))
        assert "one list a file" in str(caught.value) or "get it again" in str(caught.value)
    path.write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(DataError, match=r"lines.jsonl|expected a list"):
        JsonTable(path.rename(tmp_path / "no_list.json"))


@pytest.mark.parametrize("as_text", [False, True])
def test_parquet_images_are_read_in_any_order(tmp_path: Path, as_text: bool):
    pictures = [encoded("noise", (60, 40 + at)) for at in range(7)]
    cell = [
        base64.b64encode(data).decode() if as_text else {"bytes": data, "path": f"{at}.png"} for at, data in enumerate(pictures)
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.Table.from_pylist([{"question": str(at), "image": one} for at, one in enumerate(cell)]), path, row_group_size=3
    )
    rows = list(ParquetTable(path).rows())
    assert [row.picture for row in rows] == [str(at) if as_text else f"{at}.png" for at in range(7)]
    assert all("image" not in row.cells for row in rows)
    for at in (0, 1, 2, 3, 6, 5, 0, 0, 4, 2, 6):
        assert rows[at].load_images()[0].data == pictures[at]


def test_parquet_paths_and_pixels_are_told_apart(tmp_path: Path):
    row = {"image": "images/1.jpg", "decoded_image": {"bytes": NOISE, "path": "1.jpg"}, "score": 3.0, "gap": None}
    (found,) = ParquetTable(write_parquet(tmp_path / "a.parquet", [row])).rows()
    assert found.load_images()[0].data == NOISE
    assert found.text("image") == "images/1.jpg"
    assert found.text("score") == "3"
    assert found.value("gap") is None


def test_a_cut_parquet_file_is_one_line(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", [{"image": {"bytes": NOISE, "path": ""}}])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a Parquet file that can be read"):
        ParquetTable(path)


def test_half_a_character_is_no_text(tmp_path: Path):
    row = {**ROW, "question": "half \ud800", "multi-choice options": ["(A) one", "(B) two"], "l2-category": "ocr"}
    (tmp_path / "a.json").write_text(json.dumps([row | {"category": "Perception/OCR"}]))
    with pytest.raises(DataError, match=r"row 0, column question: expected Unicode text"):
        read(BENCHMARKS["mme-realworld"], [tmp_path / "a.json"])


def test_folders_stand_for_their_files_of_one_form(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for name in ("data/b.parquet", "data/a.parquet", "readme.md"):
        (tmp_path / name).touch()
    assert expand([tmp_path]) == [tmp_path / "data" / "a.parquet", tmp_path / "data" / "b.parquet"]
    for path, words in ((tmp_path / "x.zip", "unpack archives"), (tmp_path / "data" / "gone.tsv", "no such file")):
        with pytest.raises(DataError, match=words):
            read(VSTAR, [path])
    with pytest.raises(DataError, match="found none"):
        expand([tmp_path / "data" / "b.parquet", (tmp_path / "empty", (tmp_path / "empty").mkdir())[0]])
    with pytest.raises(DataError, match="given twice"):
        expand([tmp_path / "data" / "b.parquet"] * 2)
