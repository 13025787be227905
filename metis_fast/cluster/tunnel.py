"""Connections that ranks make to their keepers, carried to the run through calls of these: bytes, whatever they mean.

The run's end of each is a socket like any other. A keeper that dies is the end of its connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ray.exceptions import RayError

from metis_fast.cluster.keeper import CHUNK


class Tunnel:
    """All connections of some keepers, in one thread. Close it to end them."""

    def __init__(self, keepers: Sequence[Any]) -> None:
        self._made: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tunnel", daemon=True)
        self._thread.start()
        for keeper in keepers:
            self._loop.call_soon_threadsafe(self._spawn, self._accept(keeper))

    def connections(self) -> Iterator[socket.socket]:
        """The run's ends of those made since the last call; waits for nothing."""
        while not self._made.empty():
            yield self._made.get()

    def close(self) -> None:
        """End all connections."""
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self) -> None:
        others = self._tasks - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _accept(self, keeper: Any) -> None:
        with contextlib.suppress(RayError):  # its ranks are found dead by who looks at them
            while True:
                number = await keeper.accept.remote()
                far, near = socket.socketpair()
                far.setblocking(False)
                self._spawn(self._carry(keeper, number, far))
                self._made.put(near)

    async def _carry(self, keeper: Any, number: int, sock: socket.socket) -> None:
        """Both ways, until either end hangs up."""
        ways = [asyncio.ensure_future(way) for way in (self._out(keeper, number, sock), self._back(keeper, number, sock))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            sock.close()
            keeper.hang_up.remote(number)

    async def _out(self, keeper: Any, number: int, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, RayError):
            while data := await self._loop.sock_recv(sock, CHUNK):
                await keeper.write.remote(number, data)

    async def _back(self, keeper: Any, number: int, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, RayError):
            while data := await keeper.read.remote(number):
                await self._loop.sock_sendall(sock, data)
