"""The verb `metis-fast report`."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from metis_fast.errors import ConfigError

_LIMIT_MB = 30.0
_LOG = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own arguments."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folder of train, sft or demo (run.dir); with --out several, or one above",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page of `metis-fast view` as one file, instead of RUN/report.html"
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="MB",
        help=f"of --out: size of the file at most (default {_LIMIT_MB:g}); sets how many rollouts",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="of --out: of the model, for the text of tokens; default: the run's own",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Write the report; print where it is."""
    if args.out is not None:
        return _one_file(args)
    if args.limit is not None or args.tokenizer is not None:
        raise ConfigError("--limit and --tokenizer belong to --out FILE; name the file, or leave them out")
    if len(args.runs) > 1:
        raise ConfigError(f"expected one run, got {len(args.runs)}; give --out FILE for one page of several")
    from metis_fast.report.html import write_report

    notes: list[str] = []
    path = write_report(args.runs[0], notes.append)
    _warn(notes)
    print(json.dumps({"report": str(path), "notes": notes}) if args.json else path)
    return 0


def _warn(notes: Sequence[str]) -> None:
    if notes:
        things = "one thing is" if len(notes) == 1 else f"{len(notes)} things are"
        _LOG.warning(
            "%s missing or left out, which the page names; %s%s", things, "" if len(notes) == 1 else "first: ", notes[0]
        )


def _one_file(args: argparse.Namespace) -> int:
    from metis_fast.view.file import MB, write_file
    from metis_fast.view.run import open_runs

    limit = _LIMIT_MB if args.limit is None else args.limit
    if not (math.isfinite(limit) and limit > 0):
        raise ConfigError(f"--limit: expected MB above 0, got {limit:g}")
    shows = sys.stderr.isatty()

    def progress(kept: int) -> None:
        if shows:
            print(f"\r{kept} rollouts", end="", file=sys.stderr, flush=True)

    written = write_file(open_runs(args.runs, args.tokenizer), args.out, int(limit * MB), progress)
    if shows:
        print("\r\033[K", end="", file=sys.stderr)
    _warn(written.notes)
    if args.json:
        numbers = {"bytes": written.size, "rollouts": written.kept, "stored": written.stored}
        print(json.dumps({"report": str(written.path), **numbers, "notes": written.notes}))
    else:
        print(f"{written.path} ({written.size / MB:.1f} MB, {written.kept} of {written.stored} rollouts)")
    return 0
