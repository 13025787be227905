"""The file of a recording: what comes back, many processes at once, and files that are none."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import CALLS, asked, die, printed, said, write

from metis_fast.config import Config
from metis_fast.config import load as load_config
from metis_fast.errors import ConfigError, RecordingError
from metis_fast.recording.asking import Answer, read_answer, write_answer
from metis_fast.recording.file import Recording
from metis_fast.recording.opening import open_recording
from metis_fast.tools.results import (
    ContentResult,
    ImageSearchResult,
    Page,
    PythonResult,
    Refusal,
    Refused,
    SeenPage,
    TextSearchResult,
)
from metis_fast.types import ImageBlob, Observation, Outcome, ToolName, Verdict

_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # halves of surrogates, too: code may print them
_IMAGE = st.binary(max_size=8).map(ImageBlob.of)
_IMAGES = st.lists(_IMAGE, max_size=3).map(tuple)
_PARTS = st.lists(_TEXT | st.integers(0, 7), max_size=4).map(tuple)
_RESULTS = st.one_of(
    st.builds(TextSearchResult, _TEXT, st.lists(st.builds(Page, st.integers(), _TEXT, _TEXT, _TEXT), max_size=3).map(tuple)),
    st.builds(ImageSearchResult, st.lists(st.builds(SeenPage, _TEXT, _TEXT, st.none() | _IMAGE), max_size=3).map(tuple)),
    st.builds(PythonResult, _PARTS, _TEXT, _TEXT, _IMAGES, st.booleans(), _TEXT),
    st.builds(ContentResult, _PARTS, _IMAGES, st.booleans()),
    st.builds(Refused, _TEXT, st.sampled_from(Refusal), _TEXT | st.sampled_from(ToolName)),
    st.builds(Observation, _TEXT, _IMAGES, st.sampled_from(Outcome)),
    st.builds(Verdict, st.booleans(), st.booleans(), _TEXT, _TEXT, _TEXT),
)


@settings(max_examples=40)
@given(result=_RESULTS)
def test_every_answer_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, result: object) -> None:
    path = tmp_path_factory.mktemp("recording") / "run.sqlite"
    recording = Recording(path, writable=True)
    recording.keep_own(asked(), "", write_answer(result))
    recording.close()
    again = Recording(path, writable=False)
    answer = again.find(asked())
    assert answer is not None
    found = read_answer(answer.body, again.image)
    assert found == result and type(found) is type(result)
    again.close()
    again.close()


def test_an_answer_of_another_release_is_an_error_that_says_so(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "run.sqlite", writable=True)
    recording.keep_own(asked(), "", Answer('{"kind":"Hologram","has":{}}', {}))
    answer = recording.find(asked())
    assert answer is not None
    with pytest.raises(RecordingError, match="replay it with the release that recorded it"):
        read_answer(answer.body, recording.image)
    recording.close()


def test_an_image_that_is_missing_is_named(tmp_path: Path, picture: Callable[..., ImageBlob]) -> None:
    recording = Recording(tmp_path / "run.sqlite", writable=True)
    recording.keep_own(asked(), "", printed("1", picture(1)))
    recording.close()
    database = sqlite3.connect(tmp_path / "run.sqlite")
    database.execute("DELETE FROM images")
    database.commit()
    database.close()
    recording = Recording(tmp_path / "run.sqlite", writable=False)
    with pytest.raises(RecordingError, match=rf"lacks the image {picture(1).sha256[:16]} of an answer; restore it from a copy"):
        said(recording, asked())
    recording.close()


# -- who gets which answer ------------------------------------------------------------------------------------------------


def test_the_first_answer_is_everyones_where_one_is_as_good_as_another(tmp_path: Path) -> None:
    one, other = (Recording(tmp_path / "run.sqlite", writable=True) for _ in range(2))
    search = asked(scope=None)
    assert one.keep(search, printed("first")).body == printed("first").body
    assert other.keep(search, printed("second")).body == printed("first").body
    assert said(one, search, "anyone") == "first"
    one.close()
    other.close()


def test_each_rollout_keeps_what_it_was_told_and_its_next_try_replaces_that(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "run.sqlite", writable=True)
    for rollout, text in (("a", "1"), ("b", "2"), ("c", "1")):
        recording.keep_own(asked(), rollout, printed(text))
    assert [said(recording, asked(), rollout) for rollout in ("a", "b", "c", "unknown")] == ["1", "2", "1", "1"]
    recording.keep_own(asked(), "b", printed("1"))  # tried again
    recording.keep_own(asked(), "a", printed("3"))
    recording.close()
    again = Recording(tmp_path / "run.sqlite", writable=False)
    assert [said(again, asked(), rollout) for rollout in ("a", "b", "c", "unknown")] == ["3", "1", "1", "1"]
    again.close()


def test_an_image_is_in_the_file_once(tmp_path: Path, picture: Callable[..., ImageBlob]) -> None:
    recording = Recording(tmp_path / "run.sqlite", writable=True)
    for number in range(20):
        recording.keep_own(asked(str(number)), "a", printed(str(number), picture(1), picture(2)))
    recording.close()
    data = (tmp_path / "run.sqlite").read_bytes()
    database = sqlite3.connect(tmp_path / "run.sqlite")
    assert database.execute("SELECT count(*) FROM images").fetchone() == (2,)
    database.close()
    assert len(data) < 20 * len(picture(1).data)


# -- processes ------------------------------------------------------------------------------------------------------------


def test_processes_that_open_and_write_a_new_file_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.sqlite"
    context = multiprocessing.get_context("forkserver")
    writers = [context.Process(target=write, args=(path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    recording = Recording(path, writable=False)
    for i in range(CALLS):
        assert [said(recording, asked(f"own {i}"), str(number)) for number in range(4)] == ["0", "1", "2", "3"]
        assert said(recording, asked(f"shared {i}", None)) in {"0", "1", "2", "3"}
        assert all(said(recording, asked(f"{number} {i}"), str(number)) == f"{number} {i}" for number in range(4))
    recording.close()
    assert [file.name for file in path.parent.iterdir()] == ["run.sqlite"]  # nothing beside it that one could forget to copy


def test_what_a_killed_process_wrote_is_there(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    writer = context.Process(target=die, args=(tmp_path / "run.sqlite",))
    writer.start()
    writer.join()
    recording = Recording(tmp_path / "run.sqlite", writable=False)
    assert said(recording, asked(), "a") == "kept"
    recording.close()


# -- files that cannot be used --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writable", [True, False])
def test_a_file_that_is_no_recording_is_refused_and_left_as_it_is(tmp_path: Path, writable: bool) -> None:
    (tmp_path / "text").write_text("no database, and long enough to be looked at" * 100)
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE searches (key TEXT)")
    other.close()
    for name, words in (("text", "file is not a database"), ("other", "found a SQLite file of another kind")):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(RecordingError, match=words) as caught:
            Recording(tmp_path / name, writable)
        assert f"tools.{'record' if writable else 'replay'}={tmp_path / name}" in str(caught.value)
        assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("writable", [True, False])
def test_another_format_is_refused(tmp_path: Path, writable: bool) -> None:
    Recording(tmp_path / "run.sqlite", writable=True).close()
    database = sqlite3.connect(tmp_path / "run.sqlite")
    database.execute("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(RecordingError, match="expected a recording in format 3, found format 7; use the release"):
        Recording(tmp_path / "run.sqlite", writable)


def test_a_replay_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="expected a recording, found no such file"):
        Recording(tmp_path / "run.sqlite", writable=False)
    assert not list(tmp_path.iterdir())


def _mount(folder: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small one of its own."""
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount(folder, "-t", "tmpfs", "-o", "size=256k", "tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


def test_a_full_disk_is_said_and_what_was_written_before_stays(disk: Path) -> None:
    recording = Recording(disk / "run.sqlite", writable=True)
    recording.keep_own(asked("before"), "a", printed("before"))
    with pytest.raises(RecordingError, match="disk is full; make room on that disk, then resume"):
        recording.keep_own(asked("large"), "a", printed("large", ImageBlob.of(os.urandom(1 << 20))))
    assert recording.find(asked("large"), "a") is None
    _mount(disk, "-t", "tmpfs", "-o", "remount,size=8m", "tmpfs")
    recording.keep_own(asked("large"), "a", printed("large", ImageBlob.of(os.urandom(1 << 20))))
    recording.close()
    again = Recording(disk / "run.sqlite", writable=False)
    assert (said(again, asked("before"), "a"), said(again, asked("large"), "a")) == ("before", "large")
    again.close()


def test_a_disk_that_cannot_be_written_is_good_for_a_replay_only(disk: Path) -> None:
    recording = Recording(disk / "run.sqlite", writable=True)
    recording.keep_own(asked(), "a", printed("kept"))
    recording.close()
    _mount(disk, "-o", "remount,ro")
    again = Recording(disk / "run.sqlite", writable=False)
    assert said(again, asked()) == "kept"
    again.close()
    with pytest.raises(RecordingError, match=r"cannot be written: .*; give a file that you can write, on a local disk"):
        Recording(disk / "run.sqlite", writable=True)


# -- settings -------------------------------------------------------------------------------------------------------------


def test_recording_and_replaying_at_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected tools.record or tools.replay, got both .*: remove one"):
        load_config(None, [f"tools.record={tmp_path / 'a'}", f"tools.replay={tmp_path / 'b'}"])


def test_a_recording_is_of_one_corpus(tmp_path: Path) -> None:
    corpus, path = tmp_path / "corpus.parquet", tmp_path / "run.sqlite"
    corpus.write_bytes(b"one")
    config = Config.model_validate({"tools": {"record": path, "text_search": {"corpus": corpus}}})
    replay = replace_tools(config, record=None, replay=path)
    for opened in (open_recording(config), open_recording(config), open_recording(replay)):
        assert opened is not None
        opened.close()
    corpus.write_bytes(b"two")
    for other in (config, replay):
        with pytest.raises(RecordingError, match=r"holds answers of another tools\.text_search\.corpus than the one"):
            open_recording(other)
    corpus.unlink()  # a replay does without it
    opened = open_recording(replay)
    assert opened is not None
    opened.close()


def replace_tools(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"tools": config.tools.model_copy(update=changes)})


def test_a_file_is_opened_only_where_a_setting_asks_for_one() -> None:
    assert open_recording(Config()) is None
