"""Runs hostile code in a session of its own while a neighbour goes on calling, in the same server."""

from __future__ import annotations

import asyncio
import time

from python_calls import LIMIT, WORD

from metis_fast.tools.python_server import PythonServer
from metis_fast.tools.python_tool import PythonTool
from metis_fast.types import Observation, Outcome

_PATIENCE_S = 10.0  # of a neighbour, on a machine on which all tests run

SYSCALL = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def syscall(x86, arm, *args):
    number = x86 if os.uname().machine == 'x86_64' else arm
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    return 'done' if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""
"""`syscall(number on x86-64, on aarch64, arguments)` gives "done" or the name of an error."""


def attack(server: PythonServer, *codes: str, timeout_s: float = 60.0) -> list[Observation]:
    """What calls in one session show. Meanwhile the calls of a neighbour are right, and none of them waits for long."""

    async def neighbour(over: asyncio.Event) -> None:
        tool = PythonTool(server, (), 60.0, LIMIT)
        try:
            assert WORD(await tool.call("x = 6")).outcome is Outcome.TOOL_RESULT
            while True:
                begun, last = time.monotonic(), over.is_set()
                assert WORD(await tool.call("x * 7")) == Observation("42")
                assert time.monotonic() - begun < _PATIENCE_S
                if last:  # and after all was over
                    return
                await asyncio.sleep(0.02)
        finally:
            await tool.close()

    async def story() -> list[Observation]:
        tool, over = PythonTool(server, (), timeout_s, LIMIT), asyncio.Event()
        beside = asyncio.create_task(neighbour(over))
        try:
            return [WORD(await tool.call(code)) for code in codes]
        finally:
            await tool.close()
            over.set()
            await beside

    return asyncio.run(story())
