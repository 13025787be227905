"""The warm server: imports what sessions need once, then forks one process tree a session.

The trainer sends two sockets and a file for each session over the control socket. `data` goes to the session (see wire), and so
does the file, for its output (see transcript). `life` stays here: the trainer half-closes it to have the session killed, and
when the session is gone, for whatever reason, its exit status and who ended it are sent there. So neither side keeps a table of
names, and a dead server is an end of file without a status. What sessions use stands on the board.
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
import time
from collections.abc import Iterator
from dataclasses import dataclass

from metis_fast.tools.sandbox import interpreter, kernel, warm
from metis_fast.tools.sandbox.board import Board
from metis_fast.tools.sandbox.cgroups import Cgroups
from metis_fast.tools.sandbox.transcript import open_output, output_size
from metis_fast.tools.sandbox.watchdog import Watch
from metis_fast.tools.sandbox.wire import READY, SESSION_LOST, WATCH, EndedBy, Layers, Limits

_DATA, _OUTPUT = 3, 4  # descriptors of a session
_MESSAGE = 32  # bytes of the longest that the trainer sends: `WATCH`, or the number of a session to open
_LOOK_S = 0.05  # between two looks at sessions in which a call runs
_ROUND_S = 2.0  # between two at all
_REST = 9  # times as long as a look took: the server spends a tenth of one core on them, at most
_PF_EXITING = 0x4  # of a process's flags


@dataclass(slots=True, eq=False)
class _Session:
    number: int  # of its entry in the board, and of its control group
    pid: int
    pidfd: int
    life: socket.socket
    folder: str  # scratch folder on disk, without a sandbox only
    watch: Watch
    ended_by: EndedBy | None = None  # where it was we who killed it


@dataclass(frozen=True, slots=True)
class Setting:
    """What every session is made with. lock: None without a sandbox. groups: None where the watchdog does their work."""

    limits: Limits
    lock: kernel.Lock | None
    groups: Cgroups | None


class _Server:
    def __init__(self, control: socket.socket, parent: int, board: Board, setting: Setting, folder: str) -> None:
        self._control = control
        self._board = board
        self._setting = setting
        self._folder = folder
        self._live: set[_Session] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._selector.register(parent, selectors.EVENT_READ)
        self._oom_kills = _oom_kills()
        self._called = False  # calls run that are not quite short
        self._next_look = self._next_round = time.monotonic()

    def run(self) -> bool:
        """Serve until the trainer closes the control socket or dies. True: this is the process of a new session."""
        while True:
            for key, _ in self._selector.select(self._look()):
                if key.fd == self._control.fileno():
                    message, fds, _, _ = socket.recv_fds(self._control, _MESSAGE, 3)
                    if not message:
                        return False
                    if message == WATCH:
                        self._called = True
                    elif self._open(int(message), fds):
                        return True
                elif key.data is None:  # the trainer's pidfd
                    return False
                elif key.data not in self._live:
                    continue  # buried by an earlier event of this round
                elif key.fd == key.data.pidfd:
                    self._bury(key.data)
                else:
                    self._selector.unregister(key.data.life)
                    self._kill(key.data, None if _is_ending(key.data.pid) else EndedBy.TRAINER)

    def _look(self) -> float | None:
        """Measure sessions, if it is time to; seconds until it is again.

        Often those in which a call runs, or something that a call has started; all others once in a while.
        """
        if not self._live:
            return None
        now = time.monotonic()
        if self._called and now >= self._next_look:
            running = [one for one in self._live if self._board.is_running(one.number) or one.watch.tasks > 1]
            for session in running:
                self._measure(session)
            self._called = bool(running)
            took = time.monotonic() - now
            self._next_look = now + took + max(_LOOK_S, took * _REST)
        if now >= self._next_round:
            self._oom_kills = _oom_kills()
            for session in self._live:
                self._measure(session)
            self._called = self._called or any(session.watch.tasks > 1 for session in self._live)
            took = time.monotonic() - now
            self._next_round = now + took + max(_ROUND_S, took * _REST)
        return max(0.0, min(self._next_round, self._next_look if self._called else self._next_round) - time.monotonic())

    def _measure(self, session: _Session) -> None:
        usage = session.watch.measure()
        self._board.report(session.number, usage)
        if usage.memory > self._setting.limits.session_memory_mb << 20:
            self._kill(session, EndedBy.MEMORY)
        elif usage.tasks > self._setting.limits.max_tasks:
            self._kill(session, EndedBy.TASKS)

    def _open(self, number: int, fds: list[int]) -> bool:
        """Start a session; True in its process."""
        limits, groups = self._setting.limits, self._setting.groups
        try:
            data, life, output = fds
            folder = tempfile.mkdtemp(dir=self._folder) if limits.unsafe else ""
            if groups is not None:
                groups.make(number)
            pid = start_session(number, data, output, self._setting, folder)
        except (OSError, ValueError) as error:  # no more processes, memory or descriptors: the trainer sees its socket end
            os.write(2, f"cannot open a session: {error}\n".encode())
            for fd in fds:
                os.close(fd)
            return False
        if not pid:
            return True
        os.close(data)
        os.close(output)
        watch = Watch(pid, "" if limits.unsafe else kernel.SCRATCH, limits.session_memory_mb << 20)
        session = _Session(number, pid, os.pidfd_open(pid), socket.socket(fileno=life), folder, watch)
        self._live.add(session)
        self._selector.register(session.pidfd, selectors.EVENT_READ, session)
        self._selector.register(session.life, selectors.EVENT_READ, session)
        return False

    def _kill(self, session: _Session, ended_by: EndedBy | None = None) -> None:
        session.ended_by = session.ended_by or ended_by
        if self._setting.limits.unsafe:
            with contextlib.suppress(ProcessLookupError):  # not yet a group, or no longer
                os.killpg(session.pid, signal.SIGKILL)
        os.kill(session.pid, signal.SIGKILL)  # in a sandbox, PID 1 of a namespace: the kernel kills all others with it

    def _bury(self, session: _Session) -> None:
        self._live.remove(session)
        self._kill(session)  # without a sandbox, the rest of its process group
        used_up = _used_up(session.pid, self._setting.limits.cpu_s)
        _, waited = os.waitpid(session.pid, 0)
        status = os.waitstatus_to_exitcode(waited)
        ended_by = session.ended_by or self._ended_by(session, status, used_up)
        self._selector.unregister(session.pidfd)
        os.close(session.pidfd)
        if session.life.fileno() in self._selector.get_map():
            self._selector.unregister(session.life)
        if session.folder:
            shutil.rmtree(session.folder, ignore_errors=True)
        if self._setting.groups is not None:
            self._setting.groups.remove(session.number)
        with contextlib.suppress(OSError):  # the trainer may no longer listen
            session.life.send(f"{status} {ended_by}".encode())
        session.life.close()

    def _ended_by(self, session: _Session, status: int, used_up: bool) -> EndedBy:
        """Of one that ended without us. In a sandbox none of its processes can kill its first one, nor can other sessions."""
        if status != -signal.SIGKILL:
            return EndedBy.ITSELF
        if self._setting.groups is not None and self._setting.groups.was_full(session.number):
            return EndedBy.MEMORY
        if used_up and _oom_kills() == self._oom_kills:
            return EndedBy.CPU
        return EndedBy.ITSELF if self._setting.limits.unsafe else EndedBy.OTHERS


def _stat(path: str) -> list[bytes]:
    """Fields of proc_pid_stat(5) from the third, the state, on."""
    try:
        with open(f"{path}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


def _is_ending(pid: int) -> bool:
    """Whether it ends already: its sockets are closed some time before it is gone. All of it: a thread may have ended alone."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return True
    found = [_stat(f"/proc/{pid}/task/{thread}") for thread in threads]
    return all(not fields or fields[0] in (b"Z", b"X") or int(fields[6]) & _PF_EXITING for fields in found)


