"""An LLM judge that is missing, down at the start, or lost in the middle of a run; a real HTTP server plays it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import Command, checkpoint_state, error_line, run, run_state, succeed


class _Server(ThreadingHTTPServer):
    """Says CORRECT where the answer has an even length, so that groups disagree, and to what is right beyond doubt; HTTP status
    503 while it is down."""

    daemon_threads = True
    down = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.setting = f"score.llm.base_url=http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        task = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = json.loads(task["messages"][1]["content"].split("\n\n")[0])
        answer = asked["candidate_answer"]
        is_right = answer in asked["accepted_answers"] if asked["question"] == "What is 1 + 1?" else len(answer) % 2 == 0
        assert isinstance(self.server, _Server)
        word = "CORRECT" if is_right else "INCORRECT"
        body = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": word}}]}).encode()
        self.send_response(503 if self.server.down else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def _judge() -> Iterator[_Server]:
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def command(demo: Path, tmp_path: Path) -> list[object]:
    table = pq.read_table(demo / "data" / "train.parquet")
    rows = table.to_pylist()
    for row in rows:
        row["reward_model"]["style"] = "llm"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "llm.parquet")
    settings = [f"data.train=[{tmp_path / 'llm.parquet'}]", "score.llm.model=judge", "score.llm.retries=1", "train.steps=3"]
    return ["train", demo / "config.yaml", *settings]


def test_rows_for_an_llm_judge_need_an_endpoint(command: list[object], tmp_path: Path) -> None:
    line = error_line(run([*command, f"run.dir={tmp_path / 'run'}"], tmp_path / "process"))
    assert "score.llm.base_url is empty; set score.llm.base_url" in line


def test_a_judge_that_is_not_there_stops_the_run_before_it_leaves_anything(command: list[object], tmp_path: Path) -> None:
    with _judge() as server:
        pass  # its port answers no more
    line = error_line(run([*command, f"run.dir={tmp_path / 'run'}", server.setting], tmp_path / "process"))
    assert f"LLM judge 'judge' at http://127.0.0.1:{server.server_port}/v1" in line and "start it" in line
    assert not (tmp_path / "run").exists()


def test_a_run_whose_judge_dies_is_saved_and_goes_on_exactly_when_the_judge_is_back(
    command: list[object], tmp_path: Path
) -> None:
    with _judge() as server:
        succeed([*command, server.setting, f"run.dir={tmp_path / 'whole'}"], tmp_path / "reference")
        broken = [*command, server.setting, f"run.dir={tmp_path / 'run'}", "checkpoint.every=0"]
        running = Command(broken, tmp_path / "first")
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
            time.sleep(0.001)
        server.down = True  # while the third step is sampled, so that no step has verdicts for some of its rollouts only
        line = error_line(running.wait())
        assert "the judge of style 'llm' gave no verdict for any of" in line and "then resume" in line
        assert checkpoint_state(tmp_path / "run" / "checkpoints")["step"] == "2"
        server.down = False
        succeed(broken, tmp_path / "second")
    assert run_state(tmp_path / "run") == run_state(tmp_path / "whole")
