"""vLLM's own weight transfers between GPUs (`sync.transport: nccl | ipc`), from the run's process. Imports vllm at first use.

A tensor is put on the run's GPU when it is sent, broadcast (NCCL) or shared (CUDA IPC), and loaded as it comes: there is no old
version to go back to, so engines of a transfer that fails are started anew. What waits in NCCL for an engine that has died
cannot be ended: it runs in a thread that the process leaves behind. CUDA IPC has been run on a GPU, NCCL has not.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from metis_fast.config import Config
from metis_fast.errors import EngineError, InfrastructureError, SyncError
from metis_fast.rollout.engine import SyncReport
from metis_fast.rollout.vllm import library
from metis_fast.rollout.vllm.replica import LOAD_S, Replica
from metis_fast.workers.hub import Hub

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import ParamMeta

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_CLOSE_S = 60.0  # for a communicator to be left
_POLL_S = 0.05
_IPC_BUFFER = 1 << 28  # bytes at least, made for each transfer

Ask = Callable[[str, Sequence[tuple[object, ...]]], None]
"""Runs a method on every engine, with the arguments of each, and waits for all; an exception of one is raised."""
_HOST = "127.0.0.1"  # engines are processes of this machine


class Client:
    """vLLM's `VLLMWeightSyncClient` over several engines; between `start` and `finish` none of them makes a step.

    ranks: processes of one engine (tensor parallel).
    """

    def __init__(self, ask: Ask, engines: int, ranks: int) -> None:
        self._ask, self._engines, self._ranks = ask, engines, ranks
        self.version = 0

    def _all(self, method: str, *arguments: object) -> None:
        self._ask(method, [arguments] * self._engines)

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Ranks of a communicator: 0 is the run's, then those of the engines one after the other."""
        own = [dict(init_info) for _ in range(self._engines)]
        if "rank_offset" in init_info:
            for number, info in enumerate(own):
                info["rank_offset"] = 1 + number * self._ranks
        self._ask("transfer", [("init_weight_transfer_engine", info) for info in own])

    def start_weight_update(self) -> None:
        """Requests wait from here on."""
        self._all("pause")
        self._all("transfer", "start_weight_update", None)

    def update_weights(self, update_info: Any) -> None:
        """A part, or all, of the tensors."""
        self._all("transfer", "update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Requests go on, with the new version."""
        self._all("transfer", "finish_weight_update", None)
        self._all("resume", self.version)


class Source:
    """vLLM's `WeightSource` over tensors that lie anywhere. device: where they are sent from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.pairs: Sequence[tuple[str, Tensor]] = ()

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of each, in the order of iteration."""
        from vllm.distributed.weight_transfer.base import ParamMeta  # vLLM asks for it

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.pairs]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.pairs:
            yield name, tensor.detach().to(self._device)


def check(transport: str) -> None:
    """
    Raises:
        EngineError: the run's process has no GPU.
    """
    if not torch.cuda.is_available():
        raise EngineError(f"sync.transport={transport} sends from a GPU of the run's process, which has none; use staged")


class DirectTransfer:
    """One set of engines and the run. Made anew when one of them was started again.

    host: of this machine, as the engines reach it. largest: bytes of the largest tensor.

    Raises:
        InfrastructureError: an engine failed, or NCCL did.
    """

    def __init__(self, transport: str, host: str, ask: Ask, engines: int, ranks: int, largest: int) -> None:
        check(transport)
        library.load()
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self._client = Client(ask, engines, ranks)
        self._source: Any = Source(torch.device("cuda"))
        if transport == "nccl":
            with socket.create_server((host, 0)) as server:  # a port that is free now
                port = server.getsockname()[1]
            info: Any = NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=1 + engines * ranks, rank=0)
        else:
            # a tensor has to fit into the buffer: the embeddings of an 8B model are larger than vLLM's default
            info = IPCTrainerInitInfo(packed=True, rank=0, packed_buffer_size_bytes=max(largest, _IPC_BUFFER))
        self._sender: Any = _failing(
            transport, lambda: WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source)
        )
        self._transport = transport

    def send(self, pairs: Sequence[tuple[str, Tensor]], version: int) -> None:
        """All tensors, by Hugging Face names.

        Raises:
            InfrastructureError: an engine failed, or NCCL did; what weights engines have now is unknown.
        """
        self._source.pairs, self._client.version = pairs, version
        try:
            _failing(self._transport, self._sender.send_weights)
        finally:
            self._source.pairs = ()

    def close(self) -> None:
        """Leave the communicator."""
        self._sender.shutdown()


