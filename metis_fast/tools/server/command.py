"""The verb `metis-fast tools serve`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from metis_fast import config as config_module
from metis_fast.errors import ConfigError, ToolSetupError

AddVerb = Callable[
    ["argparse._SubParsersAction[argparse.ArgumentParser]", str, Callable[[argparse.Namespace], int], str],
    argparse.ArgumentParser,
]


def add_verbs(tools: argparse._SubParsersAction, verb: AddVerb) -> None:
    """Put the verb under `tools`. verb: adds one, with what runs it and what it is for."""
    sub = verb(tools, "serve", _serve, "Serve the tools of a config to other machines and other trainers, until SIGTERM.")
    sub.add_argument("config", type=Path, help="YAML file with what differs from the defaults")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that go before the file's")
    sub.add_argument(
        "--unsafe-tools", action="store_true", help="run model-written code without a sandbox (throw-away machines only)"
    )
    sub.add_argument("--json", action="store_true", help="print address and tools as one JSON object")


def _serve(args: argparse.Namespace) -> int:
    try:
        from metis_fast.tools.server.serving import serve
    except ModuleNotFoundError as error:
        raise ToolSetupError(f"tools serve needs {error.name}; in the project's folder: pip install -e '.[server]'") from None

    extra = ["tools.python.unsafe=true"] if args.unsafe_tools else []
    tools = config_module.load(args.config, [*args.overrides, *extra]).tools
    if tools.record is not None or tools.replay is not None:
        name = "record" if tools.record is not None else "replay"
        raise ConfigError(
            f"tools.{name}={getattr(tools, name)}: a server keeps no recording, since it does not know whose rollout a call is "
            f"of; leave it to the run that asks (here: tools.{name}=null)"
        )

    def ready(url: str) -> None:
        text = json.dumps({"url": url}) if args.json else f"tool server: {url}"
        print(text, flush=True)

    serve(tools, ready)
    return 0
