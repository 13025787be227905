"""Tools of one's own: what to write, and how it is called.

A tool is a class with `name`, `description`, `schema` and either `call` (`Tool`) or `open` (`StatefulTool`); one line of
`tools.own` makes it the agent's. docs/own-tools.md shows both.

A `ToolFault` is the agent's error. Whatever else a tool raises, and a call that takes too long, is a failure of ours: the
rollout is played again, and never pays for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import logging
import re
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

from metis_fast import pixels
from metis_fast.errors import InfrastructureError, ToolSetupError, one_line
from metis_fast.tools.arguments import schema_problem
from metis_fast.tools.protocol import MAX_CALL_IMAGES, NO_EXTRA, ToolSession, ToolSpec
from metis_fast.tools.results import ContentResult, Refusal, Refused, ToolResult
from metis_fast.types import ImageBlob, Observation, Outcome

_LOG = logging.getLogger(__name__)
_GRACE_S = 1.0  # for a coroutine to end after it was cancelled; then it is left behind
_MAX_LOST = 64  # calls that were given up and still hold a thread; a tool with more of them takes no further call
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,127}", re.ASCII)
_LONGEST_ERROR = 300  # characters of a tool's own error in ours

Answer = str | Observation
Arguments = Mapping[str, object]


class ToolFault(Exception):
    """Raised by a tool where the agent's call was wrong; its text is what the agent reads."""


@dataclass(frozen=True, slots=True)
class ToolPrompt:
    """The prompt of a rollout, for its tools. images, extra, seen: see `Toolbox.session`."""

    images: tuple[ImageBlob, ...] = ()
    extra: Mapping[str, object] = field(default_factory=lambda: NO_EXTRA)
    seen: tuple[tuple[int, int], ...] = ()


class Tool(Protocol):
    """A tool that keeps nothing from call to call.

    One object serves all rollouts of a process. A plain `call` runs in a thread, many at the same time; an async one on the
    event loop, which it must not block. A method `close(self)`, if there is one, is called when the run ends.
    """

    name: str
    description: str
    schema: Mapping[str, object]

    def call(self, arguments: Arguments, prompt: ToolPrompt, /) -> Answer | Awaitable[Answer]:
        """arguments: what the agent wrote; it fits `schema`.

        Raises:
            ToolFault: the agent's error.
        """
        ...


class ToolState(Protocol):
    """What a `StatefulTool` keeps for one rollout, whose calls come one after the other. A method `close(self)`, async or not,
    is called when the rollout ends, if there is one."""

    def call(self, arguments: Arguments, /) -> Answer | Awaitable[Answer]:
        """See `Tool.call`."""
        ...


class StatefulTool(Protocol):
    """A tool with a state of its own for each rollout. As `Tool` otherwise."""

    name: str
    description: str
    schema: Mapping[str, object]

    def open(self, prompt: ToolPrompt, /) -> ToolState | Awaitable[ToolState]:
        """Called before a rollout's first call of this tool."""
        ...


class ToolSource(Protocol):
    """One or several tools that share what they keep for a rollout: what a toolbox is made of."""

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """Always the same."""
        ...

    def session(self, prompt: ToolPrompt) -> ToolSession:
        """For one rollout; starts nothing. It is called with names of `tools` only, and with arguments that fit."""
        ...

    def close(self) -> None:
        """End what is shared by rollouts. Sessions still open die."""
        ...


