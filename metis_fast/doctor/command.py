"""The command `metis-fast doctor`: checks one after the other, a line for each thing that was looked at, or JSON."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from metis_fast import config as config_module
from metis_fast.config import Config
from metis_fast.data.parquet import PromptFiles
from metis_fast.demo.command import is_demo, missing_stages, resolve
from metis_fast.doctor import conversations, inputs, machine, services
from metis_fast.doctor.finding import Check, Finding, refused
from metis_fast.errors import MetisError
from metis_fast.plan.cold_start import as_trained, is_cold_start
from metis_fast.plan.shape import read_model_config

_WHAT = 18  # characters of the second column
_LEAST = 60  # of a terminal's width that lines are fitted to


def run(args: argparse.Namespace) -> int:
    """The command. Exit code 1: an error was found."""
    found: list[tuple[str, Finding]] = []
    for area, finding in findings(args):
        found.append((area, finding))
        if not args.json:
            new = area != (found[-2][0] if len(found) > 1 else "")
            print(("\n" if new and len(found) > 1 else "") + (f"{area}\n" if new else "") + line(finding), flush=True)
    states = Counter(finding.state for _, finding in found)
    if args.json:
        print(json.dumps({"findings": [{"area": area, **asdict(one)} for area, one in found], "errors": states["error"]}))
    else:
        print(f"\n{_counted(states['error'], 'error')}, {_counted(states['warning'], 'warning')}, {states['ok']} ok")
    return 1 if states["error"] else 0


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def line(finding: Finding) -> str:
    """A finding for people, fitted to the terminal; what to do stands below it."""
    width = max(_LEAST, shutil.get_terminal_size((120, 24)).columns)
    head, indent = f"  {finding.state:8}{finding.what:{_WHAT}} ", " " * (10 + _WHAT + 1)
    if len(head) > len(indent):
        head += "\n" + indent
    text = textwrap.fill(finding.found, width - len(indent), break_on_hyphens=False, break_long_words=False)
    if finding.advice:
        text += "\n" + textwrap.fill(finding.advice, width - len(indent), initial_indent="-> ", subsequent_indent="   ",
                                     break_on_hyphens=False, break_long_words=False)  # fmt: skip
    return head + text.replace("\n", f"\n{indent}")


def findings(args: argparse.Namespace) -> Iterator[tuple[str, Finding]]:
    """All of them, by area. A config that cannot be read is the last."""
    try:
        config = config_module.load(args.config, args.overrides)
    except MetisError as error:
        yield "settings", refused("config", error)
        return
    yield "settings", Finding("config", "ok", f"{args.config} can be read")
    missing = list[str]()
    if is_demo(config):
        config = resolve(config)
        try:
            missing = missing_stages(config)
        except MetisError as error:
            yield "settings", refused("demo", error)
            return
    if missing:
        advice = f"{shlex.join(['metis-fast', 'demo', str(args.config), *args.overrides])} makes them; ask again then"
        yield "settings", Finding("demo", "warning", f"not made yet in {config.run.dir}: {', '.join(missing)}", advice)
    for check in checks(config, args.offline):
        if missing and check.area not in ("machine", "packages"):
            continue
        if sys.stderr.isatty():
            print(f"  {check.area} ...", end="\r", file=sys.stderr)
        for finding in check.findings():
            yield check.area, finding


def checks(config: Config, offline: bool) -> Iterator[Check]:
    """What is looked at, in this order: cheap things first."""
    if is_cold_start(config):
        config = as_trained(config)
    yield Check("machine", partial(machine.machine, config, *_num_parameters(config)))
    yield Check("packages", partial(machine.packages, config))
    yield Check("model", partial(inputs.model, config))
    if config.train.backend == "megatron":
        yield Check("layout", partial(inputs.layout, config))
    if config.sft.phases:
        yield Check("sft", partial(conversations.sft, config))
    if not config.data.train and not config.sft.phases:
        yield Check("data.train", lambda: [Finding("data.train", "error", "names no prompts", "set data.train, or sft.phases")])
    for key, paths in (("data.train", config.data.train), ("data.heldout", config.data.heldout)):
        if paths:
            yield Check(key, partial(inputs.prompts, config, key, paths, offline))
    if config.data.train:  # a cold start plays nothing
        if config.tools.server.url and config.tools.replay is None:  # the server has what tools need, not this machine
            yield Check("tools", partial(services.server, config, offline), what="tools.server")
        else:
            for name in config.tools.enabled:
                yield Check("tools", partial(services.tool, config, name, offline), what=str(name))
            if config.tools.own or config.tools.mcp:
                yield Check("tools", partial(services.others, config), what="others")
        yield Check("judges", partial(services.judges, config, _styles(config), offline))
    if config.workers.launcher == "ray":
        yield Check("Ray", partial(services.ray, config))


def _num_parameters(config: Config) -> tuple[int, int]:
    """Of the model, and of what is trained."""
    try:
        shape = read_model_config(config, None)
    except MetisError:  # the check of the model says so
        return 0, 0
    return inputs.num_parameters(shape), inputs.num_parameters(shape, config.model.freeze)


def _styles(config: Config) -> set[str]:
    try:
        return {style for paths in (config.data.train, config.data.heldout) if paths for style in PromptFiles(paths).styles()}
    except MetisError:  # the check of the data says so
        return set()
