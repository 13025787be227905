"""VLMEvalKit itself asks a server of ours, and scores what we export: the same replies, and the same scores as ours.

It needs an environment of its own, and METIS_VLMEVALKIT with the path of its Python:

    python3.11 -m venv kit && kit/bin/pip install ms-vlmeval==0.0.20 'pandas<3'
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import answering
import pytest
import yaml
from harness import AGENT, HERE, Command
from PIL import Image
from test_serve import serving

from metis_fast.evaluate.replies import read_lines
from metis_fast.evaluate.standin import Files, write_standins, write_tsv
from metis_fast.node import opening

KIT = os.environ.get("METIS_VLMEVALKIT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KIT, reason="METIS_VLMEVALKIT is not set: the Python of an environment that has VLMEvalKit"),
]
QUESTIONS = 12
BLOCK = 16
Json = dict[str, Any]


def kit(main: Sequence[object], folder: Path, data: Path, **environment: str) -> str:
    """Run a command of VLMEvalKit in a folder; returns what it wrote. data: where its TSV files lie."""
    hub = folder / "hub"
    hub.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LD_LIBRARY_PATH")}
    places = {"HOME": folder, "LMUData": data, "HF_HUB_CACHE": environment.get("HF_HUB_CACHE", hub), "MPLCONFIGDIR": folder}
    own = {name: str(place) for name, place in places.items()} | {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    command = [KIT, *map(str, main)]
    ended = subprocess.run(
        command, cwd=folder, env=kept | own | environment, capture_output=True, text=True, errors="replace", timeout=900
    )  # its threads and progress bars tear characters apart
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a TSV or CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def settings(tmp_path: Path, files: Mapping[str, Sequence[Path]], **changes: Json) -> Path:
    """A config of the tests' agent."""
    tree: Json = {
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
        "model": {"path": str(AGENT), "dtype": "float32"},
        "rollout": {"max_prompt_tokens": 3000, "max_response_tokens": 400, "max_turns": 4},
        "tools": {"enabled": ["python"]},
        "log": {"progress": False},
        "benchmark": {"any_md5": True, "files": {name: [str(path) for path in paths] for name, paths in files.items()}},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(tree, width=1 << 20, allow_unicode=True))
    return path


def play(arguments: Sequence[object], folder: Path, before: Callable[[], None] | None) -> Json:
    """The results of a `benchmark run`."""
    ended = Command(["benchmark", "run", *arguments, "--json"], folder, before=before).wait()
    assert ended.code == 0, ended
    return json.loads(ended.out)


