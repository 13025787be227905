"""Stand-ins have the published formats to the letter, and truths that their pictures show."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from metis_fast.cli import main
from metis_fast.errors import DataError
from metis_fast.rollout.protocols.metis import Metis
from metis_fast.standin import StandinPaths, write_standin
from metis_fast.standin.pictures import KINDS, as_jpeg, draw
from metis_fast.standin.words import code_result, image_result, search_result
from metis_fast.tools.results import ImageSearchResult, Page, PythonResult, SeenPage, TextSearchResult
from metis_fast.types import ImageBlob

ROWS = 48


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> StandinPaths:
    return write_standin(tmp_path_factory.mktemp("standin"), ROWS, (160, 120))


def table(folder: Path) -> pa.Table:
    files = sorted((folder / "data").iterdir())
    assert [file.name for file in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    return pa.concat_tables(pq.read_table(file) for file in files)


def test_rl_has_the_six_published_columns_in_their_order(paths: StandinPaths):
    message = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
    for folder, data in ((paths.rl, pa.list_(pa.int64())), (paths.rl_binary, pa.binary())):
        schema = table(folder).schema
        assert schema.names == ["data_source", "prompt", "images", "ability", "reward_model", "extra_info"]
        assert schema.field("prompt").type.value_type == message.value_type
        assert schema.field("images").type.value_type == pa.struct([("bytes", data)])
        assert schema.field("reward_model").type == pa.struct([("ground_truth", pa.string()), ("style", pa.string())])
        info = [("answer", pa.string()), ("index", pa.string()), ("pass8", pa.int64()), ("question", pa.string())]
        assert schema.field("extra_info").type == pa.struct(info)


def test_rl_rows_look_like_published_ones(paths: StandinPaths):
    rows = table(paths.rl_binary).to_pylist()
    assert len(rows) == ROWS
    assert {row["ability"] for row in rows} == {"math", "perception", "search", "general"}
    assert {row["reward_model"]["style"] for row in rows} == {"rule"}
    offers = {row["prompt"][0]["content"].count("\n## ") for row in rows}
    assert offers == {1, 3}
    kinds = set()
    for row in rows:
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert row["prompt"][1]["content"] == row["extra_info"]["question"]
        assert row["extra_info"]["question"].startswith("<image>\n")
        assert row["extra_info"]["answer"] == row["reward_model"]["ground_truth"]
        (image,) = row["images"]
        with Image.open(io.BytesIO(image["bytes"])) as picture:
            kinds.add((picture.format, picture.mode, dict(picture.getexif()).get(274)))
    assert kinds == {("PNG", "RGBA", None), ("JPEG", "RGB", 1), ("JPEG", "RGB", 6), ("JPEG", "RGB", 3)}


def test_a_seed_gives_the_same_files_and_another_one_does_not(tmp_path: Path):
    made = [write_standin(tmp_path / name, 3, (96, 64), seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    first, same, other = (
        {f.relative_to(p): f.read_bytes() for f in p.rglob("*.*") if f.is_file()}
        for p in (tmp_path / "a", tmp_path / "b", tmp_path / "c")
    )
    assert len(made) == 3
    assert first == same != other
    assert first.keys() == same.keys()


def test_cold_start_has_two_columns_and_every_kind_of_row(paths: StandinPaths):
    text, binary = table(paths.cold_start), table(paths.cold_start_binary)
    assert text.schema.equals(pa.schema([("messages", pa.string()), ("images", pa.list_(pa.string()))]))
    assert binary.schema.field("images").type == pa.list_(pa.binary())
    roles, numbers, misfits, contents = set(), set(), 0, ""
    for row, same in zip(text.to_pylist(), binary.to_pylist(), strict=True):
        assert [base64.b64decode(image) for image in row["images"]] == same["images"]
        assert row["messages"] == same["messages"]
        messages = json.loads(row["messages"])
        assert all(list(message) == ["content", "role"] for message in messages)
        assert messages[0]["role"] == "system"
        assert messages[-1]["role"] == "assistant"
        roles |= {message["role"] for message in messages}
        numbers.add(len(row["images"]))
        marks = sum(
            message["content"].count("<image>")
            if isinstance(message["content"], str)
            else sum(part["type"] == "image" for part in message["content"])
            for message in messages
        )
        misfits += marks != len(row["images"])
        contents += row["messages"]
    assert roles == {"system", "user", "assistant", "tool"}
    assert {0, 1, 2, 15} <= numbers
    assert misfits == ROWS // 16
    assert "<tool_response>" in contents
    assert '"type": "text"' in contents


def test_a_call_of_cold_start_is_strict_json(paths: StandinPaths):
    for row in table(paths.cold_start).to_pylist():
        for message in json.loads(row["messages"]):
            if message["role"] == "assistant" and "<tool_call>" in message["content"]:
                inside = message["content"].split("<tool_call>")[1].split("</tool_call>")[0]
                assert set(json.loads(inside)) == {"name", "arguments"}


def test_the_image_search_cache_has_the_published_form(paths: StandinPaths):
    cache = json.loads(paths.image_search_cache.read_text(encoding="utf-8"))
    indices = {row["extra_info"]["index"] for row in table(paths.rl).select(["extra_info"]).to_pylist()}
    assert cache
    assert cache.keys() < indices  # some rows find nothing
    assert any(index.startswith("fvqa_") for index in cache)
    for entry in cache.values():
        assert set(entry) == {"tool_returned_web_title", "cached_images_path"}
        there, missing = entry["cached_images_path"]
        assert missing is None
        assert (paths.image_search_cache.parent / there).is_file()
        assert len(entry["tool_returned_web_title"]) == 2


def test_the_benchmark_has_vlmevalkits_shape(paths: StandinPaths):
    csv.field_size_limit(1 << 30)
    with paths.benchmark.open(newline="", encoding="utf-8") as file:
        rows = {row["index"]: row for row in csv.DictReader(file, delimiter="\t")}
    truths = [row["reward_model"]["ground_truth"] for row in table(paths.rl_binary).to_pylist()]
    assert [row[row["answer"]] for row in rows.values()] == truths
    assert any(len(row["image"]) < 64 for row in rows.values())
    for row in rows.values():
        image = row["image"] if len(row["image"]) > 64 else rows[row["image"]]["image"]
        with Image.open(io.BytesIO(base64.b64decode(image))) as picture:
            picture.load()
        assert len({row[letter] for letter in "ABCD"}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_upright_however_it_was_taken_and_its_boxes_lie_in_it(kind: str):
    picture = draw(kind, (128, 96), random.Random(0))
    from metis_fast import pixels

    upright, turned = (pixels.decode(as_jpeg(picture.image, orientation)) for orientation in (1, 6))
    assert upright.size == turned.size == (128, 96)
    for question in picture.questions:
        left, upper, right, lower = question.box
        assert 0 <= left < right <= 128
        assert 0 <= upper < lower <= 96


def test_stand_ins_are_replaced_and_other_files_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    verb = ["data", "standin", str(tmp_path / "x"), "--pixels", "64x48", "--rows"]
    assert main([*verb, "3"]) == main([*verb, "2"]) == 0
    assert table(tmp_path / "x" / "rl").num_rows == 2
    own = tmp_path / "x" / "rl" / "data" / "train-00000-of-00001.parquet"
    own.write_text("somebody's data")
    capsys.readouterr()
    assert main([*verb, "2"]) == 2
    assert f"{tmp_path / 'x'} holds files that are no stand-ins: rl/data/{own.name}; name a new" in capsys.readouterr().err
    assert own.read_text() == "somebody's data"
    other = tmp_path / "other" / "rl" / "data"
    other.mkdir(parents=True)
    (other / "train-00000-of-00002.parquet").write_text("somebody's data")
    assert main(["data", "standin", str(tmp_path / "other"), "--rows", "1", "--pixels", "64x48"]) == 2
    assert [path.name for path in other.iterdir()] == ["train-00000-of-00002.parquet"]


def test_a_folder_of_a_call_that_was_killed_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("metis_fast.standin.write_search_cache", stop)  # after all Parquet files
        with pytest.raises(KeyboardInterrupt):
            write_standin(tmp_path / "x", 3, (64, 48))
    paths = write_standin(tmp_path / "x", 2, (64, 48))
    assert table(paths.rl).num_rows == 2
    assert json.loads(paths.image_search_cache.read_text())  # an empty one is no cache, however few rows there are
    (paths.rl / "data" / "train-mine.parquet").write_text("somebody's data")
    with pytest.raises(DataError, match=r"no stand-ins: rl/data/train-mine\.parquet"):
        write_standin(tmp_path / "x", 2, (64, 48))


def test_the_verb_writes_and_names_all_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "standin", str(tmp_path / "x"), "--rows", "2", "--pixels", "80x64", "--json"]) == 0
    named = json.loads(capsys.readouterr().out)
    assert set(named) == {"rl", "rl_binary", "cold_start", "cold_start_binary", "image_search_cache", "benchmark"}
    assert all(Path(path).exists() for path in named.values())
    for size in ("80", "0x0", "20000x10", "99999999x99999999", "30000x30000"):
        assert main(["data", "standin", str(tmp_path / "y"), "--pixels", size]) == 2
        assert "expected --pixels like 2048x1536: sides of at least 32, at most 64 million in all" in capsys.readouterr().err
    assert main(["data", "standin", str(tmp_path / "y"), "--rows", "0"]) == 2
    assert "expected --rows from 1 on, got 0" in capsys.readouterr().err and not (tmp_path / "y").exists()
    (tmp_path / "file").write_text("")
    assert main(["data", "standin", str(tmp_path / "file"), "--rows", "1", "--pixels", "64x64"]) == 2
    assert "choose a folder that can be written" in capsys.readouterr().err


def test_observations_of_cold_start_are_those_of_the_protocol():
    protocol, blob = Metis(), ImageBlob(b"", "")
    for stdout, images in (("12\n", ()), ("", (blob,)), ("a\nb", (blob, blob))):
        worded = protocol.word(PythonResult((), stdout, "", images, True))
        assert code_result(stdout, len(images)) == worded.text
    pages = [("A", "https://a.example", "one"), ("B", "https://b.example", "two")]
    found = TextSearchResult("q", tuple(Page(rank, *page) for rank, page in enumerate(pages, 1)))
    assert search_result("q", pages) == protocol.word(found).text
    for titles in (["A"], ["A", "B", "C"]):
        seen = ImageSearchResult(tuple(SeenPage(title, "https://a.example", blob) for title in titles))
        assert image_result(titles) == protocol.word(seen).text
