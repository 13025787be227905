"""Which system calls a session may make: a filter in the kernel (seccomp(2)), the last thing that a session is given.

It is a list of what is allowed, for what CPython and the usual numerical libraries need, processes, threads and AF_UNIX pairs
included. All other calls fail with EPERM, those that are newer than the list with ENOSYS, as on an older kernel, so that the C
library takes another way. A program of another architecture (32 bits on x86-64) is killed.

What namespaces do not separate, or no limit counts, is not on the list: keys, io_uring, userfaultfd, bpf, perf, fanotify,
inotify, System V and POSIX queues and shared memory, memfds, flock (a lock on a shared read-only file would be a channel).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

from metis_fast.tools.sandbox.libc import prctl

# Name, number on x86-64, number on aarch64; from asm/unistd_64.h and asm-generic/unistd.h of Linux 6.6.
_ALLOWED = """
munmap 11 215; mremap 25 216; mprotect 10 226; brk 12 214; madvise 28 233; msync 26 227
pkey_alloc 330 289; pkey_free 331 290; pkey_mprotect 329 288

open 2 -; openat 257 56; openat2 437 437; creat 85 -; close 3 57; close_range 436 436; read 0 63; write 1 64
pread64 17 67; pwrite64 18 68; readv 19 65; writev 20 66; preadv 295 69; pwritev 296 70; preadv2 327 286
pwritev2 328 287; lseek 8 62; stat 4 -; fstat 5 80; lstat 6 -; newfstatat 262 79; statx 332 291; access 21 -
faccessat 269 48; faccessat2 439 439; readlink 89 -; readlinkat 267 78; getdents 78 -; getdents64 217 61; unlink 87 -
unlinkat 263 35; rmdir 84 -; mkdir 83 -; mkdirat 258 34; mknod 133 -; mknodat 259 33; rename 82 -; renameat 264 38
renameat2 316 276; link 86 -; linkat 265 37; symlink 88 -; symlinkat 266 36; chmod 90 -; fchmod 91 52; fchmodat 268 53
fchmodat2 452 452; chown 92 -; fchown 93 55; lchown 94 -; fchownat 260 54; truncate 76 45; ftruncate 77 46
fallocate 285 47; fsync 74 82; fdatasync 75 83; fadvise64 221 223; readahead 187 213; sync_file_range 277 84
sendfile 40 71; copy_file_range 326 285; utime 132 -; utimes 235 -; futimesat 261 -; utimensat 280 88; umask 95 166
chdir 80 49; fchdir 81 50; getcwd 79 17; statfs 137 43; fstatfs 138 44; getxattr 191 8; lgetxattr 192 9
fgetxattr 193 10; listxattr 194 11; llistxattr 195 12; flistxattr 196 13; dup 32 23; dup2 33 -; dup3 292 24

pipe 22 -; pipe2 293 59; poll 7 -; ppoll 271 73; select 23 -; pselect6 270 72; epoll_create 213 -
epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -; epoll_pwait 281 22; epoll_pwait2 441 441; eventfd 284 -
eventfd2 290 19; signalfd 282 -; signalfd4 289 74; timerfd_create 283 85; timerfd_settime 286 86
timerfd_gettime 287 87

fork 57 -; vfork 58 -; execve 59 221; exit 60 93; exit_group 231 94; wait4 61 260; waitid 247 95
kill 62 129; tkill 200 130; tgkill 234 131; pidfd_open 434 434; pidfd_send_signal 424 424; getpid 39 172
getppid 110 173; gettid 186 178; getpgid 121 155; getpgrp 111 -; getsid 124 156; setpgid 109 154; setsid 112 157
set_tid_address 218 96; futex 202 98; futex_waitv 449 449; set_robust_list 273 99; get_robust_list 274 100; rseq 334 293
membarrier 324 283; sched_yield 24 124; sched_getaffinity 204 123; sched_setaffinity 203 122; sched_getparam 143 121
sched_getscheduler 145 120; sched_getattr 315 275; sched_get_priority_max 146 125; sched_get_priority_min 147 126
sched_rr_get_interval 148 127; getpriority 140 141; ioprio_get 252 31; getcpu 309 168; arch_prctl 158 -
prlimit64 302 261; getrlimit 97 163; setrlimit 160 164; getrusage 98 165

rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigpending 127 136; rt_sigtimedwait 128 137; rt_sigqueueinfo 129 138
rt_tgsigqueueinfo 297 240; rt_sigsuspend 130 133; rt_sigreturn 15 139; sigaltstack 131 132; restart_syscall 219 128
alarm 37 -; setitimer 38 103; getitimer 36 102; pause 34 -

