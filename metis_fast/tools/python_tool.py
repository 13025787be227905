"""The `python` tool, seen from the trainer: starts the warm server, opens sessions in it, turns replies into results.

Everything here is free of the running event loop, so that one toolbox serves several `asyncio.run` calls; what belongs to a
loop lives inside one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from metis_fast import pixels
from metis_fast.config import PythonToolConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.open_files import allow_files
from metis_fast.pixels import ImageError
from metis_fast.tools.results import PythonResult
from metis_fast.tools.sandbox.transcript import Output, open_output, output_size
from metis_fast.tools.sandbox.wire import (
    LENGTH,
    MAX_FRAME,
    MAX_IMAGES,
    MAX_SIDE,
    SESSION_LOST,
    Call,
    Limits,
    Reply,
    Shown,
    WireError,
    decode_message,
    encode_call,
)
from metis_fast.types import ImageBlob

_NOTES = 200  # characters of the lines that say what was left out, at most
_START_S = 60.0  # a cold import of numpy and Pillow on a loaded machine, with room
_CPU_CALLS = 20  # a session may use the CPU time of this many calls; the paper's rollouts have ten turns
_OPEN = b"open"
_READY = b"ready"
_SLOW = b"slow"
# sys.path is set by hand because the server ignores the caller's folder and PYTHONPATH, as `-I` would have it. Not `-I` itself:
# it also ignores PYTHONHASHSEED, which makes the order of sets repeat. The environment is ours, so nothing else differs.
# An alarm of the agent's that raises again and again must end before any function of ours is entered: each entry runs handlers.
_COMMAND = """
import signal, sys
sys.path.insert(0, sys.argv.pop(1))
from metis_fast.tools.sandbox.server import main
del sys.path[0]
for call in main():
    with call, call:
        try:
            for code in call:
                exec(code, call.scope)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
"""


def _environment() -> dict[str, str]:
    return {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",  # what a child has printed is there, also if it is killed
        "MALLOC_ARENA_MAX": "1",  # of 64 MiB of address space each, one a thread, they would use up the memory limit
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MPLBACKEND": "agg",  # a name that processes know which the agent's code starts; see `figures` for its own
    }


class _SessionEndedError(Exception):
    """The other end of a session's socket is closed."""


@dataclass(frozen=True, slots=True)
class _End:
    """How a session ended. status: exit status of its first process (negative: the signal that killed it); None if the server
    died instead. left: what the running call had written until then, as far as a `Reply` of it would say so."""

    status: int | None
    left: Reply


