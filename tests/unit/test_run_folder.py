"""A run's folder belongs to one process, and what cannot be written is one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metis_fast import cli
from metis_fast.errors import ConfigError
from metis_fast.run.folder import held

_HOLD = """
import sys, time
from pathlib import Path
from metis_fast.run.folder import held
with held(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("verb", [["train"], ["sft", "--out", "model"]])
def test_a_second_process_is_turned_away_and_the_folder_is_free_again_when_the_first_one_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    folder = tmp_path / "run"
    (tmp_path / "a.yaml").write_text(f"run: {{dir: '{folder}'}}\n")
    with subprocess.Popen([sys.executable, "-c", _HOLD, folder], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"in\n"
        assert cli.main([verb[0], str(tmp_path / "a.yaml"), *verb[1:]]) == 2
        assert "another process is running in" in capsys.readouterr().err.splitlines()[-1]
        first.kill()
    with held(folder):
        pass


def test_a_folder_may_be_held_again_by_the_process_that_let_it_go(tmp_path: Path) -> None:
    for _ in range(2):
        with held(tmp_path / "deep" / "run"):
            assert (tmp_path / "deep" / "run").is_dir()
            (tmp_path / "deep" / "run" / "result").touch()
    assert (tmp_path / "deep" / "run" / "result").exists()


def test_a_folder_without_anything_in_it_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="as asked"), held(tmp_path / "run"):
        raise ConfigError("as asked")
    assert not (tmp_path / "run").exists()
    (tmp_path / "own").mkdir()
    with held(tmp_path / "own"):
        pass
    assert (tmp_path / "own").is_dir()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(ConfigError, match=r"set run\.dir to a folder that you can write"), held(folder):
            pass


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "no permission to read or write x.html"),
        (errno.EROFS, "no permission to read or write x.html"),
        (errno.EMFILE, "too many open files"),
        (errno.ENOSPC, "disk full"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    number: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(folder: Path, say: object) -> Path:
        raise OSError(number, "as asked", "x.html")

    monkeypatch.setattr("metis_fast.report.html.write_report", refuse)
    assert cli.main(["report", "runs/x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def _program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "metis_fast", *arguments], stderr=subprocess.PIPE, text=True, timeout=120, **options
    )


def test_a_full_device_behind_standard_output_is_not_called_a_full_disk() -> None:
    for arguments in (["config"], ["config", "--json"]):
        with open("/dev/full", "w") as full:
            ended = _program(*arguments, stdout=full)
        assert ended.returncode == 2
        assert (
            ended.stderr.strip() == "metis-fast: cannot write to standard output (No space left on device); send it elsewhere"
        )


def test_a_locale_without_umlauts_takes_paths_with_them(tmp_path: Path) -> None:
    """Python spells such a path with surrogates, which Arrow and others refuse."""
    folder = tmp_path / "l\xe4uft"
    folder.mkdir()
    ascii_only = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
    ascii_only |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    pq.write_table(pa.table({"a": [1]}), folder / "a.parquet")
    ended = _program("data", "check", str(folder / "a.parquet"), env=ascii_only, stdout=subprocess.PIPE)
    assert ended.returncode == 2 and "l\xe4uft/a.parquet: expected a column 'data_source'" in ended.stderr
