"""The verbs of `metis-fast judge`: try a judge on labelled examples, judge a run's rollouts again."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from metis_fast import config as config_module
from metis_fast.errors import ConfigError
from metis_fast.report.progress import progress

AddVerb = Callable[
    ["argparse._SubParsersAction[argparse.ArgumentParser]", str, Callable[[argparse.Namespace], int], str],
    argparse.ArgumentParser,
]


def add_verbs(judge: argparse._SubParsersAction, verb: AddVerb) -> None:
    """Put the verbs under `judge`. verb: adds one, with what runs it and what it is for."""
    text = "Try a judge on labelled examples; exit code 1 if it disagrees with a label or gives no verdict."
    sub = verb(judge, "check", _check, text)
    sub.add_argument("file", type=Path, metavar="FILE", help="examples: .tsv, .jsonl or .parquet (docs/llm-judge.md)")
    _add_settings(sub, "YAML file; none: the defaults")
    sub.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="ask N times, to find what it contradicts itself on (default 1)"
    )
    text = "Judge a run's stored rollouts again, with its own or another judge; exit code 1 if verdicts are missing."
    sub = verb(judge, "rescore", _rescore, text)
    sub.add_argument("run_dir", type=Path, metavar="RUN", help="run folder (run.dir), with its stored rollouts")
    _add_settings(sub, "YAML file; none: the config of the run")
    sub.add_argument("--out", type=Path, metavar="FILE", help="for the verdicts; default: RUN/verdicts/<judge>.jsonl")


def _add_settings(sub: argparse.ArgumentParser, text: str) -> None:
    sub.add_argument("config", nargs="?", action=_FileOrSetting, help=text)
    sub.add_argument(
        "overrides",
        nargs="*",
        action="extend",
        default=[],
        metavar="section.key=value",
        help="settings that go before the file's",
    )
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")


class _FileOrSetting(argparse.Action):
    """A file may be left out: a first word with an equals sign that names none is a setting already."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[str] | None,
        option_string: str | None = None,
    ) -> None:
        if values is None:
            return
        word = str(values)
        if "=" in word and not Path(word).exists():
            namespace.overrides = [*namespace.overrides, word]
        else:
            namespace.config = Path(word)


def _check(args: argparse.Namespace) -> int:
    from metis_fast.recording.opening import open_recording
    from metis_fast.score.check import check_examples, render_json, render_text
    from metis_fast.score.examples import read_examples

    if args.repeats < 1:
        raise ConfigError(f"--repeats: expected a number from 1 on, got {args.repeats}")
    config, examples = config_module.load(args.config, args.overrides), read_examples(args.file)
    with ExitStack() as stack:
        if recording := open_recording(config):
            stack.callback(recording.close)
        bar = stack.enter_context(progress(len(examples) * args.repeats, "judge", config.log, "example"))
        found = asyncio.run(check_examples(examples, config.score, args.repeats, bar.update, recording))
    print(render_json(found) if args.json else render_text(found))
    return found.exit_code


def _rescore(args: argparse.Namespace) -> int:
    from metis_fast.recording.opening import open_recording
    from metis_fast.score.rescore import count_rollouts, default_out, named, parts_of, rescore
    from metis_fast.score.rescore_report import render_json, render_text

    parts = parts_of(args.run_dir)
    own = args.run_dir / "config.yaml"
    config = config_module.load(args.config or (own if own.exists() else None), args.overrides)
    styles = count_rollouts(parts, config.score)
    with ExitStack() as stack:
        if recording := open_recording(config):
            stack.callback(recording.close)
        score = asyncio.run(named(config.score, styles, recording))
        out = args.out or default_out(args.run_dir, score)
        bar = stack.enter_context(progress(styles.total(), "judge", config.log, "rollout"))
        found = asyncio.run(rescore(parts, styles, config.score, out, bar.update, recording))
    print(render_json(found) if args.json else render_text(found))
    return int(bool(found.failures))
