"""Runs the agent's calls inside a session, like cells of a notebook, and keeps what they write and show."""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]  # `signal` makes an enumeration of every answer: 65 us a call
import ast
import importlib
import importlib.util
import io
import linecache
import math
import mmap
import os
import random
import re
import resource
import signal
import socket
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import numpy.random  # loads late by itself, in every session anew
from PIL import Image, ImageShow

from metis_fast.pixels import ImageError, decode, to_rgb
from metis_fast.tools.sandbox import kernel
from metis_fast.tools.sandbox.transcript import Output, output_size
from metis_fast.tools.sandbox.wire import LENGTH, MAX_SIDE, Limits, Reply, Shown, decode_call, encode_message

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_CELL = "<call "
_STDOUT, _STDERR = 1, 2
_ORIENTATION = 0x0112  # of EXIF
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_SIGNALS = sorted(int(number) for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
_DEPTH = 1000  # of calls, that ours may need: Python's own limit
_READY = """
import base64, math, os
from io import BytesIO
from math import cos, sin
import numpy as np
from PIL import Image
"""  # names that agents of the published protocol count on, with `plt`
_READY_TREE = ast.parse(_READY)
_READY_CODE = compile(_READY_TREE, "<ready>", "exec")
_PLOTTING = "import matplotlib.pyplot as plt"  # costs half a second, so only where a call says "plt"
_PLT = re.compile(r"\bplt\b")
_MAGIC = re.compile(r"^%matplotlib\b.*$", re.MULTILINE)  # of notebooks, which agents write from habit; here it is always so
_FIGURES = "metis_fast.tools.sandbox.figures"
_HAS_PLT = importlib.util.find_spec("matplotlib") is not None


class _Stream(io.RawIOBase):
    """What stands behind sys.stdout and sys.stderr of the agent's code. Keeps nothing back: the process may be killed."""

    def __init__(self, interpreter: Interpreter, fd: int) -> None:
        self._interpreter = interpreter
        self._fd = fd
        self.name = "<stdout>" if fd == _STDOUT else "<stderr>"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: ReadableBuffer, /) -> int:
        text = bytes(data)
        self._interpreter.write(text, self._fd)
        return len(text)


class _Viewer(ImageShow.Viewer):
    """Makes `image.show()` an output of the call."""

    def __init__(self, interpreter: Interpreter) -> None:
        self._interpreter = interpreter

    def show(self, image: Image.Image, **options: object) -> int:
        self._interpreter.show(image)
        return 1


def _upright(data: bytes) -> Image.Image:
    """In RGB; a plain photo is decoded when it is first used."""
    image = Image.open(io.BytesIO(data))
    plain = image.mode == "RGB" and "transparency" not in image.info and image.getexif().get(_ORIENTATION, 1) == 1
    return image if plain else decode(data)


class _Main(types.ModuleType):
    """`__main__` of the agent's code.

    A process that multiprocessing starts without a fork runs the file of the parent's `__main__` to find the functions it is to
    call. There is none; so one is written when it is asked for, with what the calls have defined, but without what they did.
    """

    __slots__ = ("_definitions", "_folder", "_num_files")  # not in the namespace of the agent

    def __init__(self, folder: str) -> None:
        super().__init__("__main__")
        self._folder = folder
        self._definitions: list[ast.stmt] = []
        self._num_files = 0

    def add(self, tree: ast.Module) -> None:
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        for node in tree.body:
            if isinstance(node, kinds) or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)):
                self._definitions.append(node)

    @property
    def __file__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._num_files += 1  # a file of a name that is known is not run again
        path = os.path.join(self._folder, f".calls-{self._num_files}.py")
        future = [node for node in self._definitions if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        rest = [node for node in self._definitions if node not in future]
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(ast.unparse(ast.Module([*future, *rest], [])))
        return path


class _Report(traceback.TracebackException):
    """Has the agent's own lines only. In place of Python's, it also serves children of the agent's, loggers and the agent."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stack = traceback.StackSummary.from_list([frame for frame in self.stack if current().is_own(frame.filename)])


class _Plots:
    """Finds no module, but makes sure that `plt.show()` shows before pyplot is imported, however its back end is chosen."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "matplotlib.pyplot":
            importlib.import_module(_FIGURES)


def _describe(error: BaseException) -> str:
    """What the agent reads of an error; nothing for `sys.exit()`, which is none."""
    try:
        if isinstance(error, SystemExit):
            code = error.code
            return "" if code is None or (isinstance(code, int) and code == 0) else f"SystemExit: {code}\n"
        return "".join(_Report.from_exception(error, limit=-50).format())
    except BaseException as failure:  # methods of the agent's own classes run here, and may raise anything
        return f"{type(error).__name__} (no traceback: {type(failure).__name__})\n"


def _ignore(number: int, frame: types.FrameType | None) -> None:
    """Stands for a signal handler of the agent's while none of its code runs."""


def _png(image: Image.Image, max_pixels: int) -> bytes:
    image = to_rgb(image)
    if max(image.size) > MAX_SIDE:
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    shrink = math.sqrt(image.width * image.height / max_pixels)
    if shrink > 1:
        image = image.resize((max(1, int(image.width / shrink)), max(1, int(image.height / shrink))))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, icc_profile=None)  # pixels alone: the trainer takes no other part of a PNG
    return buffer.getvalue()


