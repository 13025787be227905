"""The warm server: imports what sessions need once, then forks one process tree a session.

The trainer sends two sockets and a file for each session over the control socket. `data` goes to the session (see wire), and so
does the file, for its output (see transcript). `life` stays here: the trainer half-closes it to have the session killed, and
when the session is gone, for whatever reason, its exit status is sent there. So neither side keeps a table of names, and a dead
server is an end of file without a status.
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
from collections.abc import Iterator
from dataclasses import dataclass

from metis_fast.tools.sandbox import interpreter, kernel
from metis_fast.tools.sandbox.transcript import open_output
from metis_fast.tools.sandbox.wire import SESSION_LOST, Limits

READY = b"ready"
OPEN = b"open"
_DATA, _OUTPUT = 3, 4  # descriptors of a session


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

    def run(self) -> bool:
        """Serve until the trainer closes the control socket or dies. True: this is the process of a new session."""
        while True:
            for key, _ in self._selector.select():
                if key.fd == self._control.fileno():
                    message, fds, _, _ = socket.recv_fds(self._control, len(OPEN), 3)
                    if not message:
                        return False
                    if self._open(fds):
                        return True
                elif key.data is None:  # the trainer's pidfd
                    return False
                elif key.data not in self._live:
                    continue  # buried by an earlier event of this round
                elif key.fd == key.data.pidfd:
                    self._bury(key.data)
                else:
                    self._selector.unregister(key.data.life)
                    _kill(key.data, self._limits)

    def _open(self, fds: list[int]) -> bool:
        """Start a session; True in its process."""
        try:
            data, life, output = fds
            folder = tempfile.mkdtemp(dir=self._folder) if self._limits.unsafe else ""
            pid = start_session(data, output, self._limits, folder)
        except (OSError, ValueError) as error:  # no more processes, memory or descriptors: the trainer sees its socket end
            os.write(2, f"cannot open a session: {error}\n".encode())
            for fd in fds:
                os.close(fd)
            return False
        if not pid:
            return True
        os.close(data)
        os.close(output)
        session = _Session(pid, os.pidfd_open(pid), socket.socket(fileno=life), folder)
        self._live.add(session)
        self._selector.register(session.pidfd, selectors.EVENT_READ, session)
        self._selector.register(session.life, selectors.EVENT_READ, session)
        return False

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


def start_session(data: int, output: int, limits: Limits, folder: str) -> int:
    """Fork the process of a session. Returns its PID, which is a child of the calling process; in the child itself 0."""
    child = os.fork() if limits.unsafe else kernel.fork_session()
    if child:
        return child
    ready = False
    try:
        os.setsid()  # a signal to the process group of a session must not reach others
        if limits.unsafe:
            kernel.die_with_parent()
        else:
            kernel.isolate_session(limits)
        os.chdir(folder or kernel.SCRATCH)
        for name in ("HOME", "TMPDIR", "MPLCONFIGDIR"):
            os.environ[name] = os.getcwd()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        kernel.limit_process(limits)
        for fd in (1, 2):
            os.dup2(output, fd)
        os.dup2(data, _DATA, inheritable=False)
        os.dup2(1, _OUTPUT, inheritable=False)
        kernel.close_from(_OUTPUT + 1)  # the server's sockets, above all: two of every session
        ready = True
    except OSError as error:
        os.write(2, f"session: {error}\n".encode())
    finally:
        if not ready:
            os._exit(SESSION_LOST)  # the child must not go on as a second server
    return 0


def _session(limits: Limits) -> Iterator[interpreter.Interpreter]:
    status = SESSION_LOST
    try:
        yield from interpreter.serve(socket.socket(fileno=_DATA), _OUTPUT, limits)
        status = 0
    finally:
        os._exit(status)  # nothing of the server's, and no exit handler of the agent, runs here


def _probe(limits: Limits) -> bool:
    """Open and end one session, so that what is missing on this machine is found now. True in the process of the session."""
    ours, theirs = socket.socketpair()
    output = open_output(limits.max_output_chars)
    with ours, theirs:
        pid = start_session(theirs.fileno(), output, limits, tempfile.gettempdir() if limits.unsafe else "")
        if not pid:
            theirs.detach()
            ours.detach()
            return True
        theirs.close()
        os.close(output)
        greeting = ours.recv(1)
        ours.close()
        os.waitpid(pid, 0)
    if not greeting:
        raise PermissionError(1, "cannot make the namespaces of a session, or mount scratch and /proc in them")
    return False


def main() -> Iterator[interpreter.Interpreter]:
    """Serve. In the process of a session, iterating gives its calls; in the server it never gives any.

    Arguments: control socket, PID of the trainer, private folder, limits as JSON.
    """
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
    kernel.unbuffer_stdout()
    gc.freeze()  # no collection in a session touches, and so copies, the pages of what is loaded here
    tempfile.tempdir = folder if limits.unsafe else kernel.SCRATCH
    try:
        if not limits.unsafe:
            kernel.isolate_server(folder)
            sys.path[:] = [path for path in sys.path if kernel.is_visible(os.path.abspath(path))]
        in_session = _probe(limits)
    except OSError as error:
        control.send(f"error {error.strerror}".encode())
        return
    if not in_session:
        control.send(READY)
        server = _Server(control, parent, limits, folder)  # not freed in a session: its descriptors belong to others there
        in_session = server.run()
    if in_session:
        yield from _session(limits)
