"""Files: what is written comes back, every Arrow type of the schema is read, and a wrong file is told in one line."""

import dataclasses
import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metis_fast.data.parquet import PromptFiles
from metis_fast.data.writing import write_prompts
from metis_fast.errors import DataError
from metis_fast.types import ImageBlob, Message, Prompt


def encoded(width: int = 6, height: int = 4, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 7)).save(out, kind)
    return out.getvalue()


def some_prompt(row: int, stem: str = "set", **extra) -> Prompt:
    return Prompt(
        uid=f"{stem}:{row}",
        data_source="unit",
        messages=(Message("user", f"<image> what is {row} + {row}?"),),
        images=(ImageBlob.of(encoded(row + 1)),),
        ability="math",
        answers=(str(2 * row),),
        judge_style="math",
        question=f"{row} + {row}?",
        extra=extra,
    )


BLOBS = [ImageBlob.of(encoded(3, 5, kind)) for kind in ("PNG", "JPEG", "WEBP")]
TEXT = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda text: "<image>" not in text)
VISIBLE = TEXT.filter(str.strip)
EXTRA = st.fixed_dictionaries(
    {},
    optional={
        "kind": TEXT,
        "level": st.integers(-(2**63), 2**63 - 1),
        "share": st.floats(allow_nan=False, allow_infinity=False),
        "hard": st.booleans(),
        "source.page": st.integers(0, 9),
    },
)


@st.composite
def prompts_of_a_file(draw: st.DrawFn) -> list[Prompt]:
    prompts = []
    for row in range(draw(st.integers(1, 7))):
        images = draw(st.lists(st.sampled_from(BLOBS), max_size=3))
        user = draw(TEXT) + "".join("<image>" + draw(TEXT) for _ in images)
        system = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
        prompts.append(
            Prompt(
                uid=f"set:{row}",
                data_source=draw(TEXT),
                messages=(*system, Message("user", user)),
                images=tuple(images),
                ability=draw(st.sampled_from(("math", "perception", "search"))),
                answers=tuple(draw(st.lists(VISIBLE, min_size=1, max_size=3))),
                judge_style=draw(st.sampled_from(["rule", "math", "llm"])),
                question=draw(VISIBLE),
                extra=draw(EXTRA),
            )
        )
    return prompts


@given(prompts=prompts_of_a_file(), row_group_size=st.integers(1, 4))
@settings(max_examples=60)
def test_written_prompts_are_read_back_equal(tmp_path_factory, prompts: list[Prompt], row_group_size: int):
    path = tmp_path_factory.mktemp("trip") / "set.parquet"
    assert write_prompts(path, prompts, row_group_size) == len(prompts)
    files = PromptFiles([path])
    assert [files.read(index) for index in range(len(files))] == prompts


def test_late_extra_keys_widen_the_file_and_keep_the_rows_before(tmp_path: Path):
    prompts = [some_prompt(0, n=1), some_prompt(1, n=2), some_prompt(2, n=0.5, kind="new"), some_prompt(3, hard=True)]
    write_prompts(tmp_path / "set.parquet", prompts, row_group_size=2)
    files = PromptFiles([tmp_path / "set.parquet"])
    assert [files.read(index) for index in range(4)] == prompts
    assert [group.num_rows for group in files.row_groups] == [2, 2]


def test_the_writer_takes_one_row_group_of_prompts_at_a_time(tmp_path: Path):
    taken: list[int] = []

    def source():
        for row in range(6):
            taken.append(row)
            yield some_prompt(row)
            if row == 2:  # the third is asked for only after the first group of two has gone to the file
                assert next(tmp_path.iterdir()).stat().st_size > len(encoded(1)) + len(encoded(2))

    assert write_prompts(tmp_path / "set.parquet", source(), row_group_size=2) == len(taken) == 6


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "set.parquet"
    write_prompts(path, [some_prompt(0)])
    before = path.read_bytes()

    def source():
        yield some_prompt(0)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_prompts(path, source(), row_group_size=1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([some_prompt(0, level=1), some_prompt(1, level="high")], "mixed types"),
        ([some_prompt(0, question="twice")], "rename it"),
    ],
)
@pytest.mark.parametrize("row_group_size", [1, 9])
def test_what_cannot_be_written_is_a_data_error(tmp_path: Path, prompts: list[Prompt], message: str, row_group_size: int):
    with pytest.raises(DataError, match=message):
        write_prompts(tmp_path / "set.parquet", prompts, row_group_size)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_data_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write_prompts(tmp_path / "file" / "set.parquet", [some_prompt(0)])


def test_rows_read_in_any_order_are_the_same_with_one_row_group_in_memory(tmp_path: Path):
    prompts = [some_prompt(row) for row in range(11)]
    write_prompts(tmp_path / "set.parquet", prompts, row_group_size=3)
    files = PromptFiles([tmp_path / "set.parquet"], cache_bytes=0)
    order = random.Random(0).choices(range(11), k=60)
    assert [files.read(index) for index in order] == [prompts[index] for index in order]
    assert files.location(7) == (tmp_path / "set.parquet", 7)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_row_outside_the_files_is_an_index_error(tmp_path: Path, index: int):
    write_prompts(tmp_path / "set.parquet", [some_prompt(0), some_prompt(1)])
    with pytest.raises(IndexError):
        PromptFiles([tmp_path / "set.parquet"]).read(index)


def test_a_folder_stands_for_its_parquet_files_by_name(tmp_path: Path):
    for stem in ("b", "a"):
        write_prompts(tmp_path / f"{stem}.parquet", [some_prompt(row, stem) for row in range(2)])
    (tmp_path / "notes.txt").write_text("not data")
    files = PromptFiles([tmp_path])
    assert [files.read(index).uid for index in range(4)] == ["a:0", "a:1", "b:0", "b:1"]


