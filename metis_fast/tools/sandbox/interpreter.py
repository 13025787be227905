"""Runs the agent's calls inside a session, like cells of a notebook, and collects what they write and show."""

from __future__ import annotations

import ast
import io
import linecache
import os
import random
import socket
import sys
import traceback
import types
from collections.abc import Iterable

import numpy as np
import numpy.random  # loads late by itself, in every session anew
from PIL import Image, ImageShow

from metis_fast.pixels import to_rgb
from metis_fast.tools.sandbox.wire import LENGTH, MAX_IMAGES, MAX_SIDE, Call, Limits, Reply, decode_call, encode_reply

_CELL = "<call "


class Transcript:
    """Text and PNG images in the order written. Text beyond `limit` characters is cut in the middle; memory stays bounded."""

    def __init__(self, limit: int) -> None:
        self._head_room = (limit + 1) // 2
        self._tail_room = limit // 2
        self._head: list[str | bytes] = []
        self._tail: list[str | bytes] = []
        self._tail_chars = 0
        self._dropped = 0
        self._images = 0
        self._refused = 0

    def write(self, text: str) -> None:
        """Add text."""
        if self._head_room:
            first, text = text[: self._head_room], text[self._head_room :]
            self._head.append(first)
            self._head_room -= len(first)
        if text:
            self._tail.append(text)
            self._tail_chars += len(text)
            if self._tail_chars > 2 * self._tail_room + 4096:  # so that trimming costs O(1) a character
                self._trim()

    def show(self, image: Image.Image) -> None:
        """Add an image, as PNG."""
        if self._images == MAX_IMAGES:
            self._refused += 1
            return
        self._images += 1
        image = to_rgb(image)
        if max(image.size) > MAX_SIDE:
            image = image.copy()
            image.thumbnail((MAX_SIDE, MAX_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        (self._head if self._head_room else self._tail).append(buffer.getvalue())

    def _trim(self) -> None:
        kept: list[str | bytes] = []
        room = self._tail_room
        for part in reversed(self._tail):
            if isinstance(part, str):
                self._dropped += max(0, len(part) - room)
                part = part[len(part) - room :] if len(part) > room else part
                room -= len(part)
            if part:
                kept.append(part)
        self._tail = kept[::-1]
        self._tail_chars = self._tail_room - room

    def parts(self) -> tuple[str | bytes, ...]:
        """All parts; neighbouring text joined."""
        self._trim()
        gap = [f"\n... {self._dropped} characters left out ...\n"] if self._dropped else []
        end = [f"\n... {self._refused} more images not shown ...\n"] if self._refused else []
        joined: list[str | bytes] = []
        for part in (*self._head, *gap, *self._tail, *end):
            if isinstance(part, str) and joined and isinstance(last := joined[-1], str):
                joined[-1] = last + part
            else:
                joined.append(part)
        return tuple(joined)


class _Stream(io.TextIOBase):
    """sys.stdout and sys.stderr of the agent's code."""

    def __init__(self, interpreter: Interpreter) -> None:
        self._interpreter = interpreter

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        self._interpreter.transcript.write(text)
        return len(text)


class _Viewer(ImageShow.Viewer):
    """Makes `image.show()` an output of the call."""

    def __init__(self, interpreter: Interpreter) -> None:
        self._interpreter = interpreter

    def show(self, image: Image.Image, **options: object) -> int:
        self._interpreter.transcript.show(image)
        return 1


def _own_frames(report: traceback.TracebackException | None) -> None:
    while report is not None:
        report.stack = traceback.StackSummary.from_list([frame for frame in report.stack if frame.filename.startswith(_CELL)])
        if report.__cause__ is not None:
            _own_frames(report.__cause__)
        report = report.__context__


class Interpreter:
    """One session's state.

    prompt_images: encoded images, opened as image_1, image_2, ...; an unreadable one is left out.
    """

    def __init__(self, max_output_chars: int) -> None:
        self.transcript = Transcript(max_output_chars)
        self._limit = max_output_chars
        self._calls = 0
        self._module = types.ModuleType("__main__")
        self._module.__dict__["show"] = self.show
        sys.modules["__main__"] = self._module
        ImageShow.register(_Viewer(self), order=0)
        # What does not go through sys.stdout (child processes, C code) lands here and is added at the end of a call.
        self._overflow = os.memfd_create("output")
        os.set_inheritable(self._overflow, False)
        for fd in (1, 2):
            os.dup2(self._overflow, fd)
        # Every session draws the same numbers, so that a rollout can be repeated.
        random.seed(0)
        np.random.seed(0)

    def show(self, image: object) -> None:
        """Show an image (PIL image, or array as Pillow understands it) as part of the output."""
        self.transcript.show(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))

    def add_images(self, images: Iterable[bytes]) -> None:
        """Define image_1, image_2, ...; one that Pillow cannot open is left undefined."""
        for number, data in enumerate(images, start=1):
            try:
                self._module.__dict__[f"image_{number}"] = Image.open(io.BytesIO(data))
            except OSError:
                continue

    def run(self, code: str) -> Reply:
        """Run one call. The value of a last expression is shown if it is an image, else printed if it is not None."""
        self._calls += 1
        self.transcript = Transcript(self._limit)
        sys.stdout = sys.stderr = _Stream(self)
        name = f"{_CELL}{self._calls}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        ok = True
        try:
            self._execute(code, name)
        except SystemExit as stop:
            if stop.code not in (None, 0):
                ok = False
                self.transcript.write(f"SystemExit: {stop.code}\n")
        except BaseException as error:  # the agent's code may raise anything; here that is a result
            ok = False
            report = traceback.TracebackException.from_exception(error, limit=-50)
            _own_frames(report)
            self.transcript.write("".join(report.format()))
        self._add_overflow()
        return Reply(ok, self.transcript.parts())

    def _execute(self, code: str, name: str) -> None:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), self._module.__dict__)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), self._module.__dict__)
            if isinstance(value, Image.Image):
                self.transcript.show(value)
            elif value is not None:
                self.transcript.write(f"{value!r}\n")

    def _add_overflow(self) -> None:
        size = os.lseek(self._overflow, 0, os.SEEK_CUR)
        if size:
            self.transcript.write(os.pread(self._overflow, min(size, 8 * self._limit), 0).decode("utf-8", "replace"))
            os.ftruncate(self._overflow, 0)
            os.lseek(self._overflow, 0, os.SEEK_SET)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = connection.recv(min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def serve(connection: socket.socket, limits: Limits) -> None:
    """Answer calls until the trainer hangs up. The empty reply sent first says that the session is ready."""
    interpreter = Interpreter(limits.max_output_chars)
    _interpreters.append(interpreter)
    connection.sendall(encode_reply(Reply(True)))
    while True:
        try:
            (size,) = LENGTH.unpack(_receive(connection, LENGTH.size))
            call: Call = decode_call(_receive(connection, size))
        except EOFError:
            return
        interpreter.add_images(call.images)
        reply = interpreter.run(call.code)
        connection.sendall(encode_reply(reply))


_interpreters: list[Interpreter] = []


def current() -> Interpreter:
    """The interpreter of this session (for the plotting back end, which matplotlib loads by name)."""
    return _interpreters[-1]
