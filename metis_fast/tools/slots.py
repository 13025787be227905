"""Which calls of the Python tool may run at the same time, so that few share the processor and none waits for a sleeper.

A call holds a slot when it begins. It lends it to the next one once its session uses no CPU, or after half a second, and goes
on without; almost at once where somebody has waited for a quarter of a second. So what others do delays a short call by less
than a second, as long as not more than `busiest` of them compute: beyond that, calls wait for one that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator

_HOLD_S, _LEAST_HOLD_S = 0.5, 0.01
_PATIENCE_S = 0.25
BUSIEST = 32  # calls that compute, for each slot: a time slice of each is less than half a second


class Lease:
    """The place of one call."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._begun = time.monotonic()
        self.holds = True
        self.busy = True

    def look(self, busy: bool) -> None:
        """Say whether the call computed, or would have, since the last time; gives up the slot where another can have it."""
        self.busy = busy
        self.holds = self.holds and busy and time.monotonic() < self._begun + self._slots.hold_s
        self._slots.admit()

    def next_look_s(self, most: float) -> float:
        """Seconds until the slot may be given up, where it is held; `most` at most."""
        return min(most, self._slots.hold_s) if self.holds else most

    @property
    def crowd(self) -> float:
        """Calls that compute, for each slot."""
        return self._slots.num_busy / self._slots.num


class Slots:
    """The slots of one server. Serves one event loop after the other."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.busiest = BUSIEST * num
        self._leases: set[Lease] = set()
        self._waiting: deque[tuple[asyncio.Future[Lease], float]] = deque()  # and since when

    @property
    def num_holding(self) -> int:
        """Calls that hold a slot."""
        return sum(lease.holds for lease in self._leases)

    @property
    def num_busy(self) -> int:
        """Calls that hold a slot or compute."""
        return sum(lease.holds or lease.busy for lease in self._leases)

    @property
    def hold_s(self) -> float:
        """Seconds that a call may hold its slot now."""
        if not self._waiting:
            return _HOLD_S
        return max(_LEAST_HOLD_S, _PATIENCE_S - (time.monotonic() - self._waiting[0][1]))

    def _has_room(self) -> bool:
        return self.num_holding < self.num and self.num_busy < self.busiest

    def _take(self) -> Lease:
        lease = Lease(self)
        self._leases.add(lease)
        return lease

    def admit(self) -> None:
        """Let calls begin that wait, first come first served, as far as there is room."""
        while self._waiting and self._has_room():
            waiter, _ = self._waiting.popleft()
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
        entry = (waiter, time.monotonic())
        self._waiting.append(entry)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # its turn came just then
                self._give_back(waiter.result())
            elif entry in self._waiting:
                self._waiting.remove(entry)
            raise
