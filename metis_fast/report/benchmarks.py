"""Results of benchmarks that a run has, for its pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from metis_fast.errors import one_line

if TYPE_CHECKING:
    from metis_fast.evaluate.table import Table


def benchmark_table(run_dir: Path, say: Callable[[str], None]) -> Table | None:
    """Results beside the published ones: those of the run folder, and those of the first and of the last training step.

    say: called with a line for results that cannot be read. None where there are none.
    """
    folder = run_dir / "benchmarks"
    try:
        steps = sorted({path.parents[1] for path in folder.glob("step-*/*/result.json")})
        places = [run_dir] if any(folder.glob("*/result.json")) else []
        places += steps[:1] + steps[1:][-1:]
        if not places:
            return None
        from metis_fast.evaluate.table import make_table  # most runs have none

        return make_table(places, paper=True)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # damaged, or by a newer version's names and shapes
        say(f"benchmarks are left out: {one_line(error)[:240]}")
        return None
