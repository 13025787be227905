"""The verbs of processes that work for a run, and what shows which of them holds what."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _rank(args: argparse.Namespace) -> int:
    from metis_fast.train.megatron import rank

    return rank.run(args.join, args.rank, args.wait)


_RANK = """One process of the Megatron back end, for a run with train.megatron.launch=join: it joins the run and serves it until
the run ends. Start one for every GPU of the layout, in any order, before or after the run; they need the same metis-fast and,
in METIS_RANK_KEY, the same secret as the run. With launch=local the run starts its ranks itself."""
_RANK_EPILOG = """example, on a node that Slurm gave (docs/cluster.md); several nodes: workers.launcher=ray
  export METIS_RANK_KEY=$(openssl rand -hex 16)         before both; never on a command line
  metis-fast train my.yaml train.megatron.launch=join train.megatron.listen=127.0.0.1:29400 &
  srun --ntasks-per-node=8 metis-fast rank --join 127.0.0.1:29400
Ctrl-C and SIGTERM are for the run, which then stops at a safe point and ends its ranks; a rank that has joined ignores both."""


def _add_rank(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.description = argparse.RawDescriptionHelpFormatter, _RANK
    parser.epilog = _RANK_EPILOG
    parser.add_argument("--join", required=True, metavar="HOST:PORT", help="where the run listens (train.megatron.listen)")
    parser.add_argument("--rank", type=int, metavar="N", help="number of this rank, from 0; default: SLURM_PROCID, else RANK")
    parser.add_argument(
        "--wait", type=float, default=600.0, metavar="SECONDS", help="for a run that does not listen yet (default 600)"
    )


def _worker(args: argparse.Namespace) -> int:
    from metis_fast.workers import server

    return server.run(args.join, args.name, args.wait)


def _add_worker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--join", required=True, metavar="HOST:PORT", help="where the run listens")
    parser.add_argument("--name", required=True, help="which worker of the run this is, for example engine-0")
    parser.add_argument(
        "--wait", type=float, default=60.0, metavar="SECONDS", help="for a run that does not listen yet (default 60)"
    )


def _weights_map(args: argparse.Namespace) -> int:
    from metis_fast.train.megatron import weights_map

    return weights_map.run(args)


def _add_weights_map(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder, or a config.json alone")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor-parallel ranks; no size given: all layouts up to 8 x 8")
    parser.add_argument("--pp", type=int, metavar="N", help="pipeline stages")
    parser.add_argument("--vpp", type=int, metavar="N", help="chunks a stage (interleaved schedule)")
    parser.add_argument("--first", type=int, metavar="N", help="layers of the first stage; default: as many as the others")
    parser.add_argument("--last", type=int, metavar="N", help="layers of the last stage; default: as many as the others")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def add_verbs(verbs: Any, verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Below `metis-fast`. verb: makes one."""
    weights = verbs.add_parser("weights", help="Which rank of a layout holds which weights.").add_subparsers(
        required=True, metavar="VERB"
    )
    text = (
        "Names, shapes and bytes of a model's weights on every rank, checked both ways; exit code 1 if no layout can hold them."
    )
    _add_weights_map(verb(weights, "map", _weights_map, text))
    _add_rank(verb(verbs, "rank", _rank, "A process of the Megatron back end: joins a run on a cluster."))
    _add_worker(
        verb(verbs, "worker", _worker, "A process that works for a run (an engine, tools, a judge); the run starts it itself.")
    )
