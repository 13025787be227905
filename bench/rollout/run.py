"""The command: its options checked, the variants measured, a table or JSON printed."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..candidate import BenchError
from ..machine import Machine, describe
from . import images
from .columns import aligned
from .measure import ENGINES, RAW, Overhead, Result, Row, WrongResult, measure, num_jobs
from .plan import SHAPES
from .weights import SyncRow

SUMMARY = "the rollout loop under slow tools, beside two other schemes and the engine alone; weight synchronisation"
MIN_RUNS = 5
"""Rounds of the overhead measure. A spread of fewer says little."""


@dataclass(frozen=True, slots=True)
class Request:
    """Options, checked."""

    shape: str
    engine: str
    runs: int
    threads: int
    seed: int


def request(args: argparse.Namespace) -> Request:
    """The options of the command line.

    Raises:
        BenchError: one of them is not as stated.
    """
    shape = args.shape or "default"
    if shape not in SHAPES:
        raise BenchError(f"--shape: expected one of {', '.join(SHAPES)} for rollout, got {shape!r}")
    runs = MIN_RUNS if args.runs is None else args.runs
    if runs < MIN_RUNS:
        raise BenchError(f"--runs: expected {MIN_RUNS} or more, got {args.runs}")
    threads = 1 if args.threads is None else args.threads
    if threads < 1:
        raise BenchError(f"--threads: expected 1 or more, got {threads}")
    if args.crop is not None or args.prompts is not None:
        raise BenchError("--crop, --prompts: what they are of is told by --image; give that too")
    for option, value, default in (("--peers", args.peers, None), ("--live-fraction", args.live_fraction, 1.0)):
        if value != default:
            raise BenchError(f"{option}: rollout has none; its shapes are {', '.join(SHAPES)}")
    if args.dtype not in (None, "fp32"):
        raise BenchError(f"--dtype: rollout samples in fp32, got {args.dtype!r}")
    if args.device == "cuda":
        raise BenchError("--device cuda: rollout counts CPU seconds, so its engine runs on the CPU")
    if importlib.util.find_spec("openai") is None:
        raise BenchError(
            "rollout needs openai, for the client that it is compared with; in the project's folder: pip install -e '.[bench]'"
        )
    return Request(shape, args.engine or ENGINES[0], runs, threads, args.seed)


def _overhead(overhead: Overhead | None) -> dict[str, Any]:
    if overhead is None:
        return {"overhead": None}
    return {
        "overhead": overhead.outside.median,
        "overhead_spread": [overhead.outside.least, overhead.outside.most],
        "overhead_cpu": overhead.cpu.median if overhead.cpu else None,
        "overhead_cpu_spread": [overhead.cpu.least, overhead.cpu.most] if overhead.cpu else None,
        "overhead_wall": overhead.wall.median,
        "overhead_wall_spread": [overhead.wall.least, overhead.wall.most],
        "overhead_s_per_message": overhead.message_s,
    }


def to_json(result: Result, wanted: Request, machine: Machine) -> dict[str, Any]:
    """machine, shape, engine, rows (see `measure`), sync (see `weights`)."""
    return {
        "machine": dataclasses.asdict(machine),
        "shape": {"name": wanted.shape, **dataclasses.asdict(SHAPES[wanted.shape])},
        "engine": wanted.engine,
        "rows": [dataclasses.asdict(row) | _overhead(row.overhead) for row in result.rows],
        "sync": [dataclasses.asdict(row) | {"gbytes_per_s": row.gbytes_per_s} for row in result.sync],
    }


_COLUMNS = ("variant", "at once", "batch", "busy", "rows", "traj/s", "p99 s", "failed", "dropped", "overhead", "CPU ms/message")
_SYNC_COLUMNS = ("weight sync", "weights MB", "moved MB", "seconds", "GB/s")
NOTES = (
    "busy: share of the time in which the engine was in a step; of `ours` until its last trajectory was begun, of the others "
    "(one batch) until the batch was done. rows: that decode together, in the mean. traj/s: ended in that time.",
    "p99: 99th percentile of a trajectory's time, failed tries included. failed: tool calls that ended in an "
    "InfrastructureError. dropped: trajectories begun beyond the batch and cancelled.",
    "overhead: CPU seconds outside of the engine's steps beyond those of raw, over all of raw's, with tools that take no time; "
    "median (least..most) of the rounds. gather: those of both processes.",
    "The model calls no tools by itself: the engine samples every token of a message whose length is prescribed, then its last "
    "ones are replaced by a call or an answer.",
)


def _cells(row: Row) -> list[str]:
    overhead = row.overhead
    share, each = "-", "-"
    if overhead is not None and row.variant != RAW:
        share = f"{overhead.outside.median:.1%} ({overhead.outside.least:.1%}..{overhead.outside.most:.1%})"
        each = f"{overhead.message_s * 1e3:.2f}"
    return [
        row.variant,
        str(row.concurrency),
        str(row.batch),
        f"{row.busy_share:.3f}",
        f"{row.rows:.1f}",
        f"{row.trajectories_per_s:.2f}",
        f"{row.p99_s:.1f}",
        str(row.failed_calls),
        str(row.dropped),
        share,
        each,
    ]


def _sync_cells(row: SyncRow) -> list[str]:
    rate = row.gbytes_per_s
    return [
        row.mode,
        f"{row.size / 1e6:.1f}",
        f"{row.num_bytes / 1e6:.1f}",
        f"{row.seconds.median:.2g} ({row.seconds.least:.2g}..{row.seconds.most:.2g})",
        "-" if rate is None else f"{rate:.2f}",
    ]


def to_text(result: Result, wanted: Request, machine: Machine) -> str:
    """Tables for a terminal."""
    shape = SHAPES[wanted.shape]
    latency = shape.latency
    work = (
        f"rollout {wanted.shape}: {shape.calls[0]} to {shape.calls[1]} tool calls a trajectory, messages of "
        f"{shape.message_tokens[0]} to {shape.message_tokens[1]} tokens; tools: median {latency.median_s:g} s, 99th percentile "
        f"{latency.p99_s:g} s (lognormal, mean {latency.mean_s:.2f} s), {latency.failing:.0%} failing"
    )
    place = f"{machine.cpu}, {machine.cores} cores, {' '.join(machine.isa)}, {wanted.threads} threads, torch {machine.torch}"
    rows = aligned([_COLUMNS, *(_cells(row) for row in result.rows)])
    sync = aligned([_SYNC_COLUMNS, *(_sync_cells(row) for row in result.sync)])
    return "\n".join([work, f"{place}, engine {wanted.engine}", "", *rows, "", *sync, "", *NOTES])


def run(args: argparse.Namespace) -> int:
    """Prints tables or the JSON object. Returns the exit code: 1 if a variant did not play what it should, without figures."""
    if args.image is not None:
        return images.run(args)
    wanted = request(args)
    torch.set_num_threads(wanted.threads)
    shape = SHAPES[wanted.shape]
    total = num_jobs(shape, wanted.runs)
    with (
        tempfile.TemporaryDirectory(prefix="metis-bench-") as scratch,
        tqdm(total=total, desc="bench rollout", unit="job", file=sys.stderr, disable=None, leave=False) as bar,
    ):

        def progress(what: str) -> None:
            bar.update()
            bar.set_postfix_str(what)

        try:
            result = asyncio.run(
                measure(wanted.shape, wanted.seed, wanted.runs, wanted.engine, wanted.threads, Path(scratch), progress)
            )
        except WrongResult as wrong:
            print(f"bench: no figures are shown, since not all of the work was done:\n{wrong}", file=sys.stderr)
            return 1
    machine = describe(torch.device("cpu"))
    print(json.dumps(to_json(result, wanted, machine)) if args.json else to_text(result, wanted, machine))
    return 0
