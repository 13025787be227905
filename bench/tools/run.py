"""The command: its options checked, every candidate right before any is timed, a table or JSON printed."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from metis_fast.open_files import allow_files

from ..candidate import BenchError, PeerMissing, Spread
from ..machine import Machine, describe
from ..rollout.columns import aligned
from .candidates import CANDIDATES, Candidate
from .measure import Row, Seen, Work, measure, wrong

SUMMARY = "sessions and calls of the python tool, beside a Jupyter kernel a session and a process a call"
SHAPES: Mapping[str, Work] = {
    "full": Work((1, 16, 256), calls=512, starts=8, churn=64),
    "light": Work((1, 4), calls=8, starts=2, churn=4),
}
_OWN = ("ours", "ours, served")
_HEAVY = Work((1, 16), calls=128, starts=3, churn=16)  # not 256 kernels: one has 60 MiB and more
_PROCESSES = Work((1, 16, 256), calls=256, starts=8, churn=32)
_MOST: Mapping[str, Work] = {"jupyter": _HEAVY, "python -c": _PROCESSES}
_MIN_RUNS = 3
_MIB = 1 << 20
_IGNORED = ("--dtype", "--threads", "--engine", "--image", "--crop", "--prompts", "--nodes", "--steps")


@dataclass(frozen=True, slots=True)
class Request:
    """Options, checked. rounds: in each of which all candidates are measured."""

    shape: str
    rounds: int
    names: tuple[str, ...]


def request(args: argparse.Namespace) -> Request:
    """The options of the command line.

    Raises:
        BenchError: one of them is not as stated.
    """
    shape = args.shape or "full"
    if shape not in SHAPES:
        raise BenchError(f"--shape: expected one of {', '.join(SHAPES)} for tools, got {shape!r}")
    rounds = _MIN_RUNS if args.runs is None else args.runs
    if rounds < 1:
        raise BenchError(f"--runs: expected 1 or more, got {rounds}")
    peers = tuple(name for name in CANDIDATES if name not in _OWN)
    wanted = peers if args.peers is None else tuple(filter(None, args.peers.split(",")))
    for name in wanted:
        if name not in peers:
            raise BenchError(f"--peers: expected names out of {', '.join(peers)} for tools, got {name!r}")
    given = [option for option in _IGNORED if getattr(args, option[2:]) is not None]
    given += ["--live-fraction"] * (args.live_fraction != 1) + ["--device"] * (args.device == "cuda")
    if given:
        raise BenchError(f"{given[0]}: tools has none; it takes --shape, --runs, --peers and --json")
    if importlib.util.find_spec("psutil") is None:
        raise BenchError("tools needs psutil; in the project's folder: pip install -e '.[bench]'")
    return Request(shape, rounds, (*_OWN, *wanted))


def work_of(name: str, shape: str) -> Work:
    """What a candidate does in a round: all of the shape, or what can be waited for."""
    work, most = SHAPES[shape], _MOST.get(name)
    if most is None:
        return work
    sessions = tuple(num for num in work.sessions if num in most.sessions or num < most.sessions[-1])
    return Work(sessions, min(work.calls, most.calls), min(work.starts, most.starts), min(work.churn, most.churn))


@dataclass(frozen=True, slots=True)
class Report:
    """missing: candidates that are not here, with the reason. wrong: those that printed something else."""

    rows: tuple[Row, ...]
    missing: Mapping[str, str]
    wrong: Mapping[str, str]


async def compare(wanted: Request) -> Report:
    """Open, check and measure every candidate."""
    opened: dict[str, Candidate] = {}
    missing: dict[str, str] = {}
    failed: dict[str, str] = {}
    seen = {name: Seen() for name in wanted.names}
    try:
        for name in wanted.names:
            try:
                opened[name] = await CANDIDATES[name](unsafe=False)
            except PeerMissing as reason:
                missing[name] = str(reason)
                continue
            if said := await wrong(opened[name]):
                failed[name] = said
        if not failed:
            names = list(opened)
            turns = [names[number % len(names) :] + names[: number % len(names)] for number in range(wanted.rounds)]
            steps = [name for turn in turns for name in turn]
            for name in tqdm(steps, "bench tools", unit="turn", file=sys.stderr, disable=None, leave=False):
                await measure(opened[name], work_of(name, wanted.shape), seen[name])
    finally:
        for candidate in opened.values():
            await candidate.close()
    rows = () if failed else tuple(seen[name].row(name) for name in wanted.names if name in opened)
    return Report(rows, missing, failed)


def to_json(report: Report, wanted: Request, machine: Machine) -> dict[str, Any]:
    """machine, shape, rounds, rows, missing. Seconds and bytes."""
    return {
        "machine": dataclasses.asdict(machine),
        "shape": wanted.shape,
        "rounds": wanted.rounds,
        "rows": [dataclasses.asdict(row) for row in report.rows],
        "missing": dict(report.missing),
    }


NOTES = (
    "start: until the first call of a session is answered; close: until its processes are gone; median (least..most) of "
    "sessions that come one after the other. sessions/s: opened, used once, closed, 16 at a time.",
    "MiB: for each of 16 open sessions, pages that processes share counted once (PSS).",
    "p50/p99: ms of a trivial call while so many sessions call without a pause; ours run two calls a core at once and the "
    "others wait, which counts.",
    "ours have a sandbox; the others have none. A process a call keeps no variables.",
)


def _ms(spread: Spread) -> str:
    return f"{spread.median * 1e3:.1f} ({spread.least * 1e3:.1f}..{spread.most * 1e3:.1f})"


def _cells(row: Row, sessions: Sequence[int]) -> list[str]:
    by_number = {one.sessions: f"{one.p50 * 1e3:.2f}/{one.p99 * 1e3:.2f}" for one in row.latencies}
    memory = "-" if row.memory is None else f"{row.memory / _MIB:.1f}"
    calls = [by_number.get(num, "-") for num in sessions]
    return [row.impl, _ms(row.start), _ms(row.close), f"{row.per_s:.1f}", memory, *calls]


def to_text(report: Report, wanted: Request, machine: Machine) -> str:
    """A table for a terminal."""
    sessions = SHAPES[wanted.shape].sessions
    columns = ["", "start ms", "close ms", "sessions/s", "MiB", *(f"p50/p99 at {num}" for num in sessions)]
    lines = aligned([columns, *(_cells(row, sessions) for row in report.rows)])
    by_name = {row.impl: row for row in report.rows}
    ratio = []
    for name in _OWN:
        if "jupyter" in by_name and name in by_name:
            times = by_name["jupyter"].start.median / by_name[name].start.median
            ratio.append(f"a session of {name!r} starts {times:.0f} times faster than a Jupyter kernel")
    absent = [f"{name}: missing: {why}" for name, why in report.missing.items()]
    place = f"{machine.cpu}, {machine.cores} cores"
    head = f"tools {wanted.shape}: {wanted.rounds} rounds"
    return "\n".join([head, place, "", *lines, "", *ratio, *absent, *NOTES])


def run(args: argparse.Namespace) -> int:
    """Prints a table or the JSON object. Returns the exit code: 1 if something else was printed than should be."""
    wanted = request(args)
    allow_files(1 << 15)
    report = asyncio.run(compare(wanted))
    for name, said in report.wrong.items():
        print(f"bench: no figures are shown, {name}: {said}", file=sys.stderr)
    if report.wrong:
        return 1
    machine = describe(torch.device("cpu"))
    print(json.dumps(to_json(report, wanted, machine)) if args.json else to_text(report, wanted, machine))
    return 0
