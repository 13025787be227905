"""The result of a benchmark: `result.json` of its figures and of all that a reader has to know beside them, and its marks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis_fast.config import Config
from metis_fast.errors import DataError, one_line
from metis_fast.evaluate.aggregates import mean, reasons, units_of
from metis_fast.evaluate.question import JUDGE_FAILED, Mark, Question
from metis_fast.evaluate.replies import Reply, line, read_lines, seconds_of, write_whole
from metis_fast.score.protocol import Cost

if TYPE_CHECKING:
    from metis_fast.evaluate.playing import Table  # whose engines a reader of results does not import

Json = dict[str, Any]
_MOST_TOOLS = 20  # names of tools, as the agent spelt them
_SUFFIX = {"on": "", "off": "-tools-off", "forced": "-tools-forced"}


def write_result(
    config: Config,
    table: Table,
    marks: Mapping[str, Sequence[Mark]],
    judge: Json,
    cost: Cost,
    scoring_s: float,
) -> Json:
    """Write `marks.jsonl` and then `result.json`; returns the latter.

    marks: by scorer, those without a reply included. judge: which model was asked, "" for none, and what else its
    verdicts follow from.
    """
    prompt_set, folder, replies = table.prompt_set, table.folder, list(table.replies)
    benchmark, questions = prompt_set.benchmark, prompt_set.questions
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    failures = read_lines(folder / "failures.jsonl", mend=True)
    wanted = len(questions) * config.benchmark.rollouts
    result: Json = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "complete": len(replies) == wanted,
        "questions": len(questions),
        "rollouts": config.benchmark.rollouts,
        "replies": len(replies),
        "scorers": {name: _scored(benchmark.aggregate(questions, own), own) for name, own in marks.items()},
        **_tools(questions, replies),
        "outcomes": dict(sorted(Counter(reply.outcome for reply in replies).items())),
        "infrastructure_failures": {
            "num": wanted - len(replies),
            "reasons": dict(Counter(one_line(record["error"])[:200] for record in failures).most_common()),
        },
        "tokens": {
            name: sum(getattr(reply, f"{name}_tokens") for reply in replies) for name in ("prompt", "sampled", "observation")
        },
        "weight_versions": sorted({version for reply in replies for version in reply.weight_versions}),
        "files": [dataclasses.asdict(file) for file in prompt_set.files],
        "warnings": list(prompt_set.warnings),
        "settings": settings,
        "judge": judge | {"scorer": config.benchmark.scorer},
        "footnote": benchmark.footnote,
        "seconds": seconds_of(folder) | {"scoring": round(scoring_s, 3), "of_judges": round(cost.seconds, 3)},
        "judge_cost": {name: getattr(cost, name) for name in ("requests", "prompt_tokens", "completion_tokens")},
    }
    more = {question.index: {"cluster": question.cluster, "asked": _digest(question)} for question in questions}
    lines = "".join(line(dataclasses.asdict(mark) | more[mark.index]) for own in marks.values() for mark in own)
    write_whole(folder / "marks.jsonl", lines)
    write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _digest(question: Question) -> str:
    """By which two runs know whether an index stands for the same question."""
    return hashlib.sha256(json.dumps([question.asked, question.truth]).encode()).hexdigest()[:8]


def _scored(figures: Sequence[Any], marks: Sequence[Mark]) -> Json:
    return {
        "figures": [dataclasses.asdict(figure) for figure in figures],
        "marks": len(marks),
        "no_verdict": sum(mark.value is None for mark in marks),
        "judge_failures": sum(mark.judge_failed for mark in marks),
        "reasons": reasons(marks),
    }


def _tools(questions: Sequence[Question], replies: Sequence[Reply]) -> Json:
    """Share of replies with a call, and calls a reply, with clustered errors."""
    used = [Mark(reply.index, reply.rollout, "tools", float(reply.num_calls > 0)) for reply in replies]
    calls = Counter[str]()
    for reply in replies:
        calls.update(reply.calls)
    most = dict(calls.most_common(_MOST_TOOLS))
    if rest := calls.total() - sum(most.values()):
        most["(others)"] = rest
    return {
        "tool_rate": dataclasses.asdict(mean("tool rate", units_of(questions, used))),
        "tool_calls": {
            "mean": calls.total() / len(replies) if replies else None,
            "by_tool": most,
            "errors": sum(reply.tool_errors for reply in replies),
        },
    }


def judge_failures(result: Json) -> int:
    """Verdicts that are missing since the judge did not answer."""
    return sum(scored["judge_failures"] for scored in result["scorers"].values())


def judge_reasons(result: Json) -> dict[str, int]:
    """How often the judge did not answer, by what it said of that."""
    every = Counter[str]()
    for scored in result["scorers"].values():
        every.update({reason: num for reason, num in scored["reasons"].items() if reason.startswith(JUDGE_FAILED)})
    return {reason.removeprefix(f"{JUDGE_FAILED}: "): num for reason, num in every.most_common()}


@dataclass(frozen=True, slots=True)
class Stored:
    """A result that was read. name: what a person calls the run. folder: of the benchmark."""

    name: str
    folder: Path
    result: Json

    @property
    def benchmark(self) -> str:
        """Its name."""
        return str(self.result["benchmark"])

    def headline(self, scorer: str) -> Json | None:
        """The first figure of a scorer; None where it has none."""
        own = self.result["scorers"].get(scorer)
        return own["figures"][0] if own and own["figures"] else None

    def values(self, scorer: str) -> dict[str, float]:
        """Question -> mean of its marks by a scorer, where it has any."""
        found: dict[str, list[float]] = {}
        for record in read_lines(self.folder / "marks.jsonl"):
            if record["scorer"] == scorer and record["value"] is not None:
                found.setdefault(record["index"], []).append(record["value"])
        return {index: sum(values) / len(values) for index, values in found.items()}


def folder_name(benchmark: str, tools: str) -> str:
    """Of a benchmark's replies and result. tools: `benchmark.tools`."""
    return f"{benchmark}{_SUFFIX[tools]}"


def read_results(path: Path) -> list[Stored]:
    """The results under a run folder, a folder of benchmarks, or a single benchmark's; those of training steps are left out,
    and so is a folder of another name than its benchmark's: whoever moved it away wants to have it no longer.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    places = [path / "result.json", *sorted(path.glob("*/result.json")), *sorted(path.glob("benchmarks/*/result.json"))]
    found = [place for place in places if place.is_file()]
    if not found:
        raise DataError(
            f"{path}: expected result.json here, in folders below, or in benchmarks/*/, found none; run metis-fast "
            "benchmark run, or give its run.dir"
        )
    stored = []
    for place in found:
        try:
            result = json.loads(place.read_text(encoding="utf-8"))
            if lacking := {"benchmark", "scorers", "questions", "settings"} - result.keys():
                raise ValueError(f"it has no {', '.join(sorted(lacking))}")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{place}: not a result that can be read ({one_line(error)}); run the benchmark again") from None
        stored.append(Stored(str(path), place.parent, result))
    kept = [one for one in stored if one.folder == path or one.folder.name == _own_name(one)]
    if not kept:
        told = ", ".join(f"{one.folder.name} for {_own_name(one)}" for one in stored)
        raise DataError(f"{path}: expected folders with the names of their benchmarks, got {told}; give the folder itself")
    return kept


def _own_name(stored: Stored) -> str:
    return folder_name(stored.benchmark, stored.result["settings"]["tools"])
