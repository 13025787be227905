"""The sessions of a tool server: each call runs once, whatever becomes of the connection on which it was asked for.

A call is a task of its own, and the session keeps its last answer. A client that lost its connection, or that waits longer
than a reply may take, asks again with the same number.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Sequence

from metis_fast.config import ToolServeConfig
from metis_fast.errors import InfrastructureError
from metis_fast.tools.protocol import Toolbox, ToolSession
from metis_fast.tools.result_tree import images_of
from metis_fast.tools.server.blobs import BlobStore
from metis_fast.tools.server.metrics import Metrics, outcome_of
from metis_fast.tools.server.wire import Answer, Calling, Failure, Fault, Opening, encode_opening, to_json

_LOG = logging.getLogger(__name__)
_PICKED_UP_S = 2.0  # that an answer waits for its client while the server ends
_LONGEST_SLEEP_S = 30.0


class Rejected(Exception):
    """A request that is not done. failure: what its client is told."""

    def __init__(self, fault: Fault, text: str, missing: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.failure = Failure(fault, text, missing)


class _Session:
    """known: hashes of images that the client has. used: when it was last asked for something, on the monotonic clock."""

    def __init__(self, opening: Opening, tools: ToolSession) -> None:
        self.name, self.key, self.tools, self.known = secrets.token_hex(16), opening.key, tools, set(opening.images)
        self.opened = _known_as(opening)
        self.used = time.monotonic()
        self.number = 0
        self.asked = b""  # what the last call is, see `_digest`
        self.task: asyncio.Task[Answer | Failure] | None = None
        self.picked_up = True  # the last answer
        self.lost = ""  # why no further call can run

    @property
    def runs(self) -> bool:
        """A call of it."""
        return self.task is not None and not self.task.done()


class SessionTable:
    """Sessions over `toolbox`, in one event loop. Whoever makes it calls `watch` in a task and `close` at the end."""

    def __init__(self, toolbox: Toolbox, config: ToolServeConfig, blobs: BlobStore, metrics: Metrics) -> None:
        self._toolbox, self._config, self._blobs, self._metrics = toolbox, config, blobs, metrics
        self._sessions: dict[str, _Session] = {}
        self._by_key: dict[str, _Session] = {}
        self._running: set[asyncio.Task[Answer | Failure]] = set()
        self.draining = False

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, opening: Opening) -> str:
        """A new session, or the one of that key; starts nothing. Returns its name, which nobody can guess.

        Raises:
            Rejected: IMAGES, BUSY, DRAINING; ORDER: the key is that of another prompt's session.
        """
        again = self._by_key.get(opening.key) if opening.key else None
        if again is not None:
            if again.opened != _known_as(opening):
                raise Rejected(Fault.ORDER, "the key is that of a session with another prompt; use a new one for each session")
            return again.name
        if self.draining:
            raise Rejected(Fault.DRAINING, "the server is about to end and opens no sessions")
        if len(self._sessions) >= self._config.max_sessions:
            raise Rejected(Fault.BUSY, f"tools.serve.max_sessions={self._config.max_sessions} are open")
        missing = self._blobs.missing(opening.images)
        if missing:
            raise Rejected(Fault.IMAGES, f"{len(missing)} images are not here; put them under /blobs first", missing)
        tools = self._toolbox.session(self._blobs.take(opening.images), opening.extra, opening.seen)
        session = _Session(opening, tools)
        self._sessions[session.name] = session
        if session.key:
            self._by_key[session.key] = session
        self._metrics.opened.inc()
        self._metrics.sessions.set(len(self._sessions))
        return session.name

    def _find(self, name: str) -> _Session:
        session = self._sessions.get(name)
        if session is None:
            raise Rejected(
                Fault.NO_SESSION, "there is no such session: it ended, was idle for too long, or the server was started again"
            )
        session.used = time.monotonic()
        return session

    async def call(self, name: str, calling: Calling) -> Answer | None:
        """The answer of a call; None where it still runs after `calling.wait_s`.

        Raises:
            Rejected: NO_SESSION, ORDER, BUSY, DRAINING; TOOL, DEADLINE: of the call itself.
        """
        session = self._find(name)
        if calling.number != session.number:
            self._start(session, calling)
        elif session.asked != _digest(calling):
            raise Rejected(Fault.ORDER, f"call {calling.number} was another one before")
        task = session.task
        assert task is not None
        await asyncio.wait([task], timeout=calling.wait_s)
        session.used = time.monotonic()
        if not task.done():
            return None
        session.picked_up = True
        if task.cancelled():
            raise Rejected(Fault.NO_SESSION, "the session was ended during the call")
        answer = task.result()
        if isinstance(answer, Failure):
            raise Rejected(answer.fault, answer.text)
        return answer

    def last_number(self, name: str) -> int:
        """Of the last call that was started in a session; 0: none, or the session is gone."""
        return self._sessions[name].number if name in self._sessions else 0

    def _start(self, session: _Session, calling: Calling) -> None:
        if session.lost:
            raise Rejected(Fault.NO_SESSION, session.lost)
        if calling.number != session.number + 1:
            raise Rejected(Fault.ORDER, f"expected call {session.number} or {session.number + 1}, got {calling.number}")
        if session.runs:
            raise Rejected(Fault.ORDER, f"call {session.number} still runs; a session has one at a time")
        if self.draining:
            raise Rejected(Fault.DRAINING, "the server is about to end and runs no further call")
        if len(self._running) >= self._config.queue:
            raise Rejected(Fault.BUSY, f"tools.serve.queue={self._config.queue} calls are here")
        session.number, session.asked = calling.number, _digest(calling)
        session.picked_up = False
        task = session.task = asyncio.create_task(self._run(session, calling))
        began = time.monotonic()
        self._running.add(task)
        self._metrics.queue.set(len(self._running))

        def ended(task: asyncio.Task[Answer | Failure]) -> None:
            self._running.discard(task)
            self._metrics.queue.set(len(self._running))
            self._metrics.call(calling.name, _outcome(task), time.monotonic() - began)

        task.add_done_callback(ended)

    async def _run(self, session: _Session, calling: Calling) -> Answer | Failure:
        limit_s = min(calling.deadline_s, self._config.call_s)
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                result = await session.tools.call(calling.name, calling.arguments)
        except TimeoutError:
            if not limit.expired():
                raise
            # what the tools kept for the agent may be gone, and the next call would read as if that were its own doing
            session.lost = "an earlier call of the session took too long"
            return Failure(Fault.DEADLINE, f"the call, with its turn, took more than {limit_s:g} s")
        except InfrastructureError as error:
            return Failure(Fault.TOOL, str(error))
        fresh = {image.sha256: image for image in images_of(result) if image.sha256 not in session.known}
        session.known |= fresh.keys()
        return Answer(result, tuple(fresh.values()))

    async def end(self, name: str) -> None:
        """End a session and the call that runs in it, if there is one of that name; its processes are gone then."""
        session = self._sessions.pop(name, None)
        if session is None:
            return
        self._by_key.pop(session.key, None)
        self._metrics.sessions.set(len(self._sessions))
        if session.task is not None and session.runs:
            session.task.cancel()
            await asyncio.wait([session.task])
        await session.tools.close()

    async def watch(self) -> None:
        """End sessions that are idle, until cancelled."""
        while True:
            await asyncio.sleep(min(self._config.idle_s / 4, _LONGEST_SLEEP_S))
            oldest = time.monotonic() - self._config.idle_s
            idle = [one.name for one in self._sessions.values() if not one.runs and one.used < oldest]
            self._metrics.idle.inc(len(idle))
            await self._end_all(idle)

    async def drain(self) -> None:
        """Open and start nothing more; wait for the calls that run, for at most `drain_s`, and until their answers are read."""
        self.draining = True
        if self._running:
            await asyncio.wait(self._running, timeout=self._config.drain_s)
        latest = time.monotonic() + _PICKED_UP_S
        while time.monotonic() < latest and any(not one.picked_up and not one.runs for one in self._sessions.values()):
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End all sessions."""
        self.draining = True
        await self._end_all(list(self._sessions))

    async def _end_all(self, names: Sequence[str]) -> None:
        """Each of them, whatever becomes of the others: one that cannot be ended must not keep the rest for ever."""
        for name, error in zip(names, await asyncio.gather(*map(self.end, names), return_exceptions=True), strict=True):
            if isinstance(error, Exception):
                _LOG.error("session %s could not be ended: its tools failed", name[:8], exc_info=error)


def _known_as(opening: Opening) -> bytes:
    return hashlib.sha256(encode_opening(opening)).digest()


def _digest(calling: Calling) -> bytes:
    return hashlib.sha256(to_json([calling.name, dict(calling.arguments)])).digest()


def _outcome(task: asyncio.Task[Answer | Failure]) -> str:
    if task.cancelled():
        return Fault.NO_SESSION
    if task.exception() is not None:
        return Fault.DEFECT
    answer = task.result()
    return answer.fault if isinstance(answer, Failure) else outcome_of(answer.result)
