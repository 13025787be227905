"""Rows: every shape of a value that writers produce gives the same prompt, and a bad row says where and why."""

import base64
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from metis_fast.data.parquet import PromptFiles
from metis_fast.data.row import BadRow, BadRowError
from metis_fast.data.writing import write_prompts
from metis_fast.errors import DataError
from metis_fast.types import ImageBlob, Message, Prompt


def encoded(width: int = 6, height: int = 4, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width, height), 60).save(out, kind)
    return out.getvalue()


PNG = encoded()
PLAIN = {
    "data_source": "unit",
    "prompt": [{"role": "user", "content": "1 + 1?"}],
    "images": None,
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "math"},
    "extra_info": {"question": "one and one"},
}
ONE_MARK = [{"role": "user", "content": "<image> what?"}]


def read_rows(folder: Path, *changes: dict[str, object]) -> list[Prompt | BadRow]:
    """Write PLAIN with changes, one row each, and read the rows, their images whole."""
    pq.write_table(pa.Table.from_pylist([PLAIN | change for change in changes]), folder / "set.parquet")
    files, out = PromptFiles([folder / "set.parquet"]), []
    for row in files.raw_rows(files.row_groups[0]):
        try:
            out.append(row.decoded())
        except BadRowError as error:
            out.append(error.bad_row)
    return out


def read_good(folder: Path, **change) -> Prompt:
    (prompt,) = read_rows(folder, change)
    assert isinstance(prompt, Prompt), prompt
    return prompt


@pytest.mark.parametrize(
    "images",
    [
        [{"bytes": PNG, "path": None}],
        [{"bytes": PNG, "path": "name_only.png"}],
        [{"bytes": PNG}],
        [{"bytes": None, "path": "beside/pixels.png"}],
        [{"bytes": b"", "path": "beside/pixels.png"}],
        [PNG],
        ["beside/pixels.png"],
        {"bytes": PNG, "path": None},
        {"bytes": None, "path": "beside/pixels.png"},
        PNG,
    ],
    ids=lambda images: str(images).replace(str(PNG), "PNG"),
)
def test_every_shape_of_an_image_gives_its_bytes(tmp_path: Path, images: object):
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "pixels.png").write_bytes(PNG)
    assert read_good(tmp_path, prompt=ONE_MARK, images=images).images == (ImageBlob.of(PNG),)


