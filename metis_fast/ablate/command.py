"""The verb `metis-fast ablate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from metis_fast.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML file with base, variants, seeds and budget")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: `jobs` of the file, else 1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of all runs, in place of the file's `out`")
    parser.add_argument("--tables", action="store_true", help="start nothing; write the tables of the runs that have ended")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 if a run failed."""
    from dataclasses import replace

    from metis_fast.ablate import job
    from metis_fast.ablate.spec import read_ablation

    ablation = read_ablation(args.file)
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError(f"--jobs: expected at least 1, got {args.jobs}")
    ablation = replace(ablation, jobs=args.jobs or ablation.jobs, out=args.out or ablation.out)
    failed = job.tables(ablation) if args.tables else job.make(ablation, quiet=args.json)
    _show(ablation.out, args.json)
    return int(failed > 0)


def _show(out: Path, as_json: bool) -> None:
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(results))
        return
    print((out / "results.md").read_text(encoding="utf-8"))
    written = [out / name for name in ("results.md", "results.svg", "profile.md", "boundary.md", "boundary.svg")]
    print(f"written: {', '.join(str(path) for path in written if path.exists())}")
    if results["variants"]:
        print(f"page: metis-fast view {out}")
