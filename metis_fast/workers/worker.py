"""One worker of a run: its process, its connection and its calls; started again when it dies or hangs.

It counts as lost when its process ends, its connection breaks, it is silent for too long, or a call misses its deadline; it is
then killed with all that it started, its calls fail at once, and it is started again, in the background.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from metis_fast.config import WorkersConfig
from metis_fast.errors import InfrastructureError, MetisError
from metis_fast.workers.launch import Process, Role
from metis_fast.workers.wire import Call, Hello, Kind, Message, Welcome, WireError, encode, receive

_LOG = logging.getLogger(__name__)
_PING_S = 1.0
_NEWS_S = 15.0  # between two lines that say what is waited for
_EXIT_S = 0.5  # between a broken connection and the end of its process
_LEAVE_S = 6.0  # for a worker told to stop
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # after a start that failed; twice as long after every further one

T = TypeVar("T")


class WorkerError(InfrastructureError):
    """A worker died, hung, or failed in a way that is no answer; its call may be made again."""


class _Lost(Exception):
    """Why a worker counts as dead."""


class _Held(Exception):
    """A start was put off."""


class Home(Protocol):
    """What a worker needs of its `Hub`."""

    config: WorkersConfig

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the hub's loop; may be awaited on any."""
        ...

    def soon(self, function: Callable[[], None]) -> None:
        """Run a function on the hub's loop, from any thread; not where the hub is closed."""
        ...

    async def start(self, name: str, role: Role, cpus: float, gpus: int, environment: dict[str, str]) -> Process:
        """Start a process that will ask for the worker of that name."""
        ...


