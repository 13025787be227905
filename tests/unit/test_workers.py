"""Workers: called, lost in every way, started again; nothing waits for ever."""

import asyncio
import itertools
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from metis_fast import __version__
from metis_fast.config import WorkersConfig
from metis_fast.errors import ConfigError, EngineError, InfrastructureError, ModelError
from metis_fast.workers import worker as worker_module
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import SCRATCH, Job, LocalLauncher
from metis_fast.workers.wire import KEY, Hello, Kind, Welcome, WireError, admit, apply, encode, receive
from metis_fast.workers.worker import Worker, WorkerError, wait_ready

PROBE = "metis_fast.testing.workers:Probe"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(WorkersConfig(silence_s=3.0, start_s=60.0), LocalLauncher(tmp_path)) as hub:
        yield hub


def _worker(hub: Hub, name: str = "probe", **options: int) -> Worker:
    return hub.worker(name, "tools", PROBE, **options)  # pyright: ignore[reportArgumentType]


Life = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class _Peer:
    """A worker's side in a thread of this process, and the `Process` that it stands for."""

    def __init__(self, life: Life, number: int, job: Job) -> None:
        self._life, self._number, self._job = life, number, job
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] = self._loop.create_task(self._serve())
        self._task.add_done_callback(lambda _: self._loop.stop())
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    async def _serve(self) -> None:
        host, port = self._job.command[4].split(":")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # it holds little that was not read
        sock.setblocking(False)
        await self._loop.sock_connect(sock, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=sock)
        await apply(reader, writer, self._job.environment[KEY].encode())
        _say(writer, Kind.HELLO, 0, Hello(self._job.name, __version__, "here", 0))
        assert (await receive(reader)).kind is Kind.WELCOME
        try:
            with suppress(WireError):  # the hub has left it
                await self._life(self._number, reader, writer)
        finally:
            writer.transport.abort()
            await asyncio.sleep(0)

    def exit_code(self) -> int | None:
        return None if self._thread.is_alive() else 1

    def kill(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join()
            self._loop.close()

    def describe(self) -> str:
        return "nowhere"


class _Peers:
    """A launcher of workers that a test plays. life: called with the number of the start."""

    host = "127.0.0.1"

    def __init__(self, life: Life) -> None:
        self._life = life
        self.started: list[_Peer] = []

    def start(self, job: Job) -> _Peer:
        self.started.append(_Peer(self._life, len(self.started), job))
        return self.started[-1]

    def close(self) -> None:
        for peer in self.started:
            peer.kill()


def _say(writer: asyncio.StreamWriter, kind: Kind, number: int = 0, value: object = None) -> None:
    for part in encode(kind, number, value):
        writer.write(part)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve: "die" ends it, any other method gives its arguments back."""
    _say(writer, Kind.READY)
    while (message := await receive(reader)).kind is not Kind.STOP:
        if message.kind is Kind.PING:
            _say(writer, Kind.PONG)
        elif message.kind is Kind.CALL:
            if message.value.method == "die":
                return
            _say(writer, Kind.DONE, message.number, message.value.arguments)


def _scratch(pid: int) -> Path:
    """A worker's folder for temporary files, in which something is left."""
    variables = dict(part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in part)
    folder = Path(variables["TMPDIR"])
    assert str(folder) == variables[SCRATCH] and folder.stat().st_mode & 0o777 == 0o700
    (folder / "sub").mkdir()
    (folder / "sub" / "left").touch()
    return folder


def test_calls_arrays_errors_and_cancellation(hub: Hub) -> None:
    async def go() -> None:
        worker = _worker(hub)
        array = np.arange(1 << 20, dtype=np.float32)
        back = await worker.call("echo", {"a": array, "b": b"x" * 100})
        assert (back["a"] == array).all() and back["b"] == b"x" * 100
        assert await asyncio.gather(*(worker.call("echo", i) for i in range(200))) == list(range(200))
        with pytest.raises(InfrastructureError, match="as asked"):
            await worker.call("fail", "ours")
        with pytest.raises(WorkerError, match="RuntimeError: as asked"):
            await worker.call("fail", "other")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker.call("nap", 60.0), 0.2)
        assert await worker.call("calls") == 201  # the same process served all of it
        assert worker.restarts == 0

    asyncio.run(go())


