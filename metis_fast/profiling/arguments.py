"""The arguments of `metis-fast profile`: apart from what runs it, which imports torch."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own arguments."""
    parser.add_argument("config", type=Path, help="YAML file with what differs from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that go before the file's")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="that are recorded, after one to warm up (default 3)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for trace, tables and the copy")
    parser.add_argument("--no-ops", action="store_true", help="leave torch's profiler out, which slows the last step down")
    parser.add_argument("--json", action="store_true", help="print the tables as one JSON object")
