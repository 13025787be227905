"""Which of our implementations `impl="auto"` is, for the reader of a table."""

from __future__ import annotations

from metis_kernels import available, cpu_library_status

from .candidate import DTYPES, Request


def chosen(request: Request) -> str:
    """Name of the implementation, and why it is not the fast one where it is not."""
    fast = "triton" if request.device.type == "cuda" else "cpu"
    why_not = available(fast, request.device, DTYPES[request.dtype])
    if not why_not:
        return fast
    return f"reference ({cpu_library_status() if fast == 'cpu' else why_not})"
