"""Runs benchmarks: prompts are written, played by the nodes of a run, and the stored replies are scored."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path

from metis_fast.config import Config
from metis_fast.errors import one_line
from metis_fast.evaluate.judging import (
    LlmJudges,
    check_settings,
    judged_by,
    judges_of,
    rule_marks,
    rules_of,
    without_reply,
)
from metis_fast.evaluate.playing import Play, Table, open_table, tool_files
from metis_fast.evaluate.promptset import PromptSet, prepare
from metis_fast.evaluate.question import Mark
from metis_fast.evaluate.result import Json, judge_failures, judge_reasons, write_result
from metis_fast.model_folder import check_model_folder
from metis_fast.own_folder import OwnFolder
from metis_fast.report.progress import progress
from metis_fast.run.assembly import open_parts
from metis_fast.run.fleet import Fleet
from metis_fast.run.interrupt import Interrupts
from metis_fast.score.protocol import Cost
from metis_fast.tools import open_toolbox

_MOST_OF_A_REASON = 200  # characters, for people


def run_benchmarks(config: Config, keys: Sequence[str] = ()) -> dict[str, Json]:
    """Play what is missing of some benchmarks, and score what is there; key -> result. The folder of the run is ours meanwhile.

    keys: of `benchmark.files`; none: all of them. Replies that are there are not played again; where none is missing, no model
    is loaded.

    Raises:
        ConfigError, DataError, ModelError, ToolSetupError, JudgeError: whatever cannot work; most of it before a rollout.
        Interrupted: a stop was asked for; the same command goes on.
    """
    keys = tuple(keys) or tuple(config.benchmark.files)
    check_settings(config, keys)
    check = cache(lambda: _check_player(config))
    sets = [prepare(config, key, config.log.progress, check) for key in keys]
    tables = open_tables(config, sets)
    results: dict[str, Json] = {}
    with Interrupts() as interrupts:
        if any(table.replies.missing() for table in tables):
            _check_judge(config, tables, interrupts)
            alone = _playing(config)
            with open_parts(alone, interrupts, training=False, benchmarks=[one.parquet for one in sets]) as parts:
                for table in tables:
                    play(alone, parts.fleet, table, interrupts)
        for table in tables:
            results[table.prompt_set.key] = score(config, table, interrupts)
    return results


def open_tables(config: Config, sets: Sequence[PromptSet], step: int | None = None) -> list[Table]:
    """The benchmarks of prompt sets, whose files stand one behind another in the data of the nodes."""
    tables, first, files = [], 0, tool_files(config, step)
    for one in sets:
        tables.append(open_table(config, one, first, step, files))
        first += len(one.questions)
    return tables


def _playing(config: Config) -> Config:
    """The settings of nodes that play benchmarks alone: no judges, and no tools where none are wanted."""
    workers = config.workers.model_copy(update={"judges": 0})
    tools = config.tools
    if config.benchmark.tools == "off":
        none = {"enabled": (), "own": (), "mcp": (), "server": tools.server.model_copy(update={"url": ""})}
        tools = tools.model_copy(update=none)
        workers = workers.model_copy(update={"tools": 0})
    score = config.score.model_copy(update={"judge": "by_row"})
    data = config.data.model_copy(update={"train": (), "heldout": ()})
    update = {"workers": workers, "tools": tools, "score": score, "data": data}
    return config.model_copy(update=update)


def _check_player(config: Config) -> None:
    """The model's folder, and the tools where they run here: files of gigabytes are not read for what cannot be played.

    Raises:
        ModelError, ToolSetupError: they cannot be used.
    """
    check_model_folder(config.model.path)
    tools = _playing(config).tools
    if config.workers.launcher == "local" and tools.replay is None and not tools.server.url:
        scratch = OwnFolder(Path(tempfile.gettempdir()), "metis-tools-")
        with closing(scratch):
            open_toolbox(tools.model_copy(update={"own": (), "mcp": ()}), scratch.path).close()


def _check_judge(config: Config, tables: Sequence[Table], interrupts: Interrupts) -> None:
    """Whether it is there, as it is asked only after all has been played.

    Raises:
        JudgeError: it does not answer as a judge.
    """
    for table in tables:
        if judges_of(config, table.prompt_set.benchmark):
            with closing(LlmJudges(config, table.prompt_set.benchmark, table.folder)) as llm:
                interrupts.run(llm.check())
            return  # all benchmarks have the same one


def play(config: Config, fleet: Fleet, table: Table, interrupts: Interrupts) -> None:
    """Have what is missing played, with whatever weights the engines have."""
    total = len(table.prompt_set.questions) * config.benchmark.rollouts
    with progress(total, table.prompt_set.key, config.log, "rollout") as bar:
        bar.update(len(table.replies))
        interrupts.run(Play(fleet, config, table, bar.update).run())
    table.replies.finish()


def score(config: Config, table: Table, interrupts: Interrupts) -> Json:
    """Score the replies that are there, and write the result.

    Raises:
        JudgeError: the judge cannot be used.
    """
    began = time.monotonic()
    benchmark, questions = table.prompt_set.benchmark, table.prompt_set.questions
    replies, rollouts = list(table.replies), config.benchmark.rollouts
    marks: dict[str, list[Mark]] = {}
    judge: Json = {"model": "", "settings": ""}
    cost = Cost()
    rules, judges = rules_of(config, benchmark), judges_of(config, benchmark)
    with progress(len(replies) * (len(rules) + len(judges)), f"scoring {table.prompt_set.key}", config.log, "mark") as bar:

        def tick() -> None:
            interrupts.check()
            bar.update(1)

        for name in rules:
            marks[name] = rule_marks(benchmark, name, questions, replies, tick)
        if judges:
            with closing(LlmJudges(config, benchmark, table.folder)) as llm:
                interrupts.run(llm.check())
                marks |= interrupts.run(llm.marks(questions, replies, tick))
                judge, cost = {"model": llm.model, "settings": judged_by(config)}, llm.cost
    for name, own in marks.items():
        own += without_reply(name, questions, replies, rollouts)
    return write_result(config, table, marks, judge, cost, time.monotonic() - began)


def summary(results: Mapping[str, Json]) -> str:
    """Results for people: a line for each scorer."""
    lines = []
    for key, result in results.items():
        for name, scored in result["scorers"].items():
            figure = scored["figures"][0]
            value = "-" if figure["value"] is None else f"{100 * figure['value']:.1f}"
            error = "" if figure["error"] is None else f" ± {100 * figure['error']:.1f}"
            missing = f", {scored['no_verdict']} of {scored['marks']} without a verdict" if scored["no_verdict"] else ""
            lines.append(f"{key:20} {name:16} {figure['name']:16} {value}{error}{missing}")
        rate, failed = result["tool_rate"]["value"], result["infrastructure_failures"]["num"]
        used = "-" if rate is None else f"{100 * rate:.1f} %"
        why = _most_often(result["infrastructure_failures"]["reasons"])
        broken = (
            f"; {failed} replies are missing, as tools or engines failed: run the same command again{why}" if failed else ""
        )
        called = "tools, of which there are none, called" if result["settings"]["tools"] == "off" else "tools called"
        lines.append(f"{key:20} {called} in {used} of {result['replies']} replies{broken}")
        if missing := judge_failures(result):
            why = _most_often(judge_reasons(result))
            lines.append(f"{key:20} {missing} verdicts are missing, as the judge failed: run the same command again{why}")
        lines += [f"{key:20} warning: {warning}" for warning in result["warnings"]]
    return "\n".join(lines)


def _most_often(reasons: Mapping[str, int]) -> str:
    if not reasons:
        return ""
    most = max(reasons, key=lambda reason: reasons[reason])
    return f" ({'most often: ' if len(reasons) > 1 else ''}{one_line(most)[:_MOST_OF_A_REASON]})"


def as_json(results: Mapping[str, Json]) -> str:
    """Results for programs."""
    return json.dumps(results)
