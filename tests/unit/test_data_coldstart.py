"""The Metis-ColdStart schema: every form of a file reads the same, and what does not fit is named by row."""

from __future__ import annotations

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
    with pytest.raises(BadConversationError, match=r"images\[0\]: expected bytes as integers of 0 to 255"):
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


def test_content_that_is_json_inside_of_text_is_refused_instead_of_learnt_with_its_quotes(tmp_path):
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.json_())]))
    storage = pa.array(
        [[{"role": "user", "content": '"a"'}]], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    )
    pq.write_table(pa.table({"messages": storage.cast(kind)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a list of {role, content} with plain text, got"):
        ConversationFiles(tmp_path / "a.parquet")


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
