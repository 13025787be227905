"""The report of a cold start: its curves, alone or beside those of a run. The logs are made up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from metis_fast.cli import main
from metis_fast.report.html import write_report
from metis_fast.sft.log import SftLog

STEPS = 6


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run that is a cold start so far."""
    log = SftLog(tmp_path / "run" / "sft")
    log.resume(0)
    log.evaluation({"step": 0, "loss": 2.5, "loss_tokens": 40, "rows": 4})
    for step in range(STEPS):
        rows = {"bad_rows": step // 2, "long_rows": 0}
        more = {"lr": 1e-5, "grad_norm": 1.0, "phase": 0, "epoch": 0.1, "tokens": 90, "loss_tokens": 40}
        log.step({"step": step, "loss": 2.0 - step / 10} | more | rows)
    log.evaluation({"step": STEPS, "loss": 1.25, "loss_tokens": 40, "rows": 4})
    (tmp_path / "run" / "sft" / "config.yaml").write_text("sft: {batch_size: 7}\n")
    return tmp_path / "run"


def titles(page: str) -> list[str]:
    return re.findall(r"<h3>([^<]*)</h3>", page)


@pytest.mark.parametrize("named", [lambda run: run, lambda run: run / "sft"], ids=["run", "its folder sft"])
def test_a_cold_start_is_reported_by_its_run_folder_or_its_own(
    run_dir: Path, named: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(named(run_dir))]) == 0
    path = named(run_dir) / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = path.read_text(encoding="utf-8")
    curves = ["Loss", "Learning rate", "Gradient norm"]
    assert titles(page) == [*(f"{name} of the cold start" for name in curves), "Rows left out"]
    assert "Cold start · metis_fast" in page and "2.5000 → 1.2500" in page and "1.5000" in page
    assert "Rollouts" not in page and "Wall time" not in page
    assert "sft.batch_size" in page  # differs from the default


def test_a_log_that_no_cold_start_has_written_is_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / "sft" / "eval.jsonl"
    with path.open("a") as file:
        file.write('{"step": 9, "slices": {}}\n')
    assert main(["report", str(run_dir)]) == 2
    said = capsys.readouterr().err
    assert f"{path}:3: expected a line of a cold start, got one without loss, loss_tokens; move the file away" in said
    assert len(said.splitlines()) == 1


def test_a_line_that_a_kill_cut_short_is_left_out(run_dir: Path) -> None:
    with (run_dir / "sft" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": STEPS, "loss": 9.0})[:-3])
    assert "Loss of the cold start" in write_report(run_dir).read_text(encoding="utf-8")