def test_an_absolute_image_path_is_read_where_it_is(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pixels.png").write_bytes(PNG)
    images = [{"bytes": None, "path": str(tmp_path / "pixels.png")}]
    assert read_good(tmp_path / "elsewhere", prompt=ONE_MARK, images=images).images == (ImageBlob.of(PNG),)


@pytest.mark.parametrize("images", [None, [], {"bytes": None, "path": None}], ids=str)
def test_null_an_empty_list_and_an_empty_struct_are_no_image(tmp_path: Path, images: object):
    with_image = {"prompt": ONE_MARK, "images": {"bytes": PNG, "path": None} if isinstance(images, dict) else [{"bytes": PNG}]}
    _, without = read_rows(tmp_path, with_image, {"images": images})
    assert isinstance(without, Prompt)
    assert without.images == ()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_keep_their_encoding_and_order(tmp_path: Path, kind: str):
    blobs = [encoded(33, 9, kind), encoded(8, 70, kind)]
    prompt = read_good(tmp_path, prompt=[{"role": "user", "content": "<image><image>"}], images=blobs)
    assert [image.data for image in prompt.images] == blobs


@pytest.mark.parametrize(
    ("ground_truth", "answers"),
    [
        ("2", ("2",)),
        (["2", "two"], ("2", "two")),
        (["2", None, " "], ("2",)),
        (2, ("2",)),
        (-2.5, ("-2.5",)),
        (2.0, ("2",)),
        ([2, 3], ("2", "3")),
        (True, ("True",)),
        ({"target": ["2", "two"]}, ("2", "two")),
        ({"target": "2", "hint": "even"}, ("2",)),
        ({"value": 2}, ("2",)),
        ({"text": "2"}, ("2",)),
        ({"target": None, "text": "2"}, ("2",)),
        ([{"value": "2"}, {"value": "two"}], ("2", "two")),
        ('["2", "two"]', ('["2", "two"]',)),
        ("2024-01-01", ("2024-01-01",)),
        ('{"target": "2"}', ('{"target": "2"}',)),
        (" 2\n", (" 2\n",)),
    ],
)
def test_every_shape_of_a_ground_truth_gives_its_answers(tmp_path: Path, ground_truth: object, answers: tuple[str, ...]):
    assert read_good(tmp_path, reward_model={"ground_truth": ground_truth, "style": "rule"}).answers == answers


@pytest.mark.parametrize("reward_model", [{"ground_truth": "2"}, {"ground_truth": "2", "style": None, "weight": 0.5}], ids=str)
def test_a_missing_judge_style_is_rule(tmp_path: Path, reward_model: dict[str, object]):
    assert read_good(tmp_path, reward_model=reward_model).judge_style == "rule"


CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "<image>what is it?"}]
PARTS = [
    {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what is it?"}]},
]


@pytest.mark.parametrize(
    "prompt", [CHAT, PARTS, json.dumps(CHAT), json.dumps(PARTS)], ids=["chat", "parts", "json", "json parts"]
)
def test_every_shape_of_a_prompt_gives_the_same_messages(tmp_path: Path, prompt: object):
    messages = read_good(tmp_path, prompt=prompt, images=[PNG]).messages
    assert messages == (Message("system", "be brief"), Message("user", "<image>what is it?"))


def test_a_prompt_column_of_the_json_type_is_read_as_json(tmp_path: Path):
    prompt = pa.array([json.dumps(CHAT)], pa.json_(pa.string()))
    table = pa.Table.from_pylist([PLAIN | {"images": [PNG]}])
    pq.write_table(table.set_column(table.schema.get_field_index("prompt"), "prompt", prompt), tmp_path / "set.parquet")
    messages = PromptFiles([tmp_path / "set.parquet"]).read(0).messages
    assert messages == (Message("system", "be brief"), Message("user", "<image>what is it?"))


def test_extra_info_is_flattened_under_dotted_keys_and_holds_scalars_only(tmp_path: Path):
    extra_info = {
        "question": "one and one",
        "index": 3,
        "source": {"book": "primer", "place": {"page": 7, "line": None}},
        "share": 0.5,
        "hard": False,
        "gone": None,
        "tags": ["a", "b"],
        "raw": b"bytes",
        "missing": float("nan"),
    }
    prompt = read_good(tmp_path, extra_info=extra_info)
    assert prompt.extra == {"index": 3, "source.book": "primer", "source.place.page": 7, "share": 0.5, "hard": False}
    assert prompt.question == "one and one"


@pytest.mark.parametrize(
    "extra_info", [None, {"question": None, "a": 1}, {"question": " "}, {"question": ["no", "text"]}], ids=str
)
def test_without_a_question_the_last_user_message_is_it(tmp_path: Path, extra_info: object):
    talk = [("user", "hello"), ("assistant", "yes?"), ("user", "<image>\n1 + 1?"), ("assistant", "Let me")]
    prompt = [{"role": role, "content": content} for role, content in talk]
    assert read_good(tmp_path, prompt=prompt, images=[PNG], extra_info=extra_info).question == "1 + 1?"


def text_of(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("change", "column", "got"),
    [
        ({"prompt": [{"role": "tool", "content": "x"}]}, "prompt[0].role", "'tool'"),
        ({"prompt": [*CHAT[:1], {"role": None, "content": "x"}]}, "prompt[1].role", "null"),
        ({"prompt": CHAT[:1]}, "prompt", "[{'content': 'be brief', 'role': 'system'}]"),
        ({"prompt": text_of(None)}, "prompt[0].content", "null"),
        ({"prompt": text_of([{"type": "video", "text": "x"}])}, "prompt[0].content[0]", "{'text': 'x', 'type': 'video'}"),
        ({"prompt": text_of([{"type": "text", "text": None}])}, "prompt[0].content[0]", "{'text': None, 'type': 'text'}"),
        ({"prompt": "1 + 1?"}, "prompt", "'1 + 1?'"),
        ({"prompt": '{"role": "user", "content": "x"}'}, "prompt", "{'content': 'x', 'role': 'user'}"),
        ({"prompt": '["x"]'}, "prompt[0].role", "null"),
        ({"reward_model": "yes"}, "reward_model", "'yes'"),
        ({"reward_model": "[2]"}, "reward_model", "'[2]'"),
        ({"extra_info": "question"}, "extra_info", "'question'"),
        ({"reward_model": {"ground_truth": None, "style": "rule"}}, "reward_model.ground_truth", "null"),
        ({"reward_model": {"ground_truth": "", "style": "rule"}}, "reward_model.ground_truth", "''"),
        ({"reward_model": {"ground_truth": [], "style": "rule"}}, "reward_model.ground_truth", "[]"),
        ({"reward_model": {"ground_truth": float("nan")}}, "reward_model.ground_truth", "nan"),
        ({"reward_model": {"ground_truth": b"2"}}, "reward_model.ground_truth", "b'2'"),
        ({"reward_model": {"ground_truth": {"a": "1", "b": "2"}}}, "reward_model.ground_truth", "{'a': '1', 'b': '2'}"),
        ({"reward_model": {"ground_truth": "2", "style": 1}}, "reward_model.style", "1"),
        ({"reward_model": {"ground_truth": "2", "style": "vibes"}}, "reward_model.style", "'vibes'"),
        ({"prompt": ONE_MARK}, "images", "0"),
        ({"images": [PNG]}, "images", "1"),
        ({"images": [None, PNG]}, "images[0]", "null"),
        ({"images": [PNG, b"no image"]}, "images[1]", "8 bytes: cannot identify image file"),
        ({"prompt": ONE_MARK, "images": [encoded(90, 90, "JPEG")[:-200]]}, "images[0]", "image file is truncated"),
        ({"prompt": ONE_MARK, "images": [encoded(90, 90, "WEBP")[:-200]]}, "images[0]", "bytes: "),
        ({"prompt": ONE_MARK, "images": [encoded(90, 90)[:-200]]}, "images[0]", "bytes: "),
        ({"prompt": ONE_MARK, "images": [PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:]]}, "images[0]", "bytes: "),
        ({"images": [encoded(201, 1)]}, "images[0]", "201x1"),
        ({"images": ["absent.png"]}, "images[0]", "No such file"),
        ({"images": [3]}, "images[0]", "1 bytes: cannot identify image file"),
        ({"images": [[3, 300]]}, "images[0]", "300 at place 1"),
        ({"images": [{"bytes": [-1, 3]}]}, "images[0]", "-1 at place 0"),
        ({"images": [{"bytes": None, "path": None}]}, "images[0]", "{'bytes': None, 'path': None}"),
    ],
)
def test_a_bad_row_says_where_and_what_in_one_line(tmp_path: Path, change: dict[str, object], column: str, got: str):
    (bad_row,) = read_rows(tmp_path, change)
    assert isinstance(bad_row, BadRow), bad_row
    assert (bad_row.file, bad_row.row, bad_row.column) == (str(tmp_path / "set.parquet"), 0, column)
    assert got in bad_row.got
    assert "\n" not in str(bad_row)