@pytest.mark.parametrize("how", ["kill", "exit", "stop", "hang", "deadline"])
def test_a_lost_worker_fails_its_calls_and_is_started_again(hub: Hub, how: str) -> None:
    async def go() -> None:
        worker = _worker(hub)
        pid = await worker.call("pid")
        scratch = _scratch(pid)
        waiting = asyncio.create_task(worker.call("nap", 600.0))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        match how:
            case "kill":
                os.kill(pid, signal.SIGKILL)
            case "stop":
                os.kill(pid, signal.SIGSTOP)
            case "exit":
                with pytest.raises(WorkerError):
                    await worker.call("exit", 7)
            case "hang":
                with pytest.raises(WorkerError):
                    await worker.call("hang", 600.0)
            case "deadline":
                with pytest.raises(WorkerError, match="longer than"):
                    await worker.call("nap", 600.0, deadline_s=0.5)
        with pytest.raises(WorkerError, match="probe was lost"):
            await waiting
        assert time.monotonic() - began < 60
        assert await worker.call("pid") != pid
        assert worker.restarts == 1
        with pytest.raises(ProcessLookupError):  # nothing of the old one is left
            os.kill(pid, 0)
        assert not scratch.exists()
        assert isinstance(hub.launcher, LocalLauncher) and len(hub.launcher._running) == 1

    asyncio.run(go())


def test_a_worker_that_keeps_dying_is_given_up(hub: Hub) -> None:
    async def go() -> None:
        worker = _worker(hub, max_restarts=1)
        for _ in range(2):
            with pytest.raises(WorkerError):
                await worker.call("exit", 3)
        with pytest.raises(WorkerError, match=r"ended with 3 .*started 2 times"):
            await worker.call("echo", 1)

    asyncio.run(go())


def test_prepare_runs_before_other_calls_and_after_every_start(hub: Hub) -> None:
    prepared: list[int] = []

    async def prepare(worker: Worker) -> None:
        prepared.append(await worker.call("pid", preparing=True))

    async def go() -> None:
        worker = hub.worker("probe", "tools", PROBE, prepare=prepare)
        assert [await worker.call("pid")] == prepared
        os.kill(prepared[0], signal.SIGKILL)
        with pytest.raises(WorkerError):
            await worker.call("nap", 600.0)
        assert [await worker.call("pid")] == prepared[1:]

    asyncio.run(go())


def test_a_service_that_refuses_its_settings_stops_at_once(hub: Hub) -> None:
    worker = hub.worker("probe", "tools", PROBE, "no such model")
    with pytest.raises(ConfigError, match="no such model"):
        wait_ready([worker], lambda: None)
    assert worker.restarts == 0


