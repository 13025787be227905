"""Ctrl-C and SIGTERM: stop at the next safe point, with a checkpoint."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from metis_fast.errors import Interrupted

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While open, the first signal asks for a stop: running coroutines are cancelled and `check` raises. A second Ctrl-C ends
    the process the ordinary way, without a checkpoint.

    One event loop serves the whole run, so that tool servers and HTTP clients live as long as it.
    """

    def __init__(self) -> None:
        self.requested = False
        self._task: asyncio.Task[Any] | None = None
        self._loop = asyncio.new_event_loop()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._previous[number])  # first: whoever sees `requested` may rely on it
        self.requested = True
        if self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)

    def check(self) -> None:
        """Raises Interrupted if a stop was asked for."""
        if self.requested:
            raise Interrupted

    def finish(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that a stop must not break off: it cleans up, or completes what is half done, in short time."""
        return self._loop.run_until_complete(coroutine)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end.

        Raises:
            Interrupted: it was cancelled by a signal.
        """
        if self.requested:
            coroutine.close()
            raise Interrupted
        self._task = self._loop.create_task(coroutine)
        try:
            return self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            if self.requested:
                raise Interrupted from None
            raise
        finally:
            self._task = None