def _oom_kills() -> int:
    """How often the kernel has killed a process since it started because memory was short, in any group."""
    with open("/proc/vmstat", encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)


def _used_up(pid: int, limit: int) -> bool:
    """Whether a process that has ended had used up the CPU time that it might: `limit` seconds, or less by its own doing.

    The kernel compares with ticks of the clock, which on a busy machine, or by skill, are far from the time that /proc says. So
    half of our limit is enough, and of a limit of its own we take its word.
    """
    fields = _stat(f"/proc/{pid}")
    try:
        with open(f"/proc/{pid}/limits", encoding="ascii") as file:
            hard = next(line.split()[4] for line in file if line.startswith("Max cpu time"))
    except (OSError, StopIteration):
        return False
    if not fields or not hard.isdigit():
        return False
    if int(hard) < limit:
        return True
    return 2 * (int(fields[11]) + int(fields[12]) + 1) >= int(hard) * os.sysconf("SC_CLK_TCK")


def start_session(number: int, data: int, output: int, setting: Setting, folder: str) -> int:
    """Fork the process of a session. Returns its PID, which is a child of the calling process; in the child itself 0."""
    limits, groups = setting.limits, setting.groups
    child = os.fork() if limits.unsafe else kernel.fork_session()
    if child:
        return child
    ready = False
    try:
        if groups is not None:
            groups.enter(number)
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
        # Not the server's: what one session sets of an open file, all that have it would see.
        os.close(0)
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
        for fd in (1, 2):
            os.dup2(output, fd)
        os.dup2(data, _DATA, inheritable=False)
        os.dup2(1, _OUTPUT, inheritable=False)
        kernel.close_from(_OUTPUT + 1)  # the server's sockets, above all: two of every session
        if setting.lock is not None:
            setting.lock.close()
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


