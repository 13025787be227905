"""A judge that dies amid the scoring of `metis-fast benchmark run`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import answering
import kit_judge
import yaml
from harness import AGENT, HERE, Command, error_line, run

from metis_fast.evaluate.replies import read_lines
from metis_fast.evaluate.standin import write_standins
from metis_fast.node import opening

QUESTIONS = 24
CHECK = "What is 1 + 1?"
SERVE = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kit_judge import MODEL, say
from metis_fast.testing.judge import JudgeServer, serving

port, log, place, last = int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
lock, asked = threading.Lock(), 0

def answer(body):
    global asked
    with lock:
        asked += 1
        if asked == last:
            os.kill(os.getpid(), signal.SIGKILL)
        with log.open("a") as file:
            file.write(repr(body["messages"][-1]["content"]) + "\\n")
        return say(body)

with serving(JudgeServer(answer, models=(MODEL,), read=lambda body: body), port) as url:
    place.write_text(url)
    time.sleep(600)
"""


@contextmanager
def judging(folder: Path, name: str, port: int = 0, last: int = -1) -> Iterator[tuple[str, Path]]:
    """A judge in a process of its own: its address, and the file of what it was asked. last: the request that kills it."""
    log, place = folder / f"{name}.log", folder / f"{name}.url"
    log.touch()
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(HERE), str(port), str(log), str(place), str(last)])
    try:
        while not (place.exists() and place.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        yield place.read_text(), log
    finally:
        process.kill()
        process.wait()


def asked(log: Path) -> Counter[str]:
    return Counter(line for line in log.read_text().splitlines() if CHECK not in line)


def said(text: str) -> str:
    """Letters, texts that only a judge can read, and nothing; by the question."""
    number = zlib.crc32(text.encode())
    far = "what I have seen behind all of the many things that stand in the picture, after a long look at it, is "
    forms = ("<answer>{}</answer>", "<answer></answer>", f"<answer>{far}{{}}</answer>", f"<answer>{far}red or {{}}</answer>")
    return forms[number % len(forms)].format("ABCD"[number // 8 % 4]) + "<|im_end|>"


def use_said() -> None:
    """Let whole runs of this process have such an agent."""
    opening.NativeEngine = partial(answering.AnsweringEngine, answer=said)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_judge_that_is_killed_gives_no_false_score_and_the_next_run_asks_for_the_rest(tmp_path: Path) -> None:
    files = write_standins(tmp_path / "files", ["vstar"], count=QUESTIONS, pixels=(64, 48))
    tree = {
        "run": {"threads": 1},
        "model": {"path": str(AGENT), "dtype": "float32"},
        "rollout": {"max_prompt_tokens": 3000, "max_response_tokens": 200, "max_turns": 1},
        "tools": {"enabled": []},
        "log": {"progress": False},
        "score": {"llm": {"retries": 0, "model": kit_judge.MODEL}},
        "benchmark": {"any_md5": True, "judge": True, "files": {"vstar": [str(files["vstar"].tsv[0])]}},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    command = ["benchmark", "run", tmp_path / "my.yaml"]
    whole, broken = (tmp_path / name / "benchmarks" / "vstar" for name in ("whole", "broken"))

    with judging(tmp_path, "undisturbed") as (url, log):
        line = [*command, f"run.dir={tmp_path / 'whole'}", f"score.llm.base_url={url}"]
        ended = Command(line, tmp_path / "first", before=use_said).wait()
        assert ended.code == 0 and "verdicts are missing" not in ended.out, ended
        every = asked(log)
    assert every.total() > QUESTIONS // 2
    half = 4 + every.total() // 2  # the check asks two questions before the agent plays, and again before it is scored
    line = [*command, f"run.dir={tmp_path / 'broken'}"]
    with judging(tmp_path, "killed", last=half) as (url, log):
        port = int(url.split(":")[2].split("/")[0])
        line += [f"score.llm.base_url={url}"]
        ended = Command(line, tmp_path / "second", before=use_said).wait()
        before = asked(log)
    marks, right = read_lines(broken / "marks.jsonl"), read_lines(whole / "marks.jsonl")
    lost = [mark for mark in marks if mark["value"] is None and mark["reason"].startswith("the judge failed: ")]
    assert ended.code == 1 and len(lost) >= every.total() - before.total() > 0, ended
    assert f"{len(lost)} verdicts are missing, as the judge failed: run the same command again (" in ended.out
    assert "connection" in ended.out.split("run the same command again (")[1]
    assert all(mark == one or mark in lost for mark, one in zip(marks, right, strict=True))
    scorers = json.loads((broken / "result.json").read_text())["scorers"]
    assert sum(scored["judge_failures"] for scored in scorers.values()) == len(lost)
    for name, scored in scorers.items():
        own = sum(mark["scorer"] == name for mark in lost)
        figure = scored["figures"][0]
        assert scored["judge_failures"] == own and (own == 0 or figure["low"] < figure["high"]), name

    told = error_line(run(line, tmp_path / "third"))
    assert "LLM judge" in told and "127.0.0.1" in told
    assert read_lines(broken / "marks.jsonl") == marks

    with judging(tmp_path, "back", port=port) as (_, log):
        ended = Command(line, tmp_path / "fourth").wait()
        rest = asked(log)
    assert ended.code == 0 and "verdicts are missing" not in ended.out, ended
    assert rest <= every and every <= before + rest  # an answer may have been lost on its way
    assert rest.total() <= every.total() - before.total() + 1
    assert (broken / "marks.jsonl").read_bytes() == (whole / "marks.jsonl").read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (broken, whole)]
    for result in results:
        del result["seconds"], result["judge_cost"]
    assert results[0] == results[1]