nanosleep 35 101; clock_nanosleep 230 115; clock_gettime 228 113; clock_getres 229 114; gettimeofday 96 169
time 201 -; times 100 153

getuid 102 174; geteuid 107 175; getgid 104 176; getegid 108 177; getresuid 118 148; getresgid 120 150
getgroups 115 158; capget 125 90; uname 63 160; sysinfo 99 179; getrandom 318 278

bind 49 200; listen 50 201; accept 43 202; accept4 288 242; connect 42 203
getsockname 51 204; getpeername 52 205; recvfrom 45 207; recvmsg 47 212
recvmmsg 299 243; shutdown 48 210; getsockopt 55 209
"""
_NEWEST = 462  # the last number that was looked at; what follows is answered as by an older kernel

_COLUMN = {"x86_64": 1, "aarch64": 2}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

# struct sock_filter, and the operations that are used of it (linux/bpf_common.h)
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD, _AND, _JUMP, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x54, 0x05, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data

_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000

_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_STREAM, _DATAGRAM, _SEQPACKET, _TYPE = 1, 2, 5, 0xF
_NEW_NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_TYPE, _MAP_HUGETLB = 0x1, 0x20, 0xF, 0x40000
# F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ, F_SET_RW_HINT, F_SET_FILE_RW_HINT; hints stay with a file, for others to read
_REFUSED_FCNTLS = (1024, 1026, 1031, 1036, 1038)
_MSG_OOB = 1  # data out of band, which nobody needs, was often a defect of the kernel
_SOL_SOCKET, _SO_SNDBUF = 1, 7
# TCGETS, TIOCGPGRP, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS2: what isatty() and sockets ask
_IOCTLS = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)
# SET_PDEATHSIG, GET_PDEATHSIG, GET_DUMPABLE, SET_NAME, GET_NAME, CAPBSET_READ, SET_TIMERSLACK, GET_TIMERSLACK,
# SET_NO_NEW_PRIVS, GET_NO_NEW_PRIVS, SET_VMA (names memory, which the C library does)
_PRCTLS = (1, 2, 3, 15, 16, 23, 29, 30, 38, 39, 0x53564D41)

Block = tuple[tuple[int, int, int, int], ...]
"""Instructions (operation, jump if true, jump if false, value) that end in a return."""


@dataclass(frozen=True, slots=True)
class _Interval:
    """Numbers from `first` on, up to the next interval, and what they are answered with."""

    first: int
    block: Block


def _end(action: int) -> Block:
    return ((_RETURN, 0, 0, action),)


def _fail(number: int) -> int:
    return _FAIL | number


_REFUSED = _end(_fail(errno.EPERM))


def _argument(index: int) -> tuple[int, int, int, int]:
    return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * index)  # its low half; both architectures are little-endian


def _any_equal(values: tuple[int, ...]) -> Block:
    """Jumps over the instruction that follows where the loaded value is one of these."""
    return tuple((_IF_EQUAL, len(values) - at, 0, value) for at, value in enumerate(values))


def _one_of(index: int, values: tuple[int, ...]) -> Block:
    """Allowed where an argument has one of these values."""
    return (_argument(index), *_any_equal(values), *_REFUSED, *_end(_ALLOW))


def _none_of(index: int, values: tuple[int, ...]) -> Block:
    """Refused where it has one of these values."""
    return (_argument(index), *_any_equal(values), *_end(_ALLOW), *_REFUSED)


def _no_bit(index: int, mask: int) -> Block:
    return (_argument(index), (_IF_ANY_BIT, 1, 0, mask), *_end(_ALLOW), *_REFUSED)


# Shared memory without a file is counted by nobody once its pages are unmapped; /dev/shm is within the scratch limit.
_MMAP: Block = (
    _argument(3),
    (_IF_ANY_BIT, 3, 0, _MAP_HUGETLB),
    (_AND, 0, 0, _MAP_TYPE | _MAP_ANONYMOUS),
    (_IF_EQUAL, 1, 0, _MAP_SHARED | _MAP_ANONYMOUS),
    *_end(_ALLOW),
    *_REFUSED,
)
# Of the internet there is none: that is what code is told, as by a machine without a network.
_SOCKET: Block = (
    _argument(0),
    (_IF_EQUAL, 3, 0, _AF_UNIX),
    (_IF_EQUAL, 1, 0, _AF_INET),
    (_IF_EQUAL, 0, 7, _AF_INET6),
    *_end(_fail(errno.ENETUNREACH)),
    _argument(1),
    (_AND, 0, 0, _TYPE),
    (_IF_EQUAL, 2, 0, _STREAM),
    (_IF_EQUAL, 1, 0, _DATAGRAM),
    (_IF_EQUAL, 0, 1, _SEQPACKET),
    *_end(_ALLOW),
    *_REFUSED,
)

# Megabytes a socket, where the machine's network is tuned; no limit counts them. To ask is a hint, so it is ignored.
_SETSOCKOPT: Block = (
    _argument(1),
    (_IF_EQUAL, 0, 2, _SOL_SOCKET),
    _argument(2),
    (_IF_EQUAL, 1, 0, _SO_SNDBUF),
    *_end(_ALLOW),
    *_end(_fail(0)),
)


def _blocks(machine: str) -> dict[int, Block]:
    column = _COLUMN[machine]
    rows = [entry.split() for line in _ALLOWED.splitlines() for entry in line.split(";") if entry.strip()]
    blocks = {int(row[column]): _end(_ALLOW) for row in rows if row[column] != "-"}
    x86 = machine == "x86_64"
    blocks[9 if x86 else 222] = _MMAP
    blocks[56 if x86 else 220] = _no_bit(0, _NEW_NAMESPACES)  # clone
    blocks[435] = _end(_fail(errno.ENOSYS))  # clone3: its flags lie in memory; the C library then uses clone
    blocks[41 if x86 else 198] = _SOCKET
    blocks[53 if x86 else 199] = _one_of(0, (_AF_UNIX,))  # socketpair
    blocks[54 if x86 else 208] = _SETSOCKOPT
    blocks[44 if x86 else 206] = _no_bit(3, _MSG_OOB)  # sendto
    blocks[46 if x86 else 211] = _no_bit(2, _MSG_OOB)  # sendmsg
    blocks[307 if x86 else 269] = _no_bit(3, _MSG_OOB)  # sendmmsg
    blocks[73 if x86 else 32] = _end(_fail(errno.ENOSYS))  # flock: libraries do without where a file system has none
    blocks[16 if x86 else 29] = _one_of(1, _IOCTLS)
    blocks[72 if x86 else 25] = _none_of(1, _REFUSED_FCNTLS)  # fcntl
    blocks[157 if x86 else 167] = _one_of(0, _PRCTLS)
    return blocks


def _search(intervals: list[_Interval]) -> Block:
    """Finds the interval of a number by halves, so that a call costs about eight comparisons."""
    if len(intervals) == 1:
        return intervals[0].block
    middle = len(intervals) // 2
    low, high = _search(intervals[:middle]), _search(intervals[middle:])
    first = intervals[middle].first
    if len(low) < 256:
        return ((_IF_AT_LEAST, len(low), 0, first), *low, *high)
    return ((_IF_AT_LEAST, 0, 1, first), (_JUMP, 0, 0, len(low)), *low, *high)


def program(machine: str) -> bytes:
    """The filter for an architecture, as the kernel takes it.

    Raises:
        OSError: no list is known for it.
    """
    if machine not in _COLUMN:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    blocks = _blocks(machine)
    intervals: list[_Interval] = []
    for number in range(_NEWEST + 2):
        block = blocks.get(number, _REFUSED) if number <= _NEWEST else _end(_fail(errno.ENOSYS))
        if not intervals or intervals[-1].block != block:
            intervals.append(_Interval(number, block))
    check_arch = ((_LOAD, 0, 0, _ARCH_AT), (_IF_EQUAL, 1, 0, _AUDIT_ARCH[machine]), *_end(_KILL))
    # x32 calls of x86-64 have numbers from 0x40000000 on, and so the last interval's answer
    instructions = (*check_arch, (_LOAD, 0, 0, _NUMBER_AT), *_search(intervals))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in instructions)


class Filter:
    """A filter that is ready to be installed, as often as wanted."""

    def __init__(self) -> None:
        """Raises OSError where the architecture is not known."""
        code = program(os.uname().machine)
        self._code = ctypes.create_string_buffer(code, len(code))
        # struct sock_fprog: u16 count, pointer
        self._header = struct.pack("@HP", len(code) // _INSTRUCTION.size, ctypes.addressof(self._code))

    def install(self) -> None:
        """For this process and all that it starts, for good. It needs no_new_privs.

        Raises:
            OSError: the kernel has no seccomp filters, or whoever started us forbids them.
        """
        prctl(_PR_SET_SECCOMP, _MODE_FILTER, self._header)
