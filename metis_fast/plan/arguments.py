"""Options of `metis-fast plan`. Imported with the command line: nothing heavy here."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    parser.add_argument("config", type=Path, help="YAML file with what differs from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that go before the file's")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs in all; default: those of train.megatron, else 8")
    parser.add_argument("--gpu", choices=["h100", "h200", "b200"], default="h100")
    parser.add_argument("--model", type=Path, metavar="FILE_OR_FOLDER", help="config.json; default: model.path, model.config")
    parser.add_argument(
        "--engine-share", type=float, metavar="F",
        help="share of every GPU's memory that a rollout engine keeps; 0: it has other GPUs, or sleeps "
        "(default 0.3, with rollout.vllm.sleep 0)",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="mean; default: an eighth of rollout.max_prompt_tokens")
    parser.add_argument("--response-tokens", type=int, metavar="N", help="mean, observations included; default: an eighth")
    parser.add_argument("--sampled", type=float, default=0.5, metavar="F", help="share of the response that is sampled")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="of a prompt (default 1)")
    parser.add_argument("--image-tokens", type=int, default=1024, metavar="N", help="of an image (default 1024)")
    parser.add_argument("--uniform", type=float, default=0.2, metavar="F", help="share of groups without any advantage")
    parser.add_argument("--image-megapixels", type=float, default=3.1, metavar="F", help="of an image in the data (3.1)")
    parser.add_argument("--calls", type=float, default=1.0, metavar="F", help="of tools, a rollout (default 1)")
    parser.add_argument("--cores", type=float, default=96.0, metavar="N", help="of a machine (default 96); above: a warning")
    parser.add_argument("--memory-gb", type=float, default=1024.0, metavar="N", help="of a machine, in GiB (default 1024)")
    parser.add_argument("--json", action="store_true", help="print all layouts as one JSON object")
