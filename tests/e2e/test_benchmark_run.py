"""`metis-fast benchmark run`: every benchmark from a stand-in of its published file; stopped and killed."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import AGENT, PROGRAM, Moment, error_line, run, succeed
from jobs import Job

from metis_fast.evaluate.benchmarks import BENCHMARKS
from metis_fast.evaluate.replies import read_lines
from metis_fast.evaluate.standin import Files, write_standins
from metis_fast.run.folder import held

Json = dict[str, Any]


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    return write_standins(tmp_path_factory.mktemp("standins"), count=3, pixels=(64, 48))


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config of the tests' agent without tools."""

    def write(files: dict[str, list[str]], **changes: Json) -> Path:
        tree: Json = {
            "run": {"dir": str(tmp_path / "run"), "threads": 1},
            "model": {"path": str(AGENT), "dtype": "float32"},
            "rollout": {"max_prompt_tokens": 2000, "max_response_tokens": 8, "max_turns": 2, "max_concurrent": 8},
            "tools": {"enabled": []},
            "log": {"progress": False},
            "benchmark": {"any_md5": True, "system": "none", "max_questions": 2, "files": files},
        }
        for section, values in changes.items():
            tree[section] = tree[section] | values
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump(tree, width=1 << 20))
        return path

    return write


def tsv(standins: dict[str, Files], *names: str) -> dict[str, list[str]]:
    return {name: [str(path) for path in standins[name].tsv] for name in names}


def test_every_benchmark_runs_from_its_published_forms(
    standins: dict[str, Files], settings: Callable[..., Path], tmp_path: Path
) -> None:
    """Half of them from VLMEvalKit's files, half from the hub's. Again, nothing is played."""
    files = tsv(standins, *BENCHMARKS)
    files |= {name: [str(path) for path in standins[name].hub] for name in list(BENCHMARKS)[::2]}
    config = settings(files)
    results = json.loads(succeed(["benchmark", "run", config, "--json"], tmp_path / "first"))
    assert list(results) == sorted(BENCHMARKS)  # as the file has them
    for name, result in results.items():
        benchmark = BENCHMARKS[name]
        assert result["complete"] and result["replies"] == 2 and set(result["scorers"]) == set(benchmark.scorers), name
        assert result["tokens"]["sampled"] > 0 and result["weight_versions"] == [0] and result["seconds"]["playing"] > 0
        assert result["files"][0]["md5"] and result["settings"]["decoding"]["temperature"] == 0.0
        for scored in result["scorers"].values():
            assert scored["marks"] == 2 and any(one["missing"] + one["n"] == 2 for one in scored["figures"]), name
    again = json.loads(succeed(["benchmark", "run", config, "vstar", "--json"], tmp_path / "again"))
    assert again["vstar"] | {"seconds": 0} == results["vstar"] | {"seconds": 0}
    assert again["vstar"]["seconds"]["playing"] == results["vstar"]["seconds"]["playing"]
    table = succeed(["benchmark", "table", tmp_path / "run", "--paper"], tmp_path / "table")
    assert all(f"| {benchmark.title} |" in table for benchmark in BENCHMARKS.values())


