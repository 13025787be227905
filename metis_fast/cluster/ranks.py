"""The trainer's ranks on Ray, as the run sees them: started by keepers, reached through them, given groups and asked for
weights by them."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from metis_fast.cluster.keeper import Fetched
from metis_fast.cluster.room import Room, Seat
from metis_fast.cluster.tunnel import Tunnel
from metis_fast.cluster.weights import Published
from metis_fast.errors import ConfigError, TrainerError, one_line
from metis_fast.sync.manifest import Place
from metis_fast.train.megatron.peer import Peer
from metis_fast.train.megatron.shared import Kept
from metis_fast.train.megatron.wire import KEY
from metis_fast.train.protocol import GroupsLost

_POLL_S = 0.1
_CALL_S = 20.0  # for a keeper to start or end a process; then it counts as dead
_LOST = 255  # "exit code" of a process whose keeper is gone
# a process's environment is that of `ray start` on its machine, and these of the run's
_FORWARDED = ("GLOO_", "NCCL_", "OMP_NUM_THREADS", "VLLM_", "HF_")


class RankKeepers:
    """The keepers of a room with what the trainer's ranks want of them. A `Launch` of ranks; close it when these have ended."""

    def __init__(self, room: Room, logs: Path, start_s: float, withheld: Collection[str] = ()) -> None:
        """start_s: see `Launch`. withheld: variables of the environment of `ray start` that ranks do not get."""
        self._logs, self.start_s, self._withheld = logs.resolve(), start_s, tuple(withheld)
        self._seats = room.seats()
        self._tunnel = Tunnel([seat.keeper for seat in self._seats])
        together = len({seat.where.address for seat in self._seats}) == 1
        self.store = "127.0.0.1" if together else self._seats[0].where.address
        self._environment = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
        if together:
            self._environment.setdefault("GLOO_SOCKET_IFNAME", "lo")

    def close(self) -> None:
        """End all connections."""
        self._tunnel.close()

    def _seat(self, number: int) -> Seat:
        return next(seat for seat in self._seats if number in seat.ranks)

    # -- a launch -----------------------------------------------------------------------------------------------------

    @property
    def where(self) -> str:
        """See `Launch`."""
        return f"their machines ({', '.join(dict.fromkeys(seat.where.host for seat in self._seats))})"

    def start(self, number: int, key: str) -> Peer:
        """See `Launch`."""
        seat, name = self._seat(number), f"rank-{number}"
        log = self._logs / f"{name}.log"
        command = ("-m", "metis_fast", "rank", "--join", "{door}", "--rank", str(number))
        # LOCAL_RANK 0: it sees a GPU of its own alone
        environment = {**self._environment, "LOCAL_RANK": "0", KEY: key}
        try:
            gpu = number - seat.ranks.start
            ray.get(seat.keeper.start.remote(name, command, environment, log, gpu, self._withheld), timeout=_CALL_S)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            raise ConfigError(f"cannot start {name} on {seat.where.host}: {one_line(cause)[-300:]}") from None
        return Peer(number, placed=_Placed(seat, name, log))

    def connections(self) -> Iterator[socket.socket]:
        """See `Launch`."""
        return self._tunnel.connections()

    def shut(self) -> None:
        """See `Launch`: what strangers of the machine still say to its keeper, nobody reads."""

    # -- groups -------------------------------------------------------------------------------------------------------

    def lend(self, groups: Sequence[Kept]) -> list[Any]:
        """Keys of groups that are in this process, for `fetched`. Ray keeps them as long as the keys.

        Raises:
            TrainerError: Ray has no room for them.
        """
        try:
            return [ray.put(group) for group in groups]
        except RayError as error:
            raise TrainerError(_no_store(error)) from None

    @contextlib.contextmanager
    def fetched(
        self, keys: Sequence[Any], needed: Sequence[Collection[int]], check: Callable[[], None]
    ) -> Iterator[list[Mapping[int, str]]]:
        """Files of groups for each rank, on its machine, until the block ends. One keeper a machine fetches them, once each.

        keys: Ray's, of every group. needed: numbers of the groups that each rank reads. check: called while they come; what it
        raises goes on.

        Raises:
            GroupsLost: some cannot be fetched any more.
            TrainerError: there is no room for them.
        """
        wanted: dict[str, set[int]] = {seat.machine: set() for seat in self._seats}
        for seat in self._seats:
            wanted[seat.machine].update(*(needed[number] for number in seat.ranks))
        keepers = {seat.machine: seat.keeper for seat in reversed(self._seats)}  # the first one of each
        try:
            calls = [
                keepers[machine].fetch.remote(sorted(numbers), [keys[number] for number in sorted(numbers)])
                for machine, numbers in wanted.items()
            ]
            while len(ray.wait(calls, num_returns=len(calls), timeout=_POLL_S)[0]) < len(calls):
                check()
            found = [self._fetched(call) for call in calls]
            if lost := {number for one in found for number in one.lost}:
                raise GroupsLost(tuple(sorted(lost)))
            if problem := next((one.problem for one in found if one.problem), ""):
                raise TrainerError(problem)
            files = {machine: one.files for machine, one in zip(wanted, found, strict=True)}
            yield [files[self._seat(number).machine] for number in range(len(needed))]
        finally:
            calls = [keeper.forget.remote() for keeper in keepers.values()]
            ray.wait(calls, num_returns=len(calls), timeout=_CALL_S)

    def _fetched(self, call: Any) -> Fetched:
        try:
            return ray.get(call)
        except RayActorError:  # its ranks are gone with it, as the call that follows will find and say
            return Fetched()
        except RayError as error:
            return Fetched(problem=_no_store(error))

    # -- weights ------------------------------------------------------------------------------------------------------

    def put(self, buckets: Iterator[tuple[int, tuple[str, tuple[Place, ...]]]], version: int | None) -> Published:
        """Buckets that ranks have written into files, into Ray.

        buckets: number of the rank, its file, and what is where in it. version: see `Keeper.begin`.

        Raises:
            TrainerError: Ray has no room for them.
        """
        puts: list[Any] = []
        latest: dict[int, Any] = {}
        keepers = [seat.keeper for seat in self._seats]
        try:
            ray.get([keeper.begin.remote(version) for keeper in keepers])
            for number, (path, places) in buckets:
                if number in latest:
                    ray.wait([latest[number]])  # one a rank at a time: files wait in memory
                latest[number] = self._seat(number).keeper.put.remote(path, places)
                puts.append(latest[number])
            ray.get(puts)
            return Published.joined(ray.get([keeper.finish.remote() for keeper in keepers]))
        except RayError as error:
            raise TrainerError(_no_store(error)) from None


