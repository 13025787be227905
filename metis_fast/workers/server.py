"""A worker's side: `metis-fast worker` dials the run, makes the service that it is told to, and answers calls until hung up on.

The service is any class; its public `async` methods can be called, many at once. What keeps the event loop of this process
from answering pings for long makes the worker look dead, so a service does its long work in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import inspect
import logging
import os
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from metis_fast import __version__
from metis_fast.errors import ConfigError, InfrastructureError, MetisError
from metis_fast.workers.launch import SCRATCH, remove_scratch
from metis_fast.workers.wire import KEY, Call, Hello, Kind, Welcome, WireError, apply, encode, receive

_LOG = logging.getLogger(__name__)
_RETRY_S = 0.2
_LEAVE_S = 5.0  # for a service to close
_OUT_OF_MEMORY, _RUN_IS_GONE = 71, 1  # exit codes
_PR_SET_PDEATHSIG = 1


class _Connection:
    """Serves one service over one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._running: dict[int, asyncio.Task[None]] = {}
        self._service: Any = None
        self._making: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Until the run says so or hangs up."""
        while True:
            message = await receive(self._reader)
            match message.kind:
                case Kind.PING:
                    self._send(Kind.PONG, message.number)
                case Kind.WELCOME:
                    self._making = asyncio.create_task(self._make(message.value))
                case Kind.CALL:
                    task = asyncio.create_task(self._call(message.number, message.value))
                    self._running[message.number] = task
                    task.add_done_callback(lambda _, number=message.number: self._running.pop(number, None))
                case Kind.CANCEL:
                    if (task := self._running.get(message.number)) is not None:
                        task.cancel()
                case Kind.REFUSED:
                    raise ConfigError(f"the run refused this worker: {message.value}")
                case Kind.STOP:
                    return
                case _:
                    raise WireError(f"a run does not send {message.kind.name}")

    def _send(self, kind: Kind, number: int = 0, value: object = None) -> None:
        for part in encode(kind, number, value):
            self._writer.write(part)

    async def _make(self, welcome: Welcome) -> None:
        module, _, name = welcome.service.partition(":")
        try:
            # importing and loading take their time, in which pings are answered
            cls = await asyncio.to_thread(lambda: getattr(importlib.import_module(module), name))
            self._service = await asyncio.to_thread(cls, *welcome.arguments)
        except Exception as error:  # it goes to the run, which decides
            traceback.print_exc()
            self._send(Kind.FAILED, 0, _portable(error))
            return
        self._send(Kind.READY)

    async def _call(self, number: int, call: Call) -> None:
        method = getattr(self._service, call.method)
        assert not call.method.startswith("_") and inspect.iscoroutinefunction(method), call.method
        try:
            value = await method(*call.arguments)
        except asyncio.CancelledError:
            return  # the run has forgotten this call
        except MemoryError:  # a process without memory answers nothing that one could trust; its run starts another
            traceback.print_exc()
            os._exit(_OUT_OF_MEMORY)
        except Exception as error:  # it goes to the run, which decides
            if not isinstance(error, MetisError | InfrastructureError):
                traceback.print_exc()
            self._send(Kind.FAILED, number, _portable(error))
            return
        self._send(Kind.DONE, number, value)
        with contextlib.suppress(OSError):  # `serve` notices as well
            await self._writer.drain()

    async def close(self) -> None:
        """End the service."""
        for task in (*self._running.values(), *filter(None, [self._making])):
            task.cancel()
        close = getattr(self._service, "close", None)
        if close is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(close), _LEAVE_S)


def _portable(error: Exception) -> Exception | str:
    """The exception itself where the run has its class, else its text."""
    if isinstance(error, MetisError | InfrastructureError):
        return error
    return f"{type(error).__name__}: {error}"


async def _connect(host: str, port: int, wait_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        try:
            return await asyncio.open_connection(host, port)
        except OSError as error:
            if asyncio.get_running_loop().time() > deadline:
                raise ConfigError(
                    f"no run listens at {host}:{port} ({error.strerror or error}); see that it runs, and the address"
                ) from None
            await asyncio.sleep(_RETRY_S)


async def _main(host: str, port: int, name: str, key: bytes, wait_s: float, scratch: str) -> None:
    try:
        await _serve(host, port, name, key, wait_s)
    except WireError as error:
        print(f"worker {name}: {error}", file=sys.stderr, flush=True)
        # now: the end of an event loop waits for its threads, and the one that makes the service may never be done
        _end_group(scratch)


async def _serve(host: str, port: int, name: str, key: bytes, wait_s: float) -> None:
    reader, writer = await _connect(host, port, wait_s)
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    await apply(reader, writer, key)
    connection = _Connection(reader, writer)
    for part in encode(Kind.HELLO, 0, Hello(name, __version__, socket.gethostname(), os.getpid())):
        writer.write(part)
    try:
        await connection.serve()
    finally:
        await connection.close()


def run(join: str, name: str, wait_s: float) -> int:
    """Serve a run; the exit code is 0 only if the run ended the worker. Ends the process itself where the run is gone.

    Raises:
        ConfigError: no run there, no key, or a run that refuses.
    """
    host, _, port = join.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--join must be HOST:PORT, got {join!r}")
    key = os.environ.pop(KEY, "")  # not for what the service starts: an agent's code runs below it
    scratch = os.environ.pop(SCRATCH, "")
    if not key:
        raise ConfigError(f"{KEY} is not set; it must hold the run's key")
    # wakes up one that was stopped (SIGSTOP) when what started it dies: it reads that the run is gone, and ends its group
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGCONT))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # these are for the run, which ends its workers
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    asyncio.run(_main(host, int(port), name, key.encode(), wait_s, scratch))
    return 0


def _end_group(scratch: str) -> NoReturn:
    """The run is gone: end what the service has started, too, and this process with it."""
    remove_scratch(scratch)  # nobody else is there to do it
    if os.getpgrp() == os.getpid():  # started by a launcher, in a group of its own
        os.killpg(0, signal.SIGKILL)
    os._exit(_RUN_IS_GONE)