class DirectWeights:
    """Sends versions to replicas, all at once. Its coroutines run on the hub's loop.

    replicas: of the engine; may be filled later. newest: last version that was sent, or is being sent.

    Raises:
        EngineError: the run's process has no GPU.
    """

    def __init__(self, config: Config, hub: Hub, replicas: Sequence[Replica]) -> None:
        check(config.sync.transport)
        self._transport, self._retries = config.sync.transport, config.sync.retries
        self._ranks, self._hub, self._replicas = config.rollout.vllm.tensor_parallel, hub, replicas
        self.newest = 0
        self._open: DirectTransfer | None = None
        self._lives: list[tuple[str, int]] = []  # of the replicas in it
        self._lock = asyncio.Lock()  # one sender at a time

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """By vLLM's own transfer, into all replicas at once; those of a failed one are started anew.

        Raises:
            EngineError: none is left, none took them after retries, or a transfer hangs.
        """
        pairs = await asyncio.to_thread(list, weights)
        began = time.perf_counter()
        for attempt in range(self._retries + 1):
            await self._settled()
            async with self._lock:
                replicas = [replica for replica in self._replicas if replica.worker.broken is None]
                if not replicas:
                    raise EngineError(f"no engine took weight version {version}: {self._replicas[0].worker.broken}")
                lives = [replica.worker.restarts for replica in replicas]
                sending = _in_thread(partial(self._send, replicas, pairs, version))
                await asyncio.wait({sending}, timeout=LOAD_S)
                if not sending.done():
                    sending.cancel()
                    self._open = None  # that thread's, for good
                    for replica in replicas:  # which ends what that thread has asked them
                        await replica.worker.lose("a weight transfer hangs")
                    raise EngineError(
                        f"weight version {version} by {self._transport} took longer than {LOAD_S:g} s: an engine died or hangs "
                        "in the middle, for which NCCL waits for ever; run the same command again, or set sync.transport=staged"
                    )
                try:
                    sending.result()
                except InfrastructureError as error:
                    _LOG.warning("weights by %s, try %d: %s", self._transport, attempt + 1, error)
                    await self._leave()
                    for replica, life in zip(replicas, lives, strict=True):
                        await replica.lose(life, f"a weight transfer failed: {error}")
                    continue
            seconds = time.perf_counter() - began
            num_bytes = sum(tensor.nbytes for _, tensor in pairs)
            return SyncReport(version, "full", num_bytes, seconds, seconds, attempt)
        raise EngineError(f"no engine took weight version {version} in {self._retries + 1} tries by direct transfer")

    async def prepare(self, replica: Replica) -> None:
        """After a start of the replica, which has the weights of the model's folder: it waits for the next update, if there was
        one before."""
        if self.newest:
            replica.wait()
        else:
            replica.got(0)

    def held(self) -> dict[str, Tensor]:
        """See `RunEngine`: none of them stay here."""
        return {}

    @property
    def why_not(self) -> str:
        """Why a replica cannot have the newest version before the next update."""
        return f"sync.transport={self._transport}"

    def close(self) -> None:
        """Leave the communicator."""
        if self._open is not None:
            self._open.close()

    async def _settled(self) -> None:
        """Until no replica is being started."""
        while any(not replica.worker.alive and replica.worker.broken is None for replica in self._replicas):
            await asyncio.sleep(_POLL_S)

    async def _leave(self) -> None:
        """Free the communicator, unless that hangs, too."""
        left, self._open = self._open, None
        if left is None:
            return
        closing = _in_thread(left.close)
        await asyncio.wait({closing}, timeout=_CLOSE_S)
        error = closing.exception() if closing.done() else f"took longer than {_CLOSE_S:g} s"
        if error is not None:
            closing.cancel()
            _LOG.warning("closing a failed weight transfer: %s", error)

    def _send(self, replicas: Sequence[Replica], pairs: Sequence[tuple[str, Tensor]], version: int) -> None:
        """In a thread: vLLM's side of it blocks."""
        lives = [(replica.worker.name, replica.worker.restarts) for replica in replicas]
        if self._open is None or self._lives != lives:  # an engine that was started anew is in no communicator
            if self._open is not None:
                self._open.close()
                self._open = None
            ask = partial(self._ask_all, replicas)
            largest = max(tensor.nbytes for _, tensor in pairs)
            self._open = DirectTransfer(self._transport, _HOST, ask, len(replicas), self._ranks, largest)
            self._lives = lives
        transfer, self.newest = self._open, version
        transfer.send(pairs, version)
        for replica in replicas:
            replica.got(version)

    def _ask_all(self, replicas: Sequence[Replica], method: str, arguments: Sequence[tuple[object, ...]]) -> None:
        async def ask() -> None:
            calls = [
                replica.worker.call(method, *own, deadline_s=LOAD_S) for replica, own in zip(replicas, arguments, strict=True)
            ]
            await asyncio.gather(*calls)

        self._hub.now(ask())


def _in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Run it in a thread for which no end of the process waits, unlike those of `asyncio.to_thread`."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def set_result(result: T) -> None:
        if not future.done():
            future.set_result(result)

    def set_exception(error: Exception) -> None:
        if not future.done():
            future.set_exception(error)

    def work() -> None:
        try:
            result = call()
        except Exception as error:  # handed on, whatever it is
            with suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(set_exception, error)
            return
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(set_result, result)

    threading.Thread(target=work, name="weights", daemon=True).start()
    return future


def _failing(transport: str, call: Callable[[], T]) -> T:
    """Run a call of vLLM's. What NCCL, or the store that its ranks meet at, comes to say arrives as RuntimeError."""
    try:
        return call()
    except InfrastructureError:
        raise
    except RuntimeError as error:
        raise SyncError(f"weights by {transport}: {type(error).__name__}: {error}") from error
