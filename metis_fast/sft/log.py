"""`metrics.jsonl`, a line a step, and `eval.jsonl`, a line a measurement; on disk as they come.

A cold start that was interrupted and resumed has the lines of an uninterrupted one: what came after the checkpoint is dropped.
Nothing in them depends on the clock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metis_fast.errors import CheckpointError, DataError, one_line
from metis_fast.scratch import replaced

JsonLine = Mapping[str, int | float]


class SftLog:
    """Of a folder."""

    def __init__(self, folder: Path) -> None:
        self._metrics, self._evaluations = folder / "metrics.jsonl", folder / "eval.jsonl"

    def resume(self, steps: int) -> None:
        """Forget what came after so many steps.

        Raises:
            DataError: a file cannot be read. CheckpointError: or written.
        """
        _keep(self._metrics, steps)
        _keep(self._evaluations, steps + 1)

    def step(self, line: JsonLine) -> None:
        """Of an optimizer step; `step` counts from 0.

        Raises:
            CheckpointError: it cannot be written. The step was taken: what the run holds is one ahead of its log.
        """
        _append(self._metrics, line)

    def evaluation(self, line: JsonLine) -> None:
        """Of a measurement; `step` is how many steps were done."""
        _append(self._evaluations, line)

    def measured(self, steps: int) -> bool:
        """Whether there is a measurement after so many steps."""
        return any(line["step"] == steps for line in read_lines(self._evaluations))


def _unwritten(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written ({error.strerror or error}); free some space and resume from the last checkpoint"
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Of a log; none where there is no file. Whole ones: a kill may have cut the last one short.

    Raises:
        DataError: it cannot be read.
    """
    if not path.exists():
        return []
    try:
        whole = path.read_bytes().rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.split(b"\n") if line]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON object a line, got {one_line(error)}; remove the file") from None


def _keep(path: Path, before: int) -> None:
    lines = [line for line in read_lines(path) if line["step"] < before]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as scratch, scratch.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritten(path, error) from None


def _append(path: Path, line: JsonLine) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritten(path, error) from None
