"""A rank's process: joins the run, then does what it is told until the run leaves or dies.

It connects before it imports torch, so that the run knows at once who is there. A thread answers the run's pings and reads
EOF when the run is gone, however it went: then the rank kills its whole process group, and with it every process that it
forked (checkpoint writers). The group is its own (`_own_group`); a worker must not fork processes that leave it. When the rank
itself is killed, whoever has started it kills the group: the run, a keeper of Ray's, Slurm.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from typing import TYPE_CHECKING, Any, NoReturn

from metis_fast import __version__
from metis_fast.errors import ConfigError, MetisError
from metis_fast.machine import PARENT
from metis_fast.open_files import allow_files
from metis_fast.train.megatron.traced import recorded
from metis_fast.train.megatron.wire import (
    KEY,
    Call,
    Channel,
    Died,
    Hello,
    Kind,
    Message,
    Welcome,
    parse_address,
    unpack,
)

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_CREDITS = 2  # items on the way: one is read while the next is made
_RETRY_S = 1.0
_PR_SET_PDEATHSIG = 1


class Aborted(Exception):
    """The run asked to leave a call. Raised by a worker, on all ranks at the same place, once `Context.aborted()` says so."""


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What a worker knows of where it runs.

    device: the rank's own GPU, already the current one; the CPU where there is none. control: a gloo group of all ranks, for
    small things and bytes on the CPU.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup
    _asked: Callable[[], bool]

    def aborted(self) -> bool:
        """Whether the run asked to leave the running call; all ranks ask together and hear the same."""
        import torch
        import torch.distributed as dist

        answer = torch.tensor([self.rank == 0 and self._asked()], dtype=torch.uint8)
        dist.broadcast(answer, group=self.control, group_src=0)
        return bool(answer)


class _Mailbox(threading.Thread):
    """Reads what the run sends. calls: CALL and STOP, for the main thread."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(name="mailbox", daemon=True)
        self.calls: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.credits = threading.Semaphore(_CREDITS)
        self.current = 0
        self._aborted = -1
        self._channel = channel

    def asked(self) -> bool:
        """Whether the run asked to leave the current call."""
        return self._aborted == self.current

    def run(self) -> None:
        """Until EOF, the end of the process."""
        try:
            while True:
                message = self._channel.receive()
                match message.kind:
                    case Kind.PING:
                        self._channel.send(Kind.PONG)
                    case Kind.MORE:
                        self.credits.release()
                    case Kind.ABORT:
                        self._aborted = message.number
                    case _:
                        self.calls.put(message)
        except (EOFError, OSError):
            print("metis-fast: the run is gone; so is this rank", file=sys.stderr, flush=True)
        except BaseException:  # a defect of ours; reported here because nothing comes after `finally`
            traceback.print_exc()
        finally:
            # Nothing gentler: the main thread may be deep in a collective operation that will never end.
            os.killpg(0, signal.SIGKILL)


def run(address: str, number: int | None, wait_s: float) -> int:
    """The verb `rank`: join the run at HOST:PORT and serve it to its end.

    number: this rank's; None: what Slurm or a launcher like torchrun has put into the environment.

    Raises:
        ConfigError: it cannot join.
    """
    host, port = parse_address(address, "--join")
    number = _number(number)
    key = os.environ.pop(KEY, "").encode()  # popped: no process that a worker starts needs it
    if not key:
        raise ConfigError(f"{KEY} is not set; give the run and all its ranks the same random secret in it")
    _own_group()
    parent = int(os.environ.pop(PARENT, "0"))
    if parent:
        _follow(parent)
    faulthandler.enable()
    connection = _connect((host, port), key, 0.0 if parent else wait_s)
    channel = Channel(connection)
    # a forked process that held it open would hide the death of this one
    os.register_at_fork(after_in_child=channel.close)
    try:
        channel.send(Kind.HELLO, 0, Hello(number, __version__, socket.gethostname(), os.getpid()))
        answer = channel.receive()
    except (EOFError, OSError):
        raise ConfigError(f"the run at {host}:{port} ended while rank {number} joined; its own output says why") from None
    if answer.kind is Kind.REFUSED:
        raise ConfigError(answer.value())
    for stop in (signal.SIGINT, signal.SIGTERM):
        # they go to all processes of a terminal or job step; the run takes them and tells its ranks, which it still needs
        signal.signal(stop, signal.SIG_IGN)
    mailbox = _Mailbox(channel)
    mailbox.start()
    try:
        _serve(number, answer.value(), bool(parent), channel, mailbox)
    except BaseException as error:  # whatever it was, the run hears of it, and no exit handler waits for other ranks
        _die(error, channel, bool(parent))
    return 0


def _number(given: int | None) -> int:
    if given is not None:
        return given
    for name in ("SLURM_PROCID", "RANK"):
        text = os.environ.get(name, "")
        if text.isdigit():
            return int(text)
    raise ConfigError("which rank is this? Give --rank N, or set RANK; under srun, SLURM_PROCID says it")


