"""Benchmarks while a run trains (`eval.benchmarks`): played by its own nodes, with the weights of the moment."""

from __future__ import annotations

import logging
import shutil
from typing import Any

from metis_fast.config import Config
from metis_fast.errors import MetisError
from metis_fast.evaluate.judging import check_settings
from metis_fast.evaluate.playing import Table, place_of
from metis_fast.evaluate.promptset import PromptSet, prepare
from metis_fast.evaluate.replies import line, read_lines, write_whole
from metis_fast.evaluate.result import judge_failures
from metis_fast.evaluate.run import open_tables, play, score
from metis_fast.run.parts import Parts

_LOG = logging.getLogger(__name__)


def open_sets(config: Config) -> list[PromptSet]:
    """The prompts of `eval.benchmarks`, written before anything of the run is opened.

    Raises:
        ConfigError, DataError: they cannot be asked or scored.
    """
    check_settings(config, config.eval.benchmarks)
    return [prepare(config, key, config.log.progress) for key in config.eval.benchmarks]


def play_benchmarks(parts: Parts, step: int) -> None:
    """Play and score them with the weights of a step. Where one fails, `benchmarks/steps.jsonl` has the reason instead of a
    result, and the run goes on.

    Raises:
        Interrupted: a stop was asked for.
    """
    config = parts.config
    for (
        one
    ) in parts.benchmarks:  # whatever is there was played before this process began, with weights that may have been others
        shutil.rmtree(place_of(config, one, step), ignore_errors=True)
    for table in open_tables(config, parts.benchmarks, step):
        name = table.prompt_set.key
        try:
            record = _point(parts, table)
        except MetisError as error:
            _LOG.warning("step %d: no result of %s, this point is left out: %s", step, name, error)
            record = {"skipped": str(error)}
        _keep(config, {"step": step, "benchmark": name, **record})


def _point(parts: Parts, table: Table) -> dict[str, Any]:
    config = parts.config
    play(config, parts.fleet, table, parts.interrupts)
    result = score(config, table, parts.interrupts)
    if not result["complete"]:
        failed = result["infrastructure_failures"]["num"]
        _LOG.warning("%s: %d replies are missing, as tools or engines failed", table.folder, failed)
    if missing := judge_failures(result):
        _LOG.warning("%s: %d verdicts are missing, as the judge failed", table.folder, missing)
    scores = {scorer: scored["figures"][0] for scorer, scored in result["scorers"].items()}
    kept = ("complete", "replies", "weight_versions", "tool_rate")
    return {name: result[name] for name in kept} | {"scores": scores}


def _keep(config: Config, record: dict[str, Any]) -> None:
    """Add a point; those of the same step and of later ones are of an earlier process, whose steps are made again."""
    path = config.run.dir / "benchmarks" / "steps.jsonl"
    step, name = record["step"], record["benchmark"]
    before = [
        one for one in read_lines(path, mend=True) if one["step"] < step or (one["step"] == step and one["benchmark"] != name)
    ]
    write_whole(path, "".join(line(one) for one in (*before, record)))
