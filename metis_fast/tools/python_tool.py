"""The `python` tool of one rollout: sends calls to its session, within their time, and turns replies into results."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from metis_fast.errors import InfrastructureError
from metis_fast.tools import png
from metis_fast.tools.python_server import PythonServer
from metis_fast.tools.python_session import End, SandboxProcess, SessionEndedError
from metis_fast.tools.results import PythonResult
from metis_fast.tools.sandbox.wire import MAX_IMAGES, SESSION_LOST, EndedBy, Limits, Reply, WireError
from metis_fast.tools.slots import BUSIEST, Lease
from metis_fast.types import ImageBlob

__all__ = ["PythonServer", "PythonTool", "longest_s"]

_NOTES = 200  # characters of the lines that say what was left out, at most
_MAX_PARTS = 64  # of an answer; an honest one has text before, between and behind eight images, cut once
_SHOWN_CALLS = 4  # the images of a rollout may take as much as those of this many calls
_FIRST_LOOK_S, _LOOK_S = 0.05, 0.1  # into a running call; most end before the first
_OLD_S = 0.3  # of a measurement by the server, which looks more often
_IDLE = 0.1  # of the time: who used and wanted less of the processor sleeps
_READ_S = 1.0  # to read an answer that had begun to come in time
_LONGEST = 16  # times a call's time, that it may take where the processor has too much to do
_SHARES = 2  # of a core, that a slot stands for
_LATE_S = 10.0


def longest_s(timeout_s: float, crowd: float = BUSIEST) -> float:
    """Seconds that a call may take on a machine that has too much to do, where its own time is `timeout_s`.

    crowd: calls that compute, for each slot; the most by default.
    """
    return max(_LONGEST, _SHARES * crowd) * timeout_s + _LATE_S


def _checked(images: Sequence[bytes], max_pixels: int) -> list[ImageBlob | None]:
    """Those that really are images: what a session sends is in the agent's hands."""
    return [ImageBlob.of(data) if png.is_plain(data, max_pixels) else None for data in images]


def _describe(end: End, limits: Limits) -> str:
    """What the agent reads of a session that ended, or was ended for what its code did."""
    if end.by is EndedBy.MEMORY:
        return f"its processes and files together took more than {limits.session_memory_mb} MiB of memory"
    if end.by is EndedBy.TASKS:
        return f"it had more than {limits.max_tasks} processes and threads"
    if end.by is EndedBy.CPU:
        return "it used up its CPU time"
    if end.status in (-signal.SIGKILL, SESSION_LOST):  # by which of the two it ended first
        return "killed, or its connection closed"
    assert end.status is not None
    return f"killed by signal {-end.status}" if end.status < 0 else f"exit status {end.status}"


@dataclass(frozen=True, slots=True)
class _Now:
    """A look at a running call. wall_s: since it began. own_s: of that, when it was not kept from running. cpu_s: used.

    is_old: the server, which measures, has had no turn itself for a while.
    """

    wall_s: float
    own_s: float
    cpu_s: float
    is_old: bool

    @property
    def wanted_s(self) -> float:
        """Seconds of the processor that it used or waited for."""
        return self.cpu_s + self.wall_s - self.own_s


class _Clock:
    """Counts a call's own time: the seconds since it began, without those in which it could have run and got no processor."""

    def __init__(self, server: PythonServer, process: SandboxProcess) -> None:
        self._server = server
        self._process = process
        self._begun = time.monotonic()
        self._first = server.usage(process)

    def look(self) -> _Now:
        """What the clock shows."""
        usage, now = self._server.usage(self._process), time.monotonic()
        wall = now - self._begun
        kept = (usage.delay_ns - self._first.delay_ns) / 1e9
        is_old = now - usage.at_ns / 1e9 > _OLD_S
        if is_old:
            self._server.watch()
        return _Now(wall, wall - kept, (usage.cpu_ns - self._first.cpu_ns) / 1e9, is_old)


