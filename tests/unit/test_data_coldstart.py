"""The Metis-ColdStart schema: every form of a file reads the same, and what does not fit is named by row."""

from __future__ import annotations

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from coldstart import CALL, conversations, png, say, table, write

from metis_fast.data.coldstart import BadConversationError, ConversationFiles, holds_conversations
from metis_fast.errors import DataError
from metis_fast.standin import write_standin

FORMS = ("base64", "data", "binary", "integers", "small integers", "signed integers", "struct")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_images_is_read_as_the_bytes_that_were_written(tmp_path, form):
    rows = conversations(11)
    files = ConversationFiles(write(tmp_path / "a.parquet", rows, form))
    assert len(files) == 11
    for number, (messages, images) in enumerate(rows):
        found = files.read(number)
        assert [image.data for image in found.images] == images
        assert [message.role for message in found.messages] == [message["role"] for message in messages]
        assert found.uid == f"a:{number}"


def test_the_layout_of_the_hub_one_folder_down_is_read_file_after_file(tmp_path):
    rows = conversations(7)
    write(tmp_path / "data" / "train-00001-of-00002.parquet", rows[4:])
    write(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:4])
    files = ConversationFiles(tmp_path)
    assert [files.read(i).messages[-1].content for i in range(7)] == [messages[-1]["content"] for messages, _ in rows]
    assert files.location(5) == (tmp_path / "data" / "train-00001-of-00002.parquet", 1)
    assert holds_conversations(tmp_path)


def test_messages_may_be_a_list_of_structs_and_images_may_be_missing(tmp_path):
    messages = [say("user", "Which?"), say("assistant", "That.")]
    pq.write_table(pa.table({"messages": [messages, messages]}), tmp_path / "a.parquet")
    found = ConversationFiles(tmp_path / "a.parquet").read(1)
    assert [message.content for message in found.messages] == ["Which?", "That."] and found.images == ()


def test_marks_show_images_in_reading_order_and_what_an_assistant_writes_is_text(tmp_path):
    messages = [
        say("user", "<image> a <image>"),
        say("assistant", "The <image> is small. " + CALL),
        say("tool", [{"type": "text", "text": "the mark <image> as text, "}, {"type": "image"}]),
        say("user", [{"type": "text", "text": "<image>\nand"}]),
        say("assistant", [{"type": "text", "text": "B"}, {"type": "text", "text": "."}]),
    ]
    found = ConversationFiles(write(tmp_path / "a.parquet", [(messages, [png(i) for i in range(4)])])).read(0)
    assert [message.around_images for message in found.messages] == [
        ("", " a ", ""),
        ("The <image> is small. " + CALL,),
        ("the mark <image> as text, ", ""),
        ("", "\nand"),
        ("B.",),
    ]


USER, ASSISTANT = say("user", "Which?"), say("assistant", "That.")


