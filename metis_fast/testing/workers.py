"""A worker service that does what a test asks, failures included."""

from __future__ import annotations

import asyncio
import os
import time

from metis_fast.errors import ConfigError, InfrastructureError


class Probe:
    """Served by `metis_fast.workers.server` in tests. fail: raise it as a ConfigError instead of starting."""

    def __init__(self, fail: str = "") -> None:
        if fail:
            raise ConfigError(fail)
        self._calls = 0

    async def echo(self, value: object) -> object:
        """The same value."""
        self._calls += 1
        return value

    async def calls(self) -> int:
        """How many values were echoed in this life."""
        return self._calls

    async def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    async def nap(self, seconds: float) -> None:
        """Take time, answering pings."""
        await asyncio.sleep(seconds)

    async def hang(self, seconds: float) -> None:
        """Take time without answering pings."""
        time.sleep(seconds)

    async def fail(self, kind: str) -> None:
        """Raise an exception of a kind: "ours" or any."""
        if kind == "ours":
            raise InfrastructureError("as asked")
        raise RuntimeError("as asked")

    async def exit(self, code: int) -> None:
        """End the process at once."""
        os._exit(code)
