"""The warm server: imports what sessions need once, then forks one process tree a session.

The trainer sends two sockets for each session over the control socket. `data` goes to the session (see wire). `life` stays
here: the trainer half-closes it to have the session killed, and when the session is gone, for whatever reason, its exit status
is sent there. So neither side keeps a table of names, and a dead server is an end of file without a status.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import selectors
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass

from metis_fast.tools.sandbox import interpreter, kernel
from metis_fast.tools.sandbox.wire import Limits

READY = b"ready"
OPEN = b"open"


@dataclass(frozen=True, slots=True, eq=False)
class _Session:
    pid: int
    pidfd: int
    life: socket.socket
    folder: str  # scratch folder on disk, without a sandbox only


class _Server:
    def __init__(self, control: socket.socket, parent: int, limits: Limits, folder: str) -> None:
        self._control = control
        self._limits = limits
        self._folder = folder
        self._live: set[_Session] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._selector.register(parent, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until the trainer closes the control socket or dies."""
        while True:
            for key, _ in self._selector.select():
                if key.fd == self._control.fileno():
                    message, fds, _, _ = socket.recv_fds(self._control, len(OPEN), 2)
                    if not message:
                        return
                    self._open([socket.socket(fileno=fd) for fd in fds])
                elif key.data is None:  # the trainer's pidfd
                    return
                elif key.data not in self._live:
                    continue  # buried by an earlier event of this round
                elif key.fd == key.data.pidfd:
                    self._bury(key.data)
                else:
                    self._selector.unregister(key.data.life)
                    _kill(key.data, self._limits)

    def _open(self, sockets: list[socket.socket]) -> None:
        try:
            data, life = sockets
            folder = tempfile.mkdtemp(dir=self._folder) if self._limits.unsafe else ""
            pid = start_session(data, self._limits, folder)
        except (OSError, ValueError) as error:  # no more processes, memory or descriptors: the trainer sees its socket end
            os.write(2, f"cannot open a session: {error}\n".encode())
            for sock in sockets:
                sock.close()
            return
        data.close()
        session = _Session(pid, os.pidfd_open(pid), life, folder)
        self._live.add(session)
        self._selector.register(session.pidfd, selectors.EVENT_READ, session)
        self._selector.register(life, selectors.EVENT_READ, session)

    def _bury(self, session: _Session) -> None:
        self._live.remove(session)
        _kill(session, self._limits)  # without a sandbox, the rest of its process group
        _, status = os.waitpid(session.pid, 0)
        self._selector.unregister(session.pidfd)
        os.close(session.pidfd)
        if session.life.fileno() in self._selector.get_map():
            self._selector.unregister(session.life)
        if session.folder:
            shutil.rmtree(session.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # the trainer may no longer listen
            session.life.send(str(os.waitstatus_to_exitcode(status)).encode())
        session.life.close()


def _kill(session: _Session, limits: Limits) -> None:
    if limits.unsafe:
        with contextlib.suppress(ProcessLookupError):  # not yet a group, or no longer
            os.killpg(session.pid, signal.SIGKILL)
    os.kill(session.pid, signal.SIGKILL)  # in a sandbox, PID 1 of a namespace: the kernel kills all others with it


def start_session(data: socket.socket, limits: Limits, folder: str) -> int:
    """Fork a session that serves `data`; returns its PID, which is a child of the calling process."""
    child = os.fork() if limits.unsafe else kernel.fork_session()
    if child:
        return child
    status = 70
    try:
        if limits.unsafe:
            os.setsid()
            kernel.die_with_parent()
        else:
            kernel.isolate_session(limits)
        _run_session(data, limits, folder)
        status = 0
    except OSError as error:
        os.write(2, f"session: {error}\n".encode())
    finally:
        os._exit(status)


def _run_session(data: socket.socket, limits: Limits, folder: str) -> None:
    os.chdir(folder or kernel.SCRATCH)
    for name in ("HOME", "TMPDIR", "MPLCONFIGDIR"):
        os.environ[name] = os.getcwd()
    os.dup2(data.fileno(), 3, inheritable=False)
    data.detach()
    kernel.close_from(4)  # the server's sockets, above all: two of every session
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kernel.limit_process(limits)
    with socket.socket(fileno=3) as connection:
        interpreter.serve(connection, limits)


def _probe(limits: Limits) -> None:
    """Open and end one session, so that what is missing on this machine is found now."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = start_session(theirs, limits, tempfile.gettempdir() if limits.unsafe else "")
        theirs.close()
        greeting = ours.recv(1)
        ours.close()
        os.waitpid(pid, 0)
    if not greeting:
        raise PermissionError(1, "cannot make the namespaces of a session, or mount scratch and /proc in them")


def main() -> None:
    """Arguments: control socket, PID of the trainer, private folder, limits as JSON."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    trainer, folder, limits = int(sys.argv[2]), sys.argv[3], Limits.from_json(sys.argv[4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not PR_SET_PDEATHSIG here: that would follow the trainer's *thread*, and a restart runs in a worker thread.
    parent = os.pidfd_open(trainer)
    if os.getppid() != trainer:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 1 << 16), hard))
    interpreter.Image.init()
    gc.freeze()  # no collection in a session touches, and so copies, the pages of what is loaded here
    tempfile.tempdir = folder if limits.unsafe else kernel.SCRATCH
    try:
        if not limits.unsafe:
            kernel.isolate_server(folder)
        _probe(limits)
    except OSError as error:
        control.send(f"error {error.strerror}".encode())
        return
    control.send(READY)
    _Server(control, parent, limits, folder).run()
