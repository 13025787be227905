"""The filter of system calls of both architectures, run by a small interpreter of the kernel's instructions."""

from __future__ import annotations

import errno
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from metis_fast.tools.sandbox.seccomp import program

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL = "allow", "kill"


def answer(machine: str, number: int, *arguments: int, arch: int | None = None) -> str:
    """What the kernel does with a call: "allow", "kill", or the name of an error."""
    values = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=IIQ6Q", number, ARCH[machine] if arch is None else arch, 0, *(v & (1 << 64) - 1 for v in values))
    code = program(machine)
    at, loaded = 0, 0
    while True:
        operation, if_true, if_false, value = struct.unpack_from("=HBBI", code, 8 * at)
        at += 1
        if operation == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        elif operation == 0x54:
            loaded &= value
        elif operation == 0x05:
            at += value
        elif operation in (0x15, 0x35, 0x45):
            holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[operation]
            at += if_true if holds else if_false
        else:
            assert operation == 0x06
            kind, detail = value & 0xFFFF0000, value & 0xFFFF
            return {0x7FFF0000: ALLOW, 0x80000000: KILL, 0x50000: errno.errorcode.get(detail, "")}[kind]


SENDS = [((44, 206), (3, 0, 0, 0x4000)), ((46, 211), (3, 0, 0x4000)), ((307, 269), (3, 0, 0, 0x4000))]
# Numbers of the same call on x86-64 and aarch64, its arguments, and the answer.
CASES = [
    ((0, 63), (), ALLOW),  # read
    ((1, 64), (), ALLOW),  # write
    ((257, 56), (), ALLOW),  # openat
    ((262, 79), (), ALLOW),  # newfstatat
    ((59, 221), (), ALLOW),  # execve
    ((231, 94), (), ALLOW),  # exit_group
    ((202, 98), (), ALLOW),  # futex
    ((302, 261), (), ALLOW),  # prlimit64
    ((9, 222), (0, 4096, 3, 0x22), ALLOW),  # mmap, private
    ((9, 222), (0, 4096, 3, 0x01), ALLOW),  # shared, of a file
    ((9, 222), (0, 4096, 3, 0x21), "EPERM"),  # shared, of none
    ((9, 222), (0, 4096, 3, 0x40022), "EPERM"),  # huge pages
    ((56, 220), (0x1200011,), ALLOW),  # clone, as fork
    ((56, 220), (0x3D0F00,), ALLOW),  # as of a thread
    ((56, 220), (0x4111,), ALLOW),  # as vfork
    *(((56, 220), (flag | 0x11,), "EPERM") for flag in (1 << 17, 1 << 25, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30)),
    ((435, 435), (), "ENOSYS"),  # clone3
    ((41, 198), (1, 1), ALLOW),  # socket, unix stream
    ((41, 198), (1, 0x80802), ALLOW),  # datagram, with flags
    ((41, 198), (1, 5), ALLOW),
    ((41, 198), (1, 3), "EPERM"),  # raw
    ((41, 198), (2, 1), "ENETUNREACH"),
    ((41, 198), (10, 2), "ENETUNREACH"),
    *(((41, 198), (family, 1), "EPERM") for family in (0, 16, 17, 29, 31, 38, 40, 44)),
    ((53, 199), (1, 1), ALLOW),  # socketpair
    ((53, 199), (30, 1), "EPERM"),
    ((157, 167), (15,), ALLOW),  # prctl, a name
    *(((157, 167), (option,), "EPERM") for option in (4, 8, 22, 24, 28, 35, 36, 59, 62)),
    ((72, 25), (0, 1), ALLOW),  # fcntl
    *(((72, 25), (0, command), "EPERM") for command in (1024, 1026, 1031, 1036, 1038)),
    ((54, 208), (3, 1, 7), ""),  # setsockopt, size of a buffer: done, and nothing has happened
    ((54, 208), (3, 1, 16), ALLOW),
    ((54, 208), (3, 6, 7), ALLOW),
    ((73, 32), (0, 2), "ENOSYS"),  # flock
    *((numbers, flags, ALLOW) for numbers, flags in SENDS),
    *((numbers, (*flags[:-1], flags[-1] | 1), "EPERM") for numbers, flags in SENDS),  # out of band
    ((16, 29), (0, 0x5401), ALLOW),  # ioctl
    ((16, 29), (0, 0x5412), "EPERM"),
    *((pair, (), "EPERM") for pair in ((425, 425), (323, 282), (321, 280), (101, 117), (250, 219), (272, 97), (319, 279))),
    ((463, 463), (), "ENOSYS"),
    ((100000, 100000), (), "ENOSYS"),
]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_calls_are_answered(machine: str) -> None:
    column = 0 if machine == "x86_64" else 1
    for numbers, arguments, expected in CASES:
        assert (numbers, arguments, answer(machine, numbers[column], *arguments)) == (numbers, arguments, expected)


def test_other_numbers_of_a_processor_are_no_way_around() -> None:
    assert answer("x86_64", 0, arch=0x40000003) == KILL  # 32 bits
    assert answer("aarch64", 0, arch=0x40000028) == KILL
    assert [answer("x86_64", 0x40000000 + number) for number in (0, 57, 425)] == ["ENOSYS"] * 3


def test_the_list_agrees_with_the_systems_headers() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no headers of the kernel here")
    from metis_fast.tools.sandbox.seccomp import _ALLOWED

    known = {
        words[1].removeprefix("__NR_"): words[2] for line in header.read_text().splitlines() if len(words := line.split()) == 3
    }
    listed = [entry.split() for line in _ALLOWED.splitlines() for entry in line.split(";") if entry.strip()]
    assert len(listed) > 150 and len({name for name, *_ in listed}) == len(listed)
    for name, number, _ in listed:
        assert number == "-" or known.get(name, number) == number, name


FORBIDS = """
import asyncio, ctypes, struct, sys
from pathlib import Path
from metis_fast.config import PythonToolConfig
from metis_fast.errors import ToolSetupError
from metis_fast.tools.python_server import PythonServer
from metis_fast.tools.sandbox.libc import prctl

# prctl(PR_SET_SECCOMP) fails, as where a container forbids it; all else is allowed
nr, option = ((157, 22), (167, 22))[__import__("os").uname().machine == "aarch64"]
code = b"".join(struct.pack("=HBBI", *one) for one in (
    (0x20, 0, 0, 0), (0x15, 0, 3, nr), (0x20, 0, 0, 16), (0x15, 0, 1, option), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)))
buffer = ctypes.create_string_buffer(code, len(code))
prctl(38, 1)
prctl(22, 2, struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
try:
    PythonServer(PythonToolConfig(), Path(sys.argv[1])).close()
    print("started")
except ToolSetupError as error:
    print(error)
"""


def test_without_a_filter_the_tool_does_not_start(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORBIDS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    if "prctl 22" in done.stderr:
        pytest.skip("no filters on this machine")
    assert "no sandbox for the python tool on this machine" in done.stdout and "seccomp filters" in done.stdout, done
    assert list(tmp_path.iterdir()) == []