class Interpreter:
    """One session's state. Iterating gives the code of the current call, to be run in `scope` within a `with`.

    It is the caller who runs it (`_COMMAND` in python_tool): so no frame of ours stands below the agent's own, to be seen in a
    stack or blamed by a warning.
    """

    def __init__(self, connection: socket.socket, output: int, limits: Limits) -> None:
        """output: the file that `Output` describes; the descriptors 1 and 2 append to it."""
        self._connection = connection
        self._output = output
        self._inode = os.fstat(output).st_ino
        self._pid = os.getpid()
        self._lock = threading.RLock()  # threads of the agent may write and show at any time, its signal handlers too
        self._transcript = Output(mmap.mmap(output, output_size(limits.max_output_chars)), limits.max_output_chars)
        self._transcript.begin(1)
        self._max_pixels = limits.max_image_pixels
        self._max_shown = limits.max_shown_mb << 20
        self._shown = 0  # bytes of images in this call
        self._displayed: list[object] = []  # matplotlib's figures that this call has shown by `display` or as its value
        self._plotting = not _HAS_PLT  # whether `plt` is there, or never will be
        self._code = ""
        self._ok = True
        self._kept: list[object] = []  # streams
        self._handlers: dict[int, Callable[[int, types.FrameType | None], object]] = {}
        self._limits = resource.getrlimit(resource.RLIMIT_AS)  # what the agent's code may take, and what ours may
        self._own_limits = (self._limits[1], self._limits[1])
        self._folder = os.getcwd()  # scratch; the agent may leave it
        self._main = _Main(self._folder)
        self.scope = self._main.__dict__
        exec(_READY_CODE, self.scope)  # ours; the modules are loaded already
        self._main.add(_READY_TREE)
        self.scope["show"] = self.show
        self.scope["display"] = self.display
        sys.modules["__main__"] = self._main
        sys.argv, sys.orig_argv = [""], [sys.executable]  # as those of a plain interpreter; ours hold paths
        sys.path.insert(0, "")
        sys.meta_path.insert(0, _Plots)
        ImageShow.register(_Viewer(self), order=0)
        traceback.TracebackException = _Report
        warnings.showwarning = self._warn
        threading.excepthook = self._thread_failed
        # Every session draws the same numbers, so that a rollout can be repeated.
        random.seed(0)
        np.random.seed(0)

    def write(self, data: bytes, fd: int, alone: bytes | None = None) -> None:
        """Add to the output of the call; between calls, of the next one. fd, alone: see `Output.write`."""
        if os.getpid() != self._pid:  # forked by the agent: its memory is no longer ours, and nor is the lock
            while data:
                data = data[os.write(_STDOUT, data) :]
            return
        with self._lock:
            self._take_output()
            self._transcript.write(data, fd, alone)

    def _has_output(self) -> bool:
        """Whether the descriptor is still what it was; the agent may have closed it, and opened another file."""
        try:
            return os.fstat(self._output).st_ino == self._inode
        except OSError:
            return False

    def _take_output(self) -> None:
        if self._has_output():
            self._transcript.take(self._output)

    def show(self, image: object) -> None:
        """Show an image (PIL image, or array as Pillow understands it) as part of the output.

        Raises:
            RuntimeError: in a child process.
            ValueError: with those shown before it would be more than a call may show.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("a child process cannot show images; return the image, and show it in the main process")
        png = _png(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)), self._max_pixels)
        with self._lock:
            if self._shown + len(png) > self._max_shown:
                raise ValueError(
                    f"the images of a call may take {self._max_shown >> 20} MiB together, as PNG; show fewer or smaller ones"
                )
            self._take_output()
            if self._transcript.all.add_image():
                self._shown += len(png)
                self._connection.sendall(encode_message(Shown(self._transcript.call, png)))

    def display(self, *values: object) -> None:
        """Show images, and matplotlib's figures; print what everything else looks like."""
        for value in values:
            if not self._shows(value):
                print(repr(value))

    def _shows(self, value: object) -> bool:
        """Whether it can be shown; then it is."""
        if isinstance(value, Image.Image):
            self.show(value)
            return True
        if isinstance(value, getattr(sys.modules.get("matplotlib.figure"), "Figure", ())):
            figure: Any = value
            self.show(importlib.import_module(_FIGURES).picture(figure))
            self._displayed.append(figure)
            return True
        return False

    def _display(self, value: object) -> None:
        if value is not None and not self._shows(value):
            text = repr(value).encode("utf-8", "replace")
            self.write(text + b"\n", _STDOUT, text)  # a notebook's value has no line break

    def _warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Where a library warns of itself, or beyond the code of the call, show the line of the call that led there."""
        if not self.is_own(filename):
            frame = sys._getframe()
            while frame is not None and not frame.f_code.co_filename.startswith(_CELL):
                frame = frame.f_back
            filename, lineno = (frame.f_code.co_filename, frame.f_lineno) if frame else (f"{_CELL}{self._transcript.call}>", 0)
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)

    def is_own(self, filename: str) -> bool:
        """Whether a file is the agent's: a call, or one that it wrote."""
        return filename.startswith((_CELL, self._folder + os.sep))

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            name = args.thread.name if args.thread is not None else "?"
            text = f"Exception in thread {name}:\n{_describe(args.exc_value)}"
            self.write(text.encode("utf-8", "replace"), _STDERR)

    def add_images(self, images: Iterable[bytes], sizes: Sequence[tuple[int, int]]) -> None:
        """Define image_1, image_2, ..., in RGB and upright; one that Pillow cannot open is left undefined.

        sizes: (width, height) of each, where they are to be scaled.
        """
        for number, data in enumerate(images, start=1):
            try:
                image = _upright(data)
                if sizes and image.size != sizes[number - 1]:
                    image = image.resize(sizes[number - 1], Image.Resampling.BICUBIC)  # as the model's processor does
                self.scope[f"image_{number}"] = image
            except (OSError, ImageError):
                continue

    def begin(self, code: str) -> None:
        """Make ready for a call: the agent may have left any of this in any state."""
        self._code = code
        self._ok = True
        self._shown = 0
        self._displayed.clear()
        for fd in (_STDOUT, _STDERR):
            if self._has_output():
                os.dup2(self._output, fd)
            name = "stdout" if fd == _STDOUT else "stderr"
            stream = io.TextIOWrapper(_Stream(self, fd), "utf-8", "replace", write_through=True)
            # `print` holds no reference to the stream it writes to, and a thread may be in it (CPython issue 130163): the one
            # that is replaced here is kept, and so is the new one, which the agent's code may replace.
            self._kept += (getattr(sys, name, None), stream)
            setattr(sys, name, stream)
        stdin = getattr(sys, "stdin", None)
        if stdin is None or (type(stdin) is io.TextIOWrapper and stdin.closed):  # `exit()` closes it
            sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  # for all calls from here on
        sys.displayhook = self._display
        warnings.simplefilter("default", append=True)  # changes nothing, but what was shown before is shown again in this call

    def _put_aside(self) -> None:
        """What the agent has set for its process, and what could stop our code. May be done twice."""
        try:
            resource.setrlimit(resource.RLIMIT_AS, self._own_limits)  # takes no memory: there may be none
        except ValueError:  # the agent has lowered what can only be lowered
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            self._limits, self._own_limits = (min(self._limits[0], hard), hard), (hard, hard)
        for timer in _TIMERS:  # an alarm is for the call that set it
            signal.setitimer(timer, 0)
        sys.settrace(None)
        sys.setprofile(None)
        sys.setrecursionlimit(max(sys.getrecursionlimit(), _DEPTH))
        for number in _SIGNALS:
            handler = _signal.getsignal(number)
            if callable(handler) and handler is not _ignore:
                self._handlers[number] = handler
                _signal.signal(number, _ignore)

    def _put_back(self) -> None:
        for number, handler in self._handlers.items():
            _signal.signal(number, handler)
        self._handlers.clear()
        resource.setrlimit(resource.RLIMIT_AS, self._limits)

    def __iter__(self) -> Iterator[types.CodeType]:
        self._put_back()
        if (figures := sys.modules.get(_FIGURES)) is not None:
            figures.close_all()  # of a call that failed
        name = f"{_CELL}{self._transcript.call}>"
        linecache.cache[name] = (len(self._code), None, self._code.splitlines(keepends=True), name)
        tree = _parsed(self._code, name)
        if not self._plotting and _PLT.search(self._code):
            self._plotting = True
            plotting = ast.parse(_PLOTTING)
            _Main.add(self._main, plotting)
            if "plt" not in self.scope:
                yield compile(plotting, f"{_CELL}plt>", "exec")
        _Main.add(self._main, tree)  # the agent may have an `add` of its own in this module
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        yield compile(tree, name, "exec")
        if last is not None:
            yield compile(ast.Interactive([last]), name, "single")  # gives its value to sys.displayhook
        if (figures := sys.modules.get(_FIGURES)) is not None and os.getpid() == self._pid:
            figures.show_left_open(self._displayed)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        """End a call. The agent's code may raise anything; here that is a result.

        A signal handler of the agent's may raise in here, too, before it is put aside. So there are two of these, one in the
        other, and the outer one takes that for the call's error.
        """
        self._put_aside()
        if error is not None and (text := _describe(error)):
            self._ok = False
            self.write(text.encode("utf-8", "replace"), _STDERR)
        if os.getpid() != self._pid:  # a child that the agent forked and did not end must not answer in our place
            os._exit(not self._ok)
        return True

    def answer(self) -> None:
        """Send the end of the call. What is written from now on belongs to the next one."""
        with self._lock:
            self._take_output()
            output = self._transcript
            parts = output.all.parts()
            reply = Reply(output.call, self._ok, parts, output.stream(_STDOUT), output.stream(_STDERR))
            self._connection.sendall(encode_message(reply))  # if this fails, the trainer still finds the text
            self._transcript.begin(self._transcript.call + 1)
            start, size = self._transcript.all.spent()
            if size and self._has_output():
                kernel.punch_hole(self._output, start, size)


def _parsed(code: str, name: str) -> ast.Module:
    try:
        return ast.parse(code, name)
    except SyntaxError:
        plain = _MAGIC.sub("", code)
        if plain == code:
            raise
    return ast.parse(plain, name)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = connection.recv(min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def serve(connection: socket.socket, output: int, limits: Limits) -> Iterator[Interpreter]:
    """Take calls until the trainer hangs up; whoever iterates runs them. A reply of number 0 says that the session is ready."""
    interpreter = Interpreter(connection, output, limits)
    _interpreters.append(interpreter)
    connection.sendall(encode_message(Reply(0, True)))
    while True:
        try:
            (size,) = LENGTH.unpack(_receive(connection, LENGTH.size))
            call = decode_call(_receive(connection, size))
        except EOFError:
            return
        interpreter.add_images(call.images, call.sizes)
        interpreter.begin(call.code)
        yield interpreter
        interpreter.answer()


_interpreters: list[Interpreter] = []


def current() -> Interpreter:
    """The interpreter of this session (for the plotting back end, which matplotlib loads by name)."""
    return _interpreters[-1]
