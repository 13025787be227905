"""`metis-fast sft` on files of conversations: killed at any moment it ends as if nothing had been; rows that do not fit are
named, or skipped and counted; the held-out loss is measured; what it exports is a model."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from coldstart import conversations, png, say, write
from harness import AGENT, Moment, checkpoint_state, error_line, run, sft_state, succeed
from transformers import Qwen3VLForConditionalGeneration

ROWS = 30


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of two phases over files of conversations: 20 steps of 4, in which each set is gone through more than once."""
    folder = tmp_path_factory.mktemp("sft")
    write(folder / "set" / "data" / "train-00000-of-00002.parquet", conversations(ROWS)[:18], "base64")
    write(folder / "set" / "data" / "train-00001-of-00002.parquet", conversations(ROWS)[18:], "base64")
    write(folder / "other.parquet", conversations(7), "integers")
    write(folder / "heldout.parquet", conversations(40)[ROWS:], "binary")
    tree = {
        "run": {"threads": 1},
        "model": {"path": str(AGENT), "dtype": "float32"},
        "log": {"progress": False},
        "checkpoint": {"every": 1},  # the cold start's are ten times as far apart
        "sft": {
            "batch_size": 4,
            "tokens_per_micro_batch": 2000,
            "phases": [
                {"trajectories": str(folder / "set"), "epochs": 2},
                {"trajectories": str(folder / "other.parquet"), "steps": 5},
            ],
            "heldout": str(folder / "heldout.parquet"),
            "eval_every": 7,
            "freeze": ["vision"],
            "optim": {"lr": 1e-3, "warmup_steps": 3, "schedule": "cosine", "final_lr": 0.0},
        },
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="module")
def whole(job: Path) -> Path:
    """The run folder that nothing happens to, with the model in it. Tests do not write to it."""
    folder = job.parent / "whole"
    succeed(command(job, folder), job.parent / "process")
    return folder


def command(job: Path, folder: Path, *more: str) -> list[object]:
    return ["sft", job, f"run.dir={folder}", *more, "--out", folder / "model"]


def lines(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "sft" / name).read_text().splitlines()]


def state(folder: Path) -> dict[str, str]:
    return sft_state(folder, folder / "model") | {"eval": (folder / "sft" / "eval.jsonl").read_text()}