@pytest.mark.parametrize(
    ("messages", "images", "expected"),
    [
        ("no json", [], r"column messages: expected a list of messages as JSON .*got 'no json'"),
        ("[]", [], r"column messages: expected a list of messages, got \[\]"),
        ("7", [], r"column messages: expected a list of messages, got 7"),
        ("[1]", [], r"column messages\[0\]: expected {role, content}, got 1"),
        ([say("human", "x"), ASSISTANT], [], r"messages\[0\].role: expected system, user, assistant, tool, got 'human'"),
        ([USER], [], r"column messages: expected at least one assistant message, got \['user'\]"),
        ([USER, say("assistant", "  ")], [], r"messages\[1\].content: expected text: the assistant says something"),
        ([USER, say("assistant", None)], [], r"messages\[1\].content: expected text or a list of parts, got null"),
        ([say("user", [{"type": "video"}]), ASSISTANT], [], r"messages\[0\].content\[0\]: expected {type: text"),
        ([USER, say("assistant", [{"type": "image"}])], [png(0)], r"messages\[1\].content\[0\]: .*an assistant shows no image"),
        ([USER, ASSISTANT | {"weight": 0}], [], r"messages\[1\].weight: expected nothing: every assistant message counts"),
        ([USER, ASSISTANT | {"train": False}], [], r"messages\[1\].train: expected nothing: every assistant message counts"),
        ([USER, ASSISTANT | {"tool_calls": [{"id": 1}]}], [], r"messages\[1\].tool_calls: expected nothing: calls"),
        ([say("user", "<image> <image>"), ASSISTANT], [png(0)], r"column images: expected 2 images, .*got 1 image;"),
        ([USER, say("assistant", "<image>")], [png(0)], r"expected 0 images.*1 more in assistant messages.*got 1 image;"),
        ([say("user", "<image>"), ASSISTANT], [b"P" * 99], r"column images\[0\]: expected an image that Pillow can decode"),
        ([say("user", "<image>"), ASSISTANT], [png(0, 1, 400)], r"images\[0\]: expected an aspect ratio of at most 200"),
        (json.dumps([say("user", "x"), ASSISTANT]).replace("x", "\\ud800"), [], r"content: expected text in UTF-8, got 'half"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_what_was_expected_and_what_came(tmp_path, messages, images, expected):
    good = ([USER, ASSISTANT], [])
    files = ConversationFiles(write(tmp_path / "a.parquet", [good, (messages, images), good], "binary"))
    with pytest.raises(BadConversationError, match=expected) as error:
        files.read(1)
    assert str(error.value).startswith(f"{tmp_path / 'a.parquet'}, row 1, column ")
    assert str(error.value).endswith("mend the row, or set sft.on_bad_row=skip")
    assert files.read(2).messages[1].content == "That."


@pytest.mark.parametrize("name", ["cold_start", "cold_start_binary"])
def test_the_stand_in_of_the_published_set_is_read_but_for_the_rows_that_do_not_fit(tmp_path, name):
    files = ConversationFiles(getattr(write_standin(tmp_path, 32, (64, 48)), name))
    bad, shown = [], []
    for row in range(len(files)):
        try:
            found = files.read(row)
        except BadConversationError as error:
            assert error.bad_row.column == "images" and error.bad_row.expected.startswith(
                f"{int(error.bad_row.got[0]) + 1} images"
            )
            bad.append(row)
        else:
            shown.append(len(found.images))
    assert bad == [15, 31]
    assert min(shown) == 0 and max(shown) == 15


def test_integers_that_are_no_bytes_are_named_and_leave_the_others_as_they_are(tmp_path):
    rows = [([say("user", "<image>"), ASSISTANT], [png(i)]) for i in range(3)]
    good = table(rows, "integers")
    images = good["images"].to_pylist()
    images[1][0][5] = 256
    changed = good.set_column(1, "images", pa.array(images, good["images"].type))
    pq.write_table(changed, tmp_path / "a.parquet")
    files = ConversationFiles(tmp_path / "a.parquet")
    assert [files.read(i).images[0].data for i in (0, 2)] == [rows[0][1][0], rows[2][1][0]]
    with pytest.raises(BadConversationError, match=r"images\[0\]: expected integers from 0 to 255"):
        files.read(1)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": ["x"]}, "expected a column 'messages', got prompt; see docs/sft.md"),
        ({"messages": [1]}, "expected column 'messages' to be JSON text or a list of .* got int64"),
        ({"messages": ["x"], "images": [1.5]}, "expected column 'images' to be a list of base64 text, .* got double"),
        ({"messages": ["x"], "images": [[[0.5]]]}, "expected column 'images' to be a list"),
        ({"messages": pa.array([], pa.string())}, "no rows in"),
    ],
)
def test_files_of_another_schema_are_refused(tmp_path, columns, expected):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=expected):
        ConversationFiles(tmp_path / "a.parquet")


def _json(texts, kind=None):
    """What `datasets` writes where rows are of different types: JSON text, as an extension type, here or within `kind`."""
    return pa.array(texts, pa.string()).cast(pa.json_()) if kind is None else texts.cast(kind)


def _listed_json(rows):
    texts = pa.array([[json.dumps(one) for one in row] for row in rows], pa.list_(pa.string()))
    return _json(texts, pa.list_(pa.json_()))


def _json_content(rows):
    fields = [("role", pa.string()), ("content", pa.string())]
    plain = [[{"role": one["role"], "content": json.dumps(one["content"])} for one in row] for row in rows]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.json_())]))
    return _json(pa.array(plain, pa.list_(pa.struct(fields))), kind)


_MESSAGES = {
    "binary JSON": lambda rows: pa.array([json.dumps(row).encode() for row in rows]),
    "arrow.json": lambda rows: _json([json.dumps(row) for row in rows]),
    "text in arrow.json": lambda rows: _json([json.dumps(json.dumps(row)) for row in rows]),
    "list of arrow.json": _listed_json,
    "content in arrow.json": _json_content,
    "struct of lists": lambda rows: pa.array([{key: [one[key] for one in row] for key in ("role", "content")} for row in rows]),
    "list of maps": lambda rows: pa.array(
        [[list(one.items()) for one in row] for row in rows], pa.list_(pa.map_(pa.string(), pa.string()))
    ),
}
_BASE64 = pa.list_(pa.string())
_IMAGES = {
    "JSON": lambda rows: pa.array([json.dumps([_text(one) for one in row]) for row in rows]),
    "arrow.json": lambda rows: _json([json.dumps([{"bytes": _text(one)} for one in row]) for row in rows]),
    "list of arrow.json": lambda rows: _listed_json([[{"bytes": list(one), "path": None} for one in row] for row in rows]),
    "struct of lists": lambda rows: pa.array([{"bytes": row, "path": [None] * len(row)} for row in rows]),
    "struct of lists of integers": lambda rows: pa.array([{"bytes": [list(one) for one in row]} for row in rows]),
    "struct": lambda rows: pa.array([{"bytes": row[0], "path": "a.png"} if row else None for row in rows]),
    "bytes": lambda rows: pa.array([row[0] if row else None for row in rows]),
    "integers": lambda rows: pa.array([list(row[0]) if row else None for row in rows]),
    "text": lambda rows: pa.array([_text(row[0]) if row else None for row in rows]),
}


