"""What a run writes while it trains: `metrics.jsonl`, `eval.jsonl`, TensorBoard events, and one line a step.

A run that was interrupted and resumed has the `metrics.jsonl` of an uninterrupted one, seconds aside: `RunLog.truncate` drops
what came after the checkpoint, and a line cut short by a kill is dropped when the log is opened.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter
from tqdm import tqdm

from metis_fast.config import LogConfig
from metis_fast.errors import DataError
from metis_fast.report.lines import why
from metis_fast.report.panel import active
from metis_fast.report.slices import KINDS, has_rates, main_abilities
from metis_fast.report.trackers import Trackers
from metis_fast.scratch import replaced
from metis_fast.types import Outcome, Savings, Slice, StepStats, UpdateStats

_LINES_BETWEEN_HEADERS = 25

# Tags of the means over a step's updates. Extremes and counts are combined otherwise, below.
_UPDATE_MEANS = {
    "loss/total": "loss",
    "loss/acc": "loss_acc",
    "loss/tool": "loss_tool",
    "optimizer/grad_norm": "grad_norm",
    "optimizer/lr": "lr",
    "clip/acc": "clip_acc",
    "clip/tool": "clip_tool",
    "policy/kl": "kl",
    "policy/entropy": "entropy",
    "policy/engine_gap": "engine_gap",
}
_UPDATE_SUMS = {
    "tokens/run": "num_tokens",
    "flops/run": "flops",
    "tokens/n_acc": "n_acc",
    "tokens/n_tool": "n_tool",
}
GROUPS = ("in_flight", "carried", "dropped", "replayed")
"""What `StepStats` counts of groups besides those that a step trained on."""

_SLICE_RATES = ("accuracy", "tool_rate", "tool_calls", "format_rate", "response_tokens")

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out rates after `step` training steps (0: before the first)."""

    step: int
    slices: Mapping[str, Slice]


def _slice_scalars(slices: Mapping[str, Slice], prefix: str = "") -> dict[str, float]:
    return {
        f"{prefix}{rate}/{name}": getattr(entry, rate)
        for rate in _SLICE_RATES
        for name, entry in slices.items()
        if has_rates(entry)
    }


def failed_rates(outcomes: Mapping[str, int]) -> tuple[float, float]:
    """The share of a step's rollouts that our machinery broke off, and of the others the share whose judge failed."""
    played, broken = sum(outcomes.values()), outcomes.get(Outcome.INFRASTRUCTURE_ERROR, 0)
    return broken / max(1, played), outcomes.get(Outcome.JUDGE_ERROR, 0) / max(1, played - broken)


def step_scalars(stats: StepStats) -> dict[str, float]:
    """A step as flat `group/name` tags: the tags of TensorBoard and the curves of the report.

    Of several updates: means, sums of token counts, and the extremes of the ratio. Updates that were skipped because nothing
    had a gradient count for the tokens only.
    """
    scalars = {"reward/acc": stats.reward_acc, "reward/tool": stats.reward_tool} | _slice_scalars(stats.slices)
    scalars |= {f"outcomes/{name}": float(count) for name, count in stats.outcomes.items()}
    scalars["outcomes/tool_errors"] = float(stats.tool_errors)
    scalars["share/infra_failed_rate"], scalars["share/judge_failed_rate"] = failed_rates(stats.outcomes)
    scalars["share/qualifying"], scalars["share/signal"] = stats.qualifying_share, stats.signal_share
    scalars["data/bad_rows_skipped"] = float(stats.bad_rows_skipped)
    scalars |= {tag: float(sum(getattr(update, name) for update in stats.updates)) for tag, name in _UPDATE_SUMS.items()}
    for saving in fields(Savings):
        avoided = [getattr(update.avoided, saving.name) for update in stats.updates]
        scalars[f"tokens_avoided/{saving.name}"] = float(sum(one.tokens for one in avoided))
        scalars[f"flops_avoided/{saving.name}"] = sum(one.flops for one in avoided)
    tokens = sum(stats.staleness)
    if tokens:
        scalars |= {f"staleness/{age}": count / tokens for age, count in enumerate(stats.staleness)}
        scalars["staleness/mean"] = sum(age * count for age, count in enumerate(stats.staleness)) / tokens
    scalars |= {f"groups/{name}": float(getattr(stats, f"groups_{name}")) for name in GROUPS}
    scalars["sync/bytes"], scalars["sync/retries"] = float(stats.sync_bytes), float(stats.sync_retries)
    applied = [update for update in stats.updates if not update.skipped_step]
    if applied:
        scalars |= {tag: fmean(getattr(update, name) for update in applied) for tag, name in _UPDATE_MEANS.items()}
        scalars["policy/ratio_max"] = max(update.ratio_max for update in applied)
        scalars["policy/ratio_min"] = min(update.ratio_min for update in applied)
    scalars |= {f"seconds/{stage}": seconds for stage, seconds in stats.seconds.items()}
    return scalars | {f"cpu_seconds/{stage}": seconds for stage, seconds in stats.cpu_seconds.items()}


