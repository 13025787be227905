"""Hostile code against the kernel: system calls, sockets, keys, namespaces, devices. None of it gets through."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hostile import SYSCALL, attack
from python_calls import LIMIT, WORD, serve

from metis_fast.tools.python_server import PythonServer
from metis_fast.tools.python_tool import PythonTool
from metis_fast.types import Observation, Outcome


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonServer]:
    yield from serve(tmp_path_factory.mktemp("scratch"))


def test_every_layer_of_this_kernel_is_active(server: PythonServer) -> None:
    assert server.layers.namespaces and server.layers.seccomp
    code = "for line in open('/proc/self/status'):\n    name = line.split(':')[0]\n"
    code += "    if name in ('NoNewPrivs', 'Seccomp', 'CapEff'): print(line, end='')"
    (got,) = attack(server, code)
    assert got.text.split() == ["CapEff:", "0" * 16, "NoNewPrivs:", "1", "Seccomp:", "2"]


# Name: numbers on x86-64 and aarch64, and arguments that would do something.
CALLS = {
    "io_uring_setup": "425, 425, 8, bytes(120)",
    "userfaultfd": "323, 282, 1",
    "bpf": "321, 280, 0, bytes(64), 64",
    "perf_event_open": "298, 241, bytes(112), 0, -1, -1, 0",
    "fanotify_init": "300, 262, 0x200, 0",
    "inotify_init1": "294, 26, 0",
    "ptrace": "101, 117, 0, 0, 0, 0",
    "process_vm_readv": "310, 270, os.getpid(), 0, 0, 0, 0, 0",
    "process_vm_writev": "311, 271, os.getpid(), 0, 0, 0, 0, 0",
    "process_madvise": "440, 440, 0, 0, 0, 0, 0",
    "pidfd_getfd": "438, 438, os.pidfd_open(os.getpid()), 0, 0",
    "kcmp": "312, 272, os.getpid(), os.getpid(), 0, 0, 0",
    "keyctl, the session's keyring": "250, 219, 0, -3, 0, 0, 0",
    "keyctl, read": "250, 219, 11, -3, bytes(64), 64, 0",
    "add_key": "248, 217, b'user', b'name', b'secret', 6, -5",
    "request_key": "249, 218, b'user', b'name', None, -5",
    "name_to_handle_at": "303, 264, -100, b'/', bytes(128), bytes(8), 0",
    "open_by_handle_at": "304, 265, 3, bytes(128), 0",
    "setns": "308, 268, os.open('/proc/self/ns/net', os.O_RDONLY), 0",
    "unshare, user": "272, 97, 0x10000000",
    "unshare, files": "272, 97, 0x400",
    "clone, user namespace": "56, 220, 0x10000011, 0, 0, 0, 0",
    "clone, PID namespace": "56, 220, 0x20000011, 0, 0, 0, 0",
    "mount": "165, 40, b'none', b'/tmp', b'tmpfs', 0, b''",
    "umount2": "166, 39, b'/proc', 2",
    "pivot_root": "155, 41, b'.', b'.'",
    "open_tree": "428, 428, -100, b'/', 1",
    "move_mount": "429, 429, -100, b'/tmp', -100, b'/proc', 0",
    "fsopen": "430, 430, b'tmpfs', 0",
    "mount_setattr": "442, 442, -100, b'/', 0, bytes(32), 32",
    "chroot": "161, 51, b'/tmp'",
    "memfd_create": "319, 279, b'name', 0",
    "memfd_secret": "447, 447, 0",
    "shmget": "29, 194, 0, 1 << 20, 0o1600",
    "semget": "64, 190, 0, 1, 0o1600",
    "msgget": "68, 186, 0, 0o1600",
    "mq_open": "240, 180, b'name', 0o102, 0o600, 0",
    "personality": "135, 92, 0x0040000",
    "kexec_load": "246, 104, 0, 0, 0, 0",
    "init_module": "175, 105, 0, 0, b''",
    "reboot": "169, 142, 0xfee1dead, 672274793, 0, 0",
    "swapon": "167, 224, b'/tmp/file', 0",
    "quotactl": "179, 60, 0, 0, 0, 0",
    "acct": "163, 89, 0",
    "syslog": "103, 116, 3, bytes(64), 64",
    "settimeofday": "164, 170, bytes(16), 0",
    "adjtimex": "159, 171, bytes(256)",
    "sethostname": "170, 161, b'name', 4",
    "setuid": "105, 146, 0",
    "setresuid": "117, 147, 0, 0, 0",
    "setgroups": "116, 159, 0, 0",
    "capset": "126, 91, bytes(8), bytes(24)",
    "setpriority": "141, 140, 0, 0, 19",
    "sched_setscheduler": "144, 119, 0, 5, bytes(4)",
    "ioprio_set": "251, 30, 1, 0, 0",
    "sync": "162, 81",
    "vmsplice": "278, 75, 1, 0, 0, 0",
    "tee": "276, 77, 0, 1, 1, 0",
    "mlockall": "151, 230, 1",
    "timer_create": "222, 107, 0, 0, bytes(8)",
    "execveat of a descriptor": "322, 281, os.open('/proc/self/exe', os.O_PATH), b'', None, None, 0x1000",
    "seccomp": "317, 277, 0, 0, 0",
    "cachestat": "451, 451, 0, 0, 0, 0",
    "setxattr": "188, 5, b'/tmp', b'user.a', b'x', 1, 0",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_system_call_is_refused(server: PythonServer, name: str) -> None:
    got = attack(server, f"{SYSCALL}print(syscall({CALLS[name]}))", "2")
    assert got == [Observation("EPERM"), Observation("2")]


def test_system_calls_that_a_newer_kernel_may_have_are_unknown(server: PythonServer) -> None:
    got = attack(server, f"{SYSCALL}print(syscall(435, 435, 0, 0), syscall(463, 463), syscall(1000, 1000))")
    assert got == [Observation("ENOSYS ENOSYS ENOSYS")]


def test_a_lock_of_a_shared_file_is_what_this_file_system_does_not_have(server: PythonServer) -> None:
    """So libraries take another way, as they do not where it is forbidden."""
    code = "import errno, fcntl, os\ntry: fcntl.flock(os.open(os.__file__, os.O_RDONLY), 2)\n"
    code += "except OSError as error: print(errno.errorcode[error.errno])"
    assert attack(server, code) == [Observation("ENOSYS")]


@pytest.mark.skipif("__import__('os').uname().machine != 'x86_64'", reason="x32 and 32-bit calls are those of x86-64")
def test_the_other_numbers_of_a_processor_lead_nowhere(server: PythonServer) -> None:
    x32 = f"{SYSCALL}print(syscall(0x40000000 + 39, 0), syscall(0x40000000 + 272, 0, 0x10000000))"
    # mov eax, 20 (getpid of 32 bits); int 0x80; ret
    old = "import ctypes, mmap\ncode = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)\n"
    old += "code.write(bytes.fromhex('b814000000cd80c3'))\n"
    old += "print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())"
    refused, killed, after = attack(server, x32, old, "2")
    assert refused == Observation("ENOSYS ENOSYS")
    assert killed.outcome is Outcome.TOOL_ERROR and "killed by signal 31" in killed.text and after.text.endswith("\n2")


SOCKETS = {
    "internet": ("socket.socket(socket.AF_INET)", "ENETUNREACH"),
    "internet, datagram": ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "ENETUNREACH"),
    "internet 6": ("socket.socket(socket.AF_INET6)", "ENETUNREACH"),
    "raw": ("socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", "ENETUNREACH"),
    "netlink": ("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)", "EPERM"),
    "packet": ("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "EPERM"),
    "host of the machine": ("socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)", "EPERM"),
    "kernel's cryptography": ("socket.socket(38, socket.SOCK_SEQPACKET)", "EPERM"),
    "bluetooth": ("socket.socket(31, socket.SOCK_RAW, 1)", "EPERM"),
    "transparent pairs": ("socket.socketpair(30)", "EPERM"),
    "raw unix": ("socket.socket(socket.AF_UNIX, socket.SOCK_RAW)", "EPERM"),
}


@pytest.mark.parametrize("name", SOCKETS)
def test_no_socket_leads_out(server: PythonServer, name: str) -> None:
    code, error = SOCKETS[name]
    made = f"import errno, socket\ntry:\n    {code}\n    print('made')\n"
    assert attack(server, f"{made}except OSError as error:\n    print(errno.errorcode[error.errno])") == [Observation(error)]


def test_an_abstract_socket_of_the_machine_is_out_of_reach(server: PythonServer) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("\0metis-test-of-the-sandbox")
        listening.listen()
        (got,) = attack(server, "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0metis-test-of-the-sandbox')")
        assert got.outcome is Outcome.TOOL_ERROR and "Refused" in got.text


def test_pairs_and_sockets_by_path_work(server: PythonServer) -> None:
    code = "import asyncio, socket\na, b = socket.socketpair()\na.send(b'x')\nprint(b.recv(1))\n"
    code += "server = socket.socket(socket.AF_UNIX); server.bind('mine'); server.listen()\n"
    code += "socket.socket(socket.AF_UNIX).connect('mine')\nasync def f(): return 3\nasyncio.run(f())"
    assert attack(server, code) == [Observation("b'x'\n3")]


REFUSED = {
    "TIOCSTI": "fcntl.ioctl(0, 0x5412, b'x')",
    "fiemap": "fcntl.ioctl(os.open('/usr/lib', os.O_RDONLY), 0xC020660B, bytes(32))",
    "pipe size": "fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
    "lease": "fcntl.fcntl(os.open('file', os.O_CREAT | os.O_RDONLY), 1024, 0)",
    "hint of a file": "fcntl.fcntl(os.open('file', os.O_CREAT | os.O_RDONLY), 1036, bytes(8))",
    "data out of band": "socket.socketpair()[0].send(b'x', socket.MSG_OOB)",
    "shared memory without a file": "mmap.mmap(-1, 4096)",
    "huge pages": "mmap.mmap(-1, 1 << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)",
    "a device": "os.mknod('device', 0o20666, os.makedev(1, 1))",
    "renice": "os.nice(5)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_is_refused(server: PythonServer, name: str) -> None:
    (got,) = attack(server, f"import fcntl, mmap, os, socket\n{REFUSED[name]}")
    assert got.outcome is Outcome.TOOL_ERROR and "[Errno 1] Operation not permitted" in got.text


def test_no_socket_holds_more_than_others(server: PythonServer) -> None:
    """Where a machine's network is tuned, it could be megabytes, which no limit counts."""
    code = "import socket\na, b = socket.socketpair()\nbefore = a.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)\n"
    code += "a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)\na.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)\n"
    code += "print(*(a.getsockopt(socket.SOL_SOCKET, kind) for kind in (socket.SO_SNDBUF, socket.SO_PASSCRED)), before)"
    (got,) = attack(server, code)
    now, passes, before = got.text.split()
    assert (now, passes) == (before, "1")


