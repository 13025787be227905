"""Tools in workers: `ToolService` is served there, `RemoteToolbox` is the run's side.

A session lives in one worker, from its first call to its end. When that worker is lost, so is what the session held (a Python
session's variables): its call raises InfrastructureError, which the episode retries from the prompt, on a worker that lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from metis_fast.config import ImageSearchConfig, TextSearchConfig, ToolsConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.own_folder import OwnFolder
from metis_fast.tools.arguments import too_deep
from metis_fast.tools.builtin import SPECS
from metis_fast.tools.protocol import NO_EXTRA, ToolSpec
from metis_fast.tools.python_tool import longest_s
from metis_fast.tools.results import Refusal, Refused, ToolResult
from metis_fast.tools.search import keys
from metis_fast.tools.toolbox import LocalSession, LocalToolbox
from metis_fast.types import ImageBlob, Observation, ToolName
from metis_fast.workers.hub import Hub
from metis_fast.workers.worker import Worker, WorkerError

SERVICE = "metis_fast.tools.remote:ToolService"
_SLACK_S = 90.0  # beyond a call's own time-out: a cold start of the sandbox takes up to 60 s on a loaded machine
_SHORT_S = 60.0  # to open a session, which starts nothing, or to end one


class SessionLost(InfrastructureError):
    """The worker does not know the session: it was started again since."""


class ToolService:
    """The toolbox of a worker. Its methods are called by `RemoteToolbox` alone.

    scratch: folder for temporary files; None: the system's. work: the run's working folder; None: this process's.

    Raises:
        ToolSetupError: see `tools.open_toolbox`.
    """

    def __init__(self, config: ToolsConfig, scratch: Path | None = None, work: Path | None = None) -> None:
        self._sessions: dict[int, LocalSession] = {}
        with ExitStack() as stack:
            folder = OwnFolder(scratch or Path(tempfile.gettempdir()), "metis-tools-")
            stack.callback(folder.close)
            self._toolbox = LocalToolbox.open(config, folder.path, work)
            stack.callback(self._toolbox.close)
            self._opened = stack.pop_all()

    async def tools(self) -> tuple[ToolSpec, ...]:
        """See `Toolbox.tools`."""
        return tuple(self._toolbox.tools)

    async def open(
        self, session: int, images: Sequence[ImageBlob], extra: Mapping[str, object], seen: Sequence[tuple[int, int]]
    ) -> int:
        """Make a session of that number; returns how many calls of `python` of all sessions run at once here."""
        self._sessions[session] = self._toolbox.session(images, extra, seen)
        return self._toolbox.num_slots

    async def call(self, session: int, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """See `ToolSession.call`.

        Raises:
            SessionLost: no such session.
            InfrastructureError: see there.
        """
        if session not in self._sessions:
            raise SessionLost("the tool worker was started again since the session's last call")
        return await self._sessions[session].call(name, arguments)

    async def close_session(self, session: int) -> None:
        """End a session, if there is one of that number."""
        opened = self._sessions.pop(session, None)
        if opened is not None:
            await opened.close()

    def close(self) -> None:
        """End everything."""
        self._opened.close()


def start_tool_workers(
    hub: Hub, config: ToolsConfig, num: int, scratch: Path | None, service: str = SERVICE, max_restarts: int = 20
) -> list[Worker]:
    """Workers tools-0, tools-1, ...; they start in the background.

    scratch: see `ToolService`. service: one of another kind, for tests.
    """

    def absolute(section: TextSearchConfig | ImageSearchConfig) -> dict[str, Path]:  # a worker's working folder is another
        return {name: value.resolve() for name, value in section if isinstance(value, Path)}

    text = config.text_search.model_copy(update=absolute(config.text_search))
    image = config.image_search.model_copy(update=absolute(config.image_search))
    config = config.model_copy(update={"text_search": text, "image_search": image})
    secret = dict(keys.environment(text)) if ToolName.TEXT_SEARCH in config.enabled else {}
    secret |= mcp_environment(config)
    arguments = (config, scratch, Path.cwd())
    return [
        hub.worker(f"tools-{i}", "tools", service, *arguments, max_restarts=max_restarts, environment=secret)
        for i in range(num)
    ]


def mcp_environment(config: ToolsConfig) -> dict[str, str]:
    """Variables that sessions with MCP servers need, as far as they are set."""
    names = [name for server in config.mcp for name in server.variables()]
    return {name: os.environ[name] for name in names if name in os.environ}


class _Place:
    """A worker as the toolbox sees it. num_sessions: those that are open there."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.num_sessions = 0
        self._slots: tuple[asyncio.AbstractEventLoop, int, asyncio.Semaphore] | None = None

    def set_slots(self, num: int) -> None:
        """Calls of `python` that the worker runs at once; those beyond wait on our side, so that a deadline counts a call's own
        time. A search has its own deadline, which counts its waiting."""
        loop = asyncio.get_running_loop()
        if self._slots is None or self._slots[:2] != (loop, num):
            self._slots = (loop, num, asyncio.Semaphore(num))

    @property
    def slots(self) -> asyncio.Semaphore:
        """Held during a call."""
        assert self._slots is not None
        return self._slots[2]


