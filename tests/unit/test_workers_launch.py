"""Processes of workers on this machine: their files, their GPUs, and their ends."""

import os
import shutil
import signal
import tempfile
import time
from itertools import islice
from pathlib import Path

import pytest

from metis_fast.errors import ConfigError
from metis_fast.workers import launch as launch_module
from metis_fast.workers.launch import Child, Job, LocalLauncher, engine_gpus, remove_scratch


def test_nothing_is_started_any_more_where_all_was_ended(tmp_path: Path) -> None:
    launcher = LocalLauncher(tmp_path)
    launcher.close()
    with pytest.raises(ConfigError, match="the run ends"):
        launcher.start(Job("late", "tools", ("-c", ""), {}))
    assert not (tmp_path / "late.log").exists()


def test_temporary_files_are_removed_though_somebody_still_makes_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rmtree, late = tmp_path / "scratch", shutil.rmtree, iter("ab")

    def removed_and_written_again(path: str, ignore_errors: bool) -> None:
        rmtree(path, ignore_errors=ignore_errors)
        for name in islice(late, 1):
            folder.mkdir()
            (folder / name).touch()

    folder.mkdir()
    monkeypatch.setattr(launch_module.shutil, "rmtree", removed_and_written_again)
    remove_scratch(str(folder))
    assert not folder.exists() and next(late, None) is None


def test_temporary_files_of_workers_have_paths_that_sockets_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    launcher = LocalLauncher(tmp_path / "logs")
    code = ("-c", "import socket, tempfile; socket.socket(socket.AF_UNIX).bind(f'{tempfile.mkdtemp()}/{40 * chr(120)}')")
    for base in (str(long), "/tmp"):
        monkeypatch.setattr(tempfile, "tempdir", base)
        process = launcher.start(Job("one", "engine", code, {}))
        while process.exit_code() is None:
            time.sleep(0.01)
        assert process.exit_code() == 0, (tmp_path / "logs" / "one.log").read_text()
        process.kill()
    assert not list(long.iterdir()) and not launcher._running


def test_a_process_that_cannot_be_killed_is_waited_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    child = Child(("-c", "import time; time.sleep(600)"), {}, tmp_path / "log", scratch=True)
    with monkeypatch.context() as held:
        held.setattr(launch_module, "_GONE_S", 0.1)
        held.setattr(os, "killpg", lambda pid, number: None)  # stands for one in the kernel, which no signal reaches
        child.kill()
    assert "is still there" in caplog.text and child.exit_code() is None
    child.kill()
    assert child.exit_code() == -signal.SIGKILL


@pytest.mark.parametrize("own", ["", "/elsewhere"])
def test_what_torch_compiles_is_kept_for_the_next_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if own:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", own)
    launcher = LocalLauncher(tmp_path / "logs")
    launcher.start(Job("one", "engine", ("-c", "import os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"), {}))
    while not (said := (tmp_path / "logs" / "one.log").read_text().split("\n"))[1:]:
        time.sleep(0.01)
    launcher.close()
    assert said[0] == (own or default_cache_dir())


def test_engines_get_gpus_of_their_own_and_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for share in (False, True):
        assert engine_gpus(8, 4, 4, share) == ["4", "5", "6", "7"]
        assert engine_gpus(8, 0, 8, share) == [str(i) for i in range(8)]
    assert engine_gpus(8, 8, 8, share=True) == engine_gpus(8, 6, 4, share=True) == [str(i) for i in range(8)]
    assert (engine_gpus(8, 6, 4, share=False), engine_gpus(8, 8, 8, share=False)) == (["6", "7"], [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    assert engine_gpus(3, 1, 2, share=False) == ["3", "5"]
    launcher = LocalLauncher(tmp_path, ["3", "5"])
    code = ("-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    for name in ("engine-0", "engine-1", "engine-0"):
        process = launcher.start(Job(name, "engine", code, {}, gpus=1))
        while process.exit_code() is None:
            time.sleep(0.01)
    assert (tmp_path / "engine-0.log").read_text().split() == ["3", "3"]
    assert (tmp_path / "engine-1.log").read_text().split() == ["5"]
    with pytest.raises(ConfigError, match="needs 1 GPUs of this machine, 0 are left"):
        launcher.start(Job("engine-2", "engine", code, {}, gpus=1))
    launcher.close()
