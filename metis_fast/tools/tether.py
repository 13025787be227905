"""Run as a script: a command whose processes all end with it, and with the process that started it, however that dies. Linux.

Arguments: the id of that process, then the command. Whatever the command has started comes to this process when its own parent
ends (a subreaper, prctl(2)), also from sessions of its own, so that nothing of it can stay behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(ctypes.c_int(option), ctypes.c_ulong(value))


def _end_all() -> None:
    """Kill what there is below this process, until there is nothing."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            children = file.read().split()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def _become(command: tuple[str, ...], parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)
    for number in _STOPS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(1)


def main(parent: int, *command: str) -> int:
    """Run the command; returns its exit status, 128 and the signal where one ended it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # they are waited for below
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # it died before
        return 1
    own = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
    child = os.fork()
    if not child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD,))
        _become(command, own)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):  # the command's alone, so that the other end sees when it ends
        os.dup2(nothing, fd)
    status = 128 + signal.SIGTERM
    while True:
        if signal.sigwait((*_STOPS, signal.SIGCHLD)) != signal.SIGCHLD:
            break
        ended, found = _reaped(child)
        if ended:
            status = found
            break
    _end_all()
    return status


def _reaped(child: int) -> tuple[bool, int]:
    """Bury what has ended. Whether the command is among it, and its exit status."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True, 1
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return True, code if code >= 0 else 128 - code
        if not pid:
            return False, 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
