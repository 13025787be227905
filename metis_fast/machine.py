"""What the machine is, on any platform."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Processor cores that this process may use; where the platform does not tell (macOS), all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