class Worker:
    """One place for a worker, filled again when its process is lost. Made by `Hub.worker`.

    restarts: how often it was started again.
    """

    def __init__(
        self,
        hub: Home,
        name: str,
        role: Role,
        welcome: Welcome,
        cpus: float,
        gpus: int,
        max_restarts: int,
        prepare: Callable[[Worker], Awaitable[None]] | None,
        environment: dict[str, str],
    ) -> None:
        self.name, self.restarts = name, 0
        self.role: Role = role
        self._hub, self._welcome, self._cpus, self._gpus = hub, welcome, cpus, gpus
        self._max_restarts, self._prepare, self._environment = max_restarts, prepare, environment
        self._process: Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._arrived: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter, Hello]] | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._heard = 0.0
        self._written = 0  # bytes, in all lives
        self._ready = asyncio.Event()
        self.broken: Exception | None = None  # for good: it cannot be started
        self._lost: asyncio.Future[None] | None = None
        self._held, self._released = False, asyncio.Event()
        self._served = False  # whether it was ever ready
        self._failed_starts = 0  # since it was ready
        self.hello: Hello | None = None

    # -- for users, from any event loop ------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Ready for calls now."""
        return self._ready.is_set() and self.broken is None

    async def call(
        self, method: str, *arguments: object, deadline_s: float | None = None, preparing: bool = False, wait: bool = True
    ) -> Any:
        """Run a method of the service. Waits for a worker that is being started, unless told not to.

        deadline_s: a worker that takes longer counts as hung. preparing: for a worker whose `prepare` hook runs, or has run in
        this life; everybody else's calls wait for its end.

        Raises:
            WorkerError: the worker was lost, or raised what is no error of a kind that both ends know.
            MetisError, InfrastructureError: what the method raised.
        """
        return await self._hub.run(self._call(method, arguments, deadline_s, preparing, wait))

    async def lose(self, why: str) -> None:
        """Give the process up: it is killed and started again."""

        async def lose() -> None:
            self._lose(why)

        await self._hub.run(lose())

    def hold(self) -> None:
        """Start no process until `release`, for what it needs is somebody else's meanwhile; one that is being started is ended,
        and started from anew then. One that is ready goes on. From any thread; may be called twice.
        """
        self._held = True
        self._hub.soon(self._put_off)

    def release(self) -> None:
        """Start again what was lost since `hold`, or put off by it. From any thread; may be called twice, or without `hold`."""
        self._held = False
        self._hub.soon(self._released.set)

    # -- on the hub's loop -------------------------------------------------------------------------------------------

    def _lose(self, why: str) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_exception(_Lost(why))

    def _put_off(self) -> None:
        if self._held and not self._ready.is_set() and self._lost is not None and not self._lost.done():
            self._lost.set_exception(_Held())

    async def _call(
        self, method: str, arguments: tuple[object, ...], deadline_s: float | None, preparing: bool, wait: bool
    ) -> Any:
        while not preparing and not self._ready.is_set() and self.broken is None:
            if not wait:
                raise WorkerError(f"worker {self.name} is being started again")
            await self._ready.wait()
        if self.broken is not None:
            raise WorkerError(f"worker {self.name} is gone: {self.broken}")
        if self._writer is None:  # a call of the `preparing` kind, for one that was just lost
            raise WorkerError(f"worker {self.name} is being started again")
        number, future = self._new_call()
        writer = self._writer
        try:
            self._write(writer, Kind.CALL, number, Call(method, arguments))
            async with asyncio.timeout(deadline_s):
                with contextlib.suppress(OSError):  # whoever reads the connection notices
                    await writer.drain()
                return await future
        except TimeoutError:
            self._lose(f"{method} took longer than {deadline_s:g} s")
            raise WorkerError(f"worker {self.name}: {method} took longer than {deadline_s:g} s") from None
        except asyncio.CancelledError:
            self._write(writer, Kind.CANCEL, number)
            raise
        finally:
            self._waiting.pop(number, None)

    def _write(self, writer: asyncio.StreamWriter, kind: Kind, number: int = 0, value: object = None) -> None:
        for part in encode(kind, number, value):
            writer.write(part)
            self._written += len(part)

    def _new_call(self) -> tuple[int, asyncio.Future[Any]]:
        self._number += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[self._number] = future
        return self._number, future

    async def keep(self) -> None:
        """Start the process, and again whenever it is lost, until it cannot be or the hub closes.

        What a service raises in its very first start is final: it would refuse its settings again. Later it has shown that they
        work, and what fails then may pass: memory that the process before has not given back yet, for example.
        """
        while True:
            try:
                await self._live()
            except _Held:
                self._failed_starts -= 1
                self._fail(WorkerError(f"the start of worker {self.name} was put off"))
                _LOG.info("the start of worker %s is put off", self.name)
            except _Lost as lost:
                self._fail(WorkerError(f"worker {self.name} was lost: {lost}"))
                if self.restarts >= self._max_restarts:
                    self._break(WorkerError(f"{lost}, and it was started {self.restarts + 1} times ({self._where()})"))
                    return
                self.restarts += 1
                _LOG.warning("worker %s was lost: %s; starting it again (%d)", self.name, lost, self.restarts)
            except MetisError as error:
                self._break(error)
                return
            except asyncio.CancelledError:
                await self._leave()
                self._break(WorkerError("the run ends"))
                raise
            finally:
                if self._process is not None:
                    await asyncio.to_thread(self._process.kill)

    def ended(self, task: asyncio.Task[None]) -> None:
        """What `keep` ended with. A defect of ours must not leave anybody waiting."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            _LOG.error("worker %s: this is a defect of metis-fast", self.name, exc_info=error)
            self._break(WorkerError(f"{type(error).__name__}: {error}"))

    def _where(self) -> str:
        return f"log: {self._process.describe()}" if self._process is not None else "it never started"

    def _break(self, error: Exception) -> None:
        self.broken = error
        self._fail(error if isinstance(error, MetisError) else WorkerError(str(error)))
        self._ready.set()  # wakes those who wait

    def _fail(self, error: Exception) -> None:
        self._ready.clear()
        if self._writer is not None:
            self._writer.transport.abort()  # closing it would first send what is left, to a node that may be gone
            self._writer = None
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    async def _leave(self) -> None:
        """Let the service close itself."""
        if self._writer is None or self._process is None:
            return
        self._write(self._writer, Kind.STOP)
        for _ in range(int(_LEAVE_S / 0.05)):
            if self._process.exit_code() is not None:
                return
            await asyncio.sleep(0.05)

    async def _live(self) -> None:
        """One life of the process; ends in an exception."""
        if self._failed_starts:
            await asyncio.sleep(min(_LONGEST_PAUSE_S, _PAUSE_S * 2.0 ** (self._failed_starts - 1)))
        while self._held:
            self._released.clear()
            await self._released.wait()
        self._failed_starts += 1
        loop = asyncio.get_running_loop()
        self._arrived, self._lost = loop.create_future(), loop.create_future()
        arrived, lost = self._arrived, self._lost
        lost.add_done_callback(lambda future: None if future.cancelled() else future.exception())
        self._process = await self._hub.start(self.name, self.role, self._cpus, self._gpus, self._environment)
        background = [loop.create_task(self._watch_process())]
        began = time.monotonic()
        try:
            await self._wait_for(arrived, lost, began, "it to start")
            reader, self._writer, self.hello = arrived.result()
            self._heard = time.monotonic()
            ready: asyncio.Future[None] = loop.create_future()
            background += [loop.create_task(self._read(reader, ready)), loop.create_task(self._ping())]
            self._write(self._writer, Kind.WELCOME, 0, self._welcome)
            await self._wait_for(ready, lost, began, "it to be ready")
            ready.result()
            if self._prepare is not None:
                preparing = loop.create_task(self._prepared())
                background.append(preparing)
                await self._wait_for(preparing, lost, began, "it to be prepared")
                try:
                    preparing.result()
                except (InfrastructureError, MetisError) as error:
                    if isinstance(error, MetisError) and not self._served:
                        raise
                    raise _Lost(f"it could not be prepared: {error}") from None
            _LOG.info("worker %s is ready after %.1f s", self.name, time.monotonic() - began)
            if self._held:  # whoever held it took it for one that is not ready
                raise _Held
            self._served, self._failed_starts = True, 0
            self._ready.set()
            await lost
        finally:
            self._ready.clear()
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)

    async def _prepared(self) -> None:
        assert self._prepare is not None
        await self._prepare(self)

    async def _wait_for(self, wanted: asyncio.Future[Any], lost: asyncio.Future[None], began: float, what: str) -> None:
        limit = self._hub.config.start_s
        while True:
            left = began + limit - time.monotonic()
            done, _ = await asyncio.wait(
                {wanted, lost}, timeout=min(_NEWS_S, max(0.0, left)), return_when=asyncio.FIRST_COMPLETED
            )
            if lost in done:
                lost.result()
            if done:
                return
            if time.monotonic() - began >= limit:
                raise _Lost(f"waited {limit:g} s for {what}")
            _LOG.info("waiting for worker %s: %s, %.0f s so far (%s)", self.name, what, time.monotonic() - began, self._where())

    async def _watch_process(self) -> None:
        assert self._process is not None
        while True:
            code = await asyncio.to_thread(self._process.exit_code)
            if code is not None:
                self._lose(f"its process ended with {code} ({self._where()})")
                return
            await asyncio.sleep(0.2)

    async def _ping(self) -> None:
        writer = self._writer
        assert writer is not None
        while True:
            self._write(writer, Kind.PING)
            queued, sent = self._queued(writer)
            await asyncio.sleep(_PING_S)
            if queued and self._queued(writer)[1] > sent:  # it takes what is before the ping, over a slow connection maybe
                self._heard = time.monotonic()
            silence = time.monotonic() - self._heard
            if silence > self._hub.config.silence_s:
                self._lose(f"it has not answered for {silence:.0f} s")
                return

    def _queued(self, writer: asyncio.StreamWriter) -> tuple[int, int]:
        """Bytes that the connection has not taken yet, and those that it has."""
        queued = writer.transport.get_write_buffer_size()
        return queued, self._written - queued

    async def _read(self, reader: asyncio.StreamReader, ready: asyncio.Future[None]) -> None:
        while True:
            try:
                message = await receive(reader)
            except WireError as error:
                await asyncio.sleep(_EXIT_S)  # where its process ended, how it did says more
                self._lose(str(error))
                return
            self._heard = time.monotonic()
            if message.kind is Kind.READY:
                ready.set_result(None)
            elif message.kind is Kind.FAILED and message.number == 0 and not ready.done():
                final = isinstance(message.value, MetisError) and not self._served
                ready.set_exception(_error(self.name, message) if final else _Lost(f"it cannot start: {message.value}"))
            elif message.kind in (Kind.DONE, Kind.FAILED):
                future = self._waiting.get(message.number)
                if future is not None and not future.done():
                    if message.kind is Kind.DONE:
                        future.set_result(message.value)
                    else:
                        future.set_exception(_error(self.name, message))
            elif message.kind is not Kind.PONG:
                self._lose(f"it sent {message.kind.name}, which a worker does not")
                return

    def arrive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hello: Hello) -> str:
        """Take a connection; returns why not, or ""."""
        if self._arrived is None or self._arrived.done():
            return f"worker {self.name} is there already, or was given up"
        self._arrived.set_result((reader, writer, hello))
        return ""

    @property
    def process(self) -> Process | None:
        """Of the current life."""
        return self._process


def _error(name: str, message: Message) -> Exception:
    if isinstance(message.value, MetisError | InfrastructureError):
        return message.value
    return WorkerError(f"worker {name}: {message.value}")


def wait_ready(workers: list[Worker], check: Callable[[], None], poll_s: float = 0.2) -> None:
    """Wait until all are ready; `check` may raise to stop.

    Raises:
        MetisError: what a service raised while it was made. WorkerError: a worker cannot be started.
    """
    while not all(worker.alive for worker in workers):
        for worker in workers:
            if worker.broken is not None:
                raise worker.broken
        check()
        time.sleep(poll_s)
