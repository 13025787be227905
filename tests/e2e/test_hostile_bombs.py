"""Hostile code that takes all there is: processes, threads, memory, files, output, time. Its own session pays, nobody else."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import attack
from PIL import Image
from python_calls import LIMIT, observations, serve

from metis_fast.config import PythonToolConfig
from metis_fast.tools.python_server import PythonServer
from metis_fast.types import Observation, Outcome


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonServer]:
    yield from serve(tmp_path_factory.mktemp("scratch"))


FORKS = "import os, time\nwhile True:\n    try:\n        if not os.fork(): time.sleep(60)\n    except OSError: break\n"
TIMED_OUT = "Timed out after 2 s"
# What it does, how its first call ends, and whether the session goes on.
BOMBS = {
    "processes": (FORKS + "print('refused')", "refused", True),
    "processes of processes": (
        "import os\nfor _ in range(200):\n    try: os.fork()\n    except OSError: pass",
        "(no output)",
        True,
    ),
    "daemons": (
        "import os, time\nwhile True:\n    try:\n        if not os.fork():\n            os.setsid()\n"
        "            try: os.fork()\n            finally: time.sleep(60)\n    except OSError: break\nprint('refused')",
        "refused",
        True,
    ),
    "threads": (
        "import threading, time\ntry:\n    while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "except RuntimeError: print('refused')",
        "refused",
        True,
    ),
    "descriptors": ("import os\nwhile True: os.dup(0)", "Too many open files", True),
    "pipes": ("import os\nheld = []\nwhile True: held.append(os.pipe())", "Too many open files", True),
    "one file": ("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()", "File too large", True),
    "files": (
        "for n in range(99):\n    with open(f'x{n}', 'wb') as f: f.write(bytes(1 << 20))",
        "No space left on device",
        True,
    ),
    "names": ("for n in range(99999): open(f'x{n}', 'w').close()", "No space left on device", True),
    "folders": ("import os\nfor n in range(2000): os.mkdir('d'); os.chdir('d')", "(no output)", True),
    "a file with a hole": ("open('x', 'wb').truncate(1 << 40)", "File too large", True),
    "memory": ("held = []\nwhile True: held.append(bytearray(1 << 24))", "MemoryError", True),
    "an array": ("import numpy\nnumpy.ones(1 << 34)", "Unable to allocate", True),
    "recursion": ("f = lambda: f()\nf()", "RecursionError: maximum recursion depth exceeded", True),
    "a number": ("int('9' * 5000)", "Exceeds the limit", True),
    "output": ("import os\nwhile True: os.write(1, bytes(1 << 16))", "File too large", True),
    "lines": ("while True: print('y')", TIMED_OUT, False),
    "a loop": ("while True: pass", TIMED_OUT, False),
    "a loop in C": ("sum(range(1 << 60))", TIMED_OUT, False),
    "an expression in C": ("import re\nre.match('(a*)*b', 'a' * 60)", TIMED_OUT, False),
    "loops of processes": ("import os\nfor _ in range(5): os.fork()\nwhile True: pass", TIMED_OUT, False),
    "a loop that swallows errors": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        TIMED_OUT,
        False,
    ),
    "a loop that ignores signals": (
        "import signal\nfor n in set(signal.valid_signals()) - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        TIMED_OUT,
        False,
    ),
    "a stop": ("import os, signal\nos.kill(0, signal.SIGSTOP)\nwhile True: pass", TIMED_OUT, False),
    "an answer that never comes": ("import threading\nthreading.Event().wait()", TIMED_OUT, False),
    "a lock of ours": ("import sys\nsys._getframe = None\nshow.__self__._lock.acquire()\nimport threading\n"
        "t = threading.Thread(target=print, args=('x',)); t.start(); t.join()", TIMED_OUT, False),
}  # fmt: skip


_SLOW = ("an expression in C",)  # as "a loop in C": neither lets a signal through


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.slow if one in _SLOW else ()) for one in BOMBS])
def test_a_bomb_harms_its_own_session_only(server: PythonServer, name: str) -> None:
    code, says, goes_on = BOMBS[name]
    got, after = attack(server, code, "2", timeout_s=2.0 if says == TIMED_OUT else 60.0)
    assert says in got.text.splitlines()[-1]
    assert after.text == ("2" if goes_on else "[new Python session: earlier variables are gone]\n2")


# -- images ---------------------------------------------------------------------------------------------------------------

IMAGES = {
    "too many": ("for n in range(20): show(Image.new('RGB', (2, 2)))", 8, "... 12 more images not shown ..."),
    "too large": ("show(Image.new('RGB', (9000, 9000)))", 1, ""),
    "too wide": ("show(Image.new('RGB', (60000, 1)))", 1, ""),
    "too heavy": (
        "for n in range(6): show(np.random.randint(0, 256, (2200, 2200, 3), np.uint8))",
        4,
        "ValueError: the images of a call may take 64 MiB together, as PNG; show fewer or smaller ones",
    ),
    "lazy and broken": ("open('x.png', 'wb').write(b'\\x89PNG' * 9)\nshow(Image.open('x.png'))", 0, "cannot identify"),
    "nothing": ("show(Image.new('RGB', (0, 5)))", 0, "Error"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_bounded(server: PythonServer, name: str) -> None:
    code, num, says = IMAGES[name]
    (got,) = attack(server, code)
    assert len(got.images) == num and says in got.text
    for image in got.images:
        assert max(Image.open(io.BytesIO(image.data)).size) <= 4096


SEND = """
import os, struct, zlib
size = lambda n: n.to_bytes(4, 'big')
def send(head, blob=b''):
    data = size(len(head) + len(blob) + 4) + size(len(head)) + head + blob
    while data: data = data[os.write(3, data):]
chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
header = lambda w, h: chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))
rows = lambda w, h: b''.join(b'\\0' + bytes(3 * w) for _ in range(h))
sign, end = b'\\x89PNG\\r\\n\\x1a\\n', chunk(b'IEND', b'')
good = sign + header(3, 2) + chunk(b'IDAT', zlib.compress(rows(3, 2))) + end
"""
PNGS = {
    "whole": ("good", 1),
    "broken in its last byte": ("good[:-1]", 0),
    "with megabytes behind its end": ("good + bytes(1 << 20)", 0),
    "with megabytes in a comment": ("good[:-12] + chunk(b'tEXt', b'a\\0' + bytes(1 << 20)) + end", 0),
    "with megabytes behind its data": (
        "sign + header(3, 2) + chunk(b'IDAT', zlib.compress(rows(3, 2)) + bytes(1 << 20)) + end",
        0,
    ),
    "with more rows than it says": ("sign + header(3, 2) + chunk(b'IDAT', zlib.compress(rows(3, 99))) + end", 0),
    "with fewer rows than it says": ("sign + header(3, 2) + chunk(b'IDAT', zlib.compress(rows(3, 1))) + end", 0),
    "of a thousand million pixels": ("sign + header(40000, 40000) + chunk(b'IDAT', zlib.compress(b'')) + end", 0),
    "that unpacks to gigabytes": ("sign + header(3, 2) + chunk(b'IDAT', zlib.compress(bytes(1 << 26))) + end", 0),
    "with a wrong checksum": ("good[:30] + b'xxxx' + good[34:]", 0),
    "with an unknown filter": ("sign + header(1, 1) + chunk(b'IDAT', zlib.compress(b'\\x09abc')) + end", 0),
    "of no colour": ("good.replace(bytes([8, 2, 0, 0, 0]), bytes([8, 0, 0, 0, 0]))", 0),
    "in many small pieces": (
        "sign + header(3, 2) + b''.join(chunk(b'IDAT', bytes([x])) for x in zlib.compress(rows(3, 2))) + end",
        0,
    ),
    "that is a GIF": ("b'GIF89a' + bytes(99)", 0),
}


@pytest.mark.parametrize("name", PNGS)
def test_a_forged_image_is_taken_only_if_it_is_nothing_but_pixels(server: PythonServer, name: str) -> None:
    png, num = PNGS[name]
    code = f'{SEND}png = {png}\nsend(b\'[1, %d]\' % len(png), png)\nsend(b\'[1, true, [0, 0, "x"], "", ""]\')\n'
    (got,) = attack(server, code)
    assert got.text == "<image>\n<image>\nx" if num else got.text == "x"


def test_the_images_of_a_rollout_are_bounded(tmp_path: Path) -> None:
    with contextlib.closing(PythonServer(PythonToolConfig(max_output_chars=LIMIT, max_shown_mb=1), tmp_path)) as server:
        code = "show(np.random.randint(0, 256, (570, 570, 3), np.uint8))"
        *shown, left_out = observations(server, *[code] * 5)
    assert [len(got.images) for got in shown] == [1] * 4
    assert left_out == Observation("[image not shown: those of all calls may take 4 MiB]")


# -- what no limit of one process counts -----------------------------------------------------------------------------------

TAKE = "x = bytearray(os.urandom(1 << 20)) * 60; time.sleep(60)\n"
SHARED = "f = os.open('/dev/shm/x', os.O_CREAT | os.O_RDWR)\nos.posix_fallocate(f, 0, 50 << 20)\n"
TOGETHER = {
    "in children": f"for _ in range(6):\n    if not os.fork(): {TAKE}time.sleep(60)",
    "in children of children": f"for _ in range(6):\n    if os.fork(): {TAKE}time.sleep(60)",
    "in a process whose first thread has ended": f"import ctypes, threading\nlibc = ctypes.CDLL(None)\n"
    f"for _ in range(6):\n    if not os.fork():\n        def take():\n            {TAKE}"
    "        threading.Thread(target=take).start()\n        libc.syscall(60 if os.uname().machine == 'x86_64' else 93, 0)\n"
    "time.sleep(60)",
    "in sockets": "import socket\nfor _ in range(8):\n"
    "    if not os.fork(): held = [socket.socketpair() for _ in range(110)]; time.sleep(60)\ntime.sleep(60)",
    "in files and children": f"{SHARED}for _ in range(4):\n    if not os.fork(): {TAKE}time.sleep(60)",
}


@pytest.mark.parametrize("name", TOGETHER)
def test_memory_of_all_processes_together_ends_the_session_and_says_so(tmp_path: Path, name: str) -> None:
    config = PythonToolConfig(max_output_chars=LIMIT, memory_mb=200, session_memory_mb=256)
    with contextlib.closing(PythonServer(config, tmp_path)) as server:
        got, after = attack(server, f"print('before')\nimport os, time\n{TOGETHER[name]}", "2")
    assert got.outcome is Outcome.TOOL_ERROR
    says = "The Python session ended (its processes and files together took more than 256 MiB of memory)"
    assert got.text == f"before\n{says}; the next call starts a new one." and after.text.endswith("\n2")


def test_memory_within_the_limit_is_nobodys_business(tmp_path: Path) -> None:
    """The pages of the warm interpreter, which all processes share, count once."""
    config = PythonToolConfig(max_output_chars=LIMIT, memory_mb=200, session_memory_mb=200)
    fork = "import os, time\nfor _ in range(30):\n    if not os.fork(): time.sleep(60)\n"
    fork += "x = bytearray(50 << 20)\ntime.sleep(1)\nlen(x)"
    with contextlib.closing(PythonServer(config, tmp_path)) as server:
        assert attack(server, fork, "len(x)") == [Observation(str(50 << 20))] * 2


def test_memory_taken_between_calls_ends_the_session_too(tmp_path: Path) -> None:
    config = PythonToolConfig(max_output_chars=LIMIT, memory_mb=200, session_memory_mb=256)
    late = f"import os, time\nfor _ in range(6):\n    if not os.fork(): time.sleep(0.2); {TAKE}None"
    with contextlib.closing(PythonServer(config, tmp_path)) as server:
        first, second = attack(server, late, "import time\ntime.sleep(30)")
    assert first == Observation("(no output)")
    assert "its processes and files together took more than 256 MiB of memory" in second.text


def test_without_a_sandbox_processes_are_counted(tmp_path: Path) -> None:
    config = PythonToolConfig(max_output_chars=LIMIT, unsafe=True)
    fork = "import os, time\nfor _ in range(80):\n    if not os.fork(): time.sleep(60)\ntime.sleep(60)"
    with contextlib.closing(PythonServer(config, tmp_path)) as server:
        (got,) = observations(server, fork)
    assert got.text.startswith("The Python session ended (it had more than 64 processes and threads)")