def _text(data):
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("form", _MESSAGES)
def test_every_form_of_the_messages_is_read_as_the_text_that_was_written(tmp_path, form):
    rows = [messages for messages, images in conversations(6) if all(isinstance(one["content"], str) for one in messages)]
    images = [
        [png(i) for i in range(sum(one["content"].count("<image>") for one in row if one["role"] != "assistant"))]
        for row in rows
    ]
    for row in rows:
        row[-1]["content"] += ' says "so" \\ and\n42'
    pq.write_table(pa.table({"messages": _MESSAGES[form](rows), "images": images}), tmp_path / "a.parquet", row_group_size=2)
    files = ConversationFiles(tmp_path / "a.parquet")
    assert holds_conversations(tmp_path / "a.parquet") and len(files) == len(rows) >= 3
    for number, row in enumerate(rows):
        assert [(one.role, one.content) for one in files.read(number).messages] == [
            (one["role"], one["content"]) for one in row
        ]


def test_content_of_either_kind_in_arrow_json_is_read(tmp_path):
    row = [say("user", [{"type": "image"}, {"type": "text", "text": 'a "b"'}]), say("assistant", 'c "d"')]
    table = pa.table({"messages": _json_content([row]), "images": [[png(0)]]})
    pq.write_table(table, tmp_path / "a.parquet")
    user, assistant = ConversationFiles(tmp_path / "a.parquet").read(0).messages
    assert user.around_images == ("", 'a "b"') and assistant.content == 'c "d"'


@pytest.mark.parametrize("form", _IMAGES)
def test_images_in_other_forms_of_writers_are_read(tmp_path, form):
    images = [[png(0)], [], [png(2)]]
    if "lists" in form or "JSON" in form or "json" in form:
        images[1] = [png(4), png(5)]
    messages = [json.dumps([say("user", "<image>" * len(row)), ASSISTANT]) for row in images]
    pq.write_table(pa.table({"messages": messages, "images": _IMAGES[form](images)}), tmp_path / "a.parquet")
    files = ConversationFiles(tmp_path / "a.parquet")
    assert [[image.data for image in files.read(i).images] for i in range(3)] == images


def test_a_type_that_only_its_author_can_read_is_refused_with_what_to_do(tmp_path):
    field = pa.field("messages", pa.string(), metadata={"ARROW:extension:name": "someone.chat", "ARROW:extension:metadata": ""})
    pq.write_table(pa.table([["[]"]], pa.schema([field])), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'messages'.*extension type 'someone.chat'.*write the column without it"):
        ConversationFiles(tmp_path / "a.parquet")


def test_integers_that_are_no_bytes_spoil_no_other_batch_of_a_row_group(tmp_path):
    lists = [[list(png(i % 4))] for i in range(150)]
    lists[70] = [[300]]
    messages = [json.dumps([say("user", "<image>"), ASSISTANT])] * 150
    pq.write_table(
        pa.table({"messages": messages, "images": pa.array(lists, pa.list_(pa.list_(pa.int32())))}), tmp_path / "a.parquet"
    )
    files = ConversationFiles(tmp_path / "a.parquet")
    for number in (0, 63, 64, 69, 71, 127, 128, 149):
        assert files.read(number).images[0].data == png(number % 4)
    with pytest.raises(BadConversationError, match=r"row 70, column images\[0\]: expected integers from 0 to 255"):
        files.read(70)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        ConversationFiles(tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"expected \*\.parquet files in this folder, found none"):
        ConversationFiles(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(DataError, match="not a Parquet file that can be read"):
        ConversationFiles(tmp_path)
    with pytest.raises(DataError, match="not a Parquet file that can be read"):
        holds_conversations(tmp_path)
    pq.write_table(pa.table({"prompt": ["a"], "reward_model": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="prompts with truths are for `metis-fast train`: a cold start needs"):
        holds_conversations(tmp_path)
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="of conversations, or the rollouts of a run, got question"):
        holds_conversations(tmp_path)


def test_row_groups_are_kept_up_to_the_cache_and_no_further(tmp_path):
    rows = [([say("user", "<image>"), ASSISTANT], [png(i, 64, 64)]) for i in range(40)]
    path = write(tmp_path / "a.parquet", rows, "integers", group=4)
    whole = ConversationFiles(path)
    for i in range(40):
        whole.read(i)
    group = whole.held_bytes / 10
    small = ConversationFiles(path, cache_bytes=int(3.5 * group))
    most = 0
    for i in [*range(40), *range(0, 40, 5)]:
        assert small.read(i).images[0].data == rows[i][1][0]
        most = max(most, small.held_bytes)
    assert group < most <= 4 * group
    small.forget()
    assert small.held_bytes == 0
