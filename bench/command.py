"""The command: its options checked, one op run, a table or JSON printed."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from . import full_attention, group_advantage, hdpo_loss, linear_logprob, patchify, prefix_attention
from .candidate import BenchError, Op, Request
from .compare import compare
from .rollout import run as rollout
from .scale import run as scale
from .table import notes, to_json, to_text
from .tools import run as tools
from .update_step import run as update_step

OPS: dict[str, Op] = {
    "group_advantage": group_advantage.OP,
    "linear_logprob": linear_logprob.OP,
    "hdpo_loss": hdpo_loss.OP,
    "prefix_attention": prefix_attention.OP,
    "full_attention": full_attention.OP,
    "patchify": patchify.OP,
}

WHOLE = {"update_step": update_step, "rollout": rollout, "scale": scale, "tools": tools}
"""What is no single op: modules with a SUMMARY, SHAPES by name, and a run of their own."""

MIN_RUNS = 5
"""The default. A spread of fewer says little."""


def list_ops() -> str:
    """A line for each op."""
    lines = []
    for name, op in OPS.items():
        shape = ",".join(f"{letter}={size}" for letter, size in op.shape.items())
        lines.append(
            f"{name:16} {op.summary}\n{'':16} shape {shape}; dtypes {', '.join(op.dtypes)}; peers {', '.join(op.peers)}"
        )
    lines += [f"{name:16} {other.SUMMARY}\n{'':16} shapes {', '.join(other.SHAPES)}" for name, other in WHOLE.items()]
    return "\n".join(lines)


def _shape(text: str, op: Op) -> dict[str, int]:
    """The op's default sizes, those of `text` ("T=2048,H=1024") replaced."""
    shape = dict(op.shape)
    for word in filter(None, text.split(",")):
        letter, _, size = word.partition("=")
        if letter not in shape or not size.isdecimal() or int(size) < 1:
            expected = ",".join(f"{name}=<size>" for name in shape)
            raise BenchError(f"--shape: expected {expected}, got {word!r}")
        shape[letter] = int(size)
    return shape


def _peers(text: str | None, name: str, op: Op) -> tuple[str, ...]:
    if text is None:
        return op.peers
    wanted = tuple(filter(None, text.split(",")))
    for peer in wanted:
        if peer not in op.peers:
            raise BenchError(f"--peers: expected names out of {', '.join(op.peers)} for {name}, got {peer!r}")
    return wanted


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: torch sees no CUDA device here")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def request(args: argparse.Namespace, name: str, op: Op) -> Request:
    """The options of the command line for `op`.

    Raises:
        BenchError: one of them is not as stated.
    """
    dtype = args.dtype or op.dtypes[0]
    if dtype not in op.dtypes:
        raise BenchError(f"--dtype: expected {' or '.join(op.dtypes)} for {name}, got {dtype!r}")
    if not 0 < args.live_fraction <= 1:
        raise BenchError(f"--live-fraction: expected a number in (0, 1], got {args.live_fraction}")
    if op.all_live and args.live_fraction != 1:
        raise BenchError(f"--live-fraction: {name} has work for every token, so it can only be 1; got {args.live_fraction}")
    runs = MIN_RUNS if args.runs is None else args.runs
    if runs < MIN_RUNS:
        raise BenchError(f"--runs: expected {MIN_RUNS} or more, got {args.runs}")
    threads = 2 if args.threads is None else args.threads
    if threads < 1:
        raise BenchError(f"--threads: expected 1 or more, got {threads}")
    if args.engine is not None:
        raise BenchError(f"--engine: {name} has none; it is for rollout")
    return Request(
        shape=_shape(args.shape, op),
        dtype=dtype,
        live_fraction=args.live_fraction,
        peers=_peers(args.peers, name, op),
        runs=runs,
        threads=threads,
        device=_device(args.device),
        seed=args.seed,
    )


def run(args: argparse.Namespace) -> int:
    """The verb `bench`, its options as `metis_fast.cli` declares them. Returns the exit code: 1 if one of ours is wrong."""
    if args.op is None:
        summaries = {name: op.summary for name, op in OPS.items()} | {name: other.SUMMARY for name, other in WHOLE.items()}
        print(json.dumps(summaries) if args.json else list_ops())
        return 0
    if args.op not in ("rollout", "scale") and (args.image, args.crop, args.prompts) != (None, None, None):
        raise BenchError(f"--image, --crop, --prompts: {args.op} has no images; they are for rollout")
    if args.op != "scale" and (args.nodes, args.steps) != (None, None):
        raise BenchError(f"--nodes, --steps: {args.op} has none; they are for scale")
    if args.op in WHOLE:
        return WHOLE[args.op].run(args)
    if args.op not in OPS:
        raise BenchError(f"unknown op {args.op!r}; expected one of {', '.join([*OPS, *WHOLE])}")
    op = OPS[args.op]
    report = compare(args.op, op, request(args, args.op, op))
    if args.json:
        print(json.dumps(to_json(report)))
        print("\n".join(notes(report)), file=sys.stderr)
    else:
        print(to_text(report))
    for row in report.rows:
        if row.failed:
            print(f"bench: {row.impl} is outside its limits, no speed shown: {row.failed}", file=sys.stderr)
    return 1 if report.failed else 0
