"""A file that is replaced: whole or as it was, and nothing beside it, however its writer ends."""

from __future__ import annotations

import fcntl
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from metis_fast.scratch import replaced


@pytest.fixture(autouse=True)
def in_the_foreground() -> Iterator[None]:
    """What is started in the background of a shell, or by nohup, begins with these ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


def test_a_file_is_replaced_when_the_block_ends_and_left_alone_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    for text in ("first", "second"):
        with replaced(path) as scratch:
            scratch.write_text(text)
            assert path.exists() == (text == "second")
        assert path.read_text() == text and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="disk full"), replaced(path) as scratch:
        scratch.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_as_an_error_does_and_is_again_what_it_was(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "page.html") as scratch:
        scratch.write_text("half")
        signal.raise_signal(number)
    assert not list(tmp_path.iterdir()) and signal.getsignal(number) is before


def test_who_handles_signals_or_ignores_them_goes_on_so(tmp_path: Path) -> None:
    came = list[int]()
    before = (
        signal.signal(signal.SIGTERM, lambda number, frame: came.append(number)),
        signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    try:
        with replaced(tmp_path / "page.html") as scratch:
            scratch.write_text("whole")
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])
    assert came == [signal.SIGTERM] and (tmp_path / "page.html").read_text() == "whole"
    thread = threading.Thread(target=_write, args=(tmp_path / "beside",))  # which may set no handlers
    thread.start()
    thread.join()
    assert (tmp_path / "beside").read_text() == "whole"


def _write(path: Path) -> None:
    with replaced(path) as scratch:
        scratch.write_text("whole")


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    path, other = tmp_path / "page.html", tmp_path / ".page.html.mine.tmp"
    (tmp_path / ".page.html.0a1b2c3d.tmp").write_text("half")
    other.write_text("mine")
    living = tmp_path / ".page.html.4e5f6a7b.tmp"
    with living.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with replaced(path) as scratch, replaced(path) as later:
            scratch.write_text("first")
            later.write_text("second")
        assert path.read_text() == "first"  # the one that ended last
        assert {*tmp_path.iterdir()} == {path, other, living}


def test_a_link_is_followed_and_a_name_may_be_as_long_as_any(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.html"
    link.symlink_to("there/page.html")
    _write(link)
    assert link.is_symlink() and (tmp_path / "there" / "page.html").read_text() == "whole"
    for name in ("x" * 255, "é" * 127, "名" * 85):
        _write(tmp_path / "there" / name)
        assert (tmp_path / "there" / name).read_text() == "whole"