@cache
def _reader(kind: type[_Record]) -> TypeAdapter[_Record]:
    return TypeAdapter(kind)


def step_of(record: Mapping[str, Any]) -> StepStats:
    """A line of `metrics.jsonl`. Fields that this version does not know are left out: see `unknown_in_step`.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is no step.
    """
    infra_failed_rate, judge_failed_rate = failed_rates(record["outcomes"])  # of records that have none
    rates = {"infra_failed_rate": infra_failed_rate, "judge_failed_rate": judge_failed_rate}
    updates = [{"avoided": {}, **update} for update in record["updates"]]
    return _reader(StepStats).validate_python({**rates, **record, "updates": updates})


def evaluation_of(record: Mapping[str, Any]) -> Evaluation:
    """A line of `eval.jsonl`; as `step_of`."""
    return _reader(Evaluation).validate_python(record)


def _unknown(kind: type, record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    return (f"{prefix}{name}" for name in sorted(record.keys() - {field.name for field in fields(kind)}))


def unknown_in_evaluation(record: Mapping[str, Any]) -> Iterator[str]:
    """The fields of a newer version, as in `slices.NAME`."""
    yield from _unknown(Evaluation, record)
    for entry in record["slices"].values():
        yield from _unknown(Slice, entry, "slices.")


def unknown_in_step(record: Mapping[str, Any]) -> Iterator[str]:
    """The fields of a newer version, as in `updates.NAME`."""
    yield from _unknown(StepStats, record)
    for entry in record["slices"].values():
        yield from _unknown(Slice, entry, "slices.")
    for update in record["updates"]:
        yield from _unknown(UpdateStats, update, "updates.")
        yield from _unknown(Savings, update.get("avoided", {}), "updates.avoided.")


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file with their ends; one without an end was cut short and is left out."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if path.exists() else []


def _read(path: Path, make: Callable[[dict[str, Any]], _Record]) -> list[_Record]:
    records = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            records.append(make(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: expected a record of this version, got {why(error)}; move the file away"
            ) from None
    return records


def read_steps(folder: Path) -> list[StepStats]:
    """The steps of a run folder, in file order; none where there is no `metrics.jsonl`.

    Raises:
        DataError: a line that is not a step.
    """
    return _read(folder / "metrics.jsonl", step_of)


def read_evaluations(folder: Path) -> list[Evaluation]:
    """The evaluations of a run folder, in file order; none where there is no `eval.jsonl`.

    Raises:
        DataError: a line that is not an evaluation.
    """
    return _read(folder / "eval.jsonl", evaluation_of)


def _append(path: Path, record: StepStats | Evaluation) -> None:
    with path.open("ab") as handle:
        handle.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())


def _keep_lines(path: Path, keep: Callable[[bytes], bool]) -> None:
    """Rewrite a file, if it exists, with the whole lines that `keep` wants; atomically."""
    if not path.exists():
        return
    with replaced(path) as scratch, scratch.open("wb") as handle:
        handle.writelines(line for line in _whole_lines(path) if keep(line))
        handle.flush()
        os.fsync(handle.fileno())


def _drop_steps(folder: Path, step: int) -> None:
    """Files and folders of `step` and later ones: step-000012, step-000012.parquet, step-000012.node-0.parquet, and so on."""
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-").partition(".")[0]
        if not number.isdecimal() or int(number) < step:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _live_cells(stats: StepStats) -> dict[str, str]:
    """Heading -> text of the line a step prints."""
    scalars = step_scalars(stats)

    def cell(tag: str, form: str) -> str:
        return format(scalars[tag], form) if tag in scalars else "-"

    kinds = [kind for kind in KINDS if kind in stats.slices]
    columns = kinds or main_abilities([stats.slices])
    return {
        "step": str(stats.step),
        "accuracy": cell("accuracy/all", ".3f"),
        **{f"tools:{name}": cell(f"tool_rate/{name}", ".3f") for name in columns},
        "loss": cell("loss/total", "+.4f"),
        "grad norm": cell("optimizer/grad_norm", ".3g"),
        "seconds": f"{sum(stats.seconds.values()):.1f}",
    }


class RunLog:
    """The log of one run folder. One process writes it."""

    def __init__(self, folder: Path, config: LogConfig) -> None:
        """Open the log of `folder` (made if need be) to append to; a half-written last line is dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._metrics, self._evaluations = folder / "metrics.jsonl", folder / "eval.jsonl"
        self._trackers = Trackers(folder, config)
        self._headings: list[str] = []
        self._lines = 0
        for path in (self._metrics, self._evaluations):
            if path.exists() and not path.read_bytes().endswith(b"\n"):
                _keep_lines(path, lambda line: True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def truncate(self, step: int) -> None:
        """Forget every record whose step is `step` or later, the rollouts, held-out prompts and benchmarks of these steps, and
        the summary of an earlier end. Call it before the first record of a run resumed at `step`.

        The evaluation due at `step` is among them: the resumed run makes it again. TensorBoard hides the events it drops.
        """
        (self._folder / "summary.json").unlink(missing_ok=True)
        for name in ("rollouts", "heldout", "benchmarks"):
            _drop_steps(self._folder / name, step)
        for path in (self._metrics, self._evaluations, self._folder / "benchmarks" / "steps.jsonl"):
            _keep_lines(path, lambda line: json.loads(line)["step"] < step)
        self._trackers.forget(step)
        panel = active()
        if panel is not None:
            panel.history(read_steps(self._folder))
        if step:
            tqdm.write(f"going on after step {step}", file=sys.stdout)

    def step(self, stats: StepStats) -> None:
        """Record a training step and print its line. On disk when this returns."""
        _append(self._metrics, stats)
        self._trackers.step(step_scalars(stats), stats.step)
        self._print(_live_cells(stats))
        panel = active()
        if panel is not None:
            panel.step(stats)

    def evaluation(self, step: int, slices: Mapping[str, Slice]) -> None:
        """Record the held-out rates after `step` training steps (0: before the first). On disk when this returns."""
        _append(self._evaluations, Evaluation(step=step, slices=slices))
        self._trackers.scalars(_slice_scalars(slices, prefix="heldout_"), step)
        panel = active()
        if panel is not None:
            panel.evaluation(step, slices)

    def close(self) -> None:
        """Write out what trackers still hold. May be called twice."""
        self._trackers.close()

    def _print(self, cells: Mapping[str, str]) -> None:
        headings = list(cells)
        widths = [max(len(heading), 8) for heading in headings]
        if headings != self._headings or self._lines % _LINES_BETWEEN_HEADERS == 0:
            self._headings = headings
            tqdm.write(
                "  ".join(heading.rjust(width) for heading, width in zip(headings, widths, strict=True)), file=sys.stdout
            )
        self._lines += 1
        # tqdm's write keeps a bar that is on the screen below the line; without one it is a plain print.
        tqdm.write("  ".join(text.rjust(width) for text, width in zip(cells.values(), widths, strict=True)), file=sys.stdout)
