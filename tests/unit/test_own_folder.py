"""A process's own folder: gone when it is closed, and removed by the next one after a kill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from metis_fast.own_folder import OwnFolder

HOLD = """
import sys
from pathlib import Path
from metis_fast.own_folder import OwnFolder
folder = OwnFolder(Path(sys.argv[1]), "kind-")
(folder.path / "file").write_text("x")
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_a_folder_is_private_and_goes_when_it_is_closed(tmp_path: Path) -> None:
    folder = OwnFolder(tmp_path, "kind-")
    (folder.path / "file").write_text("x")
    assert folder.path.parent == tmp_path and folder.path.stat().st_mode & 0o777 == 0o700
    folder.close()
    folder.close()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_and_what_a_living_one_holds_stays(tmp_path: Path) -> None:
    other = tmp_path / "another-kind"
    other.mkdir()
    holding = [
        subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        paths = [Path(process.stdout.readline().strip()) for process in holding if process.stdout]
        assert all((path / "file").exists() for path in paths)
        holding[0].kill()
        holding[0].wait()
        assert paths[0].exists()
        folder = OwnFolder(tmp_path, "kind-")
        assert not paths[0].exists() and (paths[1] / "file").exists() and folder.path.exists() and other.exists()
        folder.close()
    finally:
        for process in holding:
            process.kill()
            process.communicate()
