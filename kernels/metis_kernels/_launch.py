"""The one place where Triton kernels are launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, num_warps: int, num_stages: int = 2, **constants: Any) -> None:
    """Run `kernel` on `grid` (up to three numbers): positional arguments in order, constexpr ones by name.

    Takes the ahead-of-time compiled variant where there is one for this architecture, these dtypes, alignments and
    constants, and compiles just in time otherwise.
    """
    kernel[tuple(grid)](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