def _probe(setting: Setting) -> bool:
    """Open and end one session, so that what is missing on this machine is found now. True in the process of the session."""
    ours, theirs = socket.socketpair()
    limits, groups, number = setting.limits, setting.groups, 0
    output = open_output(limits.max_output_chars)
    with ours, theirs:
        if groups is not None:
            groups.make(number)
        pid = start_session(number, theirs.fileno(), output, setting, tempfile.gettempdir() if limits.unsafe else "")
        if not pid:
            theirs.detach()
            ours.detach()
            return True
        theirs.close()
        greeting = ours.recv(1)
        said = os.pread(output, 200, output_size(limits.max_output_chars)).decode(errors="replace").strip()
        os.close(output)
        ours.close()
        os.waitpid(pid, 0)
        if groups is not None:
            groups.remove(number)
    if not greeting:
        raise PermissionError(1, said or "cannot make the namespaces of a session, or mount scratch and /proc in them")
    return False


def _forget_signals() -> None:
    """Undo what the trainer, or whoever started it, blocks or ignores: that is inherited, by sessions too."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # these Python itself ignores
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def main() -> Iterator[interpreter.Interpreter]:
    """Serve. In the process of a session, iterating gives its calls; in the server it never gives any.

    Arguments: control socket, board, folder of control groups or -1, PID of the trainer, private folder, limits as JSON, names
    of libraries to import with commas between.
    """
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    board, group = int(sys.argv[2]), int(sys.argv[3])
    trainer, folder, limits = int(sys.argv[4]), sys.argv[5], Limits.from_json(sys.argv[6])
    libraries = [name for name in sys.argv[7].split(",") if name]
    kernel.rename_arguments("metis_fast.tools.sandbox.server")
    _forget_signals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not PR_SET_PDEATHSIG here: that would follow the trainer's *thread*, and a restart runs in a worker thread.
    parent = os.pidfd_open(trainer)
    if os.getppid() != trainer:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 1 << 16), hard))
    tempfile.tempdir = folder
    interpreter.Image.init()
    warm.load(libraries, folder)
    kernel.unbuffer_stdout()
    gc.freeze()  # no collection in a session touches, and so copies, the pages of what is loaded here
    tempfile.tempdir = folder if limits.unsafe else kernel.SCRATCH
    try:
        kernel.leave_keyring()
        if not limits.unsafe:
            kernel.isolate_server(folder)
            sys.path[:] = [path for path in sys.path if kernel.is_visible(os.path.abspath(path))]
        groups = Cgroups(group, limits) if group >= 0 else None
        groups = groups if groups is not None and groups.works() else None
        setting = Setting(limits, None if limits.unsafe else kernel.Lock(), groups)
        in_session = _probe(setting)
    except OSError as error:
        control.send(f"error {error.strerror}".encode())
        return
    if not in_session:
        layers = Layers(
            namespaces=setting.lock is not None,
            seccomp=setting.lock is not None,
            landlock=setting.lock.landlock if setting.lock is not None else 0,
            limits="watchdog" if groups is None else "cgroup",
        )
        control.send(READY + layers.to_json().encode())
        # not freed in a session: its descriptors belong to others there
        server = _Server(control, parent, Board(board), setting, folder)
        in_session = server.run()
    if in_session:
        yield from _session(limits)