def test_equal_file_names_get_as_many_folders_as_tell_them_apart(tmp_path: Path):
    names = ["x/one/train", "y/one/train", "y/two/train", "y/two/test"]
    for name in names:
        write_prompts(tmp_path / f"{name}.parquet", [some_prompt(0)])
    files = PromptFiles([tmp_path / f"{name}.parquet" for name in names])
    assert [files.read(index).uid for index in range(4)] == ["x/one/train:0", "y/one/train:0", "two/train:0", "test:0"]


def test_files_that_differ_only_in_their_ending_keep_it_in_the_uid(tmp_path: Path):
    for name in ("set.parquet", "set.pq"):
        write_prompts(tmp_path / name, [some_prompt(0)])
    files = PromptFiles([tmp_path / "set.parquet", tmp_path / "set.pq"])
    assert [files.read(index).uid for index in range(2)] == ["set.parquet:0", "set.pq:0"]


PLAIN = {
    "data_source": "unit",
    "prompt": [{"role": "user", "content": "see <image>"}],
    "images": [{"bytes": encoded(), "path": None}],
    "ability": "search",
    "reward_model": {"ground_truth": ["yes"], "style": "rule"},
    "extra_info": {"question": "see what?", "split": "train"},
}
EXPECTED = Prompt(
    uid="set:0",
    data_source="unit",
    messages=(Message("user", "see <image>"),),
    images=(ImageBlob.of(encoded()),),
    ability="search",
    answers=("yes",),
    judge_style="rule",
    question="see what?",
    extra={"split": "train"},
)
WORD, LARGE_WORD, CODED_WORD = pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())


@pytest.mark.parametrize("text", [WORD, LARGE_WORD, CODED_WORD], ids=str)
@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()], ids=str)
@pytest.mark.parametrize("list_of", [pa.list_, pa.large_list, lambda item: pa.list_(item, 1)], ids=["list", "large", "fixed"])
def test_every_arrow_type_of_text_bytes_and_lists_gives_the_same_prompt(tmp_path: Path, text, binary, list_of):
    inner = LARGE_WORD if text == LARGE_WORD else WORD  # Parquet readers give dictionaries at the top level only
    schema = pa.schema(
        {
            "extra_info": pa.struct({"question": inner, "split": inner}),
            "unknown": pa.int32(),
            "reward_model": pa.struct({"style": inner, "rank": pa.int8(), "ground_truth": list_of(inner)}),
            "ability": text,
            "images": list_of(pa.struct({"bytes": binary, "path": inner})),
            "prompt": list_of(pa.struct({"content": inner, "role": inner})),
            "data_source": text,
        }
    )
    pq.write_table(pa.Table.from_pylist([PLAIN], schema=schema), tmp_path / "set.parquet")
    assert PromptFiles([tmp_path / "set.parquet"]).read(0) == EXPECTED


def write_plain(path: Path, **changes) -> Path:
    row = {key: value for key, value in (PLAIN | changes).items() if value is not ...}
    pq.write_table(pa.Table.from_pylist([row]), path)
    return path


def test_images_and_extra_info_may_be_missing(tmp_path: Path):
    path = write_plain(tmp_path / "set.parquet", images=..., extra_info=..., prompt=[{"role": "user", "content": " say yes"}])
    expected = dataclasses.replace(EXPECTED, messages=(Message("user", " say yes"),), images=(), question="say yes", extra={})
    assert PromptFiles([path]).read(0) == expected


@pytest.mark.parametrize("column", ["data_source", "prompt", "reward_model"])
def test_a_missing_required_column_is_named_at_once(tmp_path: Path, column: str):
    path = write_plain(tmp_path / "set.parquet", **{column: ...})
    with pytest.raises(DataError, match=f"expected a column '{column}'"):
        PromptFiles([path])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("data_source", 3),
        ("prompt", ["just words"]),
        ("prompt", [{"role": "user"}]),
        ("images", [0.5]),
        ("images", [{"url": "x"}]),
        ("ability", ["math"]),
        ("reward_model", {"style": "rule"}),
        ("reward_model", 1),
        ("extra_info", ["question"]),
    ],
)
def test_a_column_of_a_wrong_type_is_named_at_once(tmp_path: Path, column: str, value: object):
    path = write_plain(tmp_path / "set.parquet", **{column: value})
    with pytest.raises(DataError, match=f"expected column '{column}' to be") as caught:
        PromptFiles([path])
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used_are_told_in_one_line(tmp_path: Path):
    (tmp_path / "words.parquet").write_text("these are words\n" * 9)
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.Table.from_pylist([PLAIN]).slice(0, 0), tmp_path / "rowless.parquet")
    good = write_plain(tmp_path / "set.parquet")
    for paths, message in (
        ([], "no data files"),
        ([tmp_path / "absent.parquet"], "no such file"),
        ([tmp_path / "words.parquet"], "not a Parquet file"),
        ([tmp_path / "empty"], "found none"),
        ([tmp_path / "rowless.parquet"], "no rows"),
        ([good, good], "given 2 times"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            PromptFiles(paths)
        assert "\n" not in str(caught.value)


def test_a_damaged_or_replaced_row_group_is_a_data_error(tmp_path: Path):
    path = tmp_path / "set.parquet"
    write_prompts(path, [some_prompt(row) for row in range(20)])
    files, data = PromptFiles([path]), bytearray(path.read_bytes())
    write_prompts(path, [some_prompt(0)])
    with pytest.raises(DataError, match="changed while in use"):
        files.read(0)
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot read row group 0"):
        files.read(0)
