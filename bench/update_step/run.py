"""`metis-fast bench update_step`: gradients of all variants compared, then their steps measured in turn, then a table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..candidate import BenchError
from ..machine import Machine, describe
from .child import Measured
from .shapes import SHAPES, Shape, build_model
from .variants import REFERENCE, VARIANTS

SUMMARY = "an optimizer step of a small Qwen3-VL: the public recipe, then ours, saving by saving"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
GRADIENT_LIMIT = 1e-5
"""Largest relative error of a parameter's gradient against the reference variant, float32."""

MIN_RUNS = 3
"""The default: a run takes minutes."""


@dataclass(frozen=True, slots=True)
class Row:
    """A variant. cpu_s, peak_bytes: medians; least, most: of the CPU seconds. grad_err: see `largest_error`."""

    variant: str
    measured: Measured
    least: float
    most: float
    grad_err: float


class _Child:
    """The process of a variant; see `child`."""

    def __init__(self, variant: str, folder: Path, args: Request) -> None:
        module = f"{__package__}.child"
        words = [variant, str(folder), args.shape, args.dtype, str(args.seed), str(args.threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TQDM_DISABLE": "1"}
        self._variant = variant
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def ask(self, command: str) -> dict[str, Any]:
        """Raises BenchError if the process died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            raise BenchError(f"the process of {self._variant} ended with code {code}: {last}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@dataclass(frozen=True, slots=True)
class Request:
    """Options, checked. dtype: torch's name."""

    shape: str
    dtype: str
    runs: int
    threads: int
    seed: int


def request(args: argparse.Namespace) -> Request:
    """The options of the command line.

    Raises:
        BenchError: one of them is not as stated.
    """
    shape, dtype = args.shape or "paper", args.dtype or "fp32"
    if shape not in SHAPES:
        raise BenchError(f"--shape: expected one of {', '.join(SHAPES)} for update_step, got {shape!r}")
    if dtype not in DTYPES:
        raise BenchError(f"--dtype: expected {' or '.join(DTYPES)} for update_step, got {dtype!r}")
    runs = MIN_RUNS if args.runs is None else args.runs
    if runs < MIN_RUNS:
        raise BenchError(f"--runs: expected {MIN_RUNS} or more, got {args.runs}")
    threads = 2 if args.threads is None else args.threads
    if threads < 1:
        raise BenchError(f"--threads: expected 1 or more, got {threads}")
    unused = (("--peers", args.peers, None), ("--live-fraction", args.live_fraction, 1.0), ("--engine", args.engine, None))
    for option, value, default in unused:
        if value != default:
            raise BenchError(f"{option}: update_step has none; its shapes are {', '.join(SHAPES)}")
    if args.device == "cuda":
        raise BenchError("--device cuda: update_step counts CPU seconds and resident memory, so it runs on the CPU")
    return Request(shape, DTYPES[dtype], runs, threads, args.seed)


def largest_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """(largest relative error, its parameter) over the gradients of all mini-batches and parameters, Frobenius norm.

    A gradient that is nothing but rounding (below 1e-3 of the largest of its mini-batch) is held to that much.
    """
    if found.keys() != truth.keys():
        raise BenchError(f"gradients of different parameters: {sorted(found.keys() ^ truth.keys())[:3]}")
    largest: dict[str, float] = {}
    for name, value in truth.items():
        batch = name.partition(".")[0]
        largest[batch] = max(largest.get(batch, 0.0), float(value.norm()))
    worst = (0.0, "")
    for name, value in truth.items():
        least = 1e-3 * largest[name.partition(".")[0]]
        error = float((found[name] - value).norm()) / max(float(value.norm()), least)
        if math.isnan(error):
            return error, name
        if error > worst[0]:
            worst = (error, name)
    return worst


def measure(wanted: Request, variants: Sequence[str] = VARIANTS) -> list[Row]:
    """Rows of all variants; progress on stderr.

    Raises:
        BenchError: a process died, or a gradient in float32 is off by more than `GRADIENT_LIMIT`.
    """
    children: dict[str, _Child] = {}
    errors: dict[str, float] = {}
    runs: dict[str, list[Measured]] = {variant: [] for variant in variants}
    total = len(variants) * (1 + wanted.runs)
    with (
        tempfile.TemporaryDirectory(prefix="metis-bench-") as scratch,
        tqdm(total=total, desc="bench update_step", unit="step", file=sys.stderr, disable=None, leave=False) as bar,
    ):
        folder = Path(scratch) / "policy"
        build_model(folder, wanted.seed)
        try:
            truth: dict[str, Tensor] = {}
            for variant in variants:  # all at once: they take seconds to start
                children[variant] = _Child(variant, folder, wanted)
            for variant in variants:
                bar.set_postfix_str(f"gradients of {variant}")
                path = Path(scratch) / "gradients"
                children[variant].ask(f"gradients {path}")
                found = torch.load(path)
                truth = truth or found
                errors[variant], name = largest_error(found, truth)
                if wanted.dtype == "float32" and not errors[variant] <= GRADIENT_LIMIT:
                    raise BenchError(
                        f"{variant}: the gradient of {name} is off by {errors[variant]:.2g} of its norm, more than "
                        f"{GRADIENT_LIMIT:g}; nothing was timed"
                    )
                bar.update()
            for number in range(wanted.runs):
                first = number % len(variants)
                for variant in [*variants[first:], *variants[:first]]:
                    bar.set_postfix_str(variant)
                    runs[variant].append(Measured(**children[variant].ask("step")))
                    bar.update()
        finally:
            for child in children.values():
                child.close()
    return [_row(variant, runs[variant], errors[variant]) for variant in variants]


def _row(variant: str, runs: Sequence[Measured], error: float) -> Row:
    cpu = [one.cpu_s for one in runs]
    peaks = [one.peak_bytes for one in runs if one.peak_bytes is not None]
    median = dataclasses.replace(
        runs[0],
        cpu_s=statistics.median(cpu),
        wall_s=statistics.median(one.wall_s for one in runs),
        peak_bytes=round(statistics.median(peaks)) if peaks else None,
    )
    return Row(variant, median, min(cpu), max(cpu), error)


def to_json(rows: Sequence[Row], wanted: Request, machine: Machine) -> dict[str, Any]:
    """shape, machine, rows. ratio, flops_ratio: those of the reference over the variant's."""
    base = rows[0].measured
    return {
        "shape": {"name": wanted.shape, **dataclasses.asdict(SHAPES[wanted.shape])},
        "machine": dataclasses.asdict(machine),
        "rows": [
            {
                "variant": row.variant,
                "shape": wanted.shape,
                "dtype": wanted.dtype,
                **dataclasses.asdict(row.measured),
                "cpu_s_spread": [row.least, row.most],
                "grad_err": row.grad_err,
                "ratio": base.cpu_s / row.measured.cpu_s,
                "flops_ratio": base.flops / row.measured.flops,
            }
            for row in rows
        ],
    }


_COLUMNS = (
    "variant",
    "decoder tokens",
    "images",
    "GFLOP",
    "x fewer",
    "CPU s",
    "x fewer",
    "wall s",
    "peak MiB",
    "gradient error",
)


def _cells(row: Row, base: Measured) -> list[str]:
    one = row.measured
    return [
        row.variant,
        f"{one.decoder_tokens:,}",
        f"{one.vision_images:,}",
        f"{one.flops / 1e9:,.0f}",
        f"{base.flops / one.flops:.2f}",
        f"{one.cpu_s:.2f} ({row.least:.2f}..{row.most:.2f})",
        f"{base.cpu_s / one.cpu_s:.2f}",
        f"{one.wall_s:.2f}",
        "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:,.0f}",
        "-" if row.variant == REFERENCE else f"{row.grad_err:.1e}",
    ]


def describe_shape(name: str) -> str:
    """The batch in two lines."""
    shape: Shape = SHAPES[name]
    kinds = {kind: shape.kinds.count(kind) for kind in dict.fromkeys(shape.kinds)}
    groups = ", ".join(f"{num} {kind}" for kind, num in kinds.items())
    images = f"{shape.prompt_images} images a prompt, {shape.tool_images} an observation"
    return (
        f"update_step {name}: {shape.mini_batches} mini-batches of {len(shape.kinds)} groups ({groups}) of {shape.rollouts} "
        f"rollouts; {shape.prompt_tokens} prompt\nand about {shape.response_tokens} response tokens, {shape.observed:.0%} of "
        f"them observed; {images}; {shape.tokens_per_micro_batch:,} tokens a pass."
    )


NOTES = (
    "reference: the public recipe in plain PyTorch on transformers' Qwen3-VL. none: ours without any saving, a rollout a pass. "
    "+x: with x and those above. ours: with all.",
    "Decoder tokens and images: through decoder and vision tower, passes for old log-probabilities included. GFLOP: model "
    "FLOPs. CPU s: median (least..most). Peak: resident memory above what was there before the step.",
)


def to_text(rows: Sequence[Row], wanted: Request, machine: Machine) -> str:
    """A table for a terminal."""
    table = [list(_COLUMNS), *(_cells(row, rows[0].measured) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    place = f"{machine.cpu}, {machine.cores} cores, {' '.join(machine.isa)}, {wanted.threads} threads, torch {machine.torch}"
    return "\n".join([describe_shape(wanted.shape), f"{place}, {wanted.dtype}", "", *lines, "", *NOTES])


def run(args: argparse.Namespace) -> int:
    """Prints the table or the JSON object. Returns the exit code."""
    wanted = request(args)
    rows = measure(wanted)
    machine = dataclasses.replace(describe(torch.device("cpu")), threads=wanted.threads)
    print(json.dumps(to_json(rows, wanted, machine)) if args.json else to_text(rows, wanted, machine))
    return 0
