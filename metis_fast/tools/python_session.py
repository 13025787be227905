"""One session of the Python server, seen from the trainer: what is sent to it, what it answers, how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from dataclasses import dataclass

from metis_fast.tools.sandbox.transcript import Output, open_output, output_size
from metis_fast.tools.sandbox.wire import (
    MAX_IMAGES,
    START,
    Call,
    EndedBy,
    Limits,
    Reply,
    Shown,
    WireError,
    decode_message,
    encode_call,
    lengths,
)

_SHORT = 1 << 16  # bytes of a header that may be decoded on the event loop: a millisecond
_LAST_WORD_S = 2.0  # how long a session that ends by itself may take to be gone, before it is killed


class SessionEndedError(Exception):
    """The other end of a session's socket is closed."""


@dataclass(frozen=True, slots=True)
class End:
    """How a session ended.

    status: exit status of its first process (negative: the signal that killed it); None if the server died instead. by: who
    ended it. left: what the running call had written until then, as far as a `Reply` of it would say so.
    """

    status: int | None
    by: EndedBy
    left: Reply


class SandboxProcess:
    """One session, running or about to. Belongs to no event loop while none of its coroutines runs."""

    def __init__(self, number: int, limits: Limits) -> None:
        """number: of its entry in the board. Raises OSError where there are no more descriptors."""
        self.number = number
        self._limits = limits
        self._calls = 0
        self._ready = False
        self._reading = False
        self.images: list[bytes] = []  # shown in the running call
        with contextlib.ExitStack() as undo:
            self._data, self._their_data = (undo.enter_context(sock) for sock in socket.socketpair())
            self._life, self._their_life = (undo.enter_context(sock) for sock in socket.socketpair())
            self._output = open_output(limits.max_output_chars)
            undo.pop_all()
        for sock in (self._data, self._life):
            sock.setblocking(False)

    def send(self, control: socket.socket) -> None:
        """Have the server start it. Raises OSError where the server is gone."""
        # Does not block: callers are limited to a few at a time, the socket holds hundreds of these.
        with self._their_data, self._their_life:
            fds = [self._their_data.fileno(), self._their_life.fileno(), self._output]
            socket.send_fds(control, [str(self.number).encode()], fds)

    @property
    def has_more(self) -> bool:
        """Whether something that it sent, or the end of it, lies here unread, or is being read."""
        if self._reading:
            return True
        poll = select.poll()
        poll.register(self._data, select.POLLIN)
        return bool(poll.poll(0))

    async def _read(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        while len(buffer) < size:
            try:
                chunk = await loop.sock_recv(self._data, min(size - len(buffer), 1 << 20))
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise SessionEndedError
            buffer += chunk
        return bytes(buffer)

    async def ready(self) -> None:
        """Wait until it takes calls.

        Raises:
            SessionEndedError: it did not start. WireError: it sent something else.
        """
        if not self._ready:
            await self._read_message()
            self._ready = True

    async def _read_message(self) -> Reply | Shown:
        """What the session says next: no more than one that keeps to its limits can have to say. Raises as `ready`."""
        start = await self._read(START)
        header, blob = lengths(start)
        if header > self._limits.header_bytes or blob > self._limits.image_bytes:
            raise WireError("message is too large")
        self._reading = True
        body = start[START // 2 :] + await self._read(header + blob)
        short = header <= _SHORT
        message = decode_message(body) if short else await asyncio.to_thread(decode_message, body)
        self._reading = False
        if message.call != self._calls:
            raise WireError("message belongs to another call")
        return message

    async def exchange(self, code: str, images: tuple[bytes, ...], sizes: tuple[tuple[int, int], ...]) -> Reply:
        """Send a call and wait for its reply; `self.images` are those that it shows. Raises as `ready`."""
        self._calls += 1
        self.images = []
        call = encode_call(Call(self._calls, code, images, sizes))
        room = self._limits.max_shown_mb << 20
        try:
            await asyncio.get_running_loop().sock_sendall(self._data, call)
        except ConnectionError:
            raise SessionEndedError from None
        while isinstance(message := await self._read_message(), Shown):
            room -= len(message.png)
            if len(self.images) == MAX_IMAGES or room < 0:
                raise WireError("too many images")
            self.images.append(message.png)
        return message

    async def end(self, by_itself: bool = False, in_call: bool = True) -> End:
        """Kill the session and wait until all its processes are gone.

        by_itself: it seems to end already, so that what it dies of is not to be mistaken for us. in_call: what the last call
        has written is wanted.
        """
        loop = asyncio.get_running_loop()
        text = bytearray()
        left = Reply(self._calls, False)
        try:
            with contextlib.suppress(ConnectionError):
                if by_itself:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LAST_WORD_S):
                            text += await loop.sock_recv(self._life, 64)
                if not text:
                    with contextlib.suppress(OSError):
                        self._life.shutdown(socket.SHUT_WR)
                while chunk := await loop.sock_recv(self._life, 64):
                    text += chunk
            if in_call:
                left = await asyncio.to_thread(self._left_behind, os.dup(self._output))
        finally:
            self.discard()
        status, _, by = text.decode().partition(" ")
        return End(int(status), EndedBy(by), left) if status else End(None, EndedBy.OTHERS, left)

    def _left_behind(self, file: int) -> Reply:
        """file: the output's descriptor, closed here: whoever waits for this may be gone before it is done."""
        limit = self._limits.max_output_chars
        try:
            output = Output(bytearray(os.pread(file, output_size(limit), 0)), limit)
            if output.call != self._calls:
                return Reply(self._calls, False)  # of the call before
            output.take(file)
        finally:
            os.close(file)
        return Reply(self._calls, False, output.all.parts(), output.stream(1), output.stream(2))

    def discard(self) -> None:
        """Close what is ours without waiting; the server kills the session."""
        for sock in (self._data, self._life, self._their_data, self._their_life):
            sock.close()
        if self._output >= 0:
            os.close(self._output)
            self._output = -1
