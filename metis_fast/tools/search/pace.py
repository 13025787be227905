"""How fast requests may follow each other, whatever thread or event loop sends them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """Gives each request its time: evenly, and none before a provider wants to hear of us again.

    per_s: requests a second. clock: seconds.
    """

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._gap_s, self._clock = 1.0 / per_s, clock
        self._next = -float("inf")
        self._lock = threading.Lock()

    def wait_s(self, most_s: float) -> float | None:
        """Seconds until the caller's turn, which is taken with that; None, and nothing is taken, if that is beyond `most_s`."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            if turn - now > most_s:
                return None
            self._next = turn + self._gap_s
            return turn - now

    def rest(self, seconds: float) -> None:
        """Nobody's turn comes sooner, but for those that were given already."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)