class PythonTool:
    """The `python` tool of one rollout. Its session starts with the first call."""

    def __init__(
        self,
        server: PythonServer,
        images: Sequence[ImageBlob],
        timeout_s: float,
        max_output_chars: int,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        """sizes: (width, height) that the code sees each of `images` in; empty: their own."""
        self._server = server
        self._images = images
        self._sizes = tuple(sizes)
        self._timeout_s = timeout_s
        self._max_chars = max_output_chars
        self._process: SandboxProcess | None = None
        self._has_history = False  # a call of the agent has run
        self._max_shown = _SHOWN_CALLS * server.limits.max_shown_mb << 20
        self._shown = 0  # bytes of images that this rollout has been shown

    async def call(self, code: str) -> PythonResult:
        """Run `code` in this rollout's session.

        Raises:
            InfrastructureError: the server died, the session was killed by none of its doing, or the machine had no time for
                it; the next call starts anew.
        """
        async with self._server.slots.lease() as lease:
            return await self._call(code, lease)

    async def _call(self, code: str, lease: Lease) -> PythonResult:
        note, images, process = "", (), self._process
        if process is None:
            process = self._process = await self._server.open()
            images = tuple(image.data for image in self._images)
            note = "[new Python session: earlier variables are gone]" if self._has_history else ""
        reply: Reply | None = None
        end, text = End(None, EndedBy.OTHERS, Reply(0, False)), ""
        try:
            reply = await self._in_time(process, code, images, lease)
        except TimeoutError:
            end = await self._end(process)
            text = f"Timed out after {self._timeout_s:g} s. The Python session was stopped"
            if end.by in (EndedBy.MEMORY, EndedBy.TASKS):
                text = f"The Python session ended ({_describe(end, self._server.limits)})"
        except (SessionEndedError, WireError) as error:
            end = await self._end(process, by_itself=isinstance(error, SessionEndedError))
            if end.status is None:
                raise InfrastructureError("the Python server died during a call") from None
            if end.by is EndedBy.OTHERS:
                raise InfrastructureError(
                    "a Python session was killed from outside: the machine ran out of memory, or somebody ended it"
                ) from None
            broke = isinstance(error, WireError) and end.by is EndedBy.TRAINER
            how = "its connection broke" if broke else _describe(end, self._server.limits)
            text = f"The Python session ended ({how})"
        finally:
            if reply is None and self._process is not None:  # cancelled: what comes next on the socket is not for the next call
                self._server.discard(self._process)
                self._process = None
        self._has_history = True
        if reply is not None:
            return await self._result(reply, process.images, note)
        return await self._result(end.left, process.images, note, f"{text}; the next call starts a new one.")

    async def _in_time(self, process: SandboxProcess, code: str, images: tuple[bytes, ...], lease: Lease) -> Reply:
        """The reply to a call. Raises as `SandboxProcess.exchange`, and

        Raises:
            TimeoutError: it took more than its own time.
            InfrastructureError: it got hardly any time on the processor.
        """
        clock = _Clock(self._server, process)
        self._server.set_running(process, True)
        exchange = asyncio.ensure_future(process.exchange(code, images, self._sizes if images else ()))
        try:
            step, last = lease.next_look_s(min(_FIRST_LOOK_S, self._timeout_s)), _Now(0.0, 0.0, 0.0, False)
            crowd = lease.crowd
            while not (await asyncio.wait((exchange,), timeout=step))[0]:
                now = clock.look()
                lease.look(now.is_old or now.wanted_s - last.wanted_s > _IDLE * (now.wall_s - last.wall_s))
                crowd = max(crowd, lease.crowd)
                spent = max(now.own_s, min(now.wall_s, now.cpu_s))
                if spent >= self._timeout_s and not (now.is_old and now.wall_s < self._timeout_s + _READ_S):
                    # What came in time and was not read is an answer: it may be this process that was late.
                    if process.has_more and (await asyncio.wait((exchange,), timeout=_READ_S))[0]:
                        break
                    raise TimeoutError
                if now.wall_s > longest_s(self._timeout_s, crowd):
                    raise InfrastructureError(
                        f"a call of python had {now.own_s:.1f} s of {now.wall_s:.1f} s on the processor: the machine has too "
                        "much to do"
                    )
                step, last = lease.next_look_s(min(_LOOK_S, max(self._timeout_s - now.own_s, _LOOK_S / 10))), now
            return exchange.result()
        finally:
            self._server.set_running(process, False)
            exchange.cancel()  # nothing, where it is done
            await asyncio.gather(exchange, return_exceptions=True)

    def _bounded(self, parts: tuple[str | int, ...]) -> list[str | int]:
        """What the agent wrote; it may have forged it."""
        room = self._max_chars + _NOTES
        bounded: list[str | int] = []
        for part in parts[:_MAX_PARTS]:
            if isinstance(part, str):
                part = part[:room]
                room -= len(part)
            bounded.append(part)
        return bounded

    async def _result(self, reply: Reply, images: list[bytes], begin: str, end: str = "") -> PythonResult:
        """begin, end: lines of ours before and behind what the code wrote."""
        parts: list[str | int] = [f"{begin}\n"] if begin else []
        shown: list[ImageBlob] = []
        checked = await asyncio.to_thread(_checked, images, self._server.limits.max_image_pixels) if images else []
        for part in self._bounded(reply.parts):
            if isinstance(part, str):
                parts.append(part)
                continue
            image = checked[part] if 0 <= part < len(checked) else None
            if image is None or len(shown) == MAX_IMAGES:
                continue
            if self._shown + len(image.data) > self._max_shown:
                parts.append(f"\n[image not shown: those of all calls may take {self._max_shown >> 20} MiB]\n")
                continue
            self._shown += len(image.data)
            parts.append(len(shown))
            shown.append(image)
        if end:
            last = parts[-1] if parts else ""
            parts.append(f"\n{end}" if isinstance(last, str) and last and not last.endswith("\n") else end)
        stdout, stderr = (text[: self._max_chars + _NOTES] for text in (reply.stdout, reply.stderr))
        note = "\n".join(line for line in (begin, end and f"[{end}]") if line)
        return PythonResult(tuple(parts), stdout, stderr, tuple(shown), reply.ok, note)

    async def _end(self, process: SandboxProcess, by_itself: bool = False, in_call: bool = True) -> End:
        self._process = None
        return await self._server.end(process, by_itself, in_call)

    async def close(self) -> None:
        """Kill the session, if there is one, and wait until it is gone."""
        if self._process is not None:
            await self._end(self._process, in_call=False)
