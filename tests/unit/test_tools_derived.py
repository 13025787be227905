"""Indexes kept beside a corpus: damaged ones are built again, and other places are used where that cannot be written."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from metis_fast.errors import ToolSetupError
from metis_fast.tools.derived import derived_folder


class Builder:
    """Writes two files, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path) -> None:
        self.times += 1
        (folder / "a").write_bytes(b"a" * 1000)
        (folder / "b.json").write_text('{"version": 1}')


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "corpus.parquet"


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["a", "b.json", "checksums.json"])
def test_a_damaged_folder_is_built_again_and_said(
    corpus: Path, damage: Callable[[Path], object], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    build = Builder()
    folder = derived_folder(corpus, "index", "key", build)
    assert derived_folder(corpus, "index", "key", build) == folder and build.times == 1
    damage(folder / name)
    assert derived_folder(corpus, "index", "key", build) == folder and build.times == 2
    assert f"{folder} is damaged or incomplete; building it again" in caplog.text
    assert (folder / "a").read_bytes() == b"a" * 1000 and list(corpus.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, '["a"]', '{"a": 5}', '{"..": "x"}', '{"a\\u0000": "x"}', "1" * 9999]
)
def test_any_list_of_checksums_that_is_not_ours_means_a_new_build(corpus: Path, text: str) -> None:
    build = Builder()
    folder = derived_folder(corpus, "index", "key", build)
    (folder / "checksums.json").write_text(text)
    assert derived_folder(corpus, "index", "key", build) == folder and build.times == 2


def test_no_flipped_bit_goes_unseen(corpus: Path) -> None:
    build, rng = Builder(), random.Random(0)
    folder = derived_folder(corpus, "index", "key", build)
    for number in range(1, 51):
        path = folder / rng.choice(["a", "b.json", "checksums.json"])
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        derived_folder(corpus, "index", "key", build)
        assert build.times == 1 + number


def test_where_the_corpus_lies_cannot_be_written_the_cache_is_used(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, fixed = Builder(), Path("/proc/corpus.parquet")  # a folder in which not even root can write
    folder = derived_folder(fixed, "index", "key", build)
    assert folder == Path(os.environ["XDG_CACHE_HOME"]) / "metis_fast" / "corpus.parquet.index-key"
    assert derived_folder(fixed, "index", "key", build) == folder and build.times == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")
    with pytest.raises(ToolSetupError, match=r"cannot write the index of /proc/corpus\.parquet: .*; make one of the folders"):
        derived_folder(fixed, "index", "key", build)


def test_without_a_cache_folder_set_it_is_that_of_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # counts for nothing, says the specification
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = derived_folder(Path("/proc/corpus.parquet"), "index", "key", Builder())
    assert folder.parent == tmp_path / ".cache" / "metis_fast"


def test_a_build_that_fails_leaves_nothing_and_says_why(corpus: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "a").write_bytes(b"a")
        raise ValueError("An IO error occurred:\n'No space left on device'")  # what tantivy raises

    with pytest.raises(ToolSetupError, match=r"cannot write .*index-key: An IO error occurred: 'No space left on device'"):
        derived_folder(corpus, "index", "key", full)
    assert not list(corpus.parent.iterdir())
