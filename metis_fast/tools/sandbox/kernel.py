"""The kernel's own means of isolation, through ctypes: namespaces, mounts, capabilities, limits.

Two levels. The server has a user, mount, PID, network, IPC and UTS namespace of its own, and a root of read-only bind mounts.
A session adds a user, mount, PID, IPC and network namespace, in which only two mounts are new (scratch and /proc), so that it
costs little more than its one fork. Its mount and PID namespaces belong to the server's user namespace, in which it has no
capabilities ever after; the user namespace of its own is what makes RLIMIT_NPROC count per session (Linux >= 5.14).

Sources: man pages namespaces(7), user_namespaces(7), pid_namespaces(7), pivot_root(2), mount_setattr(2), capabilities(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import sys
import sysconfig
from pathlib import Path

from metis_fast.tools.sandbox import landlock
from metis_fast.tools.sandbox.libc import check, libc, prctl, syscall
from metis_fast.tools.sandbox.seccomp import Filter
from metis_fast.tools.sandbox.wire import Limits

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING = 1
_SYS_MOUNT_SETATTR, _SYS_CLOSE_RANGE = 442, 436  # the same on every architecture
_AT_RECURSIVE, _AT_FDCWD = 0x8000, -100
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAP_VERSION_3 = 0x20080522

_INNER_ID = 1  # who sessions run as, in the server's user namespace
_NOBODY = 65534  # who that is outside if we are root: RLIMIT_NPROC does not bind the real root
_SESSION_ID = 1000  # who they are in their own
MAX_PROCESSES = 64
MAX_FILES = 256
MAX_INODES = 16384
_NICE = 4  # has 0.4 of the trainer's weight: its event loop, and the server, answer others while hundreds of sessions compute
_MAX_SIGNALS = 1024  # that wait to be delivered
_FIRST_TO_GO = "1000"  # where the machine runs out of memory, a session goes and not the trainer
_RESERVE, _RESERVE_A_CHARACTER = 16 << 20, 64  # bytes of memory to say what a call did that took all it may

_DEVICES = ("null", "full", "random", "urandom")  # not zero: mapped, it is memory that no limit counts
_FD_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"}
_SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")


def _unshare(flags: int) -> None:
    check(libc.unshare(ctypes.c_int(flags)), "unshare")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    check(libc.mount(*arguments), f"mount {target}")


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def close_from(first: int) -> None:
    """Close every descriptor from `first` on.

    One call, where Python's `os.closerange` may be a loop and a walk through /proc/self/fd makes an inode for each of the
    hundreds that the server has open.
    """
    arguments = (ctypes.c_uint(first), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(0))
    if libc.syscall(ctypes.c_long(_SYS_CLOSE_RANGE), *arguments) == 0:
        return
    if ctypes.get_errno() != errno.ENOSYS:  # which Linux before 5.9 answers
        check(-1, "close_range")
    os.closerange(first, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def punch_hole(fd: int, start: int, size: int) -> None:
    """Free the memory of a part of a file, which then reads as zeros."""
    mode = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    check(libc.fallocate(ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(start), ctypes.c_int64(size)), "fallocate")


def unbuffer_stdout() -> None:
    """Have the C library write what its printf is given at once, as Python does here."""
    unbuffered = 2  # _IONBF
    libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, ctypes.c_int(unbuffered), ctypes.c_size_t(0))


def _write(path: str, text: str, folder: int | None = None) -> None:
    # one write(2): the id maps take no second one
    fd = os.open(path, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _write_id_maps(process: int, users: str, groups: str, setgroups: bool) -> None:
    """process: its folder in /proc."""
    if not setgroups:  # without privilege over the parent namespace, a group map needs this
        _write("setgroups", "deny", process)
    _write("uid_map", users, process)
    _write("gid_map", groups, process)


def _open_folder(path: str) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _enter_user_namespace() -> None:
    """Leave the machine's namespaces for private ones, but for the PID namespace that children will get."""
    flags = NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    user, group = os.geteuid(), os.getegid()
    if user != 0:
        _unshare(flags)
        own = _open_folder("/proc/self")
        _write_id_maps(own, f"{_INNER_ID} {user} 1", f"{_INNER_ID} {group} 1", setgroups=False)
        os.close(own)
        return
    # Root maps a second id, which only a process that stayed behind in the parent namespace may do.
    reader, writer = os.pipe()
    server = os.getpid()
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(writer)
            if os.read(reader, 1):
                ids = f"0 0 1\n{_INNER_ID} {_NOBODY} 1"
                _write_id_maps(_open_folder(f"/proc/{server}"), ids, ids, setgroups=True)
                status = 0
        finally:
            os._exit(status)
    os.close(reader)
    try:
        _unshare(flags)
        os.write(writer, b"x")
    finally:
        os.close(writer)
        _, status = os.waitpid(helper, 0)
    if status:
        raise PermissionError(1, "cannot map user ids into a new user namespace")


