"""Everything that needs a GPU, in one Markdown page: the tests marked `gpu`, then every op at the shapes of Qwen3-VL-8B.

    python -m bench.gpu_report runs/gpu_report.md

The page is written anew after every section, so that a crash late in the run loses nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from metis_fast.cli import parse
from metis_fast.errors import MetisError

from .candidate import BenchError
from .command import OPS, request
from .compare import Report, compare
from .table import machine_line, to_markdown

_HEAD = "H=4096,V=151936"
_ATTENTION = "H=32,K=8,D=128"
RUNS: tuple[tuple[str, ...], ...] = (
    ("group_advantage", "--shape", "P=512,G=16"),
    ("group_advantage", "--shape", "P=4096,G=16"),
    ("linear_logprob", "--shape", f"T=4096,{_HEAD}"),
    ("linear_logprob", "--shape", f"T=16384,{_HEAD}"),
    ("hdpo_loss", "--shape", f"T=4096,{_HEAD}"),
    ("hdpo_loss", "--shape", f"T=4096,{_HEAD}", "--live-fraction", "0.5"),
    ("hdpo_loss", "--shape", f"T=4096,{_HEAD}", "--dtype", "fp32"),
    ("hdpo_loss", "--shape", f"T=16384,{_HEAD}"),
    ("hdpo_loss", "--shape", f"T=16384,{_HEAD}", "--live-fraction", "0.5"),
    ("prefix_attention", "--shape", f"P=4096,R=16,L=1024,{_ATTENTION}"),
    ("prefix_attention", "--shape", f"P=2048,R=16,L=4096,{_ATTENTION}"),
    ("prefix_attention", "--shape", f"P=1,R=1,L=16384,{_ATTENTION}"),
    ("full_attention", "--shape", "S=1,L=12288,H=16,D=72"),
    ("patchify", "--shape", "Y=1536,X=2048"),
)
"""Command lines of `metis-fast bench`: bf16 where the op has a dtype to choose, and the loss in float32 too; all peers."""

_NO_TESTS = 5
"""Exit code of pytest where nothing has the mark."""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """passed: no test failed. output: what pytest wrote last."""

    passed: bool
    output: str


def run_tests(pytest_options: Sequence[str] = ("-m", "gpu")) -> SuiteResult:
    """The tests marked `gpu`, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", *pytest_options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return SuiteResult(done.returncode in (0, _NO_TESTS), done.stdout.strip()[-4000:])


def run_op(words: Sequence[str]) -> Report:
    """One of RUNS."""
    args = parse(["bench", *words])
    return compare(args.op, OPS[args.op], request(args, args.op, OPS[args.op]))


def render(tests: SuiteResult, reports: Sequence[Report]) -> str:
    """The page."""
    wrong = [f"{report.op}: {row.impl}: {row.failed}" for report in reports for row in report.rows if row.failed]
    lines = ["# metis_kernels on a GPU", ""]
    if reports:
        lines += [machine_line(reports[0]), ""]
    lines += [f"Tests marked `gpu`: {'passed' if tests.passed else 'FAILED'}.", "", "```", tests.output, "```", ""]
    if wrong:
        lines += ["Outside their limits, no speed shown:", "", *(f"- {line}" for line in wrong), ""]
    return "\n".join([*lines, *(to_markdown(report) for report in reports)])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 only where every test passed and every op of ours is within its limits."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_report", description="Tests and benchmarks on a GPU, as one page."
    )
    parser.add_argument("out", type=Path, metavar="REPORT.md")
    args = parser.parse_args(argv)
    try:
        if not torch.cuda.is_available():
            raise BenchError("no CUDA device: torch sees none here, so nothing was run and no report was written")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        tests = run_tests()
        reports: list[Report] = []
        args.out.write_text(render(tests, reports), encoding="utf-8")
        for words in RUNS:
            reports.append(run_op(words))
            torch.cuda.empty_cache()
            args.out.write_text(render(tests, reports), encoding="utf-8")
    except MetisError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(f"report: {args.out}")
    return 0 if tests.passed and not any(report.failed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