def test_an_interrupted_run_goes_on_and_leaves_the_same_bytes(
    standins: dict[str, Files], settings: Callable[..., Path], tmp_path: Path
) -> None:
    config = settings(
        tsv(standins, "hrbench4k"), benchmark={"max_questions": 0, "temperature": 1.0}, rollout={"max_concurrent": 4}
    )
    command = ["benchmark", "run", config, "--json"]
    whole = json.loads(succeed([*command, f"run.dir={tmp_path / 'whole'}"], tmp_path / "undisturbed"))
    for number, moment in enumerate(
        (
            Moment("playing._store", signal.SIGKILL),
            Moment("playing._append", signal.SIGKILL, entry=2),  # replies are stored, their time is not
            Moment("playing._store", signal.SIGINT),
        )
    ):
        ended = run(command, tmp_path / f"broken-{number}", moment)
        assert ended.hit and ended.code == (130 if moment.number == signal.SIGINT else -signal.SIGKILL), ended
    folder = tmp_path / "run" / "benchmarks" / "hrbench4k"
    there = len(read_lines(folder / "replies.jsonl"))
    assert 0 < there < 12 and not (folder / "result.json").exists()
    with (folder / "replies.jsonl").open("a") as file:
        file.write('{"index": "7", "rollo')
    result = json.loads(succeed(command, tmp_path / "rest"))
    for name in ("replies.jsonl", "marks.jsonl", "settings.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "benchmarks" / "hrbench4k" / name).read_bytes(), name
    assert result["hrbench4k"] | {"seconds": 0} == whole["hrbench4k"] | {"seconds": 0}


def test_what_is_wrong_with_a_file_is_one_line(
    standins: dict[str, Files], settings: Callable[..., Path], tmp_path: Path
) -> None:
    source = standins["vstar"].tsv[0]
    lines = source.read_text().splitlines(keepends=True)
    cut, lacking, reference = (tmp_path / name / source.name for name in ("cut", "lacking", "reference"))
    for path in (cut, lacking, reference):
        path.parent.mkdir()
    cut.write_text("".join(lines)[: -len(lines[-1]) // 2])
    lacking.write_text("".join([lines[0].replace("question", "asked"), *lines[1:]]))
    cells = lines[2].split("\t")
    cells[lines[0].split("\t").index("image")] = "0"  # the index of the first row, which has the image
    reference.write_text("".join([*lines[:2], "\t".join(cells), *lines[3:]]))
    command = ["benchmark", "run", settings({"vstar": [str(source)]})]
    told = error_line(run([*command, "any_md5=false"], tmp_path / "md5"))
    assert f"{source}: expected MD5 b18854d7075574be06b631cd5f7d2d6a (VStarBench), got " in told
    told = error_line(run([*command, f"files.vstar={cut}"], tmp_path / "cutting"))
    assert str(cut) in told and "cut short or damaged" in told
    told = error_line(run([*command, f"files.vstar={lacking}"], tmp_path / "column"))
    assert f"{lacking}: expected a column 'question'" in told
    told = error_line(run([*command, f"files.vstar={tmp_path / 'none.tsv'}"], tmp_path / "nothing"))
    assert "none.tsv" in told and "No such file" in told
    told = error_line(run([*command, "zebra"], tmp_path / "name"))
    assert "expected one of vstar" in told
    results = json.loads(succeed([*command, f"files.vstar={reference}", "--json"], tmp_path / "referring"))
    assert results["vstar"]["complete"]


def test_a_run_plays_benchmarks_with_the_weights_of_its_steps(demo: Path, tmp_path: Path) -> None:
    """Before, amid and after training; where the judge is away, points are skipped and the run goes on."""
    files = write_standins(tmp_path / "files", ["vstar", "hrbench4k"], count=1, pixels=(32, 32))
    asked = ["eval.benchmarks=[vstar, hrbench4k]", "benchmark.any_md5=true", "benchmark.system=none"]
    asked += [f"benchmark.files.{name}={one.tsv[0]}" for name, one in files.items()]
    command = ["train", demo / "config.yaml", "train.steps=2", "eval.every=1", "data.heldout=[]", "log.progress=false", *asked]
    succeed([*command, f"run.dir={tmp_path / 'run'}"], tmp_path / "training")
    points = read_lines(tmp_path / "run" / "benchmarks" / "steps.jsonl")
    assert [(one["step"], one["benchmark"]) for one in points] == [
        (step, name) for step in range(3) for name in ("vstar", "hrbench4k")
    ]
    for point in points:
        assert point["complete"] and point["weight_versions"] == [point["step"]] and point["scores"]["vlmeval"]["n"] > 0
        folder = tmp_path / "run" / "benchmarks" / f"step-{point['step']:06d}" / point["benchmark"]
        assert json.loads((folder / "result.json").read_text())["settings"]["weights"]["step"] == point["step"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f"<th>step-00000{step}, vlmeval</th>" in page for step in (0, 2)) and "step-000001, vlmeval" not in page
    away = ["benchmark.judge=true", "score.llm.base_url=http://127.0.0.1:9/v1", "score.llm.model=m", "score.llm.retries=0"]
    ended = run([*command, *away, "train.steps=1", f"run.dir={tmp_path / 'away'}"], tmp_path / "skipping")
    assert ended.code == 0 and ended.err.count("this point is left out") == 4, ended
    skipped = read_lines(tmp_path / "away" / "benchmarks" / "steps.jsonl")
    assert len(skipped) == 4 and all("127.0.0.1:9" in point["skipped"] for point in skipped)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_vllms_engine_plays_one(standins: dict[str, Files], settings: Callable[..., Path], tmp_path: Path) -> None:
    vllm = {"engine": "vllm", "deterministic": False, "vllm": {"cpu_threads": 1}, "max_prompt_tokens": 512}
    config = settings(tsv(standins, "vstar"), rollout=vllm, benchmark={"max_questions": 0, "rollouts": 2, "temperature": 1.0})
    result = json.loads(succeed(["benchmark", "run", config, "--json"], tmp_path / "process"))["vstar"]
    assert result["complete"] and result["replies"] == 6 and result["settings"]["decoding"]["engine"] == "vllm"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_two_nodes_on_ray_give_the_bytes_of_one_process(
    standins: dict[str, Files], settings: Callable[..., Path], tmp_path: Path
) -> None:
    drawn = {"max_questions": 0, "temperature": 1.0}
    config = settings(tsv(standins, "hrbench4k"), benchmark=drawn, rollout={"max_concurrent": 4})
    line = [PROGRAM, "benchmark", "run", config, "workers.nodes=2", "workers.launcher=ray", f"run.dir={tmp_path / 'ray'}"]
    job = Job(line, tmp_path / "job", HOME=str(tmp_path), RAY_ADDRESS="local")
    try:
        assert job.wait(left_s=120) == 0, job.err.read_text()
    finally:
        job.end()
    succeed(["benchmark", "run", config, "workers.nodes=2"], tmp_path / "process")
    for name in ("replies.jsonl", "marks.jsonl"):
        place = Path("benchmarks", "hrbench4k", name)
        assert (tmp_path / "ray" / place).read_bytes() == (tmp_path / "run" / place).read_bytes(), name


def test_a_full_disk_and_a_second_process_are_one_line_and_nothing_is_lost(
    standins: dict[str, Files], settings: Callable[..., Path], tmp_path: Path
) -> None:
    config = settings(tsv(standins, "vstar"), benchmark={"max_questions": 0})
    command = ["benchmark", "run", config]
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    try:
        told = error_line(run([*command, f"run.dir={disk / 'run'}"], tmp_path / "no-room"))
        assert "No space left" in told and "free some space" in told
        subprocess.run(["mount", "-t", "tmpfs", "-o", "remount,size=8m", "tmpfs", disk], check=True)
        with held(disk / "run"):
            told = error_line(run([*command, f"run.dir={disk / 'run'}"], tmp_path / "second"))
        assert "another process is running in" in told
        succeed([*command, f"run.dir={disk / 'run'}"], tmp_path / "rest")
        succeed(command, tmp_path / "elsewhere")
        for name in ("replies.jsonl", "marks.jsonl"):
            place = Path("benchmarks", "vstar", name)
            assert (disk / "run" / place).read_bytes() == (tmp_path / "run" / place).read_bytes(), name
    finally:
        subprocess.run(["umount", "--lazy", disk], check=False, capture_output=True)
