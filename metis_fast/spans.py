"""What runs when, told to whoever listens: the profiler draws it, the terminal panel says what is waited for.

A stage says `with span(Lane.TOOLS, name):` around what it does. While nobody listens that is one comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from functools import wraps
from types import TracebackType
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Lane(StrEnum):
    """The component that something runs in, in the order in which a trace shows them."""

    RUN = "run"
    NODES = "nodes"
    EPISODES = "episodes"
    ENGINE = "engine"
    TOOLS = "tools"
    JUDGE = "judge"
    SYNC = "sync"
    TRAINER = "trainer"


class Listener(Protocol):
    """Hears of spans, from any thread.

    lanes: that it wants to hear of.
    """

    @property
    def lanes(self) -> frozenset[Lane]: ...

    def began(self, lane: Lane, name: str) -> object:
        """A span begins. Returns what `ended` is given."""
        ...

    def ended(self, handle: object) -> None:
        """It ends, in the same task or thread."""
        ...


_NOTHING = nullcontext()
_listener: Listener | None = None


class _Told:
    """A span that somebody listens to."""

    __slots__ = ("_handle", "_lane", "_listener", "_name")

    def __init__(self, listener: Listener, lane: Lane, name: str) -> None:
        self._listener, self._lane, self._name = listener, lane, name
        self._handle: object = None

    def __enter__(self) -> None:
        self._handle = self._listener.began(self._lane, self._name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listener.ended(self._handle)


def span(lane: Lane, name: str) -> AbstractContextManager[None]:
    """A `with` block around what runs in a lane. It may await."""
    listener = _listener
    return _NOTHING if listener is None or lane not in listener.lanes else _Told(listener, lane, name)


def spanned(lane: Lane, name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`span` around every call of a function, which is no coroutine."""

    def around(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if _listener is None:
                return function(*args, **kwargs)
            with span(lane, name):
                return function(*args, **kwargs)

        return run

    return around


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener of all spans that begin meanwhile; one at a time."""
    global _listener
    assert _listener is None, "somebody listens already"
    _listener = listener
    try:
        yield
    finally:
        _listener = None