def test_it_learns_measures_and_exports_a_model_whose_tower_is_as_it_was(job: Path, whole: Path) -> None:
    steps = lines(whole, "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(20))  # 2 epochs of 30 rows by 4, and 5
    assert [line["phase"] for line in steps] == [0] * 15 + [1] * 5
    assert steps[14]["epoch"] == 2.0 and steps[19]["epoch"] == pytest.approx(20 / 7)
    assert sum(line["loss"] for line in steps[:3]) > 1.3 * sum(line["loss"] for line in steps[12:15])
    assert all(line["bad_rows"] == line["long_rows"] == 0 < line["loss_tokens"] < line["tokens"] for line in steps)
    assert steps[0]["lr"] == pytest.approx(1e-3 / 3) and steps[2]["lr"] == pytest.approx(1e-3) and steps[19]["lr"] == 0.0
    assert steps[7]["lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 4 / 16)) / 2)
    measured = lines(whole, "eval.jsonl")
    assert [line["step"] for line in measured] == [0, 7, 14, 20]
    assert {line["rows"] for line in measured} == {10}
    assert measured[-1]["loss"] < 0.9 * measured[0]["loss"]
    before, after = (
        dict(Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).named_parameters())
        for folder in (AGENT, whole / "model")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".visual." not in name}


def test_killed_at_any_moment_it_ends_bit_identical_to_an_uninterrupted_one(job: Path, whole: Path, tmp_path: Path) -> None:
    chain = [
        Moment("torch_backend.imitate", signal.SIGKILL, entry=4),  # before the first checkpoint
        Moment("cold_start.measure", signal.SIGKILL, entry=8, delay_s=0.002),
        Moment("torch_backend.imitate", signal.SIGKILL, entry=10, delay_s=0.003),
        Moment("atomic._flush_tree", signal.SIGKILL),
        Moment("log._append", signal.SIGKILL, entry=12),
        Moment("torch_backend.imitate", signal.SIGKILL, entry=7),  # amid the second phase
        Moment("export.export_model", signal.SIGKILL, delay_s=0.001),
    ]
    broken = tmp_path / "broken"
    for number, moment in enumerate(chain):
        ended = run(command(job, broken), tmp_path / f"kill-{number}", moment)
        assert ended.hit and ended.code == -signal.SIGKILL and not ended.orphans, (moment, ended)
    succeed(command(job, broken), tmp_path / "last")
    assert state(broken) == state(whole)


@pytest.mark.parametrize("entry", [pytest.param(3, marks=pytest.mark.slow), 13])
def test_stopped_by_ctrl_c_amid_an_epoch_it_saves_the_step_and_goes_on(
    job: Path, whole: Path, tmp_path: Path, entry: int
) -> None:
    broken = tmp_path / "broken"
    moment = Moment("torch_backend.imitate", signal.SIGINT, entry=entry, delay_s=0.001)
    ended = run(command(job, broken), tmp_path / "stopped", moment)
    assert ended.hit and ended.code == 130 and not ended.orphans, ended
    assert int(checkpoint_state(broken / "sft" / "checkpoints")["step"]) >= entry
    assert len(lines(broken, "metrics.jsonl")) >= entry  # as they came
    succeed(command(job, broken), tmp_path / "last")
    assert state(broken) == state(whole)


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Rows 3, 8 and 11 do not fit, row 5 is long; the image of row 8 is damaged behind its header."""
    rows: list[tuple[object, list[bytes]]] = [*conversations(12)]
    rows[3] = ([say("user", "<image> <image>"), say("assistant", "One.")], [png(1)])
    rows[5] = ([say("user", "word " * 4000), say("assistant", "Long.")], [])
    rows[8] = ([say("user", "<image>"), say("assistant", "Cut.")], [png(2, 64, 64)[:-3000]])
    rows[11] = ("[", [])
    return write(tmp_path / "faulty.parquet", rows)


def phase(path: Path, **more: object) -> str:
    return f"sft.phases={json.dumps([{'trajectories': str(path), 'steps': 6} | more])}"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["sft.on_bad_row=skip"], "row 5, column messages: expected at most 2000 tokens, got "),
        (["sft.on_long_row=skip", "run.seed=3"], "mend the row, or set sft.on_bad_row=skip"),
    ],
)
def test_a_row_that_does_not_fit_stops_the_run_in_one_line(
    job: Path, faulty: Path, tmp_path: Path, settings: list[str], expected: str
) -> None:
    ended = run(command(job, tmp_path / "run", phase(faulty), *settings), tmp_path / "process")
    *skipped, line = ended.err.splitlines()
    assert ended.code == 2 and line.startswith(f"metis-fast: {faulty}, row ") and expected in line, ended
    assert all(": skipped bad row: " in one for one in skipped)
    assert not (tmp_path / "run" / "model").exists()


def test_rows_that_do_not_fit_are_skipped_and_counted_also_over_a_resumption(job: Path, faulty: Path, tmp_path: Path) -> None:
    skip = [phase(faulty), "sft.on_bad_row=skip", "sft.on_long_row=skip"]
    succeed(command(job, tmp_path / "whole", *skip), tmp_path / "process")
    last = lines(tmp_path / "whole", "metrics.jsonl")[-1]
    assert last["epoch"] == pytest.approx(3.0, abs=0.34)  # 24 of 8 usable rows
    assert last["bad_rows"] >= 6 and last["long_rows"] >= 2
    broken = tmp_path / "broken"
    moment = Moment("torch_backend.imitate", signal.SIGINT, entry=3)
    assert run(command(job, broken, *skip), tmp_path / "stopped", moment).code == 130
    succeed(command(job, broken, *skip), tmp_path / "last")
    assert state(broken) == state(tmp_path / "whole")


def test_the_check_reads_every_row_and_names_what_does_not_fit(job: Path, faulty: Path, tmp_path: Path) -> None:
    ended = run(["sft", job, "--check", "--json", phase(faulty)], tmp_path)
    assert ended.code == 1, ended
    report, heldout = json.loads(ended.out)
    assert (report["rows"], report["bad"], report["long"], report["steps"]) == (12, 2, 1, 6)  # headers only
    assert [problem.split(", column")[0] for problem in report["problems"]] == [f"{faulty}, row {i}" for i in (3, 5, 11)]
    assert heldout["rows"] == 10 and heldout["bad"] == heldout["long"] == heldout["steps"] == 0
    assert "12 rows, 2 bad, 1 too long" in run(["sft", job, "--check", phase(faulty)], tmp_path).out
    assert run(["sft", job, "--check"], tmp_path).code == 0
    skip = [phase(faulty), "sft.on_bad_row=skip"]
    assert run(["sft", job, "--check", *skip], tmp_path).code == 1  # the long one
    assert run(["sft", job, "--check", *skip, "sft.on_long_row=skip"], tmp_path).code == 0
    (tmp_path / "none").mkdir()
    useless = write(tmp_path / "none" / "set.parquet", [("[", []), ("[", [])])
    assert run(["sft", job, "--check", phase(useless), "sft.on_bad_row=skip"], tmp_path).code == 1


def test_what_cannot_be_asked_of_conversations_is_said(job: Path, tmp_path: Path) -> None:
    other = job.parent / "other.parquet"
    line = error_line(run(command(job, tmp_path / "a", phase(other, abilities=["math"])), tmp_path))
    assert "abilities choose among stored rollouts" in line
    line = error_line(run(command(job, tmp_path / "b", phase(other, epochs=1)), tmp_path))
    assert "expected either steps or epochs" in line
    line = error_line(run(command(job, tmp_path / "d", "sft.backend=megatron", "sft.optim.muon_lr=0.01"), tmp_path))
    assert "set it to 0, or sft.backend=torch" in line
    line = error_line(run(command(job, tmp_path / "c", "sft.max_tokens=4000"), tmp_path))
    assert "max_tokens=4000 is more than tokens_per_micro_batch=2000" in line


@pytest.mark.parametrize("axes", [("tensor",), pytest.param(("tensor", "pipeline"), marks=pytest.mark.slow)], ids=" x ".join)
def test_ranks_of_megatron_learn_what_the_torch_back_end_does_and_resume(
    job: Path, whole: Path, tmp_path: Path, axes: tuple[str, ...]
) -> None:
    ranks = ["train.backend=megatron", *(f"train.megatron.{axis}_parallel=2" for axis in axes)]
    folder = tmp_path / "run"
    moment = Moment("backend.imitate", signal.SIGKILL, entry=13)
    ended = run(command(job, folder, *ranks), tmp_path / "killed", moment)
    assert ended.hit and ended.code == -signal.SIGKILL, ended
    succeed(command(job, folder, *ranks), tmp_path / "last")
    for name in ("metrics.jsonl", "eval.jsonl"):
        for one, other in zip(lines(folder, name), lines(whole, name), strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    one, several = (
        dict(Qwen3VLForConditionalGeneration.from_pretrained(run / "model", dtype=torch.float32).named_parameters())
        for run in (whole, folder)
    )
    for name, expected in one.items():
        assert float((several[name] - expected).detach().norm()) <= 1e-3 * float(expected.detach().norm()), name
