"""Hostile code against what lies around it: files, /proc, /sys, /dev, secrets, other sessions, the server, the wire."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import SYSCALL, attack
from python_calls import LIMIT, WORD, serve

from metis_fast.config import PythonToolConfig
from metis_fast.tools.python_server import PythonServer
from metis_fast.tools.python_tool import PythonTool
from metis_fast.types import Observation, Outcome

SECRET = "a-key-that-nobody-may-read"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonServer]:
    number = {"x86_64": 248, "aarch64": 217}[os.uname().machine]
    added = ctypes.CDLL(None).syscall(number, b"user", b"metis-test-key", b"secret", ctypes.c_size_t(6), ctypes.c_int(-3))
    assert added < 0 or any("metis-test-key" in line for line in Path("/proc/keys").read_text().splitlines())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METIS_TEST_KEY", SECRET)
        yield from serve(tmp_path_factory.mktemp("scratch"))
    if added >= 0:
        number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
        ctypes.CDLL(None).syscall(number, ctypes.c_int(9), ctypes.c_long(added), ctypes.c_int(-3))  # unlinked again


WRITES = {
    "a sysctl": "open('/proc/sys/kernel/core_pattern', 'w').write('x')",
    "limit of namespaces": "open('/proc/sys/user/max_user_namespaces', 'w').write('9')",
    "pressure trigger": "open('/proc/pressure/memory', 'r+').write('some 500000 10000000')",
    "its own memory": "open('/proc/self/mem', 'r+b')",
    "standing with the OOM killer": "open('/proc/self/oom_score_adj', 'w').write('-1000')",
    "id map": "open('/proc/self/uid_map', 'w').write('0 0 1')",
    "system request": "open('/proc/sysrq-trigger', 'w').write('b')",
    "core filter": "open('/proc/self/coredump_filter', 'w').write('0')",
    "the root": "open('/new', 'w')",
    "a device folder": "open('/dev/new', 'w')",
    "the libraries": "open(os.__file__, 'a')",
    "attributes of the libraries": "os.chmod(os.__file__, 0o777)",
    "the libraries' names": "os.rename(os.__file__, '/tmp/os.py')",
    "a link out of scratch": "os.symlink('/usr/lib', 'out'); open('out/new', 'w')",
    "a hard link into scratch": "os.link(os.__file__, 'own')",
    "the server's root": "os.listdir('/proc/1/root/proc/2')",
}


@pytest.mark.parametrize("name", WRITES)
def test_nothing_outside_of_scratch_can_be_changed(server: PythonServer, name: str) -> None:
    got, after = attack(server, f"import os\n{WRITES[name]}", "2")
    assert got.outcome is Outcome.TOOL_ERROR and "Error" in got.text.splitlines()[-1] and after == Observation("2")


READS = [
    *("/etc/passwd", "/etc/shadow", "/srv", "/mnt", "/sys", "/boot", "/var", "/proc/kcore", "/proc/kmsg", "/dev/mem"),
    *("/dev/kmsg", "/dev/vsock", "/dev/kvm", "/dev/zero", "/dev/ptmx", "/dev/tty", "/proc/2/environ", "/proc/1/fd/9"),
]


@pytest.mark.parametrize("path", READS)
def test_nothing_of_the_machine_can_be_read(server: PythonServer, path: str) -> None:
    code = f"import os\nprint(os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}, 'rb').read(1))"
    (got,) = attack(server, code)
    assert got.outcome is Outcome.TOOL_ERROR and got.text.splitlines()[-1].split(":")[0] in (
        *("FileNotFoundError", "PermissionError", "OSError"),
    )


def test_no_secret_is_in_the_environment_or_in_memory(server: PythonServer) -> None:
    assert os.environ.get("PATH")  # of the trainer: it has an environment
    code = "import os, re\nfound = [dict(os.environ), open('/proc/self/environ').read(), open('/proc/1/cmdline').read()]\n"
    code += "secret = 'daer-yam-ydobon-taht-yek-a'[::-1]\nhits = sum(secret in str(one) for one in found)\n"
    code += "with open('/proc/self/mem', 'rb') as memory:\n    for line in open('/proc/self/maps'):\n"
    code += "        low, high = (int(x, 16) for x in line.split()[0].split('-'))\n"
    code += "        if ' r' in line and high - low < 1 << 26 and '[v' not in line:\n"
    code += "            memory.seek(low)\n            data = memory.read(high - low)\n"
    code += "            hits += data.count(b'=YEK_TSET_SITEM'[::-1])\nprint(hits)"
    assert attack(server, code) == [Observation("0")]


def test_the_command_line_and_mounts_tell_no_path_but_those_of_the_interpreter(server: PythonServer) -> None:
    code = "print(open('/proc/self/cmdline').read().strip(chr(0)))\n"
    code += "for line in open('/proc/self/mountinfo'): print(line.split()[4])"
    (got,) = attack(server, code)
    title, *mounts = got.text.splitlines()
    assert title == "metis_fast.tools.sandbox.server"
    assert {"/", "/proc", "/dev/null"} <= set(mounts) and "/sys" not in mounts
    assert not any("python-" in mount for mount in mounts)  # the folder of the server


def test_the_keyring_of_the_trainer_is_not_in_sight(server: PythonServer) -> None:
    code = (
        "import os\nprint(sum('metis-test-key' in line for line in open('/proc/keys')) if os.path.exists('/proc/keys') else 0)"
    )
    assert attack(server, code) == [Observation("0")]


def test_a_session_goes_before_the_trainer_where_memory_is_short_and_dumps_nothing(server: PythonServer) -> None:
    code = "import resource\nprint(open('/proc/self/oom_score_adj').read().strip(), resource.getrlimit(resource.RLIMIT_CORE))"
    assert attack(server, code) == [Observation("1000 (1, 1)")]


def test_links_and_races_in_scratch_lead_nowhere(server: PythonServer) -> None:
    code = """
