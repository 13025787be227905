"""The Python tool when the agent's code forks, dies, hangs or breaks its session: what it printed arrives, with its call."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from python_calls import LIMIT, WORD, Run, observations, serve

from metis_fast.config import PythonToolConfig
from metis_fast.errors import ToolSetupError
from metis_fast.tools import python_server
from metis_fast.tools.python_tool import PythonServer, PythonTool
from metis_fast.types import Observation, Outcome

NEXT = "[new Python session: earlier variables are gone]\n2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonServer]:
    yield from serve(tmp_path_factory.mktemp("scratch"))


@pytest.fixture
def run(server: PythonServer) -> Run:
    """The observations of calls in one session."""

    return partial(observations, server)


# -- processes and threads of the agent -----------------------------------------------------------------------------------

SQUARE = "def square(x): return x * x\n"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            SQUARE + "import multiprocessing\nwith multiprocessing.Pool(3) as pool: print(pool.map(square, range(4)))",
            "[0, 1, 4, 9]",
        ),
        (
            SQUARE + "from concurrent.futures import ProcessPoolExecutor\n"
            "with ProcessPoolExecutor(2) as pool: print(list(pool.map(square, range(4))))",
            "[0, 1, 4, 9]",
        ),
        ("from multiprocessing.pool import ThreadPool\nwith ThreadPool(3) as pool: print(pool.map(abs, [-1, 2]))", "[1, 2]"),
        (
            "from multiprocessing import Lock, Process, Queue, Value\nqueue, lock, total = Queue(), Lock(), Value('i', 0)\n"
            "def work(x):\n    with lock: total.value += x\n    queue.put(x)\n"
            "several = [Process(target=work, args=(x,)) for x in (1, 2, 3)]\nfor one in several: one.start()\n"
            "print(sorted(queue.get() for _ in several))\nfor one in several: one.join()\nprint(total.value)",
            "[1, 2, 3]\n6",
        ),
        (
            "import os\nfrom multiprocessing import shared_memory\n"
            "made = shared_memory.SharedMemory('mine', create=True, size=9)\n"
            "made.buf[0] = 7\nsame = shared_memory.SharedMemory('mine')\nprint(same.buf[0], os.listdir('/dev/shm'))\n"
            "same.close(); made.close(); made.unlink()\nprint(os.listdir('/dev/shm'))",
            "7 ['mine']\n[]",
        ),
        ("print('out', file=open('/dev/stdout', 'a'), flush=True)", "out"),
    ],
    ids=["Pool", "ProcessPoolExecutor", "ThreadPool", "Queue, Lock, Value", "shared memory", "/dev/stdout"],
)
def test_the_ways_of_multiprocessing_work(run: Run, code: str, text: str) -> None:
    assert run(code, "2") == [Observation(text), Observation("2")]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_are_not_forked_know_what_the_calls_defined_and_do_not_repeat_what_they_did(
    run: Run, method: str
) -> None:
    first = "from __future__ import annotations\nimport math\nBASE = 10\nprint('once')\ndef f(x): return BASE + math.floor(x)"
    second = f"import multiprocessing\nwith multiprocessing.get_context({method!r}).Pool(1) as pool: print(pool.map(f, [1.5]))"
    assert run(first, second, "'__file__' in globals()") == [Observation("once"), Observation("[11]"), Observation("False")]


def test_shared_memory_is_the_sessions_own_and_within_its_scratch_limit(server: PythonServer) -> None:
    async def story() -> list[Observation]:
        one, other = (PythonTool(server, (), 60.0, LIMIT) for _ in range(2))
        seen = [WORD(await one.call("open('/dev/shm/name', 'w').write('x')"))]
        seen.append(WORD(await other.call("import os\nos.listdir('/dev/shm')")))
        fill = "import os\nfd = os.open('/dev/shm/big', os.O_CREAT | os.O_RDWR)\nos.posix_fallocate(fd, 0, 65 << 20)"
        seen.append(WORD(await other.call(fill)))
        await one.close()
        await other.close()
        return seen

    _, listed, filled = asyncio.run(story())
    assert listed.text == "[]" and filled.outcome is Outcome.TOOL_ERROR


def test_a_child_that_was_forked_and_not_ended_answers_nothing(run: Run) -> None:
    forks = "import os\nprint('before')\npid = os.fork()\nif pid: os.wait()\nprint('parent' if pid else 'child')"
    assert run(forks, "2", "3") == [Observation("before\nchild\nparent"), Observation("2"), Observation("3")]
    raises = "import os\nif os.fork() == 0: raise ValueError('in the child')\nos.waitstatus_to_exitcode(os.wait()[1])"
    failed, after = run(raises, "2")
    assert failed.outcome is Outcome.TOOL_RESULT and failed.text.endswith("ValueError: in the child\n1") and after.text == "2"


def test_a_child_cannot_show_an_image_in_the_sessions_place(run: Run) -> None:
    code = "import os, numpy\nif os.fork() == 0: show(numpy.zeros((2, 2), 'uint8'))\nos.wait()\nNone"
    got, after = run(code, "2")
    assert got.text.endswith(
        "RuntimeError: a child process cannot show images; return the image, and show it in the main process"
    )
    assert got.images == () and after == Observation("2")


def test_what_a_thread_prints_after_its_call_belongs_to_the_next_one(run: Run) -> None:
    start = "import threading\ngo, done = threading.Event(), threading.Event()\n"
    start += "def late():\n    go.wait(); print('late'); done.set()\nthreading.Thread(target=late, daemon=True).start()"
    assert run(start, "go.set(); done.wait()\n2", "3") == [Observation("(no output)"), Observation("late\n2"), Observation("3")]


def test_an_error_in_a_thread_shows_the_agents_lines_only(run: Run) -> None:
    (got,) = run("import threading\ndef fail(): 1 / 0\nthread = threading.Thread(target=fail)\nthread.start(); thread.join()")
    assert got.text.startswith("Exception in thread Thread-1 (fail):\nTraceback") and got.text.endswith(
        "ZeroDivisionError: division by zero"
    )
    assert 'File "<call 1>", line 2, in fail' in got.text and "threading.py" not in got.text


def test_a_signal_to_the_process_group_stays_in_the_session(server: PythonServer) -> None:
    async def story() -> list[Observation]:
        one, other = (PythonTool(server, (), 60.0, LIMIT) for _ in range(2))
        seen = [WORD(await other.call("x = 1"))]
        await one.call("import os\nos.kill(os.getppid(), 9)\nos.killpg(0, 9)")
        seen.append(WORD(await other.call("x")))
        await one.close()
        await other.close()
        return seen

    assert asyncio.run(story())[1] == Observation("1")


# -- sessions that end ----------------------------------------------------------------------------------------------------

HANG = "import time\ntime.sleep(60)"


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("import os\nos._exit(3)", "The Python session ended (exit status 3)"),
        ("import ctypes\nctypes.string_at(0)", "The Python session ended (killed by signal 11)"),
        ("import os\nos.abort()", "The Python session ended (killed by signal 11)"),
        (
            "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
            "The Python session ended (it used up its CPU time)",
        ),
        (
            "import sys\nsys.setrecursionlimit(1 << 30)\nf = lambda *x: [*map(f, x)]\nf(1)",
            "The Python session ended (killed by signal 11)",
        ),
        ("import os\nos.close(3)\n" + HANG, "The Python session ended (killed, or its connection closed)"),
        ("import os\nos.closerange(0, 256)", "The Python session ended (killed, or its connection closed)"),
        ("import os\nos.write(3, b'garbage!!')\n" + HANG, "The Python session ended (its connection broke)"),
    ],
    ids=["exit", "segmentation fault", "abort", "CPU time", "stack", "socket", "all descriptors", "garbage"],
)
def test_what_was_printed_and_shown_before_the_end_of_a_session_arrives(run: Run, end: str, says: str) -> None:
    start = "import numpy\nprint('one')\nshow(numpy.zeros((3, 2), 'uint8'))\nprint('two', end='')\n"
    got, after = run(start + end, "2")
    assert got.outcome is Outcome.TOOL_ERROR
    assert got.text == f"one\n<image>\ntwo\n{says}; the next call starts a new one."
    assert Image.open(io.BytesIO(got.images[0].data)).size == (2, 3)
    assert after == Observation(NEXT)


WRITES = """
import ctypes, os, subprocess, sys
print('one')
print('two', file=sys.stderr)
ctypes.CDLL(None).printf(b'three, from C\\n')
subprocess.run([sys.executable, '-c', 'print("four")'])
if os.fork() == 0:
    print('five')
    os._exit(0)