def _no_store(error: RayError) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return (
        f"a machine of the run cannot use Ray's object store: {one_line(cause)[-300:]}; give it more memory (ray start "
        "--object-store-memory), then run the same command again: it resumes from the last checkpoint"
    )


class _Placed:
    """A process that a keeper has started; see `Process`."""

    def __init__(self, seat: Seat, name: str, log: Path) -> None:
        self._seat, self._name, self._log = seat, name, log
        self._end = seat.keeper.wait.remote(name)
        self._code: int | None = None
        self._lock = threading.Lock()
        self._problem = ""

    def exit_code(self) -> int | None:
        """See `Process`."""
        with self._lock:
            if self._code is None and ray.wait([self._end], timeout=0)[0]:
                try:
                    self._code = ray.get(self._end)
                except RayError as error:
                    self._code, self._problem = _LOST, f"; Ray: {one_line(error)[-300:]}"
            return self._code

    def kill(self) -> None:
        """See `Process`."""
        keeper = self._seat.keeper
        try:
            ray.get(keeper.kill.remote(self._name), timeout=_CALL_S)
        except RayError:  # it is gone, and its processes find that nobody listens; or it hangs, with its machine maybe
            with contextlib.suppress(RayError):
                ray.kill(keeper)

    def describe(self) -> str:
        """See `Process`."""
        return f"{self._log} of {self._seat.where.host}{self._problem}"
