"""The cold start in the report: what `metis-fast sft` has logged, read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metis_fast.errors import DataError
from metis_fast.sft.log import read_lines

_FOLDER = "sft"
_NEEDED = frozenset({"step", "loss", "loss_tokens"})


@dataclass(frozen=True, slots=True)
class ColdStart:
    """folder: that its log lies in. steps, evaluations: lines of `metrics.jsonl` and `eval.jsonl` (docs/sft.md)."""

    folder: Path
    steps: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]


def read_cold_start(run_dir: Path) -> ColdStart | None:
    """The cold start of a run folder, or that whose own folder this is; None where there is none.

    Raises:
        DataError: a file that no cold start has written.
    """
    inside = run_dir / _FOLDER
    folder = inside if (inside / "metrics.jsonl").exists() or run_dir.name != _FOLDER else run_dir
    steps, evaluations = (_lines(folder / name) for name in ("metrics.jsonl", "eval.jsonl"))
    return ColdStart(folder, steps, evaluations) if steps or evaluations else None


def _lines(path: Path) -> tuple[Mapping[str, Any], ...]:
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if missing := _NEEDED - line.keys():
            lacks = ", ".join(sorted(missing))
            raise DataError(f"{path}:{number}: expected a line of a cold start, got one without {lacks}; move the file away")
    return tuple(lines)
