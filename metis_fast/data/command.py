"""The verbs of `metis-fast data`: check files, write the demo set, write stand-ins for published data."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from metis_fast import config as config_module
from metis_fast.errors import ConfigError

if TYPE_CHECKING:
    from metis_fast.tools.protocol import ToolSpec
    from metis_fast.types import Prompt

AddVerb = Callable[
    ["argparse._SubParsersAction[argparse.ArgumentParser]", str, Callable[[argparse.Namespace], int], str],
    argparse.ArgumentParser,
]


def add_verbs(data: argparse._SubParsersAction, verb: AddVerb) -> None:
    """Put the verbs under `data`. verb: adds one, with what runs it and what it is for."""
    sub = verb(data, "check", _check, "Report every row that does not fit the Metis-RL schema; exit code 1 if there is one.")
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE")
    sub.add_argument("--model", type=Path, metavar="FOLDER", help="count the tokens of every prompt, images included")
    sub.add_argument("--config", type=Path, metavar="my.yaml", help="of the run: its tools, judge and prompt limit hold")
    sub.add_argument(
        "--max-prompt-tokens",
        type=int,
        metavar="N",
        help="with --model: longer ones are bad; default: as rollout.max_prompt_tokens",
    )
    sub.add_argument("--processes", type=int, metavar="N", help="that decode images; default: one a core")
    sub.add_argument(
        "--any-style", action="store_true", help="unknown judge styles are no fault: score.judge will name one judge"
    )
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
    sub = verb(data, "demo", _demo, "Write the demo set (Parquet) and its search corpora.")
    sub.add_argument("out", type=Path, metavar="FOLDER")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
    sub.add_argument("overrides", nargs="*", metavar="demo.key=value")
    sub = verb(data, "standin", _standin, "Write small sets in exactly the published formats, to rehearse before a download.")
    sub.add_argument("out", type=Path, metavar="FOLDER")
    sub.add_argument("--rows", type=int, default=32, metavar="N", help="of each set (default 32)")
    sub.add_argument("--pixels", default="2048x1536", metavar="WxH", help="of most images (default 2048x1536)")
    sub.add_argument("--seed", type=int, default=0, metavar="S")
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _check(args: argparse.Namespace) -> int:
    from metis_fast.data.check import check_files
    from metis_fast.data.offers import KNOWN_TOOLS, enabled
    from metis_fast.data.report import render_json, render_text
    from metis_fast.tools import other_tools

    limit = args.max_prompt_tokens
    if limit is not None and (args.model is None or limit < 1):
        raise ConfigError(f"--max-prompt-tokens: expected a number from 1 on and --model, whose tokens it counts, got {limit}")
    config = config_module.load(args.config)
    limit = limit or config.rollout.max_prompt_tokens
    if args.processes is not None and args.processes < 1:
        raise ConfigError(f"--processes: expected a number from 1 on, got {args.processes}")
    others = other_tools(config.tools)
    counter = partial(_token_counter, args.model, config.tools, others) if args.model else None
    if counter is not None:
        counter()  # what is wrong with the model is said once, and by this process
    known = (KNOWN_TOOLS if args.config is None else enabled(config.tools.enabled)).union(tool.name for tool in others)
    any_style = args.any_style or config.score.judge != "by_row"
    report = check_files(args.files, not args.json, counter, limit, args.processes, any_style, known)
    print(render_json(report) if args.json else render_text(report))
    return report.exit_code


def _token_counter(model: Path, tools: config_module.ToolsConfig, others: Sequence[ToolSpec]) -> Callable[[Prompt], int]:
    """Tokens of a prompt as a run with this model would encode it. Its weights are not read. others: see `other_tools`."""
    from metis_fast.model_folder import check_model_folder, load_processor, load_tokenizer
    from metis_fast.pictures import ImagePreparer
    from metis_fast.rollout.chat import Chat
    from metis_fast.rollout.offer import Offer

    check_model_folder(model)
    images = ImagePreparer(load_processor(model), cache_bytes=0)
    chat = Chat(load_tokenizer(model), images, offer=Offer(tools, others))
    return lambda prompt: len(chat.encode_prompt(prompt).tokens)


def _demo(args: argparse.Namespace) -> int:
    from metis_fast.demo.command import demo_sizes
    from metis_fast.demo.files import write_demo

    config = config_module.load(None, args.overrides)
    paths = write_demo(args.out, args.seed, demo_sizes(config), lambda line: print(line, file=sys.stderr, flush=True))
    return _print_paths(dataclasses.asdict(paths), args.json)


def _standin(args: argparse.Namespace) -> int:
    from metis_fast.standin import write_standin
    from metis_fast.standin.sizes import picture_size

    size = picture_size(args.pixels)
    if args.rows < 1:
        raise ConfigError(f"data standin: expected --rows from 1 on, got {args.rows}")
    return _print_paths(dataclasses.asdict(write_standin(args.out, args.rows, size, args.seed)), args.json)


def _print_paths(paths: dict[str, Path], as_json: bool) -> int:
    named = {name: str(path) for name, path in paths.items()}
    width = max(13, *map(len, named))
    print(json.dumps(named) if as_json else "\n".join(f"{name:{width}} {path}" for name, path in named.items()))
    return 0
