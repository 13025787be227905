"""Where a run lives, and what makes it repeatable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from metis_fast.config.section import MAY_CHANGE, FilePath, NonNegative, Section, Several, Text


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    dir: Annotated[FilePath, MAY_CHANGE] = Path("runs/default")
    """Folder of this run: resolved config, metrics, rollouts, checkpoints, report."""
    seed: NonNegative = 0
    """Seeds data order, sampling and initialisation."""
    accept_changes: Annotated[Several[Text], MAY_CHANGE] = ()
    """Settings that decide the result, or whose files do, and may differ from what the run in `dir` began with, for example
    `loss.w_tool` or `model.path`. What they change is kept in `changes.jsonl`."""
    threads: Annotated[NonNegative, MAY_CHANGE] = 0
    """CPU threads for torch; 0 leaves torch's own choice. Runs are bit-repeatable for a fixed number."""