@pytest.mark.parametrize("where", ["load", "prepare"])
def test_a_worker_that_was_ready_may_fail_to_start_again_for_a_while(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(worker_module, "_PAUSE_S", 0.01)

    async def life(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if where == "load" and number in (1, 2):
            _say(writer, Kind.FAILED, 0, ModelError("less free memory than desired"))
            await reader.read()
        await _answer(reader, writer)

    async def prepare(worker: Worker) -> None:
        if where == "prepare" and worker.restarts in (1, 2):
            raise EngineError("of no version")

    async def go() -> None:
        with Hub(WorkersConfig(), peers) as hub:
            worker = hub.worker("probe", "engine", PROBE, max_restarts=3, prepare=prepare)
            for _ in range(2):
                assert await worker.call("echo", 1) == (1,)
                with pytest.raises(WorkerError):
                    await worker.call("die")
            with pytest.raises(WorkerError, match=r"started 4 times"):  # it has been started as often as promised
                await worker.call("echo", 1)

    peers = _Peers(life)
    asyncio.run(asyncio.wait_for(go(), 120))
    assert len(peers.started) == 4


def test_a_deadline_holds_while_a_worker_takes_nothing_more() -> None:
    async def life(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if number == 0:
            _say(writer, Kind.READY)
            await asyncio.sleep(600)  # a node without power
        await _answer(reader, writer)

    async def go() -> None:
        with Hub(WorkersConfig(), _Peers(life)) as hub:
            worker = hub.worker("probe", "engine", PROBE)
            other = asyncio.create_task(worker.call("echo", bytes(64 << 20)))
            began = time.monotonic()
            with pytest.raises(WorkerError, match=r"longer than 0\.3 s"):
                await worker.call("echo", bytes(64 << 20), deadline_s=0.3)
            with pytest.raises(WorkerError, match="was lost"):
                await other
            assert await worker.call("echo", 2) == (2,)
            assert time.monotonic() - began < 60

    asyncio.run(asyncio.wait_for(go(), 120))


def test_a_slow_connection_is_alive_as_long_as_it_takes_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_PING_S", 0.1)
    size = 16 << 20
    whole = asyncio.Event()

    async def life(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _say(writer, Kind.READY)
        taken = 0
        while taken < size:
            taken += len(await reader.readexactly(1 << 19))
            await asyncio.sleep(0.1)
        whole.set()
        await asyncio.sleep(600)

    async def go() -> None:
        with Hub(WorkersConfig(silence_s=2.0), _Peers(life)) as hub:
            worker = hub.worker("probe", "engine", PROBE, max_restarts=0)
            began = time.monotonic()
            with pytest.raises(WorkerError, match="has not answered for"):
                await worker.call("echo", bytes(size))
            assert whole.is_set() and 3 < time.monotonic() - began < 60

    asyncio.run(asyncio.wait_for(go(), 120))


def test_starts_that_wait_for_room_keep_nothing_else_waiting() -> None:
    room = threading.Event()

    class Full(_Peers):
        def start(self, job: Job) -> _Peer:
            room.wait()
            return super().start(job)

    async def life(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(reader, writer)

    async def go() -> None:
        with Hub(WorkersConfig(), Full(life)) as hub:
            try:
                workers = [_worker(hub, f"probe-{i}") for i in range(40)]  # more than asyncio's own threads
                assert await asyncio.wait_for(hub.run(asyncio.to_thread(lambda: "watched")), 60) == "watched"
            finally:
                room.set()
            assert await asyncio.gather(*(worker.call("echo", 1) for worker in workers)) == [(1,)] * 40

    asyncio.run(asyncio.wait_for(go(), 120))


def test_a_worker_that_is_lost_while_held_is_started_at_its_release() -> None:
    async def life(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(reader, writer)

    async def go() -> None:
        with Hub(WorkersConfig(), peers) as hub:
            worker = _worker(hub)
            assert await worker.call("echo", 1) == (1,)
            worker.hold()
            worker.hold()
            assert await worker.call("echo", 2) == (2,)  # it is there, and stays
            with pytest.raises(WorkerError, match="was lost"):
                await worker.call("die")
            waiting = asyncio.create_task(worker.call("echo", 3))
            await asyncio.sleep(0.3)
            assert not worker.alive and worker.restarts == 1 and len(peers.started) == 1 and not waiting.done()
            worker.release()
            assert await waiting == (3,)
            with pytest.raises(WorkerError, match="was lost"):
                await worker.call("die")
            assert await worker.call("echo", 4) == (4,)
            worker.hold()
            with pytest.raises(WorkerError):
                await worker.call("die")
            while worker.restarts < 3:
                await asyncio.sleep(0.01)
        worker.release()  # of no use any more, and no harm
        assert len(peers.started) == 3

    peers = _Peers(life)
    asyncio.run(asyncio.wait_for(go(), 120))


@pytest.mark.parametrize("stage", ["load", "prepare"])
def test_a_worker_that_is_held_while_it_starts_is_started_from_anew(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setattr(worker_module, "_PAUSE_S", 600.0)  # it has not failed, and no pause follows
    at = threading.Event()

    async def life(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if number == 0 and stage == "load":
            at.set()
            await reader.read()
        await _answer(reader, writer)

    async def prepare(worker: Worker) -> None:
        if len(peers.started) == 1:
            at.set()
            await asyncio.sleep(600)

    async def go() -> None:
        with Hub(WorkersConfig(), peers) as hub:
            worker = hub.worker("probe", "engine", PROBE, max_restarts=0, prepare=prepare)
            await asyncio.to_thread(at.wait, 60)
            worker.hold()
            while peers.started[0].exit_code() is None:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            assert not worker.alive and len(peers.started) == 1
            worker.release()
            assert await worker.call("echo", 1) == (1,)
            assert worker.restarts == 0

    peers = _Peers(life)
    asyncio.run(asyncio.wait_for(go(), 120))


def test_a_worker_that_is_gone_refuses_what_prepares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_PAUSE_S", 600.0)

    async def life(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _say(writer, Kind.FAILED, 0, "as asked")
        await reader.read()

    async def go() -> None:
        with Hub(WorkersConfig(), _Peers(life)) as hub:
            worker = hub.worker("probe", "engine", PROBE)
            while worker.restarts == 0:
                await asyncio.sleep(0.01)
            with pytest.raises(WorkerError, match="is being started again"):
                await worker.call("echo", 1, preparing=True)

    asyncio.run(asyncio.wait_for(go(), 120))


def test_starts_that_fail_are_farther_and_farther_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_PAUSE_S", 0.1)
    monkeypatch.setattr(worker_module, "_LONGEST_PAUSE_S", 0.3)
    at: list[float] = []

    async def life(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        at.append(time.monotonic())
        _say(writer, Kind.FAILED, 0, "as asked")
        await reader.read()

    with Hub(WorkersConfig(), _Peers(life)) as hub:
        worker = hub.worker("probe", "engine", PROBE, max_restarts=4)
        with pytest.raises(WorkerError, match="cannot start: as asked"):
            asyncio.run(asyncio.wait_for(worker.call("echo", 1), 120))
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert len(gaps) == 4 and all(gap >= least for gap, least in zip(gaps, (0.1, 0.2, 0.3, 0.3), strict=True)), gaps


def test_strangers_are_turned_away(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    host, port = hub.address.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as stranger:
        assert len(stranger.recv(200)) > 32
        stranger.sendall(b"\0" * 64)
        stranger.settimeout(60)
        assert stranger.recv(100) == b""
    assert "another key" in caplog.text


def test_workers_end_with_the_run(tmp_path: Path) -> None:
    hub = Hub(WorkersConfig(), LocalLauncher(tmp_path))
    worker = _worker(hub)
    pid = asyncio.run(worker.call("pid"))
    scratch = _scratch(pid)
    began = time.monotonic()
    hub.close()
    hub.close()
    assert time.monotonic() - began < 60
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not scratch.exists()


def test_a_worker_whose_run_is_gone_while_it_loads_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    launcher = LocalLauncher(tmp_path)

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await admit(reader, writer, b"key")
        assert (await receive(reader)).kind is Kind.HELLO
        _say(writer, Kind.WELCOME, 0, Welcome("time:sleep", (600.0,)))
        _say(writer, Kind.PING)
        while (await receive(reader)).kind is not Kind.PONG:
            pass
        await asyncio.sleep(0.2)  # it sleeps now
        writer.close()

    async def go() -> int:
        async with await asyncio.start_server(welcome, "127.0.0.1", 0) as server:
            address = "{}:{}".format(*server.sockets[0].getsockname())
            command = ("-m", "metis_fast", "worker", "--join", address, "--name", "probe")
            process = launcher.start(Job("probe", "engine", command, {KEY: "key"}))
            while (code := process.exit_code()) is None:
                await asyncio.sleep(0.05)
            return code

    assert asyncio.run(asyncio.wait_for(go(), 120)) == -signal.SIGKILL
    assert not list(tmp_path.glob("metis-*"))  # its temporary files
    assert "worker probe: connection lost" in (tmp_path / "probe.log").read_text()
    launcher.close()
