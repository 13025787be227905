"""A report for machines (JSON) and for people (a table, with ratios to the floor)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from .candidate import Row, Spread
from .compare import Report

_MIB = 2**20


def to_json(report: Report) -> dict[str, Any]:
    """machine, rows, missing.

    Seconds are medians, spreads [least, most]. A row has tflops and gbytes_per_s on a GPU only; sizes and errors that only
    one op has come after those of all. null: does not apply, or withheld because the implementation is outside its limits.
    """
    return {
        "machine": dataclasses.asdict(report.machine),
        "rows": [_json_row(row, report) for row in report.rows],
        "missing": [dataclasses.asdict(entry) for entry in report.missing],
    }


def _json_row(row: Row, report: Report) -> dict[str, Any]:
    out: dict[str, Any] = {
        "impl": row.impl,
        "dtype": report.dtype,
        **{letter: report.shape.get(letter) for letter in "THV"},
        "live_fraction": row.live_fraction,
        "cpu_s": row.cpu.median if row.cpu else None,
        "wall_s": row.wall.median if row.wall else None,
        "cpu_s_spread": [row.cpu.least, row.cpu.most] if row.cpu else None,
        "wall_s_spread": [row.wall.least, row.wall.most] if row.wall else None,
        "gemms": row.gemms,
        "peak_bytes": row.peak_bytes,
        "logp_err": None,
        "dhidden_err": None,
        "dweight_err": None,
    }
    out |= report.shape | {f"{name.lower()}_err": _finite(error) for name, error in _errors(row, report)}
    if report.machine.gpu is not None:
        out |= {"tflops": _tflops(row, report), "gbytes_per_s": _gbytes_per_s(row, report)}
    return out


def _errors(row: Row, report: Report) -> Iterator[tuple[str, float | None]]:
    """(name, error) of all that the op has; None where this implementation has none."""
    return itertools.zip_longest(report.error_names, (row.errors.values, *row.errors.gradients))


def _finite(value: float | None) -> float | None:
    """JSON has no NaN; a row that has one is withheld, and stderr says why."""
    return value if value is not None and math.isfinite(value) else None


def _tflops(row: Row, report: Report) -> float | None:
    """Of the products that it ran, not of those that were needed."""
    return row.gemms * report.gemm_flops / row.wall.median / 1e12 if row.gemms and row.wall else None


def _gbytes_per_s(row: Row, report: Report) -> float | None:
    """Inputs and outputs, moved once: what it achieves of what it needs, not what it moves."""
    return report.least_bytes / row.wall.median / 1e9 if row.wall else None


def _columns(report: Report) -> list[str]:
    gpu = ["TFLOP/s", "GB/s"] if report.machine.gpu is not None else []
    errors = [f"{name} err" for name in report.error_names]
    return ["impl", "live", "CPU ms", "x floor", "wall ms", "x floor", *gpu, "GEMMs", "peak MiB", *errors]


def _cells(row: Row, report: Report) -> list[str]:
    floor = next((other for other in report.rows if other.impl == "floor"), None)

    def ratio(mine: Spread | None, base: Spread | None) -> str:
        return f"{mine.median / base.median:.2f}" if mine and base and base.median else "-"

    gpu = [_number(_tflops(row, report), ".0f"), _number(_gbytes_per_s(row, report), ".0f")] if report.machine.gpu else []
    return [
        row.impl,
        f"{row.live_fraction:.2g}",
        _milliseconds(row.cpu, bool(row.failed)),
        ratio(row.cpu, floor.cpu if floor else None),
        _milliseconds(row.wall, bool(row.failed)),
        ratio(row.wall, floor.wall if floor else None),
        *gpu,
        _number(row.gemms, ".2f"),
        _number(None if row.peak_bytes is None else row.peak_bytes / _MIB, ".1f"),
        *(_number(error, ".1e") for _, error in _errors(row, report)),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _milliseconds(spread: Spread | None, failed: bool) -> str:
    if spread is None:
        return "wrong" if failed else "-"
    return f"{spread.median * 1e3:.4g} ({spread.least * 1e3:.4g}..{spread.most * 1e3:.4g})"


def heading(report: Report) -> str:
    """Op, sizes and dtype in one line."""
    return f"{report.op} {', '.join(f'{letter}={size}' for letter, size in report.shape.items())} {report.dtype}"


def machine_line(report: Report) -> str:
    """What it ran on, in one line."""
    machine = report.machine
    place = machine.gpu or f"{machine.cpu}, {machine.cores} cores, {' '.join(machine.isa)}, {machine.threads} threads"
    return f"{place}, torch {machine.torch}"


def _remarks(report: Report) -> list[str]:
    """What is wrong, what is missing, and what the columns mean."""
    failed = [f"{row.impl}: outside its limits, no speed: {row.failed}" for row in report.rows if row.failed]
    missing = [f"{entry.impl}: missing: {entry.why}" for entry in report.missing]
    return [*failed, *missing, *notes(report)]


def notes(report: Report) -> Sequence[str]:
    """What the columns mean, for people."""
    columns = (
        "Times: median (least..most) of the interleaved runs. Peak: live tensor bytes above those at the start, gradients "
        "handed back not counted."
    )
    gpu = "TFLOP/s: of the products that were run. GB/s: inputs and outputs, each moved once."
    return [*report.notes, columns, *([gpu] if report.machine.gpu is not None else [])]


def to_text(report: Report) -> str:
    """Aligned columns for a terminal."""
    rows = [_columns(report), *(_cells(row, report) for row in report.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([heading(report), machine_line(report), "", *lines, "", *_remarks(report)])


def to_markdown(report: Report) -> str:
    """A section of a Markdown page."""
    columns = _columns(report)
    rows = [columns, ["---"] * len(columns), *(_cells(row, report) for row in report.rows)]
    table = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(
        [f"## {heading(report)}", "", machine_line(report), "", *table, "", *(f"- {line}" for line in _remarks(report)), ""]
    )
