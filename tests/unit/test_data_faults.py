"""Files and rows that once were misread in silence, or ended in a traceback: splits, lost parts, half characters, deep JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from coldstart import png, say, table

from metis_fast.data.coldstart import BadConversationError, ConversationFiles, holds_conversations
from metis_fast.data.cursor import RowCursor
from metis_fast.data.parquet import Layout, PromptFiles
from metis_fast.data.paths import expand
from metis_fast.data.row import BadRow, BadRowError
from metis_fast.doctor.finding import Check, Finding
from metis_fast.errors import DataError, InfrastructureError

PROMPT = json.dumps([{"role": "user", "content": "1 + 1?"}])


def write(path: Path, truths: list[str | None], extra: pa.Array | None = None) -> PromptFiles:
    """Rows with such a `reward_model`, as JSON text."""
    columns = {"data_source": ["unit"] * len(truths), "prompt": [PROMPT] * len(truths), "reward_model": truths}
    made = pa.table(columns)
    pq.write_table(made if extra is None else made.append_column("extra_info", extra), path)
    return PromptFiles([path])


def bad_row(files: PromptFiles) -> BadRow:
    with pytest.raises(BadRowError) as caught:
        files.read(0)
    return caught.value.bad_row


def touch(folder: Path, *stems: str) -> None:
    for stem in stems:
        (folder / f"{stem}.parquet").touch()


# Folders


@pytest.mark.parametrize(
    ("stems", "said"),
    [
        (["test", "train"], r"got 2 \(test, train\); name the files, for example .*/train\.parquet$"),
        (["Train", "validation"], r"got 2 \(train, validation\)"),
        (["gsm8k_test", "gsm8k_train"], r"got 2 \(test, train\).*/gsm8k_train\.parquet$"),
        (["test", "train-00000-of-00002", "train-00001-of-00002"], r"got 2 \(test, train\).*/train-\*\.parquet$"),
        (["dev", "train_0", "train_1"], r"got 2 \(dev, train\)"),
    ],
)
def test_a_folder_of_several_splits_is_refused_with_what_to_write(tmp_path: Path, stems: list[str], said: str) -> None:
    touch(tmp_path, *stems)
    with pytest.raises(DataError, match=said):
        expand([tmp_path])


@pytest.mark.parametrize(
    "stems", [["a", "train"], ["train_0", "train_1"], ["contest", "latest", "train"], ["a-train", "b-train"]]
)
def test_a_folder_of_one_split_is_read_whole(tmp_path: Path, stems: list[str]) -> None:
    touch(tmp_path, *stems)
    assert [path.stem for path in expand([tmp_path])] == stems


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "train-00000-of-00003", "train-00002-of-00003")
    for path in (tmp_path, tmp_path / "train-*.parquet"):
        with pytest.raises(DataError, match=r"all 3 parts of train, got none called train-00001-of-00003\.parquet; get"):
            expand([path])
    assert len(expand([tmp_path / "train-*2-of-00003.parquet"])) == 1  # all that such a name asks for
    assert len(expand(sorted(tmp_path.glob("*")))) == 2


def test_conversations_of_several_splits_are_refused_as_such(tmp_path: Path) -> None:
    for stem in ("train", "test"):
        pq.write_table(table([([say("user", "a"), say("assistant", "b")], [])]), tmp_path / f"{stem}.parquet")
    assert holds_conversations(tmp_path)
    with pytest.raises(DataError, match="expected files of one split"):
        ConversationFiles(tmp_path)


# Rows


def test_rows_that_name_no_style_ask_for_the_rule_judge(tmp_path: Path) -> None:
    files = write(tmp_path / "a.parquet", ['{"ground_truth": 1, "style": "math"}', '{"ground_truth": 1, "style": ""}', None])
    assert files.styles() == {"math", "rule"}
    assert write(tmp_path / "b.parquet", ['{"ground_truth": 1}']).styles() == {"rule"}
    assert write(tmp_path / "c.parquet", ['{"ground_truth": 1, "style": null}']).styles() == {"rule"}


def test_half_a_character_is_a_bad_row_wherever_it_stands(tmp_path: Path) -> None:
    found = bad_row(write(tmp_path / "a.parquet", ['{"ground_truth": ["2", "\\ud800"]}']))
    assert (found.column, found.expected) == ("reward_model.ground_truth", "text in UTF-8")
    for extra in ('{"question": "\\ud800"}', '{"a": {"b": "\\udfff"}}', '{"\\ud800": 1}'):
        found = bad_row(write(tmp_path / "a.parquet", ['{"ground_truth": 1}'], pa.array([extra])))
        assert found.column.startswith("extra_info") and found.expected == "text in UTF-8"
        str(found).encode()


def test_a_damaged_page_of_the_styles_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    files = write(path, [json.dumps({"ground_truth": str(i)}) for i in range(50)])
    group = pq.read_metadata(path).row_group(0)
    (chunk,) = (group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "reward_model")
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[begin : begin + 60] = bytes(60)
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot read column reward_model"):
        files.styles()


@pytest.mark.parametrize("kind", [pa.json_(pa.string()), pa.string()], ids=str)
def test_json_of_very_many_levels_is_a_bad_row_and_has_a_digest(tmp_path: Path, kind: pa.DataType) -> None:
    deep, flat = ('{"a":' * levels + "1" + "}" * levels for levels in (900, 90))
    texts = pa.array([deep, flat])
    extra = pa.ExtensionArray.from_storage(kind, texts) if isinstance(kind, pa.BaseExtensionType) else texts
    files = write(tmp_path / "a.parquet", ['{"ground_truth": 1}'] * 2, extra)
    assert bad_row(files).column == "extra_info"
    assert files.read(1).extra == {".".join("a" * 90): 1}
    assert files.record().num_rows == 2


# Conversations


VIEWS = (
    pa.list_view(pa.list_(pa.int32())),
    pa.large_list_view(pa.large_list_view(pa.int32())),
    pa.list_view(pa.binary()),
    pa.list_view(pa.struct([("bytes", pa.list_view(pa.int64()))])),
)


@pytest.mark.parametrize("kind", VIEWS, ids=str)
def test_images_in_views_of_lists_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    data = png(0)
    one = data if kind.value_type == pa.binary() else list(data)
    one = {"bytes": one} if pa.types.is_struct(kind.value_type) else one
    rows = [[one], None, [one, one], [], [one]]
    messages = [json.dumps([say("user", "<image>" * len(some or [])), say("assistant", "a")]) for some in rows]
    pq.write_table(pa.table({"messages": messages, "images": pa.array(rows, kind)}), tmp_path / "a.parquet")
    files = ConversationFiles(tmp_path / "a.parquet")
    assert [[image.data for image in files.read(i).images] for i in range(5)] == [[data] * len(some or []) for some in rows]


def test_a_huge_integer_beside_a_null_is_a_bad_row_alone(tmp_path: Path) -> None:
    data = png(0)
    lists = [[list(data)], [[2**63 + 5, *data]], [[None, *data]], [list(data)]]
    messages = [json.dumps([say("user", "<image>"), say("assistant", "a")])] * 4
    images = pa.array(lists, pa.list_(pa.list_(pa.uint64())))
    pq.write_table(pa.table({"messages": messages, "images": images}), tmp_path / "a.parquet")
    files = ConversationFiles(tmp_path / "a.parquet")
    assert [files.read(i).images[0].data for i in (0, 3)] == [data, data]
    for row in (1, 2):
        with pytest.raises(BadConversationError, match="integers from 0 to 255"):
            files.read(row)


def test_what_to_do_where_no_row_is_usable_is_up_to_who_reads_them() -> None:
    error = BadRowError(BadRow("a", 0, "images", "one", "none"))
    cursor = RowCursor(Layout(((3, 1),), 1), 0, lambda rows: [error for _ in rows], True, "skip", "look at them")
    with pytest.raises(DataError, match="no usable row among 3; look at them"):
        cursor.next(1)


# What a check of the machine makes of a failure


def test_a_tool_that_fails_is_a_finding_with_advice() -> None:
    def run() -> Iterator[Finding]:
        yield Finding("python", "ok", "opens")
        raise InfrastructureError("the Python server\ndied")

    found = list(Check("tools", run, "python").findings())
    assert [(one.what, one.state, one.found) for one in found[1:]] == [("python", "error", "the Python server died")]
    assert found[1].advice
