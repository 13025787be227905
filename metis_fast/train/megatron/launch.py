"""The run's side of the ranks: has them started or lets them join, calls their worker, and notices when one dies or hangs.

Whatever ends a call out of step kills all ranks: collective operations that some of them have left never end. Needs neither
torch nor megatron.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from metis_fast import __version__
from metis_fast.config import MegatronConfig
from metis_fast.errors import ConfigError, Interrupted, TrainerError
from metis_fast.open_files import allow_files
from metis_fast.train.megatron.door import Arrival, Door, Here, Launch
from metis_fast.train.megatron.peer import Peer, names
from metis_fast.train.megatron.wire import (
    KEY,
    Call,
    Died,
    Kind,
    Message,
    Welcome,
    pack,
)

_POLL_S = 0.1
_PING_S = 2.0
# A live rank answers a ping in milliseconds; what may keep its thread from it is a long call that holds the interpreter lock.
_SILENCE_S = 45.0
_START_SILENCE_S = 300.0  # before it is ready: loading CUDA's libraries from a cold network disk is such a call
_NEWS_S = 5.0  # between two lines that say who is missing
_AGREE_S = 10.0  # after the first rank has left a call by an exception: the others do so at the same place, or hang
_SETTLE_S = 1.0  # after a rank died of a broken collective operation: that of the rank which broke it follows
_LEAVE_S = 30.0  # for ranks told to stop
_AGAIN = "run the same command again: it resumes from the last checkpoint"


def _nothing() -> None:
    pass


class Ranks:
    """All ranks of a layout, each with a worker built. Close it, or use it in a `with`."""

    def __init__(
        self,
        layout: MegatronConfig,
        worker: str,
        arguments: object,
        logs: Path,
        check: Callable[[], None] = _nothing,
        launch: Launch | None = None,
        withheld: Collection[str] = (),
    ) -> None:
        """Start the ranks, or wait for them to join, and build `Class(context, arguments)` on each.

        worker: "module:Class". logs: folder for their output. check: called while waiting; what it raises ends the ranks and
        goes on. launch: None: on this machine; withheld: variables of the environment that ranks started there do not get.

        Raises:
            ConfigError: an address, key or rank number that cannot work.
            TrainerError: a rank died, hung, or never came.
            MetisError: what a worker raised.
        """
        self._layout = layout
        self._ranks = [Peer(number) for number in range(layout.num_ranks)]
        self._number = 0
        self._pinged = 0.0
        self._ready = False
        self._open = self._in_step = True
        allow_files(1024 + 8 * layout.num_ranks)
        try:
            launch = launch or Here(layout, logs, withheld)
            try:
                self._gather(launch, worker, logs, check)
            finally:
                launch.shut()
            for _ in self._run(Call("", (arguments,), streams=False), check, stoppable=False):
                raise AssertionError("a worker's constructor yields nothing")
            self._ready = True
        finally:
            if not self._ready:
                self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, Exception):
            self.close()
        else:
            self._kill()  # somebody is in a hurry

    def call(self, method: str, *arguments: object, check: Callable[[], None] = _nothing) -> list[Any]:
        """Run a method of the worker on all ranks; returns what it returned, by rank.

        check: called while waiting. If it raises Interrupted, ranks are asked to leave the call (`Context.aborted`), and it is
        raised here once they have; if they end the call instead (past the point of no return), its results are returned, and
        the caller's next check raises again.

        Raises:
            Interrupted: as said; the ranks can be used on.
            MetisError: what a worker raised; the ranks can be used on if all of them raised.
            TrainerError: a rank died or hung; all are killed.
        """
        with self._kept():
            results = self._run(Call(method, arguments, streams=False), check)
            while True:
                try:
                    next(results)
                except StopIteration as end:
                    return end.value

    def stream(self, method: str, *arguments: object) -> Iterator[tuple[int, Any]]:
        """Run a generator method on all ranks; yields (rank, item) as they come, in order within a rank.

        A rank is a few items ahead at most. Take all items: leaving earlier kills the ranks.

        Raises:
            As `call`.
        """
        with self._kept():
            yield from self._run(Call(method, arguments, streams=True), _nothing)

    def close(self) -> None:
        """Let the ranks end by themselves, kill those that do not within half a minute, and wait until all are gone."""
        try:
            if self._open and self._in_step:
                self._dismiss()
        finally:
            self._kill()

    # -- joining --------------------------------------------------------------------------------------------------------

    def _gather(self, launch: Launch, worker: str, logs: Path, check: Callable[[], None]) -> None:
        local = self._layout.launch == "local"
        key = secrets.token_hex(32) if local else os.environ.get(KEY, "")
        if not key:
            raise ConfigError(
                f"{KEY} is not set; give the run and all its ranks the same secret, for example {KEY}=$(openssl rand -hex 16)"
            )
        for number in range(len(self._ranks)):
            self._ranks[number] = launch.start(number, key)
        door, where = Door(launch, key), launch.where
        welcome = Welcome(len(self._ranks), worker, launch.store, self._layout.timeout_s)
        store: object = None
        started = time.monotonic()
        news = started if not local else started + _NEWS_S
        turned_away = ""
        while (missing := [i for i, rank in enumerate(self._ranks) if rank.channel is None]) or store is None:
            check()
            for _, message in self._read():
                if message.kind is Kind.FAILED:
                    raise message.value()
                assert message.kind is Kind.STORE, message.kind
                store = message.value()
            for number in missing:
                self._look_at(number)
            for arrival in door.arrivals():
                turned_away = self._admit(arrival, welcome) or turned_away
            now = time.monotonic()
            if missing and now > started + launch.start_s:
                raise TrainerError(
                    f"{names(missing)} did not join at {where} within {launch.start_s:g} s{turned_away}; "
                    + (f"see the logs in {logs}" if local else f"start each with: metis-fast rank --join {where} --rank N")
                )
            if missing and now > news:
                news = now + _NEWS_S
                print(
                    f"waiting for {names(missing)} of {len(self._ranks)} to join at {where}{turned_away}",
                    file=sys.stderr,
                    flush=True,
                )
        for number in range(len(self._ranks)):
            self._send(number, Kind.STORE, 0, store)

    def _admit(self, arrival: Arrival, welcome: Welcome) -> str:
        """Let a rank in; returns what to tell about one that is not."""
        channel, hello, problem = arrival
        if channel is None or hello is None:
            return f" ({problem})"
        number = hello.rank
        if hello.version != __version__:
            problem = f"rank {number} on {hello.host} runs metis-fast {hello.version}, the run {__version__}; install one"
        elif not 0 <= number < len(self._ranks):
            problem = (
                f"rank {number} of {hello.host} is not one of the layout's {len(self._ranks)} (0 to {len(self._ranks) - 1}); "
                "start as many ranks as tensor_parallel x pipeline_parallel x data_parallel (train.megatron)"
            )
        elif self._ranks[number].channel is not None:
            problem = (
                f"two ranks with number {number}, on {self._ranks[number].host} and on {hello.host}; give each its own "
                "(--rank, or one srun task a rank)"
            )
        with contextlib.suppress(OSError):  # it is gone again: the next look at it says so
            channel.send(*((Kind.REFUSED, 0, problem) if problem else (Kind.WELCOME, 0, welcome)))
        if problem:
            channel.close()
            raise ConfigError(problem)
        channel.limit(self._silence_s)
        rank = self._ranks[number]
        rank.channel, rank.host = channel, hello.host
        return ""

    def _look_at(self, number: int) -> None:
        """Of a rank that has not connected: has its process ended?"""
        if self._ranks[number].status(0) is not None:
            raise self._obituary({number: None})

    # -- calls ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Kills the ranks if they are out of step when the block ends: still in a call, or not all out of it the same way."""
        if not self._open:
            raise TrainerError(f"the ranks have ended; {_AGAIN}")
        assert self._in_step, "take all items of a stream before the next call"
        self._in_step = False
        try:
            yield
        finally:
            if not self._in_step:
                self._kill()

    def _run(self, call: Call, check: Callable[[], None], stoppable: bool = True) -> Iterator[tuple[int, Any]]:
        """Yields the items of a call until every rank has ended it; returns the results."""
        number = self._number = self._number + 1
        # rank 0's first: what cannot be pickled then leaves the others where they are
        for i in range(len(self._ranks)):
            self._send(i, Kind.CALL, number, pack(call) if i == 0 else None)
        ended: dict[int, Message] = {}
        agree = float("inf")
        interrupted: Interrupted | None = None
        while len(ended) < len(self._ranks):
            for i, message in self._read():
                if message.kind is Kind.ITEM:
                    yield i, message.value()
                    self._send(i, Kind.MORE)
                    continue
                ended[i] = message
                if message.kind is not Kind.DONE:
                    agree = min(agree, time.monotonic() + _AGREE_S)
            if time.monotonic() > agree:
                break
            if interrupted is None:
                try:
                    check()
                except Interrupted as asked:
                    if not stoppable:
                        raise
                    interrupted = asked
                    self._send(0, Kind.ABORT, number)
        kinds = {message.kind for message in ended.values()}
        self._in_step = len(ended) == len(self._ranks) and len(kinds) == 1
        if self._in_step and Kind.DONE in kinds:
            return [ended[i].value() for i in range(len(self._ranks))]
        for _, message in sorted(ended.items()):
            if message.kind is Kind.FAILED:
                raise message.value()
        assert interrupted is not None, "a worker raised Aborted without being asked"
        raise interrupted

    def _send(self, number: int, kind: Kind, about: int = 0, value: object = None) -> None:
        channel = self._ranks[number].channel
        assert channel is not None
        try:
            channel.send(kind, about, value)
        except OSError as error:
            raise self._lost(number, error) from None

    def _receive(self, number: int) -> Message:
        channel = self._ranks[number].channel
        assert channel is not None
        try:
            return channel.receive()
        except (EOFError, OSError) as error:
            raise self._lost(number, error) from None

    def _joined(self) -> dict[int, int]:
        """Descriptor of its connection -> number, of all ranks that have one."""
        return {rank.channel.fileno(): i for i, rank in enumerate(self._ranks) if rank.channel is not None}

    def _lost(self, number: int, error: OSError | EOFError) -> TrainerError:
        """Why the job ends, of a rank that could not be read or written to."""
        if isinstance(error, TimeoutError):
            return self._silent(number, self._silence_s)
        message: Message | None
        while (message := self._ranks[number].last_word()) is not None:  # a write fails before its last words are read
            if message.kind is Kind.DIED:
                return self._obituary({number: message.value()})
        return self._obituary({number: None})

    @property
    def _silence_s(self) -> float:
        return min(_SILENCE_S, self._layout.timeout_s)

    def _read(self) -> list[tuple[int, Message]]:
        """What ranks have sent, up to one message a rank, waiting a moment for it. Pings them from time to time."""
        now = time.monotonic()
        joined = self._joined()
        if now > self._pinged + min(_PING_S, self._silence_s / 5):
            self._pinged = now
            for i in joined.values():
                if self._ranks[i].pinged is None:
                    self._ranks[i].pinged = now
                    self._send(i, Kind.PING)
        messages = []
        for descriptor in wait(list(joined), _POLL_S):
            if not isinstance(descriptor, int):
                continue
            i = joined.pop(descriptor)
            message = self._receive(i)
            self._ranks[i].pinged = None
            if message.kind is Kind.DIED:
                raise self._obituary({i: message.value()})
            if message.kind is not Kind.PONG:
                messages.append((i, message))
        limit_s = self._silence_s if self._ready else min(_START_SILENCE_S, self._layout.timeout_s)
        for i in joined.values():  # those that had nothing to read: an answer that waits in the socket counts
            pinged = self._ranks[i].pinged
            if pinged is not None and time.monotonic() > pinged + limit_s:
                raise self._silent(i, limit_s)
        return messages

    # -- ends -----------------------------------------------------------------------------------------------------------

    def _silent(self, number: int, limit_s: float) -> TrainerError:
        rank = self._ranks[number]
        return TrainerError(
            f"{rank} has not answered for {limit_s:g} s, so it hangs or its machine is gone{rank.output}; {_AGAIN}"
        )

    def _obituary(self, lost: dict[int, Died | None]) -> TrainerError:
        """Why the job ends: of the ranks that died, the one whose death is not another's echo."""
        deadline = time.monotonic() + _SETTLE_S
        while all(died is not None and died.echo for died in lost.values()) and time.monotonic() < deadline:
            for i in self._readable(lost):
                message = self._ranks[i].last_word()
                if message is None or message.kind is Kind.DIED:
                    lost[i] = None if message is None else message.value()
        number, died = next(((i, died) for i, died in lost.items() if died is None or not died.echo), next(iter(lost.items())))
        return TrainerError(f"{self._ranks[number].ending(died)}; {_AGAIN}")

    def _dismiss(self) -> None:
        """Tell all ranks to end; wait until they have."""
        left: set[int] = set()
        for i, rank in enumerate(self._ranks):
            assert rank.channel is not None
            try:
                rank.channel.send(Kind.STOP)
            except OSError:
                left.add(i)
        deadline = time.monotonic() + _LEAVE_S
        while len(left) < len(self._ranks) and time.monotonic() < deadline:
            left |= {i for i in self._readable(left) if self._ranks[i].last_word() is None}

    def _readable(self, without: Collection[int]) -> list[int]:
        """Ranks that have sent something or hung up, after waiting a moment for it."""
        joined = {descriptor: i for descriptor, i in self._joined().items() if i not in without}
        return [joined[descriptor] for descriptor in wait(joined, _POLL_S) if isinstance(descriptor, int)]

    def _kill(self) -> None:
        """End all ranks and what they forked, now: those started here by signal, others through who has started them, all by
        hanging up."""
        self._open = False
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.bury()