class SandboxProcess:
    """One running session of the server. Belongs to the event loop that uses it."""

    def __init__(self, data: socket.socket, life: socket.socket, output: int, max_output_chars: int) -> None:
        """output: the file that `Output` describes; the session has it, too. All three are closed here."""
        self._data = data
        self._life = life
        self._output = output
        self._max_output_chars = max_output_chars
        self._calls = 0
        self.images: list[bytes] = []  # shown in the running call
        for sock in (data, life):
            sock.setblocking(False)

    async def _read(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        while len(buffer) < size:
            try:
                chunk = await loop.sock_recv(self._data, min(size - len(buffer), 1 << 20))
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise _SessionEndedError
            buffer += chunk
        return bytes(buffer)

    async def read_message(self) -> Reply | Shown:
        """What the session says next.

        Raises:
            _SessionEndedError: the session is gone. WireError: it sent something else.
        """
        (size,) = LENGTH.unpack(await self._read(LENGTH.size))
        if size > MAX_FRAME:
            raise WireError("message is too large")
        message = decode_message(await self._read(size))
        if message.call != self._calls:
            raise WireError("message belongs to another call")
        return message

    async def exchange(self, code: str, images: tuple[bytes, ...], sizes: tuple[tuple[int, int], ...]) -> Reply:
        """Send a call and wait for its reply; `self.images` are those that it shows. Raises as `read_message`."""
        self._calls += 1
        self.images = []
        call = encode_call(Call(self._calls, code, images, sizes))
        try:
            await asyncio.get_running_loop().sock_sendall(self._data, call)
        except ConnectionError:
            raise _SessionEndedError from None
        while isinstance(message := await self.read_message(), Shown):
            if len(self.images) == MAX_IMAGES:
                raise WireError("too many images")
            self.images.append(message.png)
        return message

    async def end(self) -> _End:
        """Kill the session and wait until all its processes are gone."""
        loop = asyncio.get_running_loop()
        text = b""
        left = Reply(self._calls, False)
        try:
            with contextlib.suppress(OSError):
                self._life.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while chunk := await loop.sock_recv(self._life, 32):
                    text += chunk
            if self._calls:
                left = self._left_behind()
        finally:
            self.discard()
        return _End(int(text) if text else None, left)

    def _left_behind(self) -> Reply:
        memory = os.pread(self._output, output_size(self._max_output_chars), 0)
        output = Output(bytearray(memory), self._max_output_chars)
        if output.call != self._calls:
            return Reply(self._calls, False)  # of the call before
        output.take(self._output)
        return Reply(self._calls, False, output.all.parts(), output.stream(1), output.stream(2))

    def discard(self) -> None:
        """Close what is ours without waiting; the server kills the session."""
        self._data.close()
        self._life.close()
        if self._output >= 0:
            os.close(self._output)
            self._output = -1


class PythonServer:
    """The warm server process. Restarted by the next `open` after it died."""

    def __init__(self, config: PythonToolConfig, scratch: Path) -> None:
        """Start it.

        Raises:
            ToolSetupError: it does not start, or no sandbox can be set up on this machine.
        """
        self._limits = Limits(
            memory_mb=config.memory_mb,
            scratch_mb=config.scratch_mb,
            cpu_s=math.ceil(config.timeout_s * _CPU_CALLS),
            max_output_chars=config.max_output_chars,
            max_image_pixels=config.max_image_pixels,
            unsafe=config.unsafe,
        )
        allow_files(1 << 15)  # a session takes three here
        self._scratch = scratch
        self._lock = threading.Lock()
        self._closed = False
        self._live: set[SandboxProcess] = set()
        self._folder, self._process, self._control = self._start()

    @property
    def pid(self) -> int:
        """PID of the server's outermost process."""
        return self._process.pid

    def _start(self) -> tuple[Path, subprocess.Popen[bytes], socket.socket]:
        if not sys.platform.startswith("linux"):
            raise ToolSetupError(
                "the python tool needs Linux, with its sandbox or without (--unsafe-tools); remove `python` from tools.enabled"
            )
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="python-", dir=self._scratch))
        except OSError as error:
            raise ToolSetupError(f"cannot use scratch folder {self._scratch}: {error.strerror}; choose another") from None
        (folder / "root").mkdir()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(__file__).resolve().parents[2])
        arguments = [str(theirs.fileno()), str(os.getpid()), str((folder / "root").resolve()), self._limits.to_json()]
        with theirs, (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-c", _COMMAND, root, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd="/",
                env=_environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer alone
            )
        ours.settimeout(_START_S)
        try:
            answer = ours.recv(4096)
        except TimeoutError:
            answer = _SLOW
        except OSError as error:
            answer = f"error {error}".encode()
        if answer == _READY:
            return folder, process, ours
        process.kill()
        process.wait()
        ours.close()
        if answer == _SLOW:
            shutil.rmtree(folder, ignore_errors=True)
            raise ToolSetupError(
                f"the Python server did not start within {_START_S:g} s: the machine has too much to do; run again"
            )
        reason = answer.decode(errors="replace").removeprefix("error ") or _last_line(folder / "log") or "the server ended"
        shutil.rmtree(folder, ignore_errors=True)
        if self._limits.unsafe:
            raise ToolSetupError(f"the Python server did not start ({reason}); remove `python` from tools.enabled")
        raise ToolSetupError(
            f"no sandbox for the python tool on this machine ({reason}); allow unprivileged user namespaces, or, on a machine "
            "that you can throw away, set tools.python.unsafe=true (--unsafe-tools)"
        )

    def _stop(self) -> None:
        self._control.close()  # the server ends by itself, and with it all sessions
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ensure_alive(self) -> None:
        with self._lock:
            if self._closed:
                raise InfrastructureError("the toolbox is closed")
            if self._process.poll() is None:
                return
            self._stop()
            try:
                self._folder, self._process, self._control = self._start()
            except ToolSetupError as error:
                raise InfrastructureError(f"the Python server died and did not start again: {error}") from None

    async def open(self) -> SandboxProcess:
        """Fork a session.

        Raises:
            InfrastructureError: the server died, or cannot fork.
        """
        if self._closed or self._process.poll() is not None:
            await asyncio.to_thread(self._ensure_alive)
        data, their_data = socket.socketpair()
        life, their_life = socket.socketpair()
        output = open_output(self._limits.max_output_chars)
        process = SandboxProcess(data, life, output, self._limits.max_output_chars)
        ready = False
        try:
            with their_data, their_life:
                # Does not block: callers are limited to a few at a time, the socket holds hundreds of these.
                socket.send_fds(self._control, [_OPEN], [their_data.fileno(), their_life.fileno(), output])
            async with asyncio.timeout(_START_S):
                await process.read_message()
            ready = True
        except (OSError, _SessionEndedError, WireError) as error:  # a TimeoutError is an OSError
            reason = _last_line(self._folder / "log") or type(error).__name__
            raise InfrastructureError(f"cannot open a Python session: {reason}") from None
        finally:
            if not ready:
                process.discard()
        self._live.add(process)
        return process

    async def end(self, process: SandboxProcess) -> _End:
        """End a session, see `SandboxProcess.end`."""
        try:
            return await process.end()
        finally:
            self._live.discard(process)

    def discard(self, process: SandboxProcess) -> None:
        """End a session without waiting for it."""
        process.discard()
        self._live.discard(process)

    def close(self) -> None:
        """Stop the server and every session, and remove its folder. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for process in self._live:
                process.discard()
            self._live.clear()
            self._stop()


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip()), "")


def _image(png: bytes) -> ImageBlob | None:
    """The image if it really is one: what a session sends is in the agent's hands."""
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if max(image.size) > MAX_SIDE:
                return None
        pixels.decode(png)
    except (*pixels.DECODE_ERRORS, ImageError):
        return None
    return ImageBlob.of(png)


