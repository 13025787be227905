"""vLLM engines as the run sees them: `Engine` over several workers, each with a replica of the model.

A router keeps the rollouts of a prompt, and every rollout's messages, on the replica that holds their cache, as long as that
one lives. What a replica answers is checked before it is believed. One that dies, hangs or answers garbage is started again,
given the current weights, and then takes part again; meanwhile others take its rollouts, from their last whole message.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metis_fast.config import Config, WorkersConfig
from metis_fast.errors import EngineError, EngineFailure, InfrastructureError, StagingError, SyncError
from metis_fast.model import IMAGE_PAD, VISION_END, VISION_START, Policy
from metis_fast.rollout.engine import Completion, Sampling, SyncReport
from metis_fast.rollout.layers import Layers, unpack
from metis_fast.rollout.vllm.direct import DirectTransfer, in_thread
from metis_fast.rollout.vllm.direct import check as check_direct
from metis_fast.rollout.vllm.settings import (
    LENGTH,
    SERVICE,
    STOPPED,
    EngineSettings,
    EngineStats,
    GenerateReply,
    GenerateRequest,
)
from metis_fast.sync.staging import Payload, Staging
from metis_fast.tools.sandbox.wire import MAX_IMAGES
from metis_fast.train.megatron.names import hf_shapes
from metis_fast.types import ImageBlob, ImageSpan, Rollout
from metis_fast.workers.hub import Hub, Worker, WorkerError, wait_ready

_LOG = logging.getLogger(__name__)
_MISSING = "is not here"  # ImagesMissingError's words; the class is the service's
_LOAD_S = 600.0  # for a replica to take a version
_CALL_S = 60.0
_POLL_S = 0.05
_SPREAD = 2.0  # a prompt's replica is left when it has so many times the rollouts of the least loaded one, and some more
_SLACK = 16
_PROMPT_IMAGES = 16


@dataclass(slots=True, eq=False)
class _Replica:
    """A worker, and what the run knows of it.

    sent: images that it has. sessions: open ones. since: first weight version that it got in this life; what it sampled with an
    older one is not to be used. None: it has those of the model's folder. waiting: the life (`Worker.restarts`) in which it
    cannot have the current version any more. slots: for the requests that vLLM runs at once; those beyond wait here, where no
    deadline counts yet.
    """

    worker: Worker
    slots: asyncio.Semaphore
    sent: set[str] = field(default_factory=set)
    sessions: int = 0
    since: int | None = 0
    waiting: int | None = None

    @property
    def waits(self) -> bool:
        """Whether it is up, but is of no use before the next update."""
        return self.waiting == self.worker.restarts

    def started(self) -> None:
        """It is new."""
        self.sent.clear()
        self.since = None

    def wait(self) -> None:
        """The next update gives it weights."""
        self.waiting = self.worker.restarts

    def got(self, version: int) -> None:
        """It has these weights."""
        self.waiting = None
        if self.since is None:
            self.since = version


class _Session:
    def __init__(self, engine: VllmEngine, prompt: str, replica: _Replica | None = None) -> None:
        self._engine, self._prompt = engine, prompt
        self._replica = engine.route(prompt) if replica is None else replica
        self._replica.sessions += 1
        self._open = True

    async def generate(
        self, tokens: Sequence[int], images: Sequence[ImageBlob], spans: Sequence[ImageSpan], sampling: Sampling
    ) -> Completion:
        """See `EngineSession`."""
        if not self._open:
            raise ValueError("the session is closed")
        if not self._replica.worker.alive or self._replica.waits:  # between two messages, its cache is lost anyway
            self._replica.sessions -= 1
            self._engine.left(self._prompt)
            self._replica = self._engine.route(self._prompt)
            self._replica.sessions += 1
        return await self._engine.generate(self._replica, tokens, images, spans, sampling)

    def close(self) -> None:
        """See `EngineSession`."""
        if self._open:
            self._open = False
            self._replica.sessions -= 1
            self._engine.left(self._prompt)


@dataclass(frozen=True, slots=True, eq=False)
class _Copied:
    """A version on another machine, in shared memory of one of the engines there. life: its `Worker.restarts` then."""

    worker: Worker
    life: int
    version: int
    manifest: dict[str, Any]

    def holds(self, version: int) -> bool:
        return self.version == version and self.worker.restarts == self.life and self.worker.broken is None


class VllmEngine:
    """`Engine` over `rollout.vllm.replicas` workers, which start in the background: see `wait`.

    policy: for tokens and shapes; its weights are not used. service: what a worker serves (tests put failures in). copy_always:
    send weights over the connection also on this machine.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        hub: Hub,
        service: str = SERVICE,
        copy_always: bool = False,
    ) -> None:
        if config.sync.transport != "staged":
            check_direct(config.sync.transport)
        self._config, self._policy, self._hub, self._copy_always = config, policy, hub, copy_always
        vllm = config.rollout.vllm
        self._banned = np.asarray(policy.placeholder_ids, np.int64)
        self._staging: Staging | None = None
        self._copies: dict[str, _Copied] = {}
        self._copying: dict[str, asyncio.Lock] = {}
        self._direct: DirectTransfer | None = None
        self._direct_lives: list[tuple[str, int]] = []
        listen = config.workers.listen  # the hub's rule: by default it is found where its launcher's machines find it
        self._host = hub.launcher.host if listen == WorkersConfig().listen else listen.rpartition(":")[0]
        self._version = 0  # the last one that was sent, or is being sent
        self._lock: asyncio.Lock | None = None  # of the hub's loop: one sender at a time
        self._home: dict[str, tuple[_Replica, int]] = {}  # of a prompt: where, and by how many open sessions
        settings = _settings(config, policy)
        self._replicas: list[_Replica] = []
        on_gpu = torch.cuda.is_available()
        for number in range(vllm.replicas):
            environment = {"OMP_NUM_THREADS": str(vllm.cpu_threads)} if vllm.cpu_threads and not on_gpu else {}
            if config.sync.transport == "ipc":  # handles of GPU memory go to vLLM's own process pickled, which it must be told
                environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
            worker = hub.worker(
                f"engine-{number}",
                "engine",
                service,
                settings,
                cpus=1.0 if on_gpu else float(max(1, vllm.cpu_threads) * vllm.tensor_parallel),
                gpus=vllm.tensor_parallel if on_gpu else 0,
                max_restarts=vllm.restarts,
                prepare=self._prepare,
                environment=environment,
            )
            self._replicas.append(_Replica(worker, asyncio.Semaphore(vllm.max_num_seqs)))

    def wait(self, check: Callable[[], None]) -> None:
        """Until all replicas are ready.

        check: called meanwhile; what it raises goes on.

        Raises:
            EngineError, ModelError: vLLM is not there, does not take the settings or the model, or does not start.
        """
        try:
            wait_ready(self.workers(), check)
        except WorkerError as error:
            raise EngineError(str(error)) from None

    # -- rollouts ----------------------------------------------------------------------------------------------------

    def session(self, order: int, prompt: str = "") -> _Session:
        """See `Engine`."""
        return _Session(self, prompt)

    def probe_session(self, order: int) -> _Session:
        """A session on the replica whose turn it is: as many in a row as there are replicas reach all that are up."""
        up = self._up()
        return _Session(self, "", up[order % len(up)] if up else None)

    def _up(self) -> list[_Replica]:
        return [replica for replica in self._replicas if replica.worker.alive and not replica.waits]

    def route(self, prompt: str) -> _Replica:
        """The replica for a rollout of `prompt`: where others of it are, else the living one with the fewest rollouts.

        Raises:
            EngineError: none can be started any more, or none has the current weights.
        """
        usable = [replica for replica in self._replicas if replica.worker.broken is None]
        if not usable:
            raise EngineError(f"no engine is left: {self._replicas[0].worker.broken}")
        usable = [replica for replica in usable if not replica.waits]
        if not usable:
            raise EngineError(
                "no engine has the current weights: all were started anew, and the weights can be sent again with the next "
                f"update only ({self._why_not()}); run the same command again"
            )
        living = [replica for replica in usable if replica.worker.alive] or usable
        least = min(living, key=lambda replica: replica.sessions)
        home, count = self._home.get(prompt, (least, 0)) if prompt else (least, 0)
        if home not in living or home.sessions > _SPREAD * least.sessions + _SLACK:
            home = least
        if prompt:
            self._home[prompt] = (home, count + 1)
        return home

    def _why_not(self) -> str:
        if self._staging is not None and self._staging.damage:
            return self._staging.damage
        return f"sync.transport={self._config.sync.transport}"

    def left(self, prompt: str) -> None:
        """A session of `prompt` was closed."""
        home, count = self._home.get(prompt, (None, 0))
        if home is not None and count > 1:
            self._home[prompt] = (home, count - 1)
        else:
            self._home.pop(prompt, None)

    async def generate(
        self,
        replica: _Replica,
        tokens: Sequence[int],
        images: Sequence[ImageBlob],
        spans: Sequence[ImageSpan],
        sampling: Sampling,
    ) -> Completion:
        """One message by one replica; see `EngineSession.generate`."""
        by_hash = {image.sha256: image.data for image in images}
        needed = dict.fromkeys(span.sha256 for span in spans)
        new = {sha256: by_hash[sha256] for sha256 in needed if sha256 not in replica.sent}
        try:
            try:
                reply = await self._ask(replica, tokens, spans, new, sampling)
            except EngineFailure as error:
                if _MISSING not in str(error):
                    raise
                reply = await self._ask(replica, tokens, spans, {sha256: by_hash[sha256] for sha256 in needed}, sampling)
        except WorkerError as error:
            raise EngineFailure(str(error)) from None
        problem = self._problem(reply, sampling)
        if problem:
            why = f"it answered garbage: {problem}"
            await replica.worker.lose(why)
            raise EngineFailure(f"{replica.worker.name}: {why}")
        if replica.since is None or (reply.version < replica.since).any():  # it was asked while it was being started
            raise EngineFailure(f"{replica.worker.name} sampled before it had the current weights")
        stopped = reply.finish == STOPPED
        return Completion(reply.tokens, np.minimum(reply.logp, 0.0), reply.version, stopped)

    async def _ask(
        self, replica: _Replica, tokens: Sequence[int], spans: Sequence[ImageSpan], new: Mapping[str, bytes], sampling: Sampling
    ) -> GenerateReply:
        request = GenerateRequest(
            np.asarray(tokens, np.int32),
            tuple((span.start, span.stop, span.sha256) for span in spans),
            new,
            sampling.max_tokens,
            sampling.stop_ids,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.seed,
        )
        worker = replica.worker
        life, alive = worker.restarts, worker.alive
        async with replica.slots:
            if alive and not (worker.alive and worker.restarts == life):  # another one may have room now
                raise EngineFailure(f"{worker.name} was lost before the request's turn")
            reply = await worker.call("generate", request, deadline_s=self._config.rollout.vllm.request_s)
        if life == worker.restarts:
            replica.sent.update(new)
        return reply

    def _problem(self, reply: object, sampling: Sampling) -> str:
        """What is wrong with an answer, or ""."""
        if not isinstance(reply, GenerateReply):
            return f"a {type(reply).__name__}"
        if reply.finish not in (STOPPED, LENGTH):
            return f"it ended with {reply.finish!r}"
        kinds = [(getattr(one, "dtype", None), getattr(one, "ndim", 0)) for one in (reply.tokens, reply.logp, reply.version)]
        if kinds != [(np.int32, 1), (np.float32, 1), (np.int32, 1)]:
            return f"arrays of {', '.join(str(dtype) for dtype, _ in kinds)}"
        num, vocab = len(reply.tokens), self._policy.vocab_size
        if not 0 < num <= sampling.max_tokens or reply.logp.shape != (num,) or reply.version.shape != (num,):
            return (
                f"{num} tokens, {len(reply.logp)} log-probs and {len(reply.version)} versions; 1 to {sampling.max_tokens} asked"
            )
        if (reply.tokens < 0).any() or (reply.tokens >= vocab).any():
            return f"a token outside the vocabulary of {vocab}"
        if np.isin(reply.tokens, self._banned).any():
            return "it sampled an image placeholder"
        if (reply.version < 0).any() or (reply.version > self._version).any():
            return f"a token of weight version {int(reply.version.max())}, the newest is {self._version}"
        if not np.isfinite(reply.logp).all() or (reply.logp > 1e-3).any():
            return "a log-prob that is none"
        if (reply.finish == STOPPED) != (int(reply.tokens[-1]) in sampling.stop_ids):
            return f"it ended with {reply.finish!r} at token {int(reply.tokens[-1])}"
        return ""

    async def layer_outputs(self, order: int, rollout: Rollout) -> Layers:
        """What the layers of an engine make of a rollout's tokens but the last. order: of the session (`probe_session`).

        Raises:
            InfrastructureError: it failed, or none is up.
        """
        up = self._up()
        if not up:
            raise EngineFailure("no engine is up")
        worker = up[order % len(up)].worker
        spans = tuple((span.start, span.stop, span.sha256) for span in rollout.image_spans)
        images = {image.sha256: image.data for image in rollout.images}
        request = GenerateRequest(rollout.tokens[:-1], spans, images, 1, (), 1.0, 1.0, 0, 0)
        return unpack(await worker.call("layer_outputs", request, deadline_s=self._config.rollout.vllm.request_s))

    async def stats(self) -> list[EngineStats]:
        """Of every living replica."""
        living = [replica.worker for replica in self._replicas if replica.worker.alive]
        return [await worker.call("stats", deadline_s=_CALL_S) for worker in living]

    @property
    def restarts(self) -> int:
        """How often replicas were started again."""
        return sum(replica.worker.restarts for replica in self._replicas)

    def workers(self) -> list[Worker]:
        """Of all replicas."""
        return [replica.worker for replica in self._replicas]

    # -- weights -----------------------------------------------------------------------------------------------------

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """See `Engine`. A replica that is being started gets the weights when it is up."""
        return await self._hub.run(self._update(weights, version))

    def _sender(self) -> asyncio.Lock:
        if self._lock is None:
            self._lock = asyncio.Lock()
        return self._lock

    async def _update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        began = time.perf_counter()
        if self._config.sync.transport != "staged":
            return await self._update_direct(await asyncio.to_thread(list, weights), version)
        async with self._sender():
            if self._staging is None:
                settings = self._config.sync
                shapes = {name: tuple(shape) for name, shape in hf_shapes(self._policy.model.config).items()}
                self._staging = Staging(shapes, self._policy.head.dtype, settings.bucket_mb << 20)
            # reading a trainer's weights may take long, and pings must be answered meanwhile
            manifest = await asyncio.to_thread(self._staging.write, weights, version)
            self._version = version
            living = [replica for replica in self._replicas if replica.worker.alive or replica.waits]
            results = await asyncio.gather(*(self._push(replica, replica.worker.restarts) for replica in living))
            if self._staging.damage:
                raise StagingError(f"what was staged has changed: {self._staging.damage}")
        done = [result for result in results if result is not None]
        if not done and all(replica.worker.broken is not None for replica in self._replicas):
            raise EngineError(f"no engine took weight version {version}: {self._replicas[0].worker.broken}")
        return SyncReport(
            version=version,
            mode=self._config.sync.mode if any(sent for sent, _, _ in done) else "full",
            num_bytes=max((sent for sent, _, _ in done), default=0) or manifest.num_bytes,
            seconds=time.perf_counter() - began,
            pause_s=max((pause for _, pause, _ in done), default=0.0),
            retries=sum(retries for _, _, retries in done),
        )

    async def _update_direct(self, pairs: Sequence[tuple[str, Tensor]], version: int) -> SyncReport:
        """By vLLM's own transfer, into all replicas at once; those of a failed one are started anew.

        Raises:
            EngineError: none is left, none took them after retries, or a transfer hangs.
        """
        began, transport = time.perf_counter(), self._config.sync.transport
        for attempt in range(self._config.sync.retries + 1):
            await self._settled()
            async with self._sender():
                replicas = [replica for replica in self._replicas if replica.worker.broken is None]
                if not replicas:
                    raise EngineError(f"no engine took weight version {version}: {self._replicas[0].worker.broken}")
                lives = [replica.worker.restarts for replica in replicas]
                sending = in_thread(partial(self._send_direct, replicas, pairs, version))
                await asyncio.wait({sending}, timeout=_LOAD_S)
                if not sending.done():
                    sending.cancel()
                    self._direct = None  # that thread's, for good
                    for replica in replicas:  # which ends what that thread has asked them
                        await replica.worker.lose("a weight transfer hangs")
                    raise EngineError(
                        f"weight version {version} by {transport} took longer than {_LOAD_S:g} s: an engine died or hangs in "
                        "the middle, for which NCCL waits for ever; run the same command again, or set sync.transport=staged"
                    )
                try:
                    sending.result()
                except InfrastructureError as error:
                    _LOG.warning("weights by %s, try %d: %s", transport, attempt + 1, error)
                    await self._leave_direct()
                    for replica, life in zip(replicas, lives, strict=True):
                        await self._lose(replica, life, f"a weight transfer failed: {error}")
                    continue
            seconds = time.perf_counter() - began
            num_bytes = sum(tensor.nbytes for _, tensor in pairs)
            return SyncReport(version, "full", num_bytes, seconds, seconds, attempt)
        raise EngineError(
            f"no engine took weight version {version} in {self._config.sync.retries + 1} tries by direct transfer"
        )

    async def _settled(self) -> None:
        """Until no replica is being started."""
        while any(not replica.worker.alive and replica.worker.broken is None for replica in self._replicas):
            await asyncio.sleep(_POLL_S)

    async def _leave_direct(self) -> None:
        """Free the communicator, unless that hangs, too."""
        direct, self._direct = self._direct, None
        if direct is None:
            return
        closing = in_thread(direct.close)
        await asyncio.wait({closing}, timeout=_CALL_S)
        error = closing.exception() if closing.done() else f"took longer than {_CALL_S:g} s"
        if error is not None:
            closing.cancel()
            _LOG.warning("closing a failed weight transfer: %s", error)

    def _send_direct(self, replicas: Sequence[_Replica], pairs: Sequence[tuple[str, Tensor]], version: int) -> None:
        """In a thread: vLLM's side of it blocks."""
        lives = [(replica.worker.name, replica.worker.restarts) for replica in replicas]
        if self._direct is None or self._direct_lives != lives:  # an engine that was started anew is in no communicator
            if self._direct is not None:
                self._direct.close()
                self._direct = None
            vllm = self._config.rollout.vllm
            ask = partial(self._ask_all, replicas)
            largest = max(tensor.nbytes for _, tensor in pairs)
            self._direct = DirectTransfer(
                self._config.sync.transport, self._host, ask, len(replicas), vllm.tensor_parallel, largest
            )
            self._direct_lives = lives
        direct, self._version = self._direct, version
        direct.send(pairs, version)
        for replica in replicas:
            replica.got(version)

    def _ask_all(self, replicas: Sequence[_Replica], method: str, arguments: Sequence[tuple[object, ...]]) -> None:
        async def ask() -> None:
            calls = [
                replica.worker.call(method, *own, deadline_s=_LOAD_S) for replica, own in zip(replicas, arguments, strict=True)
            ]
            await asyncio.gather(*calls)

        self._hub.now(ask())

    async def _push(self, replica: _Replica, life: int) -> tuple[int, float, int] | None:
        """Bytes sent, seconds that its requests waited, retries; None if the replica was lost, or the version is damaged.

        life: `Worker.restarts` when it was up.
        """
        for attempt in range(self._config.sync.retries + 1):
            try:
                # one that waits may have to be asked before the hub has noted that it is up
                sent, pause = await self._send(replica.worker, attempt, preparing=replica.waits)
            except SyncError as error:
                _LOG.warning("weights for %s, try %d: %s", replica.worker.name, attempt + 1, error)
                if await self._damaged():
                    return None  # its old version goes on serving
                continue
            except InfrastructureError as error:
                _LOG.warning("weights for %s: %s", replica.worker.name, error)
                await self._lose(replica, life, f"it did not take the weights: {error}")
                return None  # it is being started again, and gets them then
            except EngineError as error:  # it is of no version any more
                await replica.worker.lose(str(error))
                return None
            assert self._staging is not None and self._staging.current is not None
            replica.got(self._staging.current.version)
            return sent, pause, attempt
        await replica.worker.lose(f"it did not take the weights in {self._config.sync.retries + 1} tries")
        return None

    async def _lose(self, replica: _Replica, life: int, why: str) -> None:
        """Start it anew if it still lives that life: what failed may have left it with weights of another version."""
        if replica.worker.restarts == life:
            await replica.worker.lose(why)

    async def _damaged(self) -> bool:
        """Whether the staged version itself is, so that trying again is of no use."""
        assert self._staging is not None
        return bool(await asyncio.to_thread(self._staging.examine))

    async def _send(self, worker: Worker, attempt: int, preparing: bool) -> tuple[int, float]:
        """Bytes sent over the connection (0: shared memory), and seconds that requests waited. After a first attempt everything
        is sent: what the changes are told against may be damaged, at either end."""
        staging = self._staging
        assert staging is not None and staging.current is not None
        assert worker.hello is not None
        manifest = staging.current.to_dict()

        async def call(method: str, *arguments: object) -> Any:
            # one that was lost meanwhile gets them when it is up again, and that waits until this has ended
            return await worker.call(method, *arguments, deadline_s=_LOAD_S, preparing=preparing, wait=False)

        host, sent = worker.hello.host, 0
        if host != socket.gethostname() or self._copy_always:
            # once to a machine: its other engines load what the first one there has got
            async with self._copying.setdefault(host, asyncio.Lock()):
                copied = self._copies.get(host)
                if attempt or copied is None or not copied.holds(staging.current.version):
                    sent, own = await self._copy(staging, manifest, attempt, call)
                    copied = self._copies[host] = _Copied(worker, worker.restarts, staging.current.version, own)
            manifest = copied.manifest
        return sent, await call("load_staged", manifest)

    async def _copy(
        self, staging: Staging, manifest: dict[str, Any], attempt: int, call: Callable[..., Awaitable[Any]]
    ) -> tuple[int, dict[str, Any]]:
        """To another machine: bytes sent, and the manifest of what is there now."""
        has = await call("copy_begin", manifest, self._config.sync.mode)
        base = None if attempt else staging.base(has)
        await call("copy_base", base)
        sent = 0
        payloads = staging.payloads(base)
        while (payload := await asyncio.to_thread(_next, payloads)) is not None:
            try:
                await call("copy_bucket", payload.index, payload.encoding, payload.data, payload.crc32)
            except SyncError:  # damaged on the way: that bucket again, once
                await call("copy_bucket", payload.index, payload.encoding, payload.data, payload.crc32)
            sent += payload.data.nbytes
        return sent, await call("copy_commit")

    async def _prepare(self, worker: Worker) -> None:
        """After every start of a replica: it has no images, and the weights of the model's folder."""
        replica = next((one for one in self._replicas if one.worker is worker), None)
        if replica is None:  # the very first start, while the list is made
            return
        replica.started()
        if self._config.sync.transport != "staged":
            if self._version:
                replica.wait()
            else:
                replica.got(0)
            return
        async with self._sender():
            if self._staging is None or self._staging.current is None:
                replica.got(0)
                return
            for attempt in range(self._config.sync.retries + 1):
                try:
                    await self._send(worker, attempt, preparing=True)
                    break
                except SyncError as error:
                    _LOG.warning("weights for %s, try %d: %s", worker.name, attempt + 1, error)
                    if await self._damaged():  # no fault of its own
                        replica.wait()
                        return
                    if attempt == self._config.sync.retries:
                        raise
            replica.got(self._staging.current.version)

    async def sleep(self) -> None:
        """Give the GPUs to the trainer (`rollout.vllm.sleep`); `wake` and `update` must follow. Replicas that are being
        started, or are lost from here on, start after `wake`.

        Raises:
            EngineError: none can be started any more.
        """
        for worker in self.workers():
            worker.hold()
        await self._hub.run(self._ask_living("sleep"))

    async def wake(self) -> None:
        """Take the GPUs back. One that is started only now gets its weights when it is up.

        Raises:
            EngineError: none can be started any more.
        """
        for replica in self._replicas:
            if not replica.worker.alive:
                replica.waiting = None  # a start that was put off counts as no other life
            replica.worker.release()
        await self._hub.run(self._ask_living("wake"))

    async def _ask_living(self, method: str) -> None:
        """One that fails is started again."""

        async def ask(replica: _Replica, life: int) -> None:
            try:
                await replica.worker.call(method, deadline_s=_LOAD_S, wait=False)
            except InfrastructureError as error:
                _LOG.warning("%s of %s: %s", method, replica.worker.name, error)
                await self._lose(replica, life, f"{method} failed: {error}")

        await asyncio.gather(*(ask(one, one.worker.restarts) for one in self._replicas if one.worker.alive))
        if all(worker.broken is not None for worker in self.workers()):
            raise EngineError(f"no engine is left: {self._replicas[0].worker.broken}")

    def close(self) -> None:
        """Free what is held for weight updates. The workers end with their hub."""
        if self._direct is not None:
            self._direct.close()
        if self._staging is not None:
            self._staging.close()


