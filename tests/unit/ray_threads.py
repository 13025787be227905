"""A stand-in for Ray in one process: an actor is two threads with a loop each; what it has put is lost with it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OwnerDiedError, RayActorError, RayTaskError

_HERE = threading.local()  # actor: whose thread this is


class Key:
    """Of an object."""

    def __init__(self, value: object, owner: Actor | None) -> None:
        self.value, self.owner = value, owner


class Ref:
    """Of a call."""

    def __init__(self) -> None:
        self.future: Future[Any] = Future()


class _Loop:
    def __init__(self, actor: Actor) -> None:
        self._actor, self._began = actor, threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        self._began.wait()

    async def _serve(self) -> None:
        _HERE.actor = self._actor
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._began.set()
        await self._stop.wait()

    def begin(self, work: Callable[[], Awaitable[None]]) -> None:
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(work()))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


class _Method:
    def __init__(self, actor: Actor, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *arguments: object) -> Ref:
        return self._actor.call(self._name, arguments)


class Actor:
    """An instance of a class; `news` of its methods run on a loop of their own."""

    def __init__(self, made_of: type) -> None:
        self.dead, self._waiting, self._lock = False, set[Ref](), threading.Lock()
        self.loops = {"poll": _Loop(self), "": _Loop(self)}
        self.one: Any = made_of()

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)

    def call(self, name: str, arguments: Sequence[object]) -> Ref:
        """Begin a method."""
        ref = Ref()
        with self._lock:
            if self.dead:
                ref.future.set_exception(_died())
                return ref
            self._waiting.add(ref)

        async def work() -> None:
            try:
                value, error = await getattr(self.one, name)(*arguments), None
            except Exception as raised:  # as Ray does: whoever waits gets it
                value, error = None, RayTaskError(name, str(raised), raised)
            with self._lock:
                if ref not in self._waiting:
                    return
                self._waiting.discard(ref)
            if error is None:
                ref.future.set_result(value)
            else:
                ref.future.set_exception(error)

        self.loops.get(name, self.loops[""]).begin(work)
        return ref

    def die(self) -> None:
        """Whoever waits for it hears of that."""
        with self._lock:
            self.dead = True
            waiting, self._waiting = self._waiting, set()
        for ref in waiting:
            ref.future.set_exception(_died())


def _died() -> RayActorError:
    return RayActorError("0" * 32, "killed")


class Rays:
    """What `cluster.nodes` and `cluster.player` use of the module. Close it to end all threads."""

    method = staticmethod(ray.method)

    def __init__(self) -> None:
        self.actors: list[Actor] = []

    def remote(self, **options: object) -> Callable[[type], Any]:
        """Makes actors of a class."""

        def make(made_of: type) -> Actor:
            self.actors.append(Actor(made_of))
            return self.actors[-1]

        return lambda made_of: SimpleNamespace(remote=partial(make, made_of))

    def put(self, value: object) -> Key:
        """An object, of the actor that puts it."""
        return Key(value, getattr(_HERE, "actor", None))

    def get(self, key: Any, timeout: float | None = None) -> Any:
        """What came of a call, an object, or several."""
        if isinstance(key, list):
            return [self.get(one, timeout) for one in key]
        if isinstance(key, Key):
            if key.owner is not None and key.owner.dead:
                raise OwnerDiedError("0" * 56, None, "")
            return key.value
        try:
            return key.future.result(timeout)
        except TimeoutError:
            raise GetTimeoutError("no answer") from None

    def wait(self, refs: Sequence[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
        """Calls that are over, and others."""
        deadline = time.monotonic() + timeout
        while not all(ref.future.done() for ref in refs) and time.monotonic() < deadline:
            time.sleep(0.005)
        return [ref for ref in refs if ref.future.done()], [ref for ref in refs if not ref.future.done()]

    def kill(self, actor: Actor) -> None:
        """At once."""
        actor.die()

    def close(self) -> None:
        """End all threads."""
        for actor in self.actors:
            actor.die()
            for loop in actor.loops.values():
                loop.close()
