"""What the machine is, on any platform."""

from __future__ import annotations

import os
from pathlib import Path

PARENT = "METIS_RANK_PARENT"
"""Environment variable with the process id of the run that started a rank on its own machine."""
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or the container's limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for path in _LIMITS if path.is_file() and (text := path.read_text().strip()).isdigit()]
    return min(memory, *limits) if limits else memory


def num_cores() -> int:
    """Processor cores that this process may use; where the platform does not tell (macOS), all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