def _next(payloads: Iterator[Payload]) -> Payload | None:
    return next(payloads, None)


def _settings(config: Config, policy: Policy) -> EngineSettings:
    rollout, vllm = config.rollout, config.rollout.vllm
    # a tool call after every message, and each may show that many
    images = _PROMPT_IMAGES + MAX_IMAGES * rollout.max_turns if policy.reads_images else 0
    return EngineSettings(
        model=str(policy.folder.resolve()),
        dtype=config.model.dtype,
        max_tokens=rollout.max_prompt_tokens + rollout.max_response_tokens,
        images=images,
        banned=tuple(policy.placeholder_ids),
        banned_text=(IMAGE_PAD, VISION_START, VISION_END, "<|video_pad|>") if policy.reads_images else (),
        image_pad=policy.image_token_id,
        processed_logprobs=rollout.temperature != 1.0,
        seeded=rollout.deterministic,
        seed=config.run.seed,
        tensor_parallel=vllm.tensor_parallel,
        max_num_seqs=vllm.max_num_seqs,
        gpu_memory=vllm.gpu_memory,
        cpu_cache_gb=vllm.cpu_cache_gb,
        cpu_threads=vllm.cpu_threads,
        sleep=vllm.sleep,
        stall_s=min(vllm.request_s, vllm.stall_s),
        transport=config.sync.transport,
        speculative=vllm.speculative,
        arguments=vllm.arguments,
    )