import os, threading
os.mkdir('a'); stop = False; swaps = made = tries = 0
def swap():
    global swaps
    while not stop:
        os.rename('a', 'b'); os.symlink('/usr/lib', 'a'); os.unlink('a'); os.rename('b', 'a'); swaps += 1
thread = threading.Thread(target=swap); thread.start()
while (made < 50 or swaps < 50) and tries < 1000000:
    tries += 1
    try: open(f'a/new-{tries}', 'w').close(); made += 1
    except OSError: pass
stop = True; thread.join()
print(made >= 50, [name for name in os.listdir('/usr/lib') if name.startswith('new-')])
"""
    assert attack(server, code) == [Observation("True []")]


def test_sessions_share_nothing(server: PythonServer) -> None:
    async def story() -> list[str]:
        one, other = (PythonTool(server, (), 60.0, LIMIT) for _ in range(2))
        try:
            await one.call("import os, socket\nopen('/dev/shm/x', 'w').write('x'); open('y', 'w').write('y')\nz = 1")
            await one.call("s = socket.socket(socket.AF_UNIX); s.bind('\\0name'); s.listen()")
            look = "import os, socket\nprint(os.listdir('.'), os.listdir('/dev/shm'), 'z' in globals())"
            reach = "socket.socket(socket.AF_UNIX).connect('\\0name')"
            kill = "print([os.kill(n, 9) for n in (-1,)] if len(os.listdir('/proc/self/task')) > 99 else os.getpid())"
            return [WORD(await other.call(code)).text for code in (look, reach, kill)] + [WORD(await one.call("z")).text]
        finally:
            await one.close()
            await other.close()

    look, reach, own, kept = asyncio.run(story())
    assert look == "[] [] False" and reach.endswith("ConnectionRefusedError: [Errno 111] Connection refused")
    assert (own, kept) == ("1", "1")


def test_what_a_session_sets_of_its_standard_input_no_other_sees(server: PythonServer) -> None:
    leave = "import fcntl, os\nfcntl.fcntl(0, 10, 37); fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK)\n"
    look = "print(fcntl.fcntl(0, 11), fcntl.fcntl(0, fcntl.F_GETFL) & os.O_NONBLOCK, os.read(0, 1))"
    assert attack(server, leave + look) == [Observation("37 2048 b''")]
    assert attack(server, f"import fcntl, os\n{look}") == [Observation("0 0 b''")]


def test_what_the_trainer_ignores_and_blocks_is_no_matter_of_sessions(tmp_path: Path) -> None:
    ignored = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGCHLD, signal.SIGTERM)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        opened = PythonServer(PythonToolConfig(max_output_chars=LIMIT), tmp_path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in ignored.items():
            signal.signal(number, handler)
    with contextlib.closing(opened) as server:
        late = "import signal, time\nsignal.signal(signal.SIGALRM, lambda *_: print('alarm')); signal.alarm(1)\ntime.sleep(2)"
        child = "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        got = attack(server, late, f"{child}child.terminate()\nprint(child.wait())")
    assert got == [Observation("alarm"), Observation("-15")]


def test_no_signal_leaves_the_session(server: PythonServer) -> None:
    code = "import os, signal\nfor pid in (0, -1, 2, 3, os.getppid()):\n    for number in (signal.SIGSTOP, signal.SIGKILL):\n"
    code += "        try: os.kill(pid, number)\n        except OSError: pass\nprint('here')"
    assert attack(server, code, "2") == [Observation("here"), Observation("2")]


def test_a_poisoned_session_poisons_no_other(server: PythonServer) -> None:
    code = "import builtins, json, sys, numpy\nbuiltins.print = numpy.array = json.dumps = None\n"
    code += "sys.modules.clear()\nfor name in list(vars(builtins)):\n    if name != 'None': vars(builtins)[name] = None"
    got = attack(server, code)  # the neighbour goes on, and begins anew
    assert isinstance(got[0], Observation)
    assert attack(server, "import json\nprint(json.dumps([1]))") == [Observation("[1]")]


FORGED = {
    "endless header": "os.write(3, size(1 << 31) + size(1 << 30) + b'[' * (1 << 20))",
    "endless image": "os.write(3, size((1 << 31) - 1) + size(8) + b'[1, 999]' + bytes(1 << 20))",
    "deep nesting": "send(b'[' * 500000)",
    "no list": "send(b'{}')",
    "not JSON": "send(b'garbage')",
    "a long number": "send(b'[' + b'9' * 500000 + b']')",
    "another call": 'send(b\'[99, true, [], "", ""]\')',
    "many images": "[send(b'[1, 3]', b'abc') for _ in range(99)]",
    "an image longer than its frame": "send(b'[1, 999]', b'abc')",
    "header longer than its frame": "os.write(3, size(8) + size(99) + b'abcd')",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_message_ends_its_session_and_nothing_else(server: PythonServer, name: str) -> None:
    code = "import os, time\nsize = lambda n: n.to_bytes(4, 'big')\ndef send(head, blob=b''):\n"
    code += "    data = size(len(head) + len(blob) + 4) + size(len(head)) + head + blob\n"
    code += f"    while data: data = data[os.write(3, data):]\n{FORGED[name]}\ntime.sleep(60)"
    got, after = attack(server, code, "2")
    assert got.outcome is Outcome.TOOL_ERROR and "its connection broke" in got.text and after.text.endswith("\n2")


@pytest.mark.parametrize("parts", ["[0] * 10000", "[-1, 7, 1 << 80]", "['x' * 9] * 9999", "['x' * 50000]"])
def test_a_forged_answer_has_no_more_than_an_honest_one_may(server: PythonServer, parts: str) -> None:
    code = f"import json, os\nhead = json.dumps([1, True, {parts}, 'o' * 9999, 'e' * 9999]).encode()\n"
    code += "size = lambda n: n.to_bytes(4, 'big')\ndata = size(len(head) + 4) + size(len(head)) + head\n"
    code += "while data: data = data[os.write(3, data):]"
    (got,) = attack(server, code)
    assert len(got.text) <= LIMIT + 300 and got.images == ()


def test_marks_and_control_tokens_in_output_stay_text(server: PythonServer) -> None:
    (got,) = attack(server, "print('<image>', '<|im_end|>', '<|vision_start|><|image_pad|><|vision_end|>')")
    assert "<image>" not in got.text and got.images == ()


def test_system_calls_of_children_are_filtered_too(server: PythonServer) -> None:
    code = f"{SYSCALL}import subprocess, sys\ncode = 'import socket\\ntry: socket.socket(socket.AF_VSOCK, 1)\\n"
    code += "except OSError as e: print(e.errno)'\nsubprocess.run([sys.executable, '-c', code])\n"
    code += "pid = os.fork()\nif not pid: print(syscall(319, 279, b'x', 0)); os._exit(0)\nos.wait()\nNone"
    assert attack(server, code) == [Observation("1\nEPERM")]
