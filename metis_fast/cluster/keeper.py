"""The actor of a bundle with ranks: all that these ranks talk to, but for each other.

It starts them, sees them end, and carries their connections (`tunnel`); it fetches groups from Ray into shared memory of its
machine, and puts weights from there into Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import mmap
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import NodeDiedError, ObjectLostError, ObjectStoreFullError, OutOfDiskError, RayActorError

from metis_fast.cluster.weights import Bucket, Publication, Published
from metis_fast.machine import PARENT
from metis_fast.sync.manifest import Place
from metis_fast.train.megatron.shared import Shared, no_room
from metis_fast.workers.launch import Child

_LOST = (ObjectLostError, RayActorError, NodeDiedError)
_FULL = (ObjectStoreFullError, OutOfDiskError)
_FETCHES = 4  # at once
CHUNK = 1 << 16
"""Bytes of a rank's connection in one call: few enough to travel within it, beside Ray's object store (100 KiB)."""


@dataclass(frozen=True, slots=True)
class Where:
    """Where a keeper runs."""

    host: str
    address: str


@dataclass(slots=True)
class Fetched:
    """What came of a fetch. files: by the group's number. lost: numbers of groups that nobody has any more. problem: why others
    could not be fetched; "" if all is well."""

    files: dict[int, str] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    problem: str = ""


class Keeper:
    """Its processes are in groups of their own: they end with all that they start, and Ray's must not."""

    def __init__(self) -> None:
        self._processes: dict[str, Child] = {}
        self._door: socket.socket | None = None
        self._connections: dict[int, socket.socket] = {}
        self._numbers = itertools.count()
        self._groups: Shared | None = None
        self._coming = self._last = Publication(None)

    async def where(self) -> Where:
        """Where it runs."""
        return Where(socket.gethostname(), ray.util.get_node_ip_address())

    async def gpus(self) -> list[str]:
        """Ids of its GPUs, as CUDA_VISIBLE_DEVICES has them."""
        return [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]

    # -- processes ----------------------------------------------------------------------------------------------------

    async def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        gpu: int,
        withheld: Collection[str] = (),
    ) -> None:
        """Start a process under a name.

        command: after the interpreter; `{door}` in it becomes the address at which it reaches the run. environment: added to
        this process's own; keys in it go over Ray's connections, into no command line. gpu: which of the bundle's GPUs it sees.
        withheld: variables of this process's own (keys) that it does not get.

        Raises:
            OSError: see `Child`.
        """
        host, port = self._open_door().getsockname()
        own = {name: value for name, value in os.environ.items() if name not in withheld}
        if gpus := await self.gpus():
            own["CUDA_VISIBLE_DEVICES"] = gpus[gpu]
        line = [part.format(door=f"{host}:{port}") for part in command]
        self._processes[name] = Child(line, {**own, **environment, PARENT: str(os.getpid())}, log, scratch=False)

    async def wait(self, name: str) -> int:
        """Exit code of the process, once it has ended; negative: the signal that killed it."""
        process = self._processes[name]
        while (code := process.exit_code()) is None:
            await asyncio.sleep(0.1)
        return code

    async def kill(self, name: str) -> None:
        """End the process, if there is one, and what it started."""
        process = self._processes.get(name)
        if process is not None:
            await asyncio.to_thread(process.kill)

    # -- connections --------------------------------------------------------------------------------------------------

    def _open_door(self) -> socket.socket:
        if self._door is None:
            self._door = socket.create_server(("127.0.0.1", 0), backlog=64)
            self._door.setblocking(False)
        return self._door

    async def accept(self) -> int:
        """Number of the next connection. Who it is, the run finds out."""
        sock, _ = await asyncio.get_running_loop().sock_accept(self._open_door())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number = next(self._numbers)
        self._connections[number] = sock
        return number

    async def read(self, number: int) -> bytes:
        """What came next on a connection; nothing: it has ended."""
        try:
            return await asyncio.get_running_loop().sock_recv(self._connections[number], CHUNK)
        except OSError:
            return b""

    async def write(self, number: int, data: bytes) -> None:
        """Onto a connection; where that has ended, `read` says so."""
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(self._connections[number], data)

    async def hang_up(self, number: int) -> None:
        """End a connection."""
        # a `read` of it may wait: it ends by this, and the last of both closes the socket
        with contextlib.suppress(OSError):
            self._connections.pop(number).shutdown(socket.SHUT_RDWR)

    # -- groups -------------------------------------------------------------------------------------------------------

    async def fetch(self, numbers: Sequence[int], keys: Sequence[Any]) -> Fetched:
        """Groups from where they lie, into files of this machine, instead of those before. keys: Ray's, of each number."""
        await self.forget()
        self._groups = Shared()
        return await asyncio.to_thread(self._fetch, self._groups, numbers, keys)

    def _fetch(self, shared: Shared, numbers: Sequence[int], keys: Sequence[Any]) -> Fetched:
        found = Fetched()

        def one(number: int, key: Any) -> None:
            try:
                found.files[number] = str(shared.write(number, ray.get(key)))
            except _LOST:
                found.lost.append(number)
            except _FULL:
                found.problem = (
                    "Ray's object store is full where groups are on their way to the ranks; give it more memory (ray start "
                    "--object-store-memory) or lower rollout.prompts_per_step (of a cold start: sft.batch_size)"
                )
            except OSError as error:
                found.problem = no_room(error)

        with ThreadPoolExecutor(_FETCHES) as threads:
            list(threads.map(one, numbers, keys))
        return found

    async def forget(self) -> None:
        """Remove the groups' files."""
        if self._groups is not None:
            self._groups.close()
            self._groups = None

    # -- weights ------------------------------------------------------------------------------------------------------

    async def begin(self, version: int | None) -> None:
        """Buckets of a version follow, which will be told against the one before; None: all of it, and none against it."""
        before = None if version is None or self._last.version is None else self._last
        self._coming = Publication(version, before)

    async def put(self, path: str, places: tuple[Place, ...]) -> None:
        """A bucket from a file, which is removed, into Ray."""
        await asyncio.to_thread(_put, Path(path), places, self._coming)

    async def finish(self) -> Published:
        """All buckets came."""
        coming = self._coming
        found = await asyncio.to_thread(coming.finish)
        if coming.version is not None:
            self._last = coming
        return found


def _put(path: Path, places: tuple[Place, ...], coming: Publication) -> None:
    with path.open("rb") as file:
        path.unlink()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            array = np.frombuffer(data, np.uint8)
            coming.put(Bucket(array, places))
            del array  # the mapping cannot be closed before