def _own_group() -> None:
    """A process group that is this rank's alone, to kill; also keeps Ctrl-C in a terminal away."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


def _follow(parent: int) -> None:
    """Wake up when the run on this machine dies, even when stopped (SIGSTOP), to read EOF and end the whole group.

    SIGKILL instead would come before that thread's turn and leave forked processes behind.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGCONT))
    if os.getppid() != parent:
        sys.exit("the run has ended")


def _connect(address: tuple[str, int], key: bytes, wait_s: float) -> Connection:
    where = "{}:{}".format(*address)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return Client(address, authkey=key)
        except AuthenticationError:
            raise ConfigError(f"the run at {where} has another {KEY}; give the run and all its ranks the same one") from None
        except (EOFError, ConnectionResetError):
            raise ConfigError(f"{where} hung up; is it the run's train.megatron.listen?") from None
        except OSError as error:  # nobody listens yet, or the name is not known yet
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"no run at {where} ({error.strerror or error}); start it with train.megatron.launch=join and "
                    "train.megatron.listen at this address, or wait longer (--wait)"
                ) from None
        time.sleep(_RETRY_S)


def _serve(number: int, welcome: Welcome, started: bool, channel: Channel, mailbox: _Mailbox) -> None:
    try:
        context = _join_group(number, welcome, started, channel, mailbox)
    except MetisError as error:
        channel.send(Kind.FAILED, 0, error)
        print(f"metis-fast: {error}", file=sys.stderr, flush=True)
        signal.pause()  # until the run, which cannot go on, hangs up
        return
    worker = None
    while True:
        message = mailbox.calls.get()
        if message.kind is Kind.STOP:
            break
        mailbox.current = message.number
        worker = _answer(message, worker, welcome.worker, context, channel, mailbox)
    import torch.distributed as dist

    dist.destroy_process_group()


def _join_group(number: int, welcome: Welcome, started: bool, channel: Channel, mailbox: _Mailbox) -> Context:
    server = _open_store(welcome, channel) if number == 0 else None
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's order of overlapped communication relies on it
    import torch
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count == 1 and not started:  # a launcher shows each of its tasks a GPU of its own
            local = 0
        if local >= count:
            raise ConfigError(
                f"rank {number} is process {local} on {socket.gethostname()}, which shows it {count} GPUs; run one process a "
                "GPU (train.megatron's layout, or the launcher's tasks per node)"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # see `load_policy`
    else:
        # Megatron's fused functions would each be compiled by inductor and g++, for 13 s in all
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    timeout = timedelta(seconds=welcome.timeout_s)
    told = mailbox.calls.get()  # once all have joined
    assert told.kind is Kind.STORE, told.kind
    host, port = told.value()
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        host,
        port,
        is_master=server is not None,
        wait_for_workers=False,
        master_listen_fd=None if server is None else server.detach(),  # the store closes it
        timeout=timeout,
    )
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=welcome.num_ranks, timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    return Context(number, local, welcome.num_ranks, device, control, mailbox.asked)


def _open_store(welcome: Welcome, channel: Channel) -> socket.socket:
    """Where torch.distributed will meet, of rank 0; the run tells the others."""
    allow_files(1024 + 64 * welcome.num_ranks)  # a rank takes several descriptors there, one a process group
    server = socket.create_server((welcome.store, 0), backlog=512)
    channel.send(Kind.STORE, 0, server.getsockname()[:2])
    return server


def _answer(message: Message, worker: Any, name: str, context: Context, channel: Channel, mailbox: _Mailbox) -> Any:
    """Run a call and report how it ended; returns the worker, which the first call makes."""
    call = _share(message, context)
    result = None
    try:
        if not call.method:
            module, _, kind = name.partition(":")
            worker = getattr(importlib.import_module(module), kind)(context, *call.arguments)
        elif call.streams:
            for item in getattr(worker, call.method)(*call.arguments):
                mailbox.credits.acquire()
                channel.send(Kind.ITEM, message.number, item)
        else:
            with recorded(context.rank, call.method, message.number):
                result = getattr(worker, call.method)(*call.arguments)
    except Aborted:
        channel.send(Kind.ABORTED, message.number)
    except MetisError as error:
        channel.send(Kind.FAILED, message.number, error)
    else:
        channel.send(Kind.DONE, message.number, result)
    return worker


def _share(message: Message, context: Context) -> Call:
    """Rank 0's call to all: the run sends it once, however many ranks there are."""
    import torch
    import torch.distributed as dist

    data = bytearray(message.value() or b"")  # torch wants memory that it could write to
    size = torch.tensor([len(data)])
    dist.broadcast(size, group=context.control, group_src=0)
    data = data or bytearray(int(size))
    dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), group=context.control, group_src=0)
    return unpack(data)


def _die(error: BaseException, channel: Channel, started: bool) -> NoReturn:
    import torch.distributed as dist

    traceback.print_exception(error)
    sys.stderr.flush()
    last = traceback.format_exception_only(error)[-1].strip()
    # a broken collective operation: torch's own types, or what gloo throws
    echo = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    try:
        channel.send(Kind.DIED, 0, Died(last, echo))
    finally:
        if not started:  # nobody that we know of kills the group
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