@pytest.mark.parametrize(
    ("change", "column", "got"),
    [
        ({"data_source": None}, "data_source", "null"),
        ({"prompt": None}, "prompt", "null"),
        ({"prompt": []}, "prompt", "[]"),
        ({"reward_model": None}, "reward_model.ground_truth", "null"),
    ],
)
def test_a_null_or_empty_value_beside_a_good_row_is_a_bad_row(tmp_path: Path, change: dict[str, object], column: str, got: str):
    good, bad_row = read_rows(tmp_path, {}, change)
    assert isinstance(good, Prompt)
    assert isinstance(bad_row, BadRow)
    assert (bad_row.row, bad_row.column, bad_row.got) == (1, column, got)


def test_the_row_of_a_bad_row_counts_from_the_start_of_its_own_file(tmp_path: Path):
    for name, styles in (("a", ["math"] * 3), ("b", ["math", "rule", "music"])):
        table = pa.Table.from_pylist([PLAIN | {"reward_model": {"ground_truth": "2", "style": style}} for style in styles])
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    files = PromptFiles([tmp_path])
    with pytest.raises(BadRowError) as caught:
        files.read(5)
    assert caught.value.bad_row == BadRow(
        str(tmp_path / "b.parquet"), 2, "reward_model.style", "rule, choice, math, llm", "'music'"
    )
    assert files.read(4).uid == "b:1"