class RemoteToolbox:
    """Spreads sessions over workers. See `Toolbox` for the contract."""

    def __init__(self, config: ToolsConfig, workers: Sequence[Worker]) -> None:
        """workers: from `start_tool_workers`; they end with their hub."""
        self._tools = tuple(SPECS[name] for name in dict.fromkeys(config.enabled))
        self._places = [_Place(worker) for worker in workers]
        self._numbers = itertools.count()
        self._closed = False
        others = [config.own_timeout_s, *(server.queue_s + server.connect_s + server.timeout_s for server in config.mcp)]
        self.call_s = max(longest_s(config.python.timeout_s), config.text_search.deadline_s, *others) + _SLACK_S

    async def learn(self) -> None:
        """Ask a worker for its tools. Needed only where there are others than the built-in ones, which are known.

        Raises:
            WorkerError: it was lost.
        """
        self._tools = tuple(await self._places[0].worker.call("tools", deadline_s=_SHORT_S))

    @property
    def names(self) -> Sequence[str]:
        """The built-in tools in the order of the configuration, then others."""
        return tuple(spec.name for spec in self._tools)

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """In the same order."""
        return self._tools

    @property
    def num_sessions(self) -> list[int]:
        """Open sessions of each worker."""
        return [place.num_sessions for place in self._places]

    def session(
        self, images: Sequence[ImageBlob], extra: Mapping[str, object] = NO_EXTRA, seen: Sequence[tuple[int, int]] = ()
    ) -> RemoteSession:
        """Tools for one rollout; it gets its worker with its first call."""
        return RemoteSession(self, next(self._numbers), (tuple(images), dict(extra), tuple(seen)))

    def place(self) -> _Place:
        """Where the next session goes: a living worker, or at least one that is being started, with the fewest sessions.

        Raises:
            InfrastructureError: the toolbox is closed.
            ToolSetupError: every worker was given up.
        """
        if self._closed:
            raise InfrastructureError("the toolbox is closed")
        places = [place for place in self._places if place.worker.broken is None]
        if not places:
            raise ToolSetupError(f"no tool worker is left: {self._places[0].worker.broken}")
        return min(places, key=lambda place: (not place.worker.alive, place.num_sessions))

    def close(self) -> None:
        """No session opens any more; the workers end with their hub."""
        self._closed = True


class RemoteSession:
    """The tools of one rollout. See `ToolSession` for the contract."""

    def __init__(self, toolbox: RemoteToolbox, number: int, prompt: tuple[object, ...]) -> None:
        """prompt: further arguments of `ToolService.open`."""
        self._toolbox, self._number, self._prompt = toolbox, number, prompt
        self._place: _Place | None = None

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """Run one tool; see `ToolSession.call`. After a lost worker the session's next call opens it anew, on another."""
        if refused := too_deep(name, arguments):
            return refused
        try:
            if self._place is None:
                self._place = self._toolbox.place()
                self._place.num_sessions += 1
                worker = self._place.worker
                self._place.set_slots(await worker.call("open", self._number, *self._prompt, deadline_s=_SHORT_S))
            worker = self._place.worker
            async with self._place.slots if name == ToolName.PYTHON else contextlib.nullcontext():
                answer = await worker.call(
                    "call", self._number, name, dict(arguments), deadline_s=self._toolbox.call_s, wait=False
                )
            if isinstance(answer, Refused) and answer.why is Refusal.NO_TOOL and name in self._toolbox.names:
                raise InfrastructureError(f"worker {worker.name} does not have the tool {name}, which prompts offer")
            if not isinstance(answer, (*get_args(ToolResult), Observation)):
                await worker.lose(f"a tool call was answered with {type(answer).__name__}, which is no result")
                raise WorkerError(f"worker {worker.name}: its answer is no result")
            return answer
        except (WorkerError, SessionLost):
            await self.close()  # the rollout's state is gone, or not to be trusted
            raise

    async def close(self) -> None:
        """End the session in its worker, if that lives; otherwise it has ended with it."""
        place, self._place = self._place, None
        if place is None:
            return
        place.num_sessions -= 1
        if place.worker.alive:
            with contextlib.suppress(InfrastructureError):  # a worker that is lost meanwhile takes the session with it
                await place.worker.call("close_session", self._number, deadline_s=_SHORT_S, wait=False)