class OwnTool:
    """A `ToolSource` of one tool that a user wrote."""

    def __init__(self, tool: Tool | StatefulTool, place: str, timeout_s: float, max_chars: int) -> None:
        """place: where it came from, for errors. timeout_s: of a call. max_chars: of the text of an answer.

        Raises:
            ToolSetupError: something is missing, or no use.
        """
        self.tool = tool
        self.spec = _checked(tool, place)
        self.timeout_s, self.max_chars = timeout_s, max_chars
        self._lost = 0
        self._lock = threading.Lock()

    @staticmethod
    def load(place: str, folder: Path, timeout_s: float, max_chars: int) -> OwnTool:
        """place: "module:Class", installed or in the folder.

        Raises:
            ToolSetupError: no such module or class, or see above.
        """
        module, _, name = place.partition(":")
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # to stay, for what the tool imports later; last, so that nothing installed is hidden
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except Exception as error:  # a module of the user's may fail in any way when it is imported
            missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
            what = "cannot be found" if missing else "cannot be imported"
            raise ToolSetupError(
                f"tools.own: {module} {what} ({_said(error)}); install it, or put it into the working folder {folder}"
            ) from error
        if not isinstance(cls, type):
            raise ToolSetupError(f"tools.own: expected a class {name} in {module}, got {cls!r:.100}; name one, as module:Class")
        try:
            tool = cls()
        except Exception as error:  # as above
            raise ToolSetupError(f"tools.own: {place}() failed ({_said(error)}); a tool is made without arguments") from error
        return OwnTool(cast(Tool, tool), place, timeout_s, max_chars)

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """The one."""
        return (self.spec,)

    def session(self, prompt: ToolPrompt) -> OwnSession:
        """See `ToolSource`."""
        return OwnSession(self, prompt)

    def close(self) -> None:
        """Call the tool's own `close`, if it has one."""
        close = getattr(self.tool, "close", None)
        if close is None:
            return
        try:
            close()
        except Exception:  # nothing depends on it any more, and the rest of the run has to be closed
            _LOG.exception("tool %s: its close() failed", self.spec.name)

    async def run(self, what: str, function: Callable[..., object], *arguments: object) -> object:
        """What a function of the tool's returns, be it plain or async.

        Raises:
            ToolFault: it raised that.
            InfrastructureError: it raised something else, or took longer than `timeout_s`.
        """
        try:
            return await self._within_limit(what, function, arguments)
        except (ToolFault, InfrastructureError):
            raise
        except Exception as error:  # of whatever kind, it is a defect of the tool, and not the agent's
            _LOG.warning("tool %s: %s failed", self.spec.name, what, exc_info=error)
            raise InfrastructureError(f"tool {self.spec.name}: {what} failed: {_said(error)}") from error

    async def _within_limit(self, what: str, function: Callable[..., object], arguments: tuple[object, ...]) -> object:
        async def whole() -> object:
            plain = not inspect.iscoroutinefunction(function)
            value = await self._in_thread(function, arguments) if plain else function(*arguments)
            return await cast(Awaitable[object], value) if inspect.isawaitable(value) else value

        # in a task of its own, so that nothing that the tool cancels is taken for the end of the rollout
        task = asyncio.ensure_future(_without_exit(whole()))
        try:
            await asyncio.wait([task], timeout=self.timeout_s)
        finally:  # also where the rollout is cancelled
            late = not task.done()
            if late:
                task.cancel()
                await asyncio.wait([task], timeout=_GRACE_S)
        if late or task.cancelled():
            if not task.done():
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
            why = f"took longer than tools.own_timeout_s={self.timeout_s:g}" if late else "was cancelled"
            raise InfrastructureError(f"tool {self.spec.name}: {what} {why}")
        return task.result()

    async def _in_thread(self, function: Callable[..., object], arguments: tuple[object, ...]) -> object:
        """Not one of the event loop's own threads: a tool that hangs would keep them from everything else, and this process
        from its end."""
        if self._lost >= _MAX_LOST:
            raise InfrastructureError(f"tool {self.spec.name}: {self._lost} calls hang; it takes no more")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[object, BaseException | None]] = loop.create_future()

        def deliver(value: object, error: BaseException | None) -> None:
            if not done.done():
                done.set_result((value, error))

        def work() -> None:
            value, failure = None, None
            try:
                value = function(*arguments)
            except BaseException as error:  # it belongs to whoever waits
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(deliver, value, failure)
            with self._lock:
                ended.set()
                if given_up.is_set():
                    self._lost -= 1

        ended, given_up = threading.Event(), threading.Event()
        threading.Thread(target=work, name=f"tool {self.spec.name}", daemon=True).start()
        try:
            value, failure = await done
        except asyncio.CancelledError:
            with self._lock:
                if not ended.is_set():
                    given_up.set()
                    self._lost += 1
            raise
        if failure is None:
            return value
        if isinstance(failure, Exception):
            raise failure
        raise RuntimeError(type(failure).__name__) from failure  # sys.exit() in a tool ends nothing


