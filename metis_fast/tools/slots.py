"""Which calls of the Python tool may run at the same time, so that few share the processor and none waits for a sleeper.

A call holds a slot when it begins. It lends it to the next one once its session uses no CPU, or after half a second, and goes
on without. So what others do delays a short call by half a second at most, as long as not more than `busiest` of them compute:
beyond that, calls wait for one that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator

_HOLD_S = 0.5
_BUSIEST = 8  # calls that compute, for each slot


class Lease:
    """The place of one call."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._until = time.monotonic() + _HOLD_S
        self.holds = True
        self.busy = True

    def look(self, busy: bool) -> None:
        """Say whether the call has used the processor since the last time; gives up the slot where another can have it."""
        self.busy = busy
        self.holds = self.holds and busy and time.monotonic() < self._until
        self._slots.admit()


class Slots:
    """The slots of one server. Serves one event loop after the other."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.busiest = _BUSIEST * num
        self._leases: set[Lease] = set()
        self._waiting: deque[asyncio.Future[Lease]] = deque()

    @property
    def num_holding(self) -> int:
        """Calls that hold a slot."""
        return sum(lease.holds for lease in self._leases)

    def _has_room(self) -> bool:
        busy = sum(lease.holds or lease.busy for lease in self._leases)
        return self.num_holding < self.num and busy < self.busiest

    def _take(self) -> Lease:
        lease = Lease(self)
        self._leases.add(lease)
        return lease

    def admit(self) -> None:
        """Let calls begin that wait, first come first served, as far as there is room."""
        while self._waiting and self._has_room():
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(self._take())

    def _give_back(self, lease: Lease) -> None:
        self._leases.discard(lease)
        self.admit()

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[Lease]:
        """A place for one call, when its turn has come."""
        lease = await self._wait()
        try:
            yield lease
        finally:
            self._give_back(lease)

    async def _wait(self) -> Lease:
        if not self._waiting and self._has_room():
            return self._take()
        waiter: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # its turn came just then
                self._give_back(waiter.result())
            elif waiter in self._waiting:
                self._waiting.remove(waiter)
            raise