def _describe(status: int) -> str:
    if status in (-signal.SIGKILL, SESSION_LOST):  # by which of the two it ended first
        return "killed, or its connection closed"
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


class PythonTool:
    """The `python` tool of one rollout. Its process starts with the first call."""

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

    async def call(self, code: str) -> PythonResult:
        """Run `code` in this rollout's session.

        Raises:
            InfrastructureError: the server died; the next call starts anew.
        """
        note, images, process = "", (), self._process
        if process is None:
            process = self._process = await self._server.open()
            images = tuple(image.data for image in self._images)
            note = "[new Python session: earlier variables are gone]" if self._has_history else ""
        reply: Reply | None = None
        end, text = _End(None, Reply(0, False)), ""
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await process.exchange(code, images, self._sizes if images else ())
        except TimeoutError:
            text = f"Timed out after {self._timeout_s:g} s. The Python session was stopped"
            end = await self._end(process)
        except (_SessionEndedError, WireError) as error:
            end = await self._end(process)
            if end.status is None:
                raise InfrastructureError("the Python server died during a call") from None
            how = _describe(end.status) if isinstance(error, _SessionEndedError) else "its connection broke"
            text = f"The Python session ended ({how})"
        finally:
            if reply is None and self._process is not None:  # cancelled: what comes next on the socket is not for the next call
                self._server.discard(self._process)
                self._process = None
        self._has_history = True
        if reply is not None:
            return await self._result(reply, process.images, note)
        return await self._result(end.left, process.images, note, f"{text}; the next call starts a new one.")

    def _bounded(self, parts: tuple[str | int, ...]) -> list[str | int]:
        """What the agent wrote; it may have forged it."""
        room = self._max_chars + _NOTES
        bounded: list[str | int] = []
        for part in parts:
            if isinstance(part, str):
                part = part[:room]
                room -= len(part)
            bounded.append(part)
        return bounded

    async def _result(self, reply: Reply, images: list[bytes], begin: str, end: str = "") -> PythonResult:
        """begin, end: lines of ours before and behind what the code wrote."""
        parts: list[str | int] = [f"{begin}\n"] if begin else []
        shown: list[ImageBlob] = []
        for part in self._bounded(reply.parts):
            if isinstance(part, str):
                parts.append(part)
                continue
            image = await asyncio.to_thread(_image, images[part]) if 0 <= part < len(images) else None
            if image is not None and len(shown) < MAX_IMAGES:
                parts.append(len(shown))
                shown.append(image)
        if end:
            last = parts[-1] if parts else ""
            parts.append(f"\n{end}" if isinstance(last, str) and last and not last.endswith("\n") else end)
        stdout, stderr = (text[: self._max_chars + _NOTES] for text in (reply.stdout, reply.stderr))
        note = "\n".join(line for line in (begin, end and f"[{end}]") if line)
        return PythonResult(tuple(parts), stdout, stderr, tuple(shown), reply.ok, note)

    async def _end(self, process: SandboxProcess) -> _End:
        self._process = None
        return await self._server.end(process)

    async def close(self) -> None:
        """Kill the session, if there is one, and wait until it is gone."""
        if self._process is not None:
            await self._end(self._process)
