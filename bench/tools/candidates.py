"""What runs an agent's code: ours in this process, ours behind the tool server, a Jupyter kernel, a process for each call."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

from metis_fast.config import ToolsConfig
from metis_fast.tools import open_toolbox
from metis_fast.tools.protocol import Toolbox, ToolSession
from metis_fast.tools.results import PythonResult
from metis_fast.tools.server.client import ServerToolbox

from ..candidate import BenchError, PeerMissing

_START_S = 120.0


class Session(Protocol):
    """Runs code, one call after the other."""

    async def call(self, code: str) -> str:
        """What the code printed to stdout."""
        ...

    async def close(self) -> None:
        """Its processes are gone when this returns."""
        ...


class Candidate(Protocol):
    """Opens sessions. keeps_state: whether the next call of a session knows the variables of the last one."""

    keeps_state: bool

    async def open(self) -> Session:
        """A session, started as far as it can be before its first call."""
        ...

    async def close(self) -> None:
        """End everything."""
        ...


class _ToolboxSession:
    def __init__(self, session: ToolSession) -> None:
        self._session = session

    async def call(self, code: str) -> str:
        result = await self._session.call("python", {"code": code})
        if not isinstance(result, PythonResult) or not result.ok:
            raise BenchError(f"the python tool answered {result}; expected a result")
        return result.stdout

    async def close(self) -> None:
        await self._session.close()


class _OverToolbox:
    keeps_state = True

    def __init__(self, toolbox: Toolbox, stack: AsyncExitStack) -> None:
        self._toolbox, self._stack = toolbox, stack

    async def open(self) -> Session:
        return _ToolboxSession(self._toolbox.session(()))

    async def close(self) -> None:
        await self._stack.aclose()


def _config(**more: object) -> ToolsConfig:
    return ToolsConfig.model_validate({"enabled": ["python"], **more})


async def ours(unsafe: bool) -> Candidate:
    """The toolbox of a run."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        toolbox = await asyncio.to_thread(open_toolbox, _config(python={"unsafe": unsafe}), Path(folder))
        stack.callback(toolbox.close)
        return _OverToolbox(toolbox, stack.pop_all())


async def served(unsafe: bool) -> Candidate:
    """The same behind `metis-fast tools serve`, in a process of its own, over loopback."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "tools.yaml").write_text("tools: {enabled: [python], serve: {port: 0, token_env: ''}}\n", encoding="utf-8")
        command = [sys.executable, "-m", "metis_fast", "tools", "serve", str(folder / "tools.yaml")]
        with (folder / "err").open("wb") as said:
            process = await asyncio.create_subprocess_exec(
                *command, *["--unsafe-tools"] * unsafe, stdout=subprocess.PIPE, stderr=said
            )

        async def stop() -> None:
            if process.returncode is None:
                process.terminate()
            await process.wait()

        stack.push_async_callback(stop)
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), _START_S)
        if not line:
            lines = (folder / "err").read_text(encoding="utf-8").strip().splitlines()
            raise BenchError(f"the tool server did not start: {lines[-1] if lines else 'no message'}")
        url = line.decode().split()[-1]
        config = _config(python={"unsafe": unsafe}, server={"url": url, "token_env": ""})
        return _OverToolbox(await asyncio.to_thread(ServerToolbox, config), stack.pop_all())


class _ProcessSession:
    async def call(self, code: str) -> str:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
        out, _ = await process.communicate()
        return out.decode()

    async def close(self) -> None:
        """Nothing is left of a call."""


class _Processes:
    keeps_state = False

    async def open(self) -> Session:
        return _ProcessSession()

    async def close(self) -> None:
        """Nothing is kept."""


async def processes(unsafe: bool) -> Candidate:
    """`python -c` for each call: no sandbox, no state, nothing imported."""
    return _Processes()


class _Kernel:
    def __init__(self, manager: Any, client: Any) -> None:
        self._manager, self._client = manager, client

    async def call(self, code: str) -> str:
        request = self._client.execute(code, store_history=False)
        out: list[str] = []
        while True:
            message = await self._client.get_iopub_msg(timeout=_START_S)
            if message["parent_header"].get("msg_id") != request:
                continue
            content: Mapping[str, Any] = message["content"]
            if message["msg_type"] == "stream" and content["name"] == "stdout":
                out.append(content["text"])
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                return "".join(out)

    async def close(self) -> None:
        self._client.stop_channels()
        await self._manager.shutdown_kernel(now=True)


class _Kernels:
    keeps_state = True

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._opened = itertools.count()

    async def open(self) -> Session:
        from jupyter_client.manager import AsyncKernelManager  # pyright: ignore[reportMissingImports]

        # sockets with names of their own: the ports of kernels that start at once may be the same, and one of two dies then
        file = f"{self._folder.name}/{next(self._opened)}.json"
        manager = AsyncKernelManager(kernel_name="python3", transport="ipc", connection_file=file)
        await manager.start_kernel(stderr=subprocess.DEVNULL)
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=_START_S)
        return _Kernel(manager, client)

    async def close(self) -> None:
        """Each session ended its own kernel."""
        self._folder.cleanup()


async def kernels(unsafe: bool) -> Candidate:
    """A Jupyter kernel for each session: no sandbox.

    Raises:
        PeerMissing: it is not installed.
    """
    for package in ("jupyter_client", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            raise PeerMissing(f"{package} is not installed; in the project's folder: pip install -e '.[bench]'")
    return _Kernels()


CANDIDATES = {"ours": ours, "ours, served": served, "jupyter": kernels, "python -c": processes}
"""Those that `bench tools` compares; each is opened by its function. unsafe: whether ours run without their sandbox."""
