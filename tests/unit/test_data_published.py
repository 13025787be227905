"""Data sets as they are published: what Metis-RL, the hub, `datasets` and verl make of the schema is read, and the same rows
are known as the same however they are stored; what is not read says what to do."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from metis_fast.cli import main
from metis_fast.config import load
from metis_fast.data.check import check_files
from metis_fast.data.columns import Columns
from metis_fast.data.parquet import PromptFiles
from metis_fast.data.report import render_text
from metis_fast.data.row import BadRowError
from metis_fast.errors import DataError
from metis_fast.standin import StandinPaths, write_standin
from metis_fast.types import ImageBlob, Prompt

INTEGERS = [pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()]


def encoded(size: tuple[int, int] = (9, 7), mode: str = "RGBA") -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(out, "PNG")
    return out.getvalue()


A, B = encoded(), encoded((30, 20), "P")
ROW = {
    "data_source": "vthinker-sft",
    "prompt": [
        {"content": "Reply in <answer>.", "role": "system"},
        {"content": "<image>\nWhat share is shaded?", "role": "user"},
    ],
    "images": [{"bytes": A}],
    "ability": "math",
    "reward_model": {"ground_truth": "3/8", "style": "rule"},
    "extra_info": {"answer": "3/8", "index": "source_index_7", "pass8": 0, "question": "<image>\nWhat share is shaded?"},
}


def one_row(path: Path, types: dict[str, pa.DataType] | None = None, **change: object) -> Path:
    """A file of ROW with other values and types of columns; `...` leaves a column out."""
    row = {name: value for name, value in (ROW | change).items() if value is not ...}
    columns = {name: array_of([value], (types or {}).get(name)) for name, value in row.items()}
    pq.write_table(pa.table(columns), path)
    return path


def array_of(values: list[object], kind: pa.DataType | None) -> pa.Array:
    """Arrow makes arrays of extension types from their storage only."""
    return pa.array(values, kind) if kind is not None else pa.array(values)


def json_array(values: list[object]) -> pa.ExtensionArray:
    """As `datasets` writes what is of different types from row to row."""
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(value) for value in values]))


def read(path: Path, row: int = 0) -> Prompt:
    return PromptFiles([path]).read(row)


def plain_prompt(tmp_path: Path) -> Prompt:
    return read(one_row(tmp_path / "set.parquet"))


def test_a_published_row_keeps_all_that_it_says(tmp_path: Path):
    prompt = plain_prompt(tmp_path)
    assert (prompt.data_source, prompt.ability, prompt.judge_style) == ("vthinker-sft", "math", "rule")
    assert prompt.answers == ("3/8",)
    assert prompt.question == "What share is shaded?"
    assert prompt.extra == {"answer": "3/8", "index": "source_index_7", "pass8": 0}
    assert prompt.images == (ImageBlob.of(A),)


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
@pytest.mark.parametrize(
    "listed",
    [pa.list_, pa.large_list, pa.list_view, lambda kind: pa.list_(kind, len(A))],
    ids=["list", "large", "view", "fixed"],
)
def test_bytes_as_integers_of_any_width_are_bytes(tmp_path: Path, kind: pa.DataType, listed):
    types = {"images": pa.list_(pa.struct([("bytes", listed(kind)), ("path", pa.string())]))}
    images = [{"bytes": list(A), "path": None}]
    integers = PromptFiles([one_row(tmp_path / "set.parquet", types, images=images)])
    (tmp_path / "binary").mkdir()
    binary = PromptFiles([one_row(tmp_path / "binary" / "set.parquet")])
    assert integers.read(0) == binary.read(0)
    assert integers.record().rows == binary.record().rows


def test_bytes_of_java_have_a_sign(tmp_path: Path):
    signed = np.frombuffer(A, np.int8).tolist()
    types = {"images": pa.list_(pa.struct([("bytes", pa.list_(pa.int8()))]))}
    assert read(one_row(tmp_path / "set.parquet", types, images=[{"bytes": signed}])).images[0].data == A


@pytest.mark.parametrize(
    "images",
    [
        [list(A)],
        list(A),
        {"bytes": list(A)},
        {"bytes": [list(A)], "path": [None]},
        {"bytes": [A], "path": ["x.png"]},
        [{"bytes": list(A), "path": "x.png"}],
        json.dumps([{"bytes": list(A), "path": None}]),
        json.dumps({"bytes": base64.b64encode(A).decode()}),
    ],
    ids=["lists", "one list", "one struct", "struct of lists", "struct of binary", "with a path", "JSON", "JSON of one"],
)
def test_integers_and_structs_of_lists_stand_wherever_an_image_may(tmp_path: Path, images: object):
    files = PromptFiles([one_row(tmp_path / "set.parquet", images=images)])
    assert files.read(0) == plain_prompt(tmp_path)


IMAGES = st.lists(st.one_of(st.none(), st.binary(max_size=9)), max_size=3)


@given(rows=st.lists(st.one_of(st.none(), IMAGES), min_size=1, max_size=9), data=st.data())
def test_integers_become_the_bytes_that_they_were(rows: list[list[bytes | None] | None], data: st.DataObject):
    """Nulls, empty lists and empty images at any place, in a table that begins anywhere."""
    as_integers = [None if some is None else [None if one is None else {"bytes": [*one]} for one in some] for some in rows]
    start = data.draw(st.integers(0, len(rows) - 1))
    array = pa.array(as_integers, pa.list_(pa.struct([("bytes", pa.list_(pa.int32()))])))
    batch = pa.RecordBatch.from_arrays([array.slice(start)], ["images"])
    made = Columns({"images": "images"}, integers=True).named(batch)
    made.validate(full=True)
    as_bytes = [None if some is None else [None if one is None else {"bytes": one} for one in some] for some in rows]
    assert made.column("images").to_pylist() == as_bytes[start:]
    assert made.schema.field("images").type == pa.list_(pa.struct([("bytes", pa.large_binary())]))


def test_an_integer_that_is_no_byte_costs_its_own_row_only(tmp_path: Path):
    rows = [ROW | {"images": [{"bytes": [*data]}]} for data in (A, B, A)]
    rows[1]["images"][0]["bytes"][3] = 256
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    files = PromptFiles([tmp_path / "set.parquet"])
    with pytest.raises(BadRowError, match=r"row 1, column images\[0\]: expected integers from 0 to 255.*256 at place 3"):
        files.read(1)
    assert [files.read(row).images[0].data for row in (0, 2)] == [A, A]
    assert files.record().rows[:8] == PromptFiles([one_row(tmp_path / "binary.parquet")]).record().rows


def test_an_integer_that_is_no_byte_costs_no_other_row_of_a_long_row_group(tmp_path: Path):
    """A row group is read in batches, which differ in their types then."""
    rows = [ROW | {"images": [{"bytes": [*A]}]} for _ in range(150)]
    rows[100]["images"] = [{"bytes": [256, *A]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    files = PromptFiles([tmp_path / "set.parquet"])
    with pytest.raises(BadRowError, match=r"row 100, column images\[0\]: expected integers from 0 to 255.*256 at place 0"):
        files.read(100)
    assert all(files.read(row).images[0].data == A for row in range(150) if row != 100)


def test_row_groups_of_integers_are_held_as_bytes(tmp_path: Path):
    """The cache is bounded by what it holds: twelve groups of 300 kB fit two at a time into 700 kB."""
    noise = encoded((400, 300), "RGB")
    rows = [ROW | {"images": [{"bytes": [*noise]}]}] * 12
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet", row_group_size=1)
    files = PromptFiles([tmp_path / "set.parquet"], cache_bytes=int(2.3 * len(noise)))
    assert all(len(noise) <= group.num_bytes < 1.1 * len(noise) for group in files.row_groups)
    for row in range(12):
        files.read(row)
        assert sum(decoded.nbytes for decoded in files._cache.values()) <= files.cache_bytes
    assert len(files._cache) == 2


def test_json_columns_of_datasets_are_read_as_what_they_say(tmp_path: Path):
    """`datasets` writes `arrow.json` by itself where rows differ in type: text with its quotes, a list as one text."""
    contents = json_array([ROW["prompt"][0]["content"], ROW["prompt"][1]["content"]])
    messages = pa.StructArray.from_arrays([contents, pa.array(["system", "user"])], ["content", "role"])
    truths = json_array([["3/8", "0.375"]])
    table = pa.table(
        {
            "data_source": ["vthinker-sft"],
            "prompt": pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), messages),
            "images": pa.array([ROW["images"]]),
            "ability": ["math"],
            "reward_model": pa.StructArray.from_arrays([truths, pa.array(["rule"])], ["ground_truth", "style"]),
            "extra_info": json_array([ROW["extra_info"]]),
        }
    )
    pq.write_table(table, tmp_path / "set.parquet")
    prompt = read(tmp_path / "set.parquet")
    assert prompt.messages == plain_prompt(tmp_path).messages
    assert prompt.answers == ("3/8", "0.375")
    assert prompt.extra["index"] == "source_index_7"


@pytest.mark.parametrize("column", ["prompt", "reward_model", "extra_info"])
def test_whole_columns_may_be_json(tmp_path: Path, column: str):
    expected = plain_prompt(tmp_path)
    change: dict[str, Any] = {column: json.dumps(ROW[column])}
    assert read(one_row(tmp_path / "set.parquet", **change)) == expected
    table = pa.table({name: json_array([value]) if name == column else pa.array([value]) for name, value in ROW.items()})
    pq.write_table(table, tmp_path / "set.parquet")
    assert read(tmp_path / "set.parquet") == expected


def test_an_extension_type_that_nobody_knows_is_refused_with_what_to_do(tmp_path: Path):
    field = pa.field("ability", pa.string(), metadata={"ARROW:extension:name": "someone.enum", "ARROW:extension:metadata": ""})
    table = pa.Table.from_pylist([ROW])
    at = table.schema.get_field_index("ability")
    pq.write_table(table.set_column(at, field, table["ability"]), tmp_path / "set.parquet")
    with pytest.raises(DataError, match=r"'ability'.*extension type 'someone.enum'.*write the column without it"):
        PromptFiles([tmp_path / "set.parquet"])


def test_a_struct_of_lists_is_a_list_of_messages(tmp_path: Path):
    lists = {name: [message[name] for message in ROW["prompt"]] for name in ("role", "content")}
    files = PromptFiles([one_row(tmp_path / "set.parquet", prompt=lists)])
    prompt, rows = files.read(0), files.record().rows
    assert prompt == plain_prompt(tmp_path)
    assert rows == PromptFiles([tmp_path / "set.parquet"]).record().rows  # now as `plain_prompt` wrote it


def test_maps_are_structs(tmp_path: Path):
    text = pa.map_(pa.string(), pa.string())
    types = {"reward_model": text, "extra_info": text, "prompt": pa.list_(text)}
    values = {"reward_model": list(ROW["reward_model"].items()), "extra_info": [("index", "7"), ("question", "why?")]}
    messages = [list(message.items()) for message in ROW["prompt"]]
    prompt = read(one_row(tmp_path / "set.parquet", types, **values, prompt=messages))
    assert (prompt.answers, prompt.judge_style, prompt.question, prompt.extra) == (("3/8",), "rule", "why?", {"index": "7"})
    assert prompt.messages == plain_prompt(tmp_path).messages


def test_a_column_named_image_holds_the_image(tmp_path: Path):
    files = PromptFiles([one_row(tmp_path / "set.parquet", images=..., image={"bytes": A, "path": None})])
    assert files.read(0) == plain_prompt(tmp_path)


@pytest.mark.parametrize("ability", ["Math ", "chart/ocr", "图表", None, ""])
def test_any_text_is_an_ability(tmp_path: Path, ability: str | None):
    expected = (ability or "").strip() or "none"
    assert read(one_row(tmp_path / "set.parquet", {"ability": pa.string()}, ability=ability)).ability == expected
    assert read(one_row(tmp_path / "set.parquet", ability=...)).ability == "none"


def test_styles_are_found_in_every_form_of_the_column(tmp_path: Path):
    for value in (ROW["reward_model"], json.dumps(ROW["reward_model"])):
        assert PromptFiles([one_row(tmp_path / "set.parquet", reward_model=value)]).styles() == {"rule"}


# Files that are not of the schema


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"question": "2 + 2?", "answer": "It is #### 4"}, "as GSM8K has them: make `prompt` of `question`"),
        ({"problem": "2 + 2?", "answer": "4"}, "make `prompt` of `problem`"),
        ({"messages": "[]", "images": [A]}, "`metis-fast sft`"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "these are conversations"),
        ({"text": "x"}, "docs/data.md shows how to make a file"),
    ],
)
def test_other_public_forms_are_refused_with_what_to_do(tmp_path: Path, row: dict[str, object], advice: str):
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "set.parquet")
    with pytest.raises(DataError, match="expected a column 'data_source'") as caught:
        PromptFiles([tmp_path / "set.parquet"])
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_verl_is_read(tmp_path: Path):
    """Its own script for GSM8K makes these columns."""
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "2 + 2? Let's think step by step and output the final answer after ####."}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 3, "answer": "It is #### 4", "question": "2 + 2?"},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "set.parquet")
    assert read(tmp_path / "set.parquet").extra == {"split": "train", "index": 3, "answer": "It is #### 4"}
    report = check_files([tmp_path / "set.parquet"], progress=False)
    assert report.never_asking == 1
    assert "warning: 1 rows (first set:0) never ask for <answer>" in render_text(report)


def test_a_pointer_of_git_lfs_says_what_it_is(tmp_path: Path):
    (tmp_path / "set.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match="git lfs pull"):
        PromptFiles([tmp_path / "set.parquet"])


# Folders


def test_a_folder_of_the_hub_has_its_files_one_level_down(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for number in (1, 0):
        one_row(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", data_source=str(number))
    assert [read(tmp_path, row).data_source for row in range(2)] == ["0", "1"]
    one_row(tmp_path / "data" / "test-00000-of-00001.parquet", data_source="held out")
    with pytest.raises(DataError, match=r"expected files of one split, got 2 \(test, train\); name the files.*data/train-\*"):
        PromptFiles([tmp_path])
    assert len(PromptFiles([tmp_path / "data" / "train-*.parquet"])) == 2
    with pytest.raises(DataError, match="expected Parquet files of such a name, found none"):
        PromptFiles([tmp_path / "data" / "dev-*.parquet"])


def test_a_folder_of_folders_names_them(tmp_path: Path):
    (tmp_path / "main").mkdir()
    one_row(tmp_path / "main" / "a.parquet")
    with pytest.raises(DataError, match=r"found none; give one of its folders \(main\)"):
        PromptFiles([tmp_path])


# The stand-ins, and what the check says of them


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> StandinPaths:
    return write_standin(tmp_path_factory.mktemp("standin"), rows=40, pixels=(160, 120))


def test_integers_and_binary_are_the_same_set(standin: StandinPaths):
    integers, binary = PromptFiles([standin.rl]), PromptFiles([standin.rl_binary])
    assert [integers.read(row) for row in range(40)] == [binary.read(row) for row in range(40)]
    assert integers.record().rows == binary.record().rows


def test_the_check_reports_what_stands_in_published_data(standin: StandinPaths):
    def count(prompt: Prompt) -> int:
        return 300 * len(prompt.images) + len(prompt.messages[1].content)

    report = check_files([standin.rl], False, lambda: count, 320, processes=1)
    assert {bad.column for bad in report.bad_rows} == {"prompt"}
    assert report.over_limit == len(report.bad_rows) > 0
    assert sum(report.abilities.values()) == 40 - len(report.bad_rows)
    every = check_files([standin.rl], False, processes=1)
    assert set(every.abilities) == {"general", "math", "perception", "search"}
    assert (every.styles, every.never_asking, every.unknown_tools) == ({"rule": 40}, 0, {})
    assert every.tools["python"] == 40 > every.tools["image_search"] == every.tools["text_search"] > 0
    assert every.image_sizes == {"to 0.1 MP": 40}
    assert (every.tokens, every.over_limit) == (None, None)


def test_unknown_tools_are_named(tmp_path: Path):
    offer = "# Tools\nYou may call:\n\n## python\nRuns code.\n\n## zoom_in\nZooms.\n\n"
    offer += "# Output Format\n## style\nAnswer in <answer>."
    messages = [{"role": "system", "content": offer}, {"role": "user", "content": "<image>?"}]
    report = check_files([one_row(tmp_path / "set.parquet", prompt=messages)], progress=False)
    assert (report.tools, report.unknown_tools) == ({"python": 1, "zoom_in": 1}, {"zoom_in": 1})
    assert report.warnings == (
        "1 rows (first set:0) offer the tool 'zoom_in', which nobody answers; "
        "known are image_search, python, search, text_search",
    )
    listed = {"index": "1", "tools": ["python", "rotate"]}
    report = check_files([one_row(tmp_path / "set.parquet", prompt=messages, extra_info=listed)], progress=False)
    assert (report.unknown_tools, report.unknown_listed) == ({"zoom_in": 1}, {"rotate": 1})
    assert report.warnings[1].startswith(
        "1 rows (first set:0) list the tool 'rotate' in extra_info.tools, which nobody answers"
    )
    schema = '<tools>\n{"type": "function", "function": {"name": "crop", "description": "x", "parameters": {}}}\n</tools>'
    messages[0]["content"] = f"Answer in <answer>. {schema}"
    assert check_files([one_row(tmp_path / "set.parquet", prompt=messages)], progress=False).unknown_tools == {"crop": 1}


def test_the_verb_counts_tokens_with_a_model(standin: StandinPaths, tiny_folder: Path, capsys: pytest.CaptureFixture[str]):
    command = ["data", "check", str(standin.rl), "--model", str(tiny_folder), "--json", "--processes", "1"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(report["tokens"].values()) == report["rows"] == 40
    assert report["over_limit"] == 0
    assert report["longest_prompt"] > 100
    assert main([*command, "--max-prompt-tokens", str(report["longest_prompt"] - 1)]) == 1
    shorter = json.loads(capsys.readouterr().out)
    assert shorter["over_limit"] == len(shorter["bad_rows"]) >= 1
    assert shorter["longest_prompt"] < report["longest_prompt"]


def test_the_cold_start_takes_any_ability():
    config = load(None, ["sft.phases=[{trajectories: a, steps: 1, abilities: [charts, 图表]}]"])
    assert config.sft.phases[0].abilities == ("charts", "图表")