def test_signals_that_wait_are_few_and_those_of_other_sessions_do_not_count(server: PythonServer) -> None:
    code = "import ctypes, os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(34, 64))\n"
    code += "libc, num = ctypes.CDLL(None), 0\nwhile not libc.sigqueue(os.getpid(), 40, 0): num += 1\nprint(num)"

    async def story() -> list[str]:
        tools = [PythonTool(server, (), 60.0, LIMIT) for _ in range(2)]
        try:
            return [WORD(await tool.call(code)).text for tool in tools]
        finally:
            for tool in tools:
                await tool.close()

    assert asyncio.run(story()) == ["1024", "1024"]


def test_no_process_of_the_session_can_be_made_unreadable_or_traceable(server: PythonServer) -> None:
    code = f"{SYSCALL}print([syscall(157, 167, option, 0, 0, 0, 0) for option in (4, 35, 36, 22, 0x59616d61)])"
    assert attack(server, code) == [Observation(str(["EPERM"] * 5))]


def test_a_program_with_another_users_rights_has_none(server: PythonServer) -> None:
    code = "import os, shutil, subprocess, sys\nshutil.copy(os.path.realpath(sys.executable), 'own')\nos.chmod('own', 0o6755)\n"
    code += 'look = \'import os; print(os.geteuid(), os.getegid()); print(open("/proc/self/status").read().count("0" * 16))\'\n'
    code += "subprocess.run(['./own', '-c', look], env={**os.environ, 'PYTHONHOME': sys.base_prefix})\nNone"
    (got,) = attack(server, code)
    assert got.text.splitlines()[0] == "1000 1000" and int(got.text.splitlines()[1]) >= 3  # no capability of any kind