def test_a_style_that_nobody_knows_is_no_fault_where_one_judge_takes_every_row(tmp_path: Path):
    rows = [PLAIN | {"reward_model": {"ground_truth": "2", "style": style}} for style in ("vibes", "math")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    files = PromptFiles([tmp_path / "set.parquet"], any_style=True)
    assert [files.read(row).judge_style for row in (0, 1)] == ["vibes", "math"]
    assert [row.prompt().judge_style for row in files.raw_rows(files.row_groups[0])] == ["vibes", "math"]
    pq.write_table(
        pa.Table.from_pylist([PLAIN | {"reward_model": {"ground_truth": "2", "style": 1}}]), tmp_path / "set.parquet"
    )
    with pytest.raises(BadRowError, match=r"reward_model\.style"):  # no style at all
        PromptFiles([tmp_path / "set.parquet"], any_style=True).read(0)


def test_text_that_is_not_utf8_is_a_bad_row(tmp_path: Path):
    table = pa.Table.from_pylist([PLAIN])
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(table.set_column(0, "data_source", broken), tmp_path / "set.parquet")
    with pytest.raises(BadRowError, match="column data_source") as caught:
        PromptFiles([tmp_path / "set.parquet"]).read(0)
    assert caught.value.bad_row.got.startswith("'utf-8' codec can't decode")  # as ever: digests are made of it


def test_a_long_value_is_cut_in_the_message(tmp_path: Path):
    (bad_row,) = read_rows(tmp_path, {"prompt": "words " * 1000})
    assert len(str(bad_row).replace(str(tmp_path), "")) < 250


def test_a_bad_row_error_survives_the_way_between_processes():
    error = BadRowError(BadRow("set.parquet", 3, "ability", "math", "'music'"))
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, BadRowError)
    assert (copy.bad_row, str(copy)) == (error.bad_row, str(error))


TEXT = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("="),
        TEXT.replace("+", "-").replace("/", "_"),
        base64.encodebytes(PNG).decode(),
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;name=a.png;BASE64,{quote(TEXT)}",
        f"data:image/png,{quote(PNG)}",
    ],
    ids=["plain", "unpadded", "url-safe", "lines", "data-url", "data-url-escaped", "data-url-percent"],
)
@pytest.mark.parametrize(
    "shape",
    [lambda t: [t], lambda t: [{"path": t}], lambda t: [{"bytes": t}], lambda t: [t.encode()], lambda t: t],
    ids=range(5),
)
def test_an_image_that_is_written_as_text_is_read(tmp_path: Path, text: str, shape: Callable[[str], object]):
    assert read_good(tmp_path, prompt=ONE_MARK, images=shape(text)).images == (ImageBlob.of(PNG),)


def test_jpeg_as_base64_begins_like_a_path(tmp_path: Path):
    jpeg = encoded(kind="JPEG")
    assert base64.b64encode(jpeg).startswith(b"/9j/")
    assert read_good(tmp_path, prompt=ONE_MARK, images=[base64.b64encode(jpeg).decode()]).images == (ImageBlob.of(jpeg),)


def test_a_file_whose_name_could_be_base64_is_a_file_and_plain_text_pixels_are_pixels(tmp_path: Path):
    (tmp_path / ("0" * 64)).write_bytes(PNG)
    assert read_good(tmp_path, prompt=ONE_MARK, images=["0" * 64]).images == (ImageBlob.of(PNG),)
    pixels = b"P3\n8 8\n255\n" + b"7 8 9 " * 64
    assert read_good(tmp_path, prompt=ONE_MARK, images=[pixels]).images == (ImageBlob.of(pixels),)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("file:///data/a.png", "not a URL"),
        ("https://example.org/a.png", "not a URL"),
        ("s3://bucket/a.png", "not a URL"),
        ("data:image/png;base64", "expected a data URL like"),
        ("data:image/png;base64,@@@@", "expected an image as base64"),
        ("A" * 545_000, "expected an image that Pillow can decode"),
        ("A" * 545_001, "expected an image as base64"),
        ("no such.png" * 50_000, "File name too long"),
        ("nul\0.png", "null"),
    ],
)
def test_what_is_no_image_is_told_in_a_short_line(tmp_path: Path, image: str, said: str):
    (bad_row,) = read_rows(tmp_path, {"prompt": ONE_MARK, "images": [image]})
    assert isinstance(bad_row, BadRow)
    assert said in str(bad_row) and bad_row.column == "images[0]" and len(str(bad_row)) < 700 and "\n" not in str(bad_row)


def parts(*texts: str | None) -> list[dict[str, object]]:
    """Content in parts; None stands for an image."""
    return [{"type": "image", "text": None} if text is None else {"type": "text", "text": text} for text in texts]