def photo(rng: random.Random) -> str:
    """2048 x 1536 as base64 of PNG: grey blocks, which JPEG keeps to the bit, since VLMEvalKit sends every image as JPEG."""
    small = Image.frombytes("L", (2048 // BLOCK, 1536 // BLOCK), rng.randbytes(2048 * 1536 // BLOCK**2))
    image = small.resize((2048, 1536), Image.Resampling.NEAREST).convert("RGB")
    sent = io.BytesIO()
    image.save(sent, "JPEG")
    assert Image.open(sent).convert("RGB").tobytes() == image.tobytes()
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def custom_tsv(path: Path) -> None:
    """Sums under pictures, a third of them with a wrong key, in the columns of VLMEvalKit's multiple choice."""
    rng = random.Random(0)
    rows: list[dict[str, object]] = []
    for index in range(QUESTIONS):
        a, b, place = rng.randrange(20, 50), rng.randrange(20, 50), rng.randrange(4)
        options = {letter: a + b + (at - place) * 11 for at, letter in enumerate("ABCD")}
        answer = "ABCD"[(place + (index % 3 == 0)) % 4]
        rows.append(
            {
                **{"index": index, "image": photo(rng), "question": f"What is {a} + {b}?", **options, "answer": answer},
                "category": ("direct_attributes", "relative_position")[index % 2],
            }
        )
    write_tsv(path, rows)


@pytest.mark.parametrize("before", [None, answering.use], ids=["tiny model", "agent with tools"])
def test_vlmevalkit_asks_the_server_and_gets_the_score_of_benchmark_run(
    before: Callable[[], None] | None, tmp_path: Path
) -> None:
    """Of the tests' agent, whatever its answers are worth, and of one that has python do each sum."""
    data = tmp_path / "LMUData"
    custom_tsv(data / "MySums.tsv")
    more: dict[str, Json] = {"serve": {"port": 0, "temperature": 0.0, "queue": 100}}
    if before is None:  # without a system text, which it has not learnt, it says something else to each question
        (tmp_path / "system").touch()
        more["serve"]["system"] = str(tmp_path / "system")
        more["rollout"] = {"max_prompt_tokens": 3000, "max_response_tokens": 24, "max_turns": 2}
    config = settings(tmp_path, {"vstar": [data / "MySums.tsv"]}, **more)
    ours = play([config, "vstar"], tmp_path / "playing", before)["vstar"]
    with serving(tmp_path, before, **more) as server:
        asked = ["--base-url", server.url, "--model", AGENT.name, "--data", "MySums", "--work-dir", tmp_path / "out"]
        kit(["-m", "vlmeval", *asked, "--judge", "exact_matching"], tmp_path / "kit", data, PRED_FORMAT="tsv")
        assert server.end().code == 0
    out = tmp_path / "out" / AGENT.name
    theirs = {row["index"]: row["prediction"] for row in table(out / f"{AGENT.name}_MySums.tsv")}
    replies = read_lines(tmp_path / "run" / "benchmarks" / "vstar" / "replies.jsonl")
    assert {reply["index"]: reply["prediction"].strip() for reply in replies} == theirs and len(theirs) == QUESTIONS
    (score,) = table(out / f"{AGENT.name}_MySums_acc.csv")
    figure = ours["scorers"]["vlmeval"]["figures"][0]
    assert float(score["Overall"]) == pytest.approx(figure["value"], abs=1e-9) and figure["n"] == QUESTIONS
    if before is not None:
        assert figure["value"] == pytest.approx(8 / 12) and ours["tool_rate"]["value"] == 1.0


MODEL = "metis-fast"
COMMIT = "0" * 40
ODD = (
    "<answer>{letter}</answer>",
    "<reason>Not A or B.</reason><answer>The answer is {letter}.</answer>",
    "<answer>Answer: {letter}</answer>",
    '<answer>{letter}\r\nas "it" says\there</answer>',
    "<answer>={letter}</answer>",
    "<answer></answer>",
    "<answer>None</answer>",
    "<answer>I cannot tell</answer>",
    "<answer>1</answer>",
    "{letter}",
)
CALL = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'


def odd(text: str) -> str:
    """A reply in one of many dresses, which the question decides; some call a tool before, which there is none of."""
    question = text.rpartition("<|im_start|>user")[2]
    asked, called, _ = question.partition("<tool_call>")
    number = zlib.crc32(asked.partition("<|im_end|>")[0].encode())
    if number % 3 == 0 and not called:
        return CALL
    return ODD[number // 3 % len(ODD)].format(letter="ABCD"[number // 64 % 4]) + "<|im_end|>"


def use_odd() -> None:
    """Let whole runs of this process have such an agent."""
    opening.NativeEngine = partial(answering.AnsweringEngine, answer=odd)  # pyright: ignore[reportAttributeAccessIssue]


RULED = {  # name there -> ours, and the scorer that repeats its rule
    "VStarBench": ("vstar", "vlmeval"),
    "HRBench4K": ("hrbench4k", "vlmeval"),
    "HRBench8K": ("hrbench8k", "vlmeval"),
    "SEEDBench2_Plus": ("seedbench2plus", "vlmeval"),
    "MME-RealWorld": ("mme-realworld", "vlmeval"),
    "MME-RealWorld-Lite": ("mme-realworld-lite", "vlmeval"),
    "MME-RealWorld-CN": ("mme-realworld-cn", "vlmeval"),
    "WeMath": ("wemath", "vlmeval-exact"),
    "TreeBench": ("treebench", "vlmeval"),
}


def place(files: Mapping[str, Files], data: Path, hub: Path) -> None:
    """Put stand-ins where VLMEvalKit looks for the published files."""
    cached = hub / "datasets--yifanzhang114--MME-RealWorld-Base64"
    (cached / "refs").mkdir(parents=True)
    (cached / "blobs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    for one in files.values():
        for path in one.tsv:
            built = path.stem in ("MME-RealWorld", "MME-RealWorld-CN")
            folder = cached / "snapshots" / COMMIT if built else data
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)


def test_what_is_exported_has_the_same_score_in_vlmevalkit(tmp_path: Path) -> None:
    """All benchmarks that it has a rule for."""
    names = [name for name, _ in RULED.values()]
    files = write_standins(tmp_path / "files", names, count=24, pixels=(64, 48))
    data, hub = tmp_path / "LMUData", tmp_path / "hub"
    place(files, data, hub)
    config = settings(tmp_path, {name: files[name].tsv for name in names}, tools={"enabled": []})
    ours = play([config], tmp_path / "playing", use_odd)
    work = tmp_path / "out"
    ended = Command(["benchmark", "export", tmp_path / "run", "--vlmeval", work], tmp_path / "exporting").wait()
    assert ended.code == 0, ended
    main = [HERE / "vlmevalkit_main.py", "--mode", "eval", "--model", MODEL, "--work-dir", work, "--judge", "exact_matching"]
    tables = [name for name in RULED if name != "TreeBench"]
    kit([*main, "--data", *tables], tmp_path / "kit", data, HF_HUB_CACHE=str(hub), PRED_FORMAT="tsv")
    kit([*main, "--data", "TreeBench"], tmp_path / "kit", data, HF_HUB_CACHE=str(hub))
    for name, (benchmark, scorer) in RULED.items():
        figures = {figure["name"]: figure for figure in ours[benchmark]["scorers"][scorer]["figures"]}
        check(name, work / MODEL, figures)
        marks = read_lines(tmp_path / "run" / "benchmarks" / benchmark / "marks.jsonl")
        values = {mark["index"]: mark["value"] for mark in marks if mark["scorer"] == scorer}
        assert set(values.values()) == {0.0, 1.0}, name
        rows = by_row(name, work / MODEL)
        assert rows == values or (not rows and name == "WeMath"), name
    calls = [int(row["num_tool_calls"]) for row in table(work / MODEL / f"{MODEL}_VStarBench_exact_matching_result.tsv")]
    assert 0 < sum(calls) == sum(ours["vstar"]["tool_calls"]["by_tool"].values())


def check(name: str, folder: Path, figures: Mapping[str, Json]) -> None:
    """Whether VLMEvalKit's own files of a benchmark say what our result says."""
    stem = f"{MODEL}_{name}"
    headline = next(iter(figures.values()))["value"]
    if name.startswith("MME") or name == "TreeBench":
        rating = json.loads((folder / f"{stem}_rating.json").read_text())
        assert rating["Overall"] == pytest.approx(headline, abs=1e-9), name
    elif name == "WeMath":
        (score,) = table(folder / f"{stem}_exact_matching_score.csv")
        for kind, long in {
            "IK": "InsufficientKnowledge",
            "IG": "InadequateGeneralization",
            "CM": "CompleteMastery",
            "RM": "RoteMemorization",
        }.items():
            for way in ("strict", "loose"):
                figure = figures[f"{way}/{kind}"]
                assert score[f"{long} ({way.capitalize()})"].endswith(f" ({round(figure['value'] * figure['n'])})"), (kind, way)
        for ours, theirs in {"S1": "One-step(S1)", "S2": "Two-step(S2)", "S3": "Three-step(S3)"}.items():
            assert score[theirs] == f"{figures[ours]['value']:.2%}", ours
    else:
        scores = table(folder / f"{stem}_acc.csv")
        found = (
            [row["accuracy"] for row in scores if row["cycle"] == "Average" and row["type"] == "all"] if "HR" in name else []
        )
        assert float((found or [scores[0]["Overall"]])[0]) == pytest.approx(headline, abs=1e-9), name


def by_row(name: str, folder: Path) -> dict[str, float]:
    """What it says of each row; none where it keeps that nowhere (WeMath)."""
    for ending, column in (("_exact_matching_result.tsv", "hit"), ("_score.tsv", "score")):
        path = folder / f"{MODEL}_{name}{ending}"
        if path.exists():
            return {row["index"]: float(row[column]) for row in table(path)}
    path = folder / f"{MODEL}_{name}_score.xlsx"
    if not path.exists():
        return {}
    head, *rows = pytest.importorskip("openpyxl").load_workbook(path).worksheets[0].iter_rows(values_only=True)
    return {str(row[head.index("index")]): float(row[head.index("score")]) for row in rows}
