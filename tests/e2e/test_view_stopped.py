"""The server of `metis-fast view`: stopped or killed while it answers, on a disk without room, with files that go away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

import pytest
from disks import small_disk
from harness import Command
from view_runs import write_run

_LIMIT_S = 200.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "hdpo", steps=4, prompts=9, size=6)


def _address(command: Command) -> str:
    deadline = time.monotonic() + _LIMIT_S
    while not command.read("out").endswith("\n"):
        assert command.alive and time.monotonic() < deadline, command.read("err")
        time.sleep(0.05)
    return json.loads(command.read("out"))["url"]


def _get(url: str, path: str) -> bytes:
    base, _, token = url.partition("/?token=")
    request = urllib.request.Request(f"{base}/api/{path}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=_LIMIT_S) as answer:
        return answer.read()


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name
)
def test_a_server_that_is_stopped_while_it_answers_leaves_nothing_and_may_be_started_again(
    finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    command = Command(["view", finished, "--port", 0, "--json"], tmp_path / "first")
    url, answered = _address(command), threading.Event()

    def ask() -> None:
        texts = iter(range(1 << 30))
        try:
            while True:  # each one is another search in all texts
                _get(url, f"rollouts?run=hdpo&text=panel+{next(texts)}")
                answered.set()
        except (OSError, HTTPException):  # the server has gone
            return

    askers = [threading.Thread(target=ask) for _ in range(6)]
    for asker in askers:
        asker.start()
    assert answered.wait(_LIMIT_S)
    os.kill(command.pid, number)
    ended = command.wait()
    for asker in askers:
        asker.join(_LIMIT_S)
        assert not asker.is_alive()
    assert ended.code == (-signal.SIGKILL if number is signal.SIGKILL else 0)
    assert ended.err == "" and ended.orphans == () and ended.scratch == ()
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    port = url.rpartition(":")[2].partition("/")[0]
    again = Command(["view", finished, "--port", port, "--json"], tmp_path / "second")  # the same port is free
    assert json.loads(_get(_address(again), "rollouts?run=hdpo&wait=1"))["total"] == 4 * 9 * 6
    os.kill(again.pid, signal.SIGTERM)
    assert again.wait().code == 0


def test_a_full_disk_and_files_that_go_away_do_not_end_the_server(finished: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        folder = Path(shutil.copytree(finished, disk.folder / "hdpo"))
        disk.leave(0)
        command = Command(["view", folder, "--port", 0, "--json"], tmp_path / "process")
        url = _address(command)
        rows = json.loads(_get(url, "rollouts?run=hdpo&wait=1"))["rows"]
        sha = json.loads(_get(url, f"rollout?run=hdpo&part={rows[0]['part']}&row=0"))["talk"]["images"][0]
        assert _get(url, f"image?run=hdpo&sha={sha}").startswith(b"\x89PNG")
        shutil.rmtree(folder / "rollouts")
        for path in ("rollout", "group", "tokens"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                _get(url, f"{path}?run=hdpo&part={rows[0]['part']}&row=0")
        assert json.loads(_get(url, "rollouts?run=hdpo"))["total"] == 0
        shutil.rmtree(folder)
        assert "has gone" in json.loads(_get(url, "overview"))["runs"][0]["gone"]
        os.kill(command.pid, signal.SIGTERM)
        ended = command.wait()
        assert (ended.code, ended.err, ended.orphans) == (0, "", ())
