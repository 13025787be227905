"""The page of `make bench-gpu`, made of small runs on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import gpu_report
from bench.candidate import Errors, Row
from bench.command import OPS
from bench.compare import Report
from bench.gpu_report import RUNS, SuiteResult, main, render, run_op


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Two small runs."""
    common = ["--threads", "1", "--device", "cpu"]
    return [
        run_op(["group_advantage", "--shape", "P=8,G=4", *common]),
        run_op(["hdpo_loss", "--shape", "T=32,H=16,V=100", "--peers", "eager", "--live-fraction", "0.5", *common]),
    ]


def test_page_has_a_table_with_a_row_an_implementation_for_every_run(reports):
    page = render(SuiteResult(True, "12 passed"), reports)
    assert "Tests marked `gpu`: passed." in page and "12 passed" in page
    for report in reports:
        section = page.split(f"## {report.op} ")[1].split("## ")[0]
        table = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
        assert [cells[0].removeprefix("| ") for cells in table[2:]] == [row.impl for row in report.rows]
        assert len({len(cells) for cells in table}) == 1  # as many cells everywhere as there are columns


def test_on_a_gpu_a_row_has_the_rate_of_its_products_and_of_its_bytes(reports):
    report = replace(reports[1], machine=replace(reports[1].machine, gpu="H100"), gemm_flops=10**12, least_bytes=10**9)
    page = render(SuiteResult(True, ""), [report])
    header, _, *rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    floor = next(row for row in report.rows if row.impl == "floor")
    cells = dict(zip(header, next(cells for cells in rows if cells[0] == "floor"), strict=True))
    assert floor.wall is not None and floor.gemms == 3.0
    assert cells["TFLOP/s"] == f"{3 / floor.wall.median:.0f}"
    assert cells["GB/s"] == f"{1 / floor.wall.median:.0f}"
    assert page.startswith("# metis_kernels on a GPU\n\nH100, torch ")


def test_page_says_first_what_failed(reports):
    wrong = Row("ours", 1.0, None, None, None, None, Errors(gradients=(0.1,)), failed="error of dHidden 0.1 > 0.003")
    page = render(SuiteResult(False, "1 failed"), [replace(reports[1], rows=[wrong, *reports[1].rows[1:]])])
    top, section = page.split("## ", 1)
    assert "FAILED" in top and "- hdpo_loss: ours: error of dHidden 0.1 > 0.003" in top
    assert "| ours | 1 | wrong |" in section


def test_every_op_runs_at_the_shapes_of_the_model():
    assert {words[0] for words in RUNS} == set(OPS)
    head = [words for words in RUNS if words[0] == "hdpo_loss"]
    shapes = {(words[2], "0.5" in words) for words in head}
    assert shapes == {(f"T={tokens},H=4096,V=151936", half) for tokens in (4096, 16384) for half in (False, True)}
    assert any("fp32" in words for words in head)


def test_without_a_gpu_it_says_so_fails_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_report, "run_tests", lambda: pytest.fail("ran tests"))
    out = tmp_path / "page.md"
    assert main([str(out)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not out.exists()