def visible_paths() -> list[str]:
    """What a session may read: the interpreter, its packages, the system's libraries. Parents come before children."""
    names = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *_SYSTEM}
    names.update(sysconfig.get_paths().values())
    # Not all of sys.path: with a development install it may hold a checkout, and with it data and answers.
    names.update(path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages"))
    names.add(os.path.dirname(os.path.abspath(__file__)))  # the plotting back end, loaded on demand
    kept: list[str] = []
    for name in sorted(name for name in names if os.path.exists(name)):
        real_parent = any(os.path.commonpath((name, parent)) == parent for parent in kept if not os.path.islink(parent))
        if not real_parent:
            kept.append(name)
    return kept


def is_visible(path: str) -> bool:
    """Whether a session sees all of a folder."""
    return any(os.path.commonpath((path, visible)) == visible for visible in visible_paths())


def _scratch() -> str:
    below_tmp = any(name.startswith("/tmp/") for name in visible_paths())  # an environment made there must stay visible
    return "/scratch" if below_tmp else "/tmp"


SCRATCH = _scratch()  # of a session, in the sandbox's root


def _bind(source: str, root: str) -> None:
    target = root + source
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        Path(target).touch()
    _mount(source, target, "", _MS_BIND | _MS_REC)


def _make_read_only(root: str) -> None:
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    result = libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        root.encode(),
        ctypes.c_uint(_AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    check(result, "mount_setattr")


def _pivot(root: str) -> None:
    machine = os.uname().machine
    if machine not in _SYS_PIVOT_ROOT:
        raise OSError(38, f"no known pivot_root system call on {machine}")
    os.chdir(root)
    # The old root is stacked on the new one, then detached: no folder for it is needed (pivot_root(2), NOTES).
    check(libc.syscall(ctypes.c_long(_SYS_PIVOT_ROOT[machine]), b".", b"."), "pivot_root")
    check(libc.umount2(b".", ctypes.c_int(_MNT_DETACH)), "umount the old root")
    os.chdir("/")


def _go_on_in_child() -> None:
    """Fork; the calling process only waits, and ends as the child does."""
    child = os.fork()
    if child:
        os.closerange(3, 1 << 16)  # the child alone holds the sockets, so its end is seen as the server's end
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    die_with_parent()


def isolate_server(folder: str) -> None:
    """Continue as PID 1 of a process tree without network and with a private read-only root. Returns in a forked child only.

    folder: an empty folder to build the root on; nothing appears in it outside.

    Raises:
        OSError: the machine allows no such namespaces or mounts. Raised in the caller or in the child, not in both.
    """
    if len(os.listdir("/proc/self/task")) > 1:  # some libraries start threads; a process of several gets no user namespace
        _go_on_in_child()
    _enter_user_namespace()
    _go_on_in_child()
    visible = visible_paths()
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    for source in visible:
        _bind(source, folder)
    for device in _DEVICES:
        _bind(f"/dev/{device}", folder)
    # Semaphores and shared memory lie in the scratch folder: each session's own, within its limit, and without another mount.
    for name, target in {**_FD_LINKS, "shm": SCRATCH}.items():
        os.symlink(target, f"{folder}/dev/{name}")
    for name in ("proc", SCRATCH.strip("/")):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
    _make_read_only(folder)
    # Not read-only: a session has to write a sysctl and its id maps in it.
    _mount("proc", f"{folder}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _pivot(folder)


def fork_session() -> int:
    """`os.fork`, but the child is PID 1 of a new PID namespace. For `isolate_session`, which the child calls next."""
    own = os.pidfd_open(os.getpid())
    child = -1
    try:
        _unshare(NEWPID)  # for children only
        child = os.fork()
        return child
    finally:
        # in the server, also where it could not fork: back to its own namespace, or the next unshare is refused
        if child and libc.setns(ctypes.c_int(own), ctypes.c_int(NEWPID)):
            os.write(2, b"server: cannot go back to its own PID namespace\n")
            os._exit(71)  # no session after this one would be right; all of them end with it, and the run starts another
        os.close(own)


def isolate_session(limits: Limits) -> None:
    """Put the calling process, of `fork_session`, into namespaces of its own; `limit_process` and a `Lock` are to come."""
    # through the server's /proc: the session's own is read-only, so that nothing of the kernel's can be set or triggered in it
    own, users = _open_folder("/proc/self"), _open_folder("/proc/sys/user")
    _write("oom_score_adj", _FIRST_TO_GO, own)
    _unshare(NEWNS)
    options = f"mode=700,uid={_INNER_ID},gid={_INNER_ID},size={limits.scratch_mb}m,nr_inodes={MAX_INODES}"
    _mount("tmpfs", SCRATCH, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    _mount("proc", "/proc", "proc", _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_INNER_ID, _INNER_ID, _INNER_ID)
        os.setresuid(_INNER_ID, _INNER_ID, _INNER_ID)
        prctl(_PR_SET_DUMPABLE, 1)  # cleared by the change of user; without it our own id maps are not ours
    _unshare(NEWUSER | NEWIPC | NEWNET)
    _write_id_maps(own, f"{_SESSION_ID} {_INNER_ID} 1", f"{_SESSION_ID} {_INNER_ID} 1", setgroups=False)
    # In a further user namespace the agent would be allowed to mount, and with it to leave the scratch limit.
    _write("max_user_namespaces", "0", users)
    os.close(own)
    os.close(users)
    _drop_privileges()


def _drop_privileges() -> None:
    # The bounding set stays: it only matters to an execve that raises capabilities, which no_new_privs rules out, and
    # emptying it costs 41 system calls and more time than the fork.
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    check(libc.capset(struct.pack("=Ii", _CAP_VERSION_3, 0), bytes(24)), "capset")


class Lock:
    """The last thing that a session is given: landlock, where there is one, and the filter of system calls."""

    def __init__(self) -> None:
        """Raises OSError where the architecture is not known."""
        self._filter = Filter()
        self.landlock = landlock.version()

    def close(self) -> None:
        """For the calling process and all that it starts, for good.

        Raises:
            OSError: the kernel has no filters, or whoever started us forbids them.
        """
        if self.landlock:
            landlock.restrict(self.landlock, SCRATCH)
        self._filter.install()


def leave_keyring() -> None:
    """Have a session keyring of our own, and with it none of the trainer's keys."""
    number = _SYS_KEYCTL.get(os.uname().machine)
    if number is None:
        return
    with contextlib.suppress(OSError):  # no keys in this kernel, or forbidden by the container: then sessions reach none either
        syscall("keyctl", number, _JOIN_SESSION_KEYRING, None)


def rename_arguments(title: str) -> None:
    """Show `title` in place of the command line of this process and of those forked from it: it names paths outside."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, 48th and 49th of proc_pid_stat(5)
    if 0 < start < end:
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, title.encode()[: end - start - 1], min(len(title), end - start - 1))


def limit_process(limits: Limits) -> None:
    """Set the resource limits and the priority of a session; they are inherited by whatever it starts."""
    os.nice(_NICE)
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    reserve = _RESERVE + _RESERVE_A_CHARACTER * limits.max_output_chars
    values = {
        resource.RLIMIT_AS: held + (limits.memory_mb << 20) + reserve,
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_FSIZE: limits.scratch_mb << 20,
        resource.RLIMIT_NOFILE: MAX_FILES,
        resource.RLIMIT_CORE: 1,  # 0 would not keep the kernel from giving a dump to a program (core(5)), 1 does
    }
    if not limits.unsafe:  # outside a user namespace they would count all of the user's
        values[resource.RLIMIT_NPROC] = MAX_PROCESSES
        values[resource.RLIMIT_SIGPENDING] = _MAX_SIGNALS
    for name, value in values.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value - reserve if name == resource.RLIMIT_AS else value, value))
