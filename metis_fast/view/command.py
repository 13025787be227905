"""The verb `metis-fast view`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from metis_fast.errors import ConfigError

_PORT = 8600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own arguments."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run or an ablation, or one that has runs right below it"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=_PORT, metavar="N", help=f"0: any that is free (default {_PORT})")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="of the model, for the text of tokens; default: the run's own"
    )
    parser.add_argument("--json", action="store_true", help="print the address as a JSON object")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        from metis_fast.view.serving import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise ConfigError(f"view needs {error.name}; in the project's folder: pip install -e '.[server]'") from None

    def ready(url: str) -> None:
        print(json.dumps({"url": url}) if args.json else f"runs: {url}", flush=True)

    serve(args.runs, args.host, args.port, args.tokenizer, ready)
    return 0
