"""Lines that an MCP server writes to stdout and that are no messages of the protocol: a print left in it, above all.

The SDK passes them over, but logs a traceback for each, whose text takes longer than a call may where there are thousands.
Here they are counted, for each session by itself, and told of in one line.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass

_SDK = logging.getLogger("mcp.client.stdio")
_COMPLAINT = "Failed to parse JSONRPC message from server"  # of the SDK, one a line; a test fails where it is another one


@dataclass(slots=True)
class Noise:
    """Of one session. lines: how many there were."""

    lines: int = 0

    def __str__(self) -> str:
        lines = "a line" if self.lines == 1 else f"{self.lines:,} lines"
        return f"it wrote {lines} to stdout that are no messages"


_current: ContextVar[Noise | None] = ContextVar("noise", default=None)  # of the session whose task runs


def _count(record: logging.LogRecord) -> bool:
    """A filter: whether the SDK may log this."""
    noise = _current.get()
    if noise is None or record.msg != _COMPLAINT:
        return True
    noise.lines += 1
    return False


_SDK.addFilter(_count)


def count_in(noise: Noise) -> None:
    """Have such lines counted in `noise`, of the session that the calling task opens."""
    _current.set(noise)
