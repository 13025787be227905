"""Further verbs of `metis-fast benchmark`: run some, compare two runs, print tables, export replies for other kits."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metis_fast import config as config_module
from metis_fast.errors import ConfigError

if TYPE_CHECKING:
    from metis_fast.data.command import AddVerb

_SETTING = re.compile(r"([\w.-]+)=")


def add_running_verbs(benchmark: argparse._SubParsersAction, verb: AddVerb) -> None:
    """Put the verbs under `benchmark`."""
    sub = verb(
        benchmark, "run", _run, "Play benchmarks with the engines and tools of a config, and score them; again: go on. "
        "Exit code 1 if replies are missing, or verdicts, as the judge failed.",
    )  # fmt: skip
    sub.add_argument("config", type=Path, help="YAML file with what differs from the defaults")
    sub.add_argument(
        "overrides", nargs="*", action=_NamesAndSettings, metavar="NAME or key=value",
        help="benchmarks, none: all of benchmark.files; settings, those of `benchmark` without its name (tools=off)",
    )  # fmt: skip
    sub.add_argument("--unsafe-tools", action="store_true", help="run model-written code without a sandbox")
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")

    sub = verb(benchmark, "compare", _compare, "Paired tests between two runs, on the questions that both have.")
    sub.add_argument("first", type=Path, metavar="A", help="a run folder, or the folder of one benchmark in it")
    sub.add_argument("second", type=Path, metavar="B")
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
    sub = verb(benchmark, "table", _table, "Results of runs as a table: Markdown, or another form.")
    sub.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    sub.add_argument("--paper", action="store_true", help="beside the numbers of the paper and of its base model")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the result as one JSON object")
    form.add_argument("--html", action="store_true", help="a section of a page")
    form.add_argument("--latex", action="store_true", help="a tabular")
    sub = verb(benchmark, "export", _export, "Write the replies of a run in the forms of other kits.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--vlmeval", type=Path, metavar="DIR", help="a work-dir of VLMEvalKit, for its --mode eval")
    sub.add_argument("--lmms-eval", type=Path, metavar="DIR", help="an output folder of lmms-eval")
    sub.add_argument("--model", default="metis-fast", metavar="NAME", help="what the kits are to call the model")
    sub.add_argument("--rollout", type=int, default=0, metavar="N", help="which of several replies (default 0)")
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")


class _NamesAndSettings(argparse.Action):
    """`names` are those of benchmarks, `overrides` settings as `config.load` takes them."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option_string: str | None = None) -> None:
        """See argparse."""
        namespace.names, namespace.overrides = _split(values if isinstance(values, list) else [])


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    own = config_module.BenchmarkConfig.model_fields
    names: list[str] = []
    settings: list[str] = []
    for word in words:
        if (key := _SETTING.match(word)) is None:
            names.append(word)
        else:
            ours = key[1] in own or key[1].startswith("files.")  # `tools` is one, `tools.enabled` is not
            settings.append(f"benchmark.{word}" if ours else word)
    return names, settings


def _run(args: argparse.Namespace) -> int:
    from transformers.utils import logging as transformers_logging

    from metis_fast.evaluate.result import judge_failures
    from metis_fast.evaluate.run import as_json, run_benchmarks, summary
    from metis_fast.run.folder import held

    transformers_logging.disable_progress_bar()  # they also go to files, and would surround the one line of an error
    more, settings = _split(args.overrides)  # what stood behind an option came there unread
    names = [*args.names, *more]
    settings += ["tools.python.unsafe=true"] if args.unsafe_tools else []
    config = config_module.load(args.config, settings)
    with held(config.run.dir):
        results = run_benchmarks(config, names)
    print(as_json(results) if args.json else summary(results))
    return int(not all(result["complete"] and not judge_failures(result) for result in results.values()))


def _compare(args: argparse.Namespace) -> int:
    from metis_fast.evaluate.compare import as_json, as_text, compare_runs

    compared = compare_runs(args.first, args.second)
    print(json.dumps(as_json(compared)) if args.json else as_text(compared))
    return 0


def _table(args: argparse.Namespace) -> int:
    from metis_fast.evaluate import table

    made = table.make_table(args.runs, args.paper)
    forms = {"json": table.as_json, "html": table.as_html, "latex": table.as_latex}
    chosen = next((form for name, form in forms.items() if getattr(args, name)), table.as_markdown)
    print(chosen(made))
    return 0


def _export(args: argparse.Namespace) -> int:
    from metis_fast.evaluate.export import export_lmms_eval, export_vlmeval
    from metis_fast.evaluate.result import read_results

    if args.vlmeval is None and args.lmms_eval is None:
        raise ConfigError("benchmark export: expected --vlmeval DIR or --lmms-eval DIR, got neither; name one")
    stored = read_results(args.run_dir)
    written: list[Path] = []
    if args.vlmeval is not None:
        written += export_vlmeval(stored, args.vlmeval, args.model, args.rollout)
    if args.lmms_eval is not None:
        written += export_lmms_eval(stored, args.lmms_eval, args.model, args.rollout)
    print(json.dumps([str(path) for path in written]) if args.json else "\n".join(map(str, written)))
    return 0