os.wait()
subprocess.Popen([sys.executable, '-c', 'import time\\nprint("six")\\ntime.sleep(60)'])
while 'six' not in open('/proc/self/fd/1', errors='replace').read(): pass
print('seven', end='')
"""


def test_what_was_written_before_a_time_out_arrives_in_order(run: Run) -> None:
    got, after = run(WRITES + HANG, "2", timeout_s=4.0)
    text = "one\ntwo\nthree, from C\nfour\nfive\nsix\nseven\n"
    text += "Timed out after 4 s. The Python session was stopped; the next call starts a new one."
    assert got == Observation(text, outcome=Outcome.TOOL_ERROR) and after == Observation(NEXT)


def test_a_flood_before_a_time_out_is_cut_in_the_middle(run: Run) -> None:
    got, _ = run("print('first')\nwhile True: print('y' * 49)", "2", timeout_s=1.0)
    assert got.text.startswith("first\nyyy") and "\nTimed out after 1 s." in got.text and len(got.text) < LIMIT + 300
    assert "characters left out" in got.text


def test_a_session_that_ends_during_a_call_does_not_show_the_output_of_the_one_before(run: Run) -> None:
    _, first, second, third = run("print('old')", *["import os\nos._exit(0)"] * 2, "print('x')\nimport os\nos._exit(0)")
    end = "The Python session ended (exit status 0); the next call starts a new one."
    new = "[new Python session: earlier variables are gone]\n"
    assert [got.text for got in (first, second, third)] == [end, new + end, f"{new}x\n{end}"]


def test_a_server_that_takes_too_long_to_start_does_not_blame_the_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_server, "_START_S", 0.001)
    with pytest.raises(ToolSetupError, match=r"did not start within 0\.001 s: the machine has too much to do; run again$"):
        PythonServer(PythonToolConfig(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- what the agent does to its own session ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.close(1); os.close(2)",
        "import os\nos.dup2(os.open('/dev/null', os.O_WRONLY), 1)\nNone",
        "import os\nos.close(4); open('other', 'w').write('x')\nNone",
        "import sys\nsys.stdout.close(); sys.stderr.close()",
        "import io, sys\nsys.stdout = sys.stderr = io.StringIO()\nsys.displayhook = None",
        "import sys\ndel sys.stdout, sys.stderr",
        "import sys\nsys.exit()",
        "import atexit\natexit.register(print, 'at exit')\nNone",
        "import os\nos.kill(os.getpid(), 9)",
        "from signal import *\ndef ring(*_): raise TimeoutError\nsignal(SIGALRM, ring)\nsetitimer(ITIMER_REAL, 0.05)\nNone",
        "import warnings\nwarnings.simplefilter('error')",
        "def add(a, b): return a + b",  # names of ours
        "_definitions = _folder = __file__ = 1",
    ],
)
def test_calls_go_on_whatever_the_one_before_has_done(run: Run, code: str) -> None:
    got, one, two = run(code, "import time\ntime.sleep(0.1)\nprint('printed')\n'shown'", "2")
    assert got == Observation("(no output)")
    assert one == Observation("printed\n'shown'") and two == Observation("2")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("input('name? ')", "EOFError: EOF when reading a line"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import sys\nsys.exit('no')", "SystemExit: no"),
        ("import os\nos.setsid()", "PermissionError: [Errno 1] Operation not permitted"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("(" * 1000, "SyntaxError: too many nested parentheses"),
        ("open('/dev/stdout', 'w')", "PermissionError: [Errno 1] Operation not permitted: '/dev/stdout'"),
        ("import os\nos.ftruncate(2, 0)", "PermissionError: [Errno 1] Operation not permitted"),
        ("x = '\0'", "SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_errors_of_the_call_are_its_answer(run: Run, code: str, error: str) -> None:
    got, after = run(code, "2")
    assert got.outcome is Outcome.TOOL_ERROR and got.text.endswith(error) and after == Observation("2")


def test_streams_have_what_programs_expect_of_them(run: Run) -> None:
    code = "import subprocess, sys\nout = sys.stdout\n"
    code += "print(out.name, out.encoding, out.isatty(), out.fileno(), sys.stderr.fileno())\n"
    code += (
        "out.buffer.write(b'raw\\n')\nsubprocess.run([sys.executable, '-c', 'print(5)'], stdout=sys.stderr)\nprint('\\ud800')"
    )
    assert run(code) == [Observation("<stdout> utf-8 False 1 2\nraw\n5\n?")]


def test_a_thread_that_prints_outlives_the_streams_of_every_call(run: Run) -> None:
    start = "import threading\ngo, done = threading.Event(), threading.Event()\n"
    start += "def spam():\n    while not go.is_set(): print('spam')\n    done.set()\n"
    start += "threading.Thread(target=spam, daemon=True).start()"
    replace = "import io, sys\nsys.stdout = sys.stderr = io.StringIO()"
    between = [replace if number % 3 == 0 else "import time\ntime.sleep(0.002)" for number in range(12)]
    *_, end, after = run(start, *between, "go.set(); done.wait()", "2")
    assert end.outcome is Outcome.TOOL_RESULT and after == Observation("2")


@pytest.mark.parametrize(
    "take",
    [
        "while True: x.append(bytearray(700))",
        "while True: x.append(object())",
        "while True: x[0] = [x[0], str(len(x))]; x.append(x[0])",
        "y = {}\nx.append(y)\nfor i in range(1 << 40): y[i] = str(i)",
        "for size in (1 << 20, 5000, 700, 200, 60, 30):\n    try:\n        while True: x.append(bytes(size))\n"
        "    except MemoryError: pass\nwhile True: x.append(bytes(7))",
    ],
    ids=["small", "smallest", "lists", "dictionary", "every size"],
)
def test_code_that_takes_all_memory_is_told_so_and_keeps_its_session(tmp_path: Path, take: str) -> None:
    with contextlib.closing(PythonServer(PythonToolConfig(memory_mb=128), tmp_path)) as server:
        calls = ["x = [0]", take, "len(x) > 1 or len(x[0]) > 1", take, "len(x) > 1", "del x", "print('room again')"]
        _, full, kept, again, still, _, after = observations(server, *calls)
    for got in (full, again):
        assert got.outcome is Outcome.TOOL_ERROR and got.text.endswith("MemoryError")
    assert [kept.text, still.text, after.text] == ["True", "True", "room again"]


def test_forty_threads_fit_into_the_memory_limit(run: Run) -> None:
    code = "from concurrent.futures import ThreadPoolExecutor\nimport threading\nall_here = threading.Barrier(40)\n"
    code += "with ThreadPoolExecutor(40) as pool: print(sum(pool.map(lambda x: all_here.wait() >= 0, range(40))))"
    assert run(code) == [Observation("40")]


ERROR = "class E({}):\n    @property\n    def {}(self): raise KeyError\nraise E"


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("import numpy, sys\nsys.exit(numpy.array([1, 2]))", "SystemExit: [1 2]"),
        ("import numpy, sys\nsys.exit(numpy.array([0]))", "SystemExit: [0]"),
        ("class A:\n    def __str__(self): raise ValueError\nraise SystemExit(A())", "SystemExit (no traceback: ValueError)"),
        (ERROR.format("SystemExit", "code"), "E (no traceback: KeyError)"),
        (ERROR.format("Exception", "__notes__"), "E (no traceback: KeyError)"),
        (ERROR.format("Exception", "__cause__"), "E (no traceback: KeyError)"),
        ("raise SyntaxError('m', ('f', 1, 1, 5))", "SyntaxError (no traceback: AttributeError)"),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "E: <exception str() failed>"),
        (
            "e = None\nfor i in range(3000):\n    new = ValueError(i)\n    new.__cause__ = e\n    e = new\nraise e",
            "ValueError: 2999",
        ),
        (
            "e = None\nfor i in range(3000):\n    new = ValueError(i)\n    new.__context__ = e\n    e = new\nraise e",
            "ValueError: 2999",
        ),
        ("e = ValueError()\nfor i in range(3000): e = ExceptionGroup('g', [e])\nraise e", "---"),
        ("import sys\nsys.setrecursionlimit(12)\nraise ValueError", "ValueError"),
        (
            "import sys\ndef f(frame, *_):\n    if frame.f_code.co_name == '__exit__': raise KeyError\nsys.setprofile(f)",
            "KeyError",
        ),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))\nbytearray(1 << 30)", "MemoryError"),
    ],
)
def test_no_error_costs_the_session_whatever_it_is_made_of(run: Run, code: str, end: str) -> None:
    _, got, kept = run("x = 1", "print('printed')\n" + code, "x")
    assert got.outcome is Outcome.TOOL_ERROR and got.text.startswith("printed\n") and got.text.endswith(end)
    assert "metis_fast" not in got.text and kept == Observation("1")


@pytest.mark.parametrize(("timer", "name"), [("REAL", "ALRM"), ("VIRTUAL", "VTALRM"), ("PROF", "PROF")])
def test_a_timer_whose_handler_raises_again_and_again_ends_with_its_call(run: Run, timer: str, name: str) -> None:
    code = f"from signal import *\ndef ring(*_): raise TimeoutError\nsignal(SIG{name}, ring)\n"
    code += f"setitimer(ITIMER_{timer}, 0.001, 0.0001)\nwhile True: pass"
    got, spent, kept = run(code, "for _ in range(1 << 20): pass", f"getsignal(SIG{name}) is ring")
    assert got.text.endswith("TimeoutError") and [spent, kept] == [Observation("(no output)"), Observation("True")]


def test_signals_that_come_between_calls_end_no_session(run: Run) -> None:
    start = "import os, signal, threading, time\ndef raise_in_code_that_is_not_mine(_, frame):\n"
    start += "    if not frame.f_code.co_filename.startswith('<call'): raise ValueError\n"
    start += "signal.signal(signal.SIGUSR1, raise_in_code_that_is_not_mine)\ndef send():\n"
    start += "    while True: os.kill(os.getpid(), signal.SIGUSR1); time.sleep(0.0002)\n"
    start += "threading.Thread(target=send, daemon=True).start()"
    assert not any("Python session" in got.text for got in run(start, *["time.sleep(0.005)"] * 10))


def test_a_signal_to_itself_ends_no_session(run: Run) -> None:
    code = "import os\nfrom signal import *\nfor number in (SIGSEGV, SIGTERM, SIGKILL, SIGSTOP): os.kill(os.getpid(), number)\n"
    assert run(code + "os.kill(0, 9)", "2") == [Observation("(no output)"), Observation("2")]