@given(
    st.lists(st.one_of(st.none(), st.sampled_from(["<image>", "a", "", "x <image> y", "<ima", "ge>"])), min_size=1, max_size=8)
)
def test_only_image_parts_stand_for_images(tmp_path_factory: pytest.TempPathFactory, texts: list[str | None]):
    num = sum(text is None for text in texts)
    folder = tmp_path_factory.mktemp("parts")
    prompt = read_good(folder, prompt=json.dumps([{"role": "user", "content": parts(*texts)}]), images=[{"bytes": PNG}] * num)
    runs = "\0".join("\1" if text is None else text for text in texts).replace("\0", "").split("\1")
    assert prompt.messages[0].around_images == tuple(runs) and len(prompt.images) == num
    (bad_row,) = read_rows(
        folder, {"prompt": json.dumps([{"role": "user", "content": parts(*texts)}]), "images": [{"bytes": PNG}] * (num + 1)}
    )
    assert isinstance(bad_row, BadRow) and bad_row.got == str(num + 1)


def test_a_text_part_that_names_the_mark_cannot_be_written_as_plain_content(tmp_path: Path):
    prompt = read_good(
        tmp_path, prompt=json.dumps([{"role": "user", "content": parts("<image> is a tag", None)}]), images=[PNG]
    )
    assert prompt.question == "one and one"
    with pytest.raises(DataError, match="reads as an image"):
        write_prompts(tmp_path / "again.parquet", [prompt])


def typed(folder: Path, name: str, column: pa.Array) -> PromptFiles:
    """PLAIN with a column of another type."""
    table = pa.Table.from_pylist([PLAIN] * len(column))
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, column), folder / "set.parquet")
    return PromptFiles([folder / "set.parquet"])


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_short_floats_are_what_their_writer_meant(tmp_path: Path, kind: pa.DataType):
    values = [0.1, 33.3, 0.7, 2.0]
    truths = pa.array([{"ground_truth": [value], "style": "rule"} for value in values])
    truths = truths.cast(pa.struct([("ground_truth", pa.list_(kind)), ("style", pa.string())]))
    files = typed(tmp_path, "reward_model", truths)
    assert [files.read(i).answers for i in range(4)] == [("0.1",), ("33.3",), ("0.7",), ("2",)]
    extra = pa.array([{"x": 0.1}]).cast(pa.struct([("x", kind)]))
    assert typed(tmp_path, "extra_info", extra).read(0).extra == {"x": 0.1}


def test_extra_info_that_python_cannot_hold_is_left_out(tmp_path: Path):
    when = pa.array([1, 2**62], pa.timestamp("ns"))
    files = typed(tmp_path, "extra_info", pa.StructArray.from_arrays([when, pa.array(["a", "b"])], ["when", "kind"]))
    assert [files.read(i).extra for i in range(2)] == [{"kind": "a"}, {"kind": "b"}]


def test_half_a_character_in_json_is_a_bad_row(tmp_path: Path):
    (bad_row,) = read_rows(tmp_path, {"prompt": '[{"role": "user", "content": "cut \\ud83d"}]'})
    assert isinstance(bad_row, BadRow) and bad_row.expected == "text in UTF-8"


def test_a_style_that_is_not_utf8_stops_no_one_from_reading_the_others(tmp_path: Path):
    buffers = [None, pa.array([0, 2, 6], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfemath")]
    styles = pa.Array.from_buffers(pa.string(), 2, buffers)
    truths = pa.StructArray.from_arrays([pa.array(["1", "2"]), styles], ["ground_truth", "style"])
    files = typed(tmp_path, "reward_model", truths)
    assert files.styles() == {"math"}
    with pytest.raises(BadRowError):
        files.read(0)


def test_a_column_that_is_there_twice_is_told(tmp_path: Path):
    table = pa.Table.from_pylist([PLAIN])
    pq.write_table(table.append_column("prompt", table["prompt"]), tmp_path / "set.parquet")
    with pytest.raises(DataError, match="expected one column 'prompt', got several"):
        PromptFiles([tmp_path / "set.parquet"])


def test_a_name_that_is_not_utf8_is_told(tmp_path: Path):
    pq.write_table(pa.Table.from_pylist([PLAIN]), tmp_path / "set.parquet")
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.parquet"))
    (tmp_path / "set.parquet").rename(name)
    with pytest.raises(DataError, match="not a Parquet file that can be read"):
        PromptFiles([name])


def test_pages_whose_checksum_is_wrong_are_not_read(tmp_path: Path):
    pq.write_table(pa.Table.from_pylist([PLAIN]), tmp_path / "set.parquet", write_page_checksum=True, compression="none")
    data = (tmp_path / "set.parquet").read_bytes()
    at = data.index(b"1 + 1?")
    (tmp_path / "set.parquet").write_bytes(data[:at] + b"1 - 1?" + data[at + 6 :])
    with pytest.raises(DataError, match="CRC"):
        PromptFiles([tmp_path / "set.parquet"]).read(0)
