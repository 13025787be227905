"""Calls of the Python tool in one session, and a server for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metis_fast.config import PythonToolConfig
from metis_fast.errors import ToolSetupError
from metis_fast.rollout.protocols import Compact
from metis_fast.tools.python_tool import PythonServer, PythonTool
from metis_fast.types import Observation

LIMIT = 2000
WORD = Compact().word
Run = Callable[..., list[Observation]]


def observations(server: PythonServer, *codes: str, timeout_s: float = 60.0) -> list[Observation]:
    async def story() -> list[Observation]:
        tool = PythonTool(server, (), timeout_s, LIMIT)
        try:
            return [WORD(await tool.call(code)) for code in codes]
        finally:
            await tool.close()

    return asyncio.run(story())


def serve(scratch: Path) -> Iterator[PythonServer]:
    """A server; a machine without a sandbox skips the test."""
    try:
        opened = PythonServer(PythonToolConfig(max_output_chars=LIMIT), scratch)
    except ToolSetupError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()