class OwnSession:
    """One rollout with a tool of a user's. See `ToolSession`."""

    def __init__(self, own: OwnTool, prompt: ToolPrompt) -> None:
        self._own, self._prompt = own, prompt
        self._state: ToolState | None = None

    async def call(self, name: str, arguments: Arguments) -> ToolResult | Observation:
        """See `ToolSession.call`."""
        own = self._own
        try:
            return await _answer(own.spec.name, await self._asked(arguments), own.max_chars)
        except ToolFault as fault:
            return Refused(shorten(str(fault), own.max_chars), Refusal.OTHER, own.spec.name)
        except InfrastructureError:
            await self.close()  # what it keeps may be half of something
            raise

    async def _asked(self, arguments: Arguments) -> object:
        own = self._own
        if not hasattr(own.tool, "open"):
            return await own.run("call", cast(Tool, own.tool).call, arguments, self._prompt)
        if self._state is None:
            self._state = cast(ToolState, await own.run("open", cast(StatefulTool, own.tool).open, self._prompt))
        return await own.run("call", self._state.call, arguments)

    async def close(self) -> None:
        """Close the tool's state; what goes wrong there is logged, for the rollout is over."""
        state, self._state = self._state, None
        close: Any = getattr(state, "close", None)
        if close is None:
            return
        try:
            await self._own.run("close", close)
        except (ToolFault, InfrastructureError) as error:
            _LOG.warning("%s", error)


async def _without_exit(work: Awaitable[object]) -> object:
    """sys.exit() in a tool ends nothing."""
    try:
        return await work
    except SystemExit as error:
        raise RuntimeError("SystemExit") from error


def _checked(tool: Tool | StatefulTool, place: str) -> ToolSpec:
    """Raises: ToolSetupError: see `OwnTool`."""
    name, description, schema = (getattr(tool, key, None) for key in ("name", "description", "schema"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ToolSetupError(f"tools.own: {place}.name: expected a name like word_count, got {name!r:.100}")
    if not isinstance(description, str) or not description.strip():
        raise ToolSetupError(f"tools.own: {place}.description: expected a sentence that tells the model what the tool does")
    problem = schema_problem(schema)
    if problem:
        raise ToolSetupError(
            f"tools.own: {place}.schema: {problem}; expected the JSON schema of an object, like "
            '{"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}'
        )
    has = [method for method in ("call", "open") if callable(getattr(tool, method, None))]
    if len(has) != 1:
        raise ToolSetupError(
            f"tools.own: {place}: expected a method call(self, arguments, prompt), or open(self, prompt) for a tool with a "
            f"state, got {'both' if has else 'neither'}"
        )
    return ToolSpec(name, description.strip(), dict(cast(Mapping[str, object], schema)))


async def _answer(name: str, value: object, max_chars: int) -> ContentResult | Observation:
    """Raises: InfrastructureError: the tool returned what is no answer."""
    if isinstance(value, str):
        return ContentResult((shorten(value, max_chars),))
    if not isinstance(value, Observation):
        raise InfrastructureError(f"tool {name}: expected text or an Observation from its call, got {type(value).__name__}")
    text, images = cast(object, value.text), cast(object, value.images)
    if (
        not isinstance(text, str)
        or not isinstance(images, tuple | list)
        or not all(isinstance(one, ImageBlob) for one in images)
    ):
        raise InfrastructureError(
            f"tool {name}: expected an Observation with a text and a tuple of ImageBlob, got {type(text).__name__} and "
            f"{images!r:.100}; make images with ImageBlob.of(DATA)"
        )
    if value.outcome not in (Outcome.TOOL_RESULT, Outcome.TOOL_ERROR) or len(value.images) > MAX_CALL_IMAGES:
        raise InfrastructureError(
            f"tool {name}: expected an Observation with outcome tool_result or tool_error and at most {MAX_CALL_IMAGES} "
            f"images, got {value.outcome} and {len(value.images)}"
        )
    return replace(value, text=shorten(text, max_chars), images=tuple([await _usable(name, one) for one in value.images]))


async def _usable(name: str, image: ImageBlob) -> ImageBlob:
    """The image, by the hash that it has. Raises: InfrastructureError: it is none."""
    try:
        checked = await asyncio.to_thread(ImageBlob.of, image.data)
    except TypeError:
        raise InfrastructureError(f"tool {name}: expected bytes in an image, got {type(image.data).__name__}") from None
    if problem := await asyncio.to_thread(pixels.problem, checked.data):
        raise InfrastructureError(f"tool {name}: it returned an image that cannot be used: {problem}")
    return checked


def shorten(text: str, limit: int) -> str:
    """Text with what is too much of it cut out of its middle, and half pairs of surrogates replaced."""
    text = text.encode("utf-8", "replace").decode()
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n[{len(text) - limit} characters cut]\n{text[len(text) - limit + limit // 2 :]}"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"[:_LONGEST_ERROR]
