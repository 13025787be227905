"""What the run's process costs as nodes are added, and that nothing of a group comes into it: real actors, real Ray nodes of
this machine, groups from a script."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness import HERE

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")

_OBJECTS = 1024  # bytes of a rollout, of all that is pickled; measured: 800
_TCP = 4096  # of a rollout, Ray's own included


def _bench(tmp_path: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "scale", "--shape", "light", "--json", *words],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_rollout_costs_the_run_a_kilobyte_and_no_array_or_image_of_it_comes_in(tmp_path: Path) -> None:
    """That all groups were trained once, that ranks fetched what summaries say, and that nothing of them is in the run's
    process, the benchmark checks itself: else it shows nothing. With one node, since each takes its time to start."""
    (row,) = _bench(tmp_path, "--nodes", "1", "--steps", "3", "--prompts", "8")["rows"]
    assert row["summaries"] + row["jobs"] + row["scored"] + row["told"] < _OBJECTS
    assert 0 < row["tcp_in"] + row["tcp_out"] < _TCP
    assert row["fetched"] <= row["ranks"]


@pytest.mark.slow
def test_memory_is_flat_over_two_hundred_steps_and_bytes_do_not_grow_with_nodes(tmp_path: Path) -> None:
    one, four = _bench(tmp_path, "--nodes", "1,4", "--steps", "200", "--prompts", "8")["rows"]
    for row in (one, four):
        before, after = row["resident"]
        assert after - before < 16 << 20
        assert row["tcp_in"] + row["tcp_out"] < _TCP
    assert one["summaries"] == pytest.approx(four["summaries"], rel=0.02)
