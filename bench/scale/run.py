"""The command: its options checked, a process for every number of nodes, a table or JSON printed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..candidate import BenchError
from ..machine import Machine, describe
from ..rollout.columns import aligned
from .groups import LIGHT, REAL, Work

if TYPE_CHECKING:
    from .measure import Asked, Found, Step

SUMMARY = "the run's own process with more and more nodes that play: its CPU, bytes and memory; what ranks fetch"
SHAPES = {"paper": REAL, "light": LIGHT}
_NODES, _PROMPTS, _STEPS = (1, 2, 4), 128, 4
_LEAST_STEPS = 3
_MIB = 1 << 20
_LIMIT_S = 1800.0  # of a process
_IGNORED = ("--image", "--crop", "--peers", "--runs", "--threads", "--engine", "--dtype")


@dataclass(frozen=True, slots=True)
class Request:
    """Options, checked. steps: that are counted."""

    nodes: tuple[int, ...]
    prompts: int
    steps: int
    shape: str


def request(args: argparse.Namespace) -> Request:
    """The options of the command line.

    Raises:
        BenchError: one of them is not as stated.
    """
    words = (args.nodes or ",".join(map(str, _NODES))).split(",")
    if not all(word.isdecimal() and 1 <= int(word) <= 64 for word in words):
        raise BenchError(f"--nodes: expected numbers from 1 to 64 as in 1,2,4, got {args.nodes!r}")
    prompts = _PROMPTS if args.prompts is None else args.prompts
    steps = _STEPS if args.steps is None else args.steps
    for option, number, least in (("--prompts", prompts, 2), ("--steps", steps, _LEAST_STEPS)):
        if number < least:
            raise BenchError(f"{option}: expected {least} or more, got {number}")
    shape = args.shape or "paper"
    if shape not in SHAPES:
        raise BenchError(f"--shape: expected one of {', '.join(SHAPES)} for scale, got {shape!r}")
    given = [option for option in _IGNORED if getattr(args, option[2:]) is not None]
    given += ["--live-fraction"] * (args.live_fraction != 1) + ["--device"] * (args.device == "cuda")
    if given:
        raise BenchError(f"{given[0]}: scale has none; it takes --nodes, --prompts, --steps, --shape and --json")
    if importlib.util.find_spec("ray") is None:
        raise BenchError("scale needs Ray; in the project's folder: pip install -e '.[ray]'")
    return Request(tuple(map(int, words)), prompts, steps, shape)


@dataclass(frozen=True, slots=True)
class Row:
    """Of a number of nodes. Per rollout and of the run's process, unless said.

    cpu_ms: median, least, most of the steps, an idle process's taken off. idle_cpu_ms: for a second. tcp_in, tcp_out: bytes on
    its connections, Ray's own included. summaries, jobs, scored, told: pickled bytes (see `measure.Sizes`). resident: bytes
    before and after the steps. groups_per_s: median. fetched, fetched_most: of a rank, over an even share.
    """

    nodes: int
    ranks: int
    cpu_ms: tuple[float, float, float]
    idle_cpu_ms: float
    tcp_in: float
    tcp_out: float
    summaries: float
    jobs: float
    scored: float
    told: float
    resident: tuple[int, int]
    groups_per_s: float
    fetched: float
    fetched_most: float


def row_of(found: Found, asked: Asked) -> Row:
    """What a table tells of a measurement."""
    rollouts, idle = asked.prompts * asked.work.rollouts, found.idle

    def median(value: Callable[[Step], float]) -> float:
        return statistics.median(map(value, found.steps))

    cpu = [1e3 * (step.cpu_s - idle.cpu_s * step.wall_s) / rollouts for step in found.steps]
    return Row(
        found.nodes,
        asked.ranks,
        (statistics.median(cpu), min(cpu), max(cpu)),
        1e3 * idle.cpu_s,
        median(lambda step: (step.bytes_in - idle.bytes_in * step.wall_s) / rollouts),
        median(lambda step: (step.bytes_out - idle.bytes_out * step.wall_s) / rollouts),
        found.sizes.summaries,
        found.sizes.jobs,
        found.sizes.scored,
        found.sizes.told,
        found.resident,
        median(lambda step: asked.prompts / step.wall_s),
        *found.shares,
    )


def _ask(asked: Asked) -> Found:
    from .measure import Found, Sizes, Step

    words = (str(asked.nodes), str(asked.prompts), str(asked.steps), json.dumps(dataclasses.asdict(asked.work)))
    command = [sys.executable, "-m", f"{__package__}.measure", *words]
    environment = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            out, said = process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise BenchError(
                f"with {asked.nodes} nodes it took more than {_LIMIT_S:g} s; ask for fewer nodes or steps"
            ) from None
        finally:
            process.terminate()  # where it still runs, it ends all of its Ray first
            process.wait()
    if process.returncode:
        last = (said.strip().splitlines() or ["no message"])[-1]
        raise BenchError(f"the process with {asked.nodes} nodes ended with code {process.returncode}: {last}")
    fields = json.loads(out)
    parts: dict[str, Any] = {
        "idle": Step(**fields["idle"]),
        "steps": [Step(**step) for step in fields["steps"]],
        "sizes": Sizes(**fields["sizes"]),
        "resident": tuple(fields["resident"]),
        "shares": tuple(fields["shares"]),
    }
    return Found(**fields | parts)


def to_json(rows: Sequence[Row], wanted: Request, machine: Machine) -> dict[str, Any]:
    """machine, work, prompts, steps, rows."""
    return {
        "machine": dataclasses.asdict(machine),
        "work": {"name": wanted.shape, **dataclasses.asdict(SHAPES[wanted.shape])},
        "prompts": wanted.prompts,
        "steps": wanted.steps,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


_COLUMNS = (
    "nodes", "ranks", "CPU ms/rollout", "idle CPU ms/s", "TCP in B", "out", "summary B", "job", "scores", "told", "MiB before",
    "after", "groups/s", "fetched", "most",
)  # fmt: skip
NOTES = (
    "CPU: user and system of the run's process, all threads, an idle one's taken off; median (least..most) of the steps. "
    "Groups/s are those of fake nodes that all share this machine.",
    "bytes a rollout: TCP, on all connections of the process, Ray's own included; summary (comes in), job and scores (to the "
    "node) and told (to the ranks, once): pickled.",
    "fetched: bytes that a rank fetched in a step, over an even share of all groups; mean, and of the rank and step with most.",
    "Checked before anything is shown: each group is trained once and none is lost; what ranks fetched is what its summary "
    "says; no rollout, image or array of one is in the run's process.",
)


def _cells(row: Row) -> list[str]:
    cpu = row.cpu_ms
    sizes = (row.tcp_in, row.tcp_out, row.summaries, row.jobs, row.scored, row.told)
    return [
        str(row.nodes),
        str(row.ranks),
        f"{cpu[0]:.3f} ({cpu[1]:.3f}..{cpu[2]:.3f})",
        f"{row.idle_cpu_ms:.1f}",
        *(f"{size:.0f}" for size in sizes),
        *(f"{size / _MIB:.0f}" for size in row.resident),
        f"{row.groups_per_s:.1f}",
        f"{row.fetched:.2f}",
        f"{row.fetched_most:.2f}",
    ]


def to_text(rows: Sequence[Row], wanted: Request, machine: Machine) -> str:
    """A table for a terminal."""
    work: Work = SHAPES[wanted.shape]
    sizes = f"images of {work.image[0]} x {work.image[1]}, crops of {work.crop[0]} x {work.crop[1]}"
    head = (
        f"scale {wanted.shape}: {wanted.prompts} prompts a step, {work.rollouts} rollouts each, {sizes}, "
        f"{work.messages} messages, {work.tokens:,} tokens; {wanted.steps} steps"
    )
    place = f"{machine.cpu}, {machine.cores} cores, torch {machine.torch}"
    return "\n".join([head, place, "", *aligned([_COLUMNS, *map(_cells, rows)]), "", *NOTES])


def run(args: argparse.Namespace) -> int:
    """Prints a table or the JSON object. Returns the exit code: 1 if something was lost, repeated or not as told."""
    wanted = request(args)
    from .measure import Asked  # here: it needs Ray

    rows: list[Row] = []
    for nodes in tqdm(wanted.nodes, "bench scale", unit="job", file=sys.stderr, disable=None, leave=False):
        asked = Asked(nodes, wanted.prompts, wanted.steps, SHAPES[wanted.shape])
        found = _ask(asked)
        if found.wrong:
            print(f"bench: no figures are shown, with {nodes} nodes {found.wrong[0]}", file=sys.stderr)
            return 1
        rows.append(row_of(found, asked))
    machine = describe(torch.device("cpu"))
    print(json.dumps(to_json(rows, wanted, machine)) if args.json else to_text(rows, wanted, machine))
    return 0
