"""The run's side of its workers: where they join, and the thread that keeps them.

The thread keeps the connections and pings, so that a trainer that works for minutes takes nobody for dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from metis_fast import __version__
from metis_fast.config import WorkersConfig
from metis_fast.workers.launch import Job, Launcher, Process, Role
from metis_fast.workers.wire import KEY, Kind, Welcome, WireError, admit, encode, receive
from metis_fast.workers.worker import Worker, WorkerError

_LOG = logging.getLogger(__name__)
_HANDSHAKE_S = 20.0
_STARTS = 256  # that may wait for room at once; a thread is made for each when it is needed

T = TypeVar("T")


class Hub:
    """All workers of a run. Close it, or use it in a `with`.

    address: host:port at which workers join, of this machine alone.
    """

    def __init__(self, config: WorkersConfig, launcher: Launcher) -> None:
        self.config, self.launcher = config, launcher
        self._key = secrets.token_hex(32)
        self._workers: dict[str, Worker] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._socket.getsockname()[:2])
        # a cluster without room lets starts wait for minutes, in which others' threads are needed to kill, watch and stage
        self._starts = ThreadPoolExecutor(_STARTS, "start")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="workers", daemon=True)
        self._thread.start()
        self._server: asyncio.Server = self.now(asyncio.start_server(self._on_connection, sock=self._socket))

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def now(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the hub's loop, from any other thread, and wait.

        Raises:
            WorkerError: the hub is closed.
        """
        try:
            running = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # a thread that was left behind
            coroutine.close()
            raise WorkerError("the run ends") from None
        return running.result()

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the hub's loop; may be awaited on any."""
        if asyncio.get_running_loop() is self._loop:
            return await coroutine
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def soon(self, function: Callable[[], None]) -> None:
        """Run a function on the hub's loop, from any thread; not where the hub is closed."""
        with contextlib.suppress(RuntimeError):  # its loop is closed
            self._loop.call_soon_threadsafe(function)

    async def start(self, name: str, role: Role, cpus: float, gpus: int, environment: dict[str, str]) -> Process:
        """Start a process that will ask for the worker of that name."""
        # by the module's own name: a Python that `multiprocessing` spawns from there (each rank of a tensor-parallel vLLM)
        # imports it, and metis_fast with it, before anything else; it passes over what is called __main__
        command = ("-m", "metis_fast.cli", "worker", "--join", self.address, "--name", name)
        job = Job(name, role, command, {**environment, KEY: self._key}, cpus, gpus)
        return await self._loop.run_in_executor(self._starts, self.launcher.start, job)

    def worker(
        self,
        name: str,
        role: Role,
        service: str,
        *arguments: object,
        cpus: float = 1.0,
        gpus: int = 0,
        max_restarts: int = 5,
        prepare: Callable[[Worker], Awaitable[None]] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Worker:
        """A worker that serves "module:Class" made with `arguments`; it is started in the background, and calls wait for it.

        prepare: runs on the hub's loop after every start, before anybody else's calls; an InfrastructureError in it means that
        the start has failed, and so does a MetisError once the worker has been ready; before, that is final.
        """

        async def make() -> Worker:
            assert name not in self._workers, name
            worker = Worker(
                self, name, role, Welcome(service, arguments), cpus, gpus, max_restarts, prepare, dict(environment or {})
            )
            self._workers[name] = worker
            task = self._loop.create_task(worker.keep())
            task.add_done_callback(worker.ended)
            self._tasks.append(task)
            return worker

        return self.now(make())

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            async with asyncio.timeout(_HANDSHAKE_S):
                await admit(reader, writer, self._key.encode())
                hello = (await receive(reader)).value
        except (WireError, TimeoutError) as error:
            _LOG.warning("a connection that is no worker's was turned away: %s", error)
            writer.close()
            return
        worker = self._workers.get(hello.name)
        problem = f"the run has no worker {hello.name}" if worker is None else ""
        if hello.version != __version__:
            problem = f"it is metis-fast {hello.version}, the run {__version__}; install the same on all machines"
        if worker is not None and not problem:
            problem = worker.arrive(reader, writer, hello)
        if problem:
            _LOG.warning("worker %s was refused: %s", hello.name, problem)
            for part in encode(Kind.REFUSED, 0, problem):
                writer.write(part)
            writer.close()

    def close(self) -> None:
        """End all workers."""
        if not self._thread.is_alive():
            return

        async def stop() -> None:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self.now(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.launcher.close()
        self._starts.shutdown(wait=False, cancel_futures=True)
