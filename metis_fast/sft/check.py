"""`metis-fast sft --check`: every row of a cold start, read and encoded, before a run depends on it. Needs no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from metis_fast.config import Config
from metis_fast.data.coldstart import LongConversationError
from metis_fast.data.row import BadRowError
from metis_fast.machine import num_cores
from metis_fast.report.progress import progress
from metis_fast.run.cold_start import open_streams
from metis_fast.sft.streams import Conversations, Stream, num_steps
from metis_fast.sft.trainers import open_images
from metis_fast.train.optimizer import Schedule
from metis_fast.types import Rollout

_ROWS = 64  # read together: tokenizers work beside each other
_NAMED = 20


@dataclass(frozen=True, slots=True)
class SetReport:
    """Of a phase, or of the held-out set. bad, long: rows that do not fit, or have too many tokens; problems: the first ones.
    tokens: of a row, at the quantiles 50, 90, 99 and 100 % of usable rows. steps: optimizer steps; 0 for the held-out set."""

    path: str
    rows: int
    bad: int
    long: int
    tokens: tuple[int, ...]
    total_tokens: int
    loss_tokens: int
    images: int
    steps: int
    problems: tuple[str, ...]


def check(config: Config) -> list[SetReport]:
    """Reports of all phases, and of the held-out set behind them. Images are looked at up to their headers.

    Raises:
        ConfigError, DataError, ModelError: see `open_streams`.
    """
    streams, heldout = open_streams(config, open_images(config))
    paths = [(phase.trajectories, num_steps(phase, stream.num_rows, config.sft.batch_size))
             for phase, stream in zip(config.sft.phases, streams, strict=True)]  # fmt: skip
    if heldout is not None and config.sft.heldout is not None:
        streams, paths = [*streams, heldout], [*paths, (config.sft.heldout, 0)]
    return [_report(stream, str(path), steps, config) for stream, (path, steps) in zip(streams, paths, strict=True)]


def _report(stream: Stream, path: str, steps: int, config: Config) -> SetReport:
    lengths: list[int] = []
    loss_tokens = images = bad = long = 0
    problems: list[str] = []
    with progress(stream.num_rows, f"reading {path}", config.log, "row") as bar:
        for one in _rows(stream):
            bar.update()
            if isinstance(one, Rollout):
                lengths.append(one.num_tokens)
                loss_tokens += one.num_sampled
                images += len(one.image_spans)
                continue
            long += isinstance(one, LongConversationError)
            bad += not isinstance(one, LongConversationError)
            if len(problems) < _NAMED:
                problems.append(str(one.bad_row))
    stream.forget()
    shares = np.quantile(lengths, (0.5, 0.9, 0.99, 1.0), method="higher") if lengths else ()
    return SetReport(
        path, stream.num_rows, bad, long, tuple(map(int, shares)), sum(lengths), loss_tokens, images, steps, tuple(problems)
    )


def _rows(stream: Stream) -> Iterator[Rollout | BadRowError]:
    if not isinstance(stream, Conversations):
        for some in stream.once(0):
            yield from some
        return
    with ThreadPoolExecutor(num_cores(), "encode") as threads:
        for start in range(0, stream.num_rows, _ROWS):
            yield from stream.read_all(range(start, min(start + _ROWS, stream.num_rows)), threads)


def stops(reports: Sequence[SetReport], config: Config) -> bool:
    """Whether a run would end at a row: one that is not to be skipped, or because a set has no other."""
    bad, long = config.sft.on_bad_row == "stop", config.sft.on_long_row == "stop"
    return any((report.bad and bad) or (report.long and long) or not report.tokens for report in reports)


def advice(reports: Sequence[SetReport], config: Config) -> list[str]:
    """What is to be done before a run, a line each."""
    lines: list[str] = []
    for kind, number, setting, is_stop in (
        ("do not fit", sum(report.bad for report in reports), "sft.on_bad_row", config.sft.on_bad_row == "stop"),
        ("are too long", sum(report.long for report in reports), "sft.on_long_row", config.sft.on_long_row == "stop"),
    ):
        if number and is_stop:
            lines.append(f"a run would end at the first of the {number} rows that {kind}: mend them, or set {setting}=skip")
    doubt = Schedule(config.sft.optim, sum(report.steps for report in reports)).doubt("sft.optim")
    return [*lines, *([doubt] if doubt else [])]


def as_json(reports: Sequence[SetReport]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(report) for report in reports]


def as_text(reports: Sequence[SetReport]) -> str:
    """Lines for people."""
    lines: list[str] = []
    for report in reports:
        lines.append(
            f"{report.path}: {report.rows} rows, {report.bad} bad, {report.long} too long; {report.images} images; "
            f"{report.total_tokens} tokens, {report.loss_tokens} of them with loss"
            + (f"; {report.steps} steps" if report.steps else "")
        )
        if report.tokens:
            lines.append(
                "  tokens of a row: {} (half have at most so many), {} (90 %), {} (99 %), {} (all)".format(*report.tokens)
            )
        lines += [f"  {problem}" for problem in report.problems]
        rest = report.bad + report.long - len(report.problems)
        lines += [f"  and {rest} more"] * (rest > 0)
    return "\n".join(lines)
