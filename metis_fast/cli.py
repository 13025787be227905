"""The command line: `metis-fast VERB`. One verb per job; exit code 0 only on success.

0 done; 2 something that you can mend (one line on stderr says what); 130 stopped by Ctrl-C or SIGTERM, state saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metis_fast import __version__
from metis_fast import config as config_module
from metis_fast.ablate.command import add_arguments as add_ablate_arguments
from metis_fast.config import Config
from metis_fast.data.command import add_verbs as add_data_verbs
from metis_fast.errors import ConfigError, Interrupted, MetisError
from metis_fast.evaluate.command import add_verbs as add_benchmark_verbs
from metis_fast.plan.arguments import add_plan_arguments
from metis_fast.profiling.arguments import add_arguments as add_profile_arguments
from metis_fast.report.command import add_arguments as add_report_arguments
from metis_fast.run.folder import held
from metis_fast.score.command import add_verbs as add_judge_verbs
from metis_fast.tools.server.command import add_verbs as add_tool_verbs
from metis_fast.view.command import add_arguments as add_view_arguments
from metis_fast.workers.command import add_verbs as add_process_verbs

_EPILOG = """examples:
  metis-fast demo                                       the whole story on a laptop, in a quarter of an hour
  metis-fast data check data/*.parquet                  is my data fit for training?
  metis-fast train my.yaml loss.w_tool=0.2              train, with one setting changed; again: resume
  metis-fast report runs/demo                           what happened?
  metis-fast plan my.yaml --gpus 64                     which layout fits, and how long would a step take?
  metis-fast doctor my.yaml                             what would stop this job before its first step?
  metis-fast rehearse my.yaml                           does its whole path work, on a tiny model and stand-in data?
Exit codes: 0 done; 1 a check found something (data check, benchmark check and run, judge, sft --check, doctor, rehearse, plan,
bench), or a run of ablate failed; 2 something that you can mend (one line on stderr says what); 130 stopped, state saved.
Settings are read from a YAML file that holds only what differs from the defaults; `metis-fast config` lists them all."""


_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "disk full ({}); free some space and run the command again"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "no permission to read or write {}; change it, or name another place"
    ),
    errno.ENAMETOOLONG: "{}: this name is longer than a file system takes; choose a shorter one",
    errno.EISDIR: "{} is a folder where a file should be; move it away",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "{}: a file stands where a folder should be; move it away"),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "too many open files ({}); raise the limit (ulimit -n 4096) and run it again"
    ),
}
"""What the operating system refuses anywhere, in words for whoever runs us."""


def _file_or_setting(text: str) -> Path | str:
    """What stands where a file may be left out: the path of one, or already the first setting, with its value or without."""
    key = re.match(r"(\w+)\.[\w.]+", text) if "=" not in text else re.match(r"([\w.\s-]+)=", text)
    if key is None or ("=" not in text and key[1] not in config_module.Config.model_fields):
        return Path(text)
    try:
        is_file = Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or with characters that none has
        is_file = False
    return Path(text) if is_file else text


def _settings_alone(args: argparse.Namespace) -> tuple[Path | None, list[str]]:
    """File and overrides of a verb that takes settings without a file, too."""
    return (None, [args.config, *args.overrides]) if isinstance(args.config, str) else (args.config, args.overrides)


def _add_config(
    parser: argparse.ArgumentParser, text: str = "YAML file with what differs from the defaults", optional: bool = False
) -> None:
    parser.add_argument("config", type=_file_or_setting if optional else Path, nargs="?" if optional else None, help=text)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that go before the file's")
    parser.add_argument(
        "--unsafe-tools", action="store_true", help="run model-written code without a sandbox (throw-away machines only)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # they also go to files, and would surround the one line of an error


def _load(args: argparse.Namespace) -> Config:
    """The config of a verb that loads or writes models."""
    _quiet()
    extra = ["tools.python.unsafe=true"] if getattr(args, "unsafe_tools", False) else []
    return config_module.load(args.config, [*args.overrides, *extra])


def _without_infinity(value: Any) -> Any:
    """JSON has no infinity; as text, settings read it back."""
    if isinstance(value, dict):
        return {name: _without_infinity(part) for name, part in value.items()}
    return "inf" if value == math.inf else value


def _config(args: argparse.Namespace) -> int:
    path, overrides = _settings_alone(args)
    if args.schema or args.reference:
        if path is not None or overrides:
            raise ConfigError("config --schema and --reference are about all config files; give them no file and no settings")
        from metis_fast.config import reference, schema

        print(json.dumps(schema.schema(), indent=2) if args.schema else reference.reference().rstrip("\n"))
        return 0
    config = config_module.load(path, overrides)
    if args.json:
        tree = config.model_dump(mode="json", exclude_defaults=args.changes)
        print(json.dumps(_without_infinity(tree), allow_nan=False))
    else:
        print(config_module.to_yaml(config, only_changes=args.changes), end="")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from metis_fast.demo import command as demo

    path, args.overrides = _settings_alone(args)
    args.config = path or demo.shipped("demo.yaml")
    return _trained(args, demo.resolve(_load(args)), demo.run)


def _train(args: argparse.Namespace) -> int:
    from metis_fast.run import pipeline

    return _trained(args, _load(args), pipeline.train)


def _trained(args: argparse.Namespace, config: Config, job: Callable[[Config], object]) -> int:
    from metis_fast.report.summary import Summary, print_summary_table

    with held(config.run.dir):
        summary = job(config)
    if args.json:
        path = config.run.dir / "summary.json"
        print(json.dumps(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}))
        return 0
    if isinstance(summary, Summary):
        print_summary_table(summary)
    print(f"report: {config.run.dir / 'report.html'}")
    return 0


def _sft(args: argparse.Namespace) -> int:
    from metis_fast.run.cold_start import sft

    config = _load(args)
    if args.check:
        from metis_fast.sft import check

        if not config.sft.phases:
            raise ConfigError("sft.phases is empty; name at least one set of conversations and its steps or epochs")
        reports = check.check(config)
        print(json.dumps(check.as_json(reports)) if args.json else check.as_text(reports))
        for line in check.advice(reports, config):
            print(f"metis-fast: {line}", file=sys.stderr)
        return int(check.stops(reports, config))
    with held(config.run.dir):
        sft(config, args.out)
    print(json.dumps({"model": str(args.out)}) if args.json else f"model: {args.out}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from metis_fast.report.slices import slice_lines
    from metis_fast.run import pipeline

    rates = pipeline.evaluate(_load(args))
    if args.json:
        print(json.dumps({name: dataclasses.asdict(rate) for name, rate in rates.items()}))
        return 0
    print("\n".join(slice_lines(rates)))
    return 0


def _serve(args: argparse.Namespace) -> int:
    from metis_fast.serve import command

    return command.run(_load(args), args.json)


def _report(args: argparse.Namespace) -> int:
    from metis_fast.report import command

    return command.run(args)


def _view(args: argparse.Namespace) -> int:
    from metis_fast.view import command

    return command.run(args)


def _ablate(args: argparse.Namespace) -> int:
    from metis_fast.ablate import command

    _quiet()
    return command.run(args)


def _profile(args: argparse.Namespace) -> int:
    from metis_fast.profiling import command

    _quiet()
    return command.run(args)


def _bench(args: argparse.Namespace) -> int:
    # by name: a wheel has the files under metis_fast (CMakeLists.txt), a source checkout in bench/
    package = "metis_fast.bench" if importlib.util.find_spec("metis_fast.bench") else "bench"
    return importlib.import_module(f"{package}.command").run(args)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", metavar="OP", help="a kernel, update_step, rollout, scale or tools; none: list them")
    parser.add_argument(
        "--shape", default="", metavar="T=2048,H=1024", help="sizes that differ from a kernel's own; others: a name"
    )
    parser.add_argument("--dtype", metavar="bf16|fp32", help="of hidden states and head")
    parser.add_argument("--live-fraction", type=float, default=1.0, metavar="F", help="share of the tokens with an advantage")
    parser.add_argument("--peers", metavar="A,B", help='which to run beside ours; default: all; "": none')
    parser.add_argument("--runs", type=int, metavar="N", help="timed runs of each (default and least: 5; update_step: 3)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of torch on the CPU (default: 2; rollout without --image: 1)"
    )
    parser.add_argument("--engine", choices=["native", "vllm"], help="rollout: what samples (default: native)")
    parser.add_argument("--image", metavar="WxH", help="rollout: what images cost instead, with one of so many pixels a prompt")
    parser.add_argument("--crop", metavar="WxH", help="with --image: what half of the rollouts look at (default: nothing)")
    parser.add_argument(
        "--prompts", type=int, metavar="N", help="of a step; rollout: with --image (default: 4); scale (default: 128)"
    )
    parser.add_argument("--nodes", metavar="1,2,4", help="scale: how many play (default: 1,2,4)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="scale: that are counted (default: 4); with --shape light, hundreds take minutes"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _plan(args: argparse.Namespace) -> int:
    from metis_fast.plan import command

    return command.run(args)


def _doctor(args: argparse.Namespace) -> int:
    from metis_fast.doctor import command

    _quiet()
    return command.run(args)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file with what differs from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that go before the file's")
    parser.add_argument("--offline", action="store_true", help="ask nothing of judges and search providers")
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")


def _rehearse(args: argparse.Namespace) -> int:
    from metis_fast.rehearse import command

    _quiet()
    return command.run(args)


def _add_rehearse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file with what differs from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that go before the file's")
    parser.add_argument("--pixels", default="1024x768", metavar="WxH", help="of the stand-in images (default 1024x768)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep everything in a new folder; default: nothing is kept")
    parser.add_argument("--json", action="store_true", help="print the stages as one JSON object")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="metis-fast",
        description="Train multimodal agents that know when to call tools (HDPO).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"metis-fast {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        where: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = where.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = verb(verbs, "demo", _demo, "The main job: data, tiny model, cold start, HDPO, report. Run again to resume.")
    _add_config(sub, "YAML file; none: the demo's own (configs/demo.yaml), which comes with the package", optional=True)
    _add_config(verb(verbs, "train", _train, "HDPO from a cold-started model. Run again to resume."))
    sub = verb(verbs, "sft", _sft, "Cold start: SFT on conversations or stored trajectories. Run again to resume.")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for the exported model")
    what.add_argument(
        "--check", action="store_true", help="read all rows, count tokens, name those that do not fit; exit code 1 if any"
    )
    _add_config(sub)
    _add_config(verb(verbs, "eval", _eval, "Accuracy and tool rate of model.path on data.heldout."))
    _add_config(verb(verbs, "serve", _serve, "Serve the agent, with its tools, to OpenAI's clients, until SIGTERM."))
    sub = verb(verbs, "config", _config, "Check a config and show it with all defaults.")
    sub.add_argument("config", type=_file_or_setting, nargs="?", help="YAML file; none: the defaults (the paper's recipe)")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--changes", action="store_true", help="show only what differs from the defaults")
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
    what.add_argument("--schema", action="store_true", help="print the JSON schema of config files, for editors")
    what.add_argument("--reference", action="store_true", help="print the page of all settings (docs/settings.md)")
    text = "Check data files, make the demo set, or stand-ins for published data."
    add_data_verbs(verbs.add_parser("data", help=text).add_subparsers(required=True, metavar="VERB"), verb)
    text = "Benchmarks: check their published files, run them, compare and tabulate results, export replies."
    add_benchmark_verbs(verbs.add_parser("benchmark", help=text).add_subparsers(required=True, metavar="VERB"), verb)
    text = "Serve the tools of a config over HTTP and MCP."
    add_tool_verbs(verbs.add_parser("tools", help=text).add_subparsers(required=True, metavar="VERB"), verb)
    text = "Try a judge on labelled examples, or judge a run's rollouts again."
    add_judge_verbs(verbs.add_parser("judge", help=text).add_subparsers(required=True, metavar="VERB"), verb)
    text = "Write report.html of a run folder, or the page of runs as one file (--out)."
    add_report_arguments(verb(verbs, "report", _report, text))
    add_view_arguments(verb(verbs, "view", _view, "A page over runs and their rollouts, live while they train; it only reads."))
    add_ablate_arguments(
        verb(verbs, "ablate", _ablate, "Named variants x seeds from one cold start, compared; exit code 1 if a run fails.")
    )
    add_plan_arguments(
        verb(verbs, "plan", _plan, "Memory and step time of every Megatron layout, predicted; exit code 1 if none fits.")
    )
    add_profile_arguments(verb(verbs, "profile", _profile, "Some real steps of a run, in a copy of it: a trace, and tables."))
    _add_doctor(verb(verbs, "doctor", _doctor, "What can be known of a job before it is submitted; exit code 1 on errors."))
    _add_rehearse(
        verb(verbs, "rehearse", _rehearse, "A config's own path on stand-ins, two steps; exit code 1 if a stage fails.")
    )
    add_process_verbs(verbs, verb)
    _add_bench(verb(verbs, "bench", _bench, "Time a kernel, an update step or rollouts; exit code 1 if a result is wrong."))
    return parser


def _without_dashes(argv: Sequence[str]) -> list[str]:
    """`--section.key=value` and `--section.key value`, as other programs have settings, are `section.key=value`."""
    words: list[str] = []
    value_follows = False
    for word in argv:
        if value_follows and not word.startswith("--"):
            words[-1] += f"={word}"
            value_follows = False
            continue
        setting = re.match(r"--[\w-]+\.", word) is not None
        words.append(word[2:] if setting else word)
        value_follows = setting and "=" not in word
    return words


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; overrides may stand before and after options, which argparse alone does not take."""
    parser = build_parser()
    args, rest = parser.parse_known_args(_without_dashes(sys.argv[1:] if argv is None else argv))
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(args, "overrides")):
        hint = "; settings are written section.key=value (metis-fast config lists them)" if hasattr(args, "overrides") else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _open_standard_streams() -> None:
    """Those that whoever started us has closed: else the next opened files get their numbers, and what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _use_utf8() -> None:
    """In a locale that is not UTF-8, Python and the libraries under us spell a path like `läuft` differently: start again in
    Python's UTF-8 mode, which all processes of ours inherit."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.ignore_environment:  # else it would start again for ever
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def _cannot_print() -> bool:
    """Whether standard output refuses even nothing, as a device that is full does; then nothing more goes there."""
    try:
        os.write(sys.stdout.fileno(), b"")
    except io.UnsupportedOperation:  # no file at all
        return False
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter still flushes
        return True
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `metis-fast`."""
    if argv is None:
        _use_utf8()
    _open_standard_streams()
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for name in ("metis_fast.cluster", "metis_fast.workers"):  # what a run waits for
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except MetisError as error:
        print(f"metis-fast: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter still flushes
        return 141
    except OSError as error:
        if error.filename is None and _cannot_print():
            print(f"metis-fast: cannot write to standard output ({error.strerror}); send it elsewhere", file=sys.stderr)
            return 2
        advice = _ADVICE.get(error.errno or 0)
        if advice is None:
            raise
        print(f"metis-fast: {advice.format(error.filename or error)}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print("metis-fast: stopped; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
