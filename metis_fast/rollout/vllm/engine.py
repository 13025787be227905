"""vLLM engines as the run sees them: `Engine` over several workers, each with a replica of the model.

A router keeps the rollouts of a prompt, and every rollout's messages, on the replica that holds their cache, as long as that
one lives. What a replica answers is checked before it is believed. One that dies, hangs or answers garbage is started again,
given the current weights, and then takes part again; meanwhile others take its rollouts, from their last whole message.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from metis_fast.config import Config
from metis_fast.errors import EngineError, EngineFailure, InfrastructureError
from metis_fast.model import Policy
from metis_fast.model_folder import IMAGE_PAD, VISION_END, VISION_START
from metis_fast.rollout.engine import Completion, Sampling, SyncReport
from metis_fast.rollout.layers import Layers, unpack
from metis_fast.rollout.stops import StopStrings
from metis_fast.rollout.vllm.direct import DirectWeights
from metis_fast.rollout.vllm.replica import LOAD_S, Replica
from metis_fast.rollout.vllm.settings import (
    LENGTH,
    SERVICE,
    STOPPED,
    EngineSettings,
    EngineStats,
    GenerateReply,
    GenerateRequest,
)
from metis_fast.rollout.vllm.staged import StagedWeights
from metis_fast.spans import Lane, span
from metis_fast.tools.protocol import MAX_CALL_IMAGES
from metis_fast.types import ImageBlob, ImageSpan, Rollout
from metis_fast.workers.hub import Hub
from metis_fast.workers.worker import Worker, WorkerError, wait_ready

_LOG = logging.getLogger(__name__)
_MISSING = "is not here"  # ImagesMissingError's words; the class is the service's
_CALL_S = 60.0
_SPREAD = 2.0  # a prompt's replica is left when it has more than so many times the rollouts that replicas have on average
_PROMPT_IMAGES = 16


class _Session:
    def __init__(self, engine: VllmEngine, prompt: str, replica: Replica | None = None) -> None:
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


class VllmEngine:
    """`Engine` over `rollout.vllm.replicas` workers, which start in the background: see `wait`.

    policy: for tokens and shapes; its weights are not used. service: what a worker serves (tests put failures in). weights: how
    replicas get theirs. homes: of a prompt with open sessions, its replica and how many they are.
    """

    def __init__(self, config: Config, policy: Policy, hub: Hub, service: str = SERVICE) -> None:
        self._config, self._policy, self._hub = config, policy, hub
        vllm = config.rollout.vllm
        self.num_replicas = vllm.replicas
        self._rests = False
        self._banned = np.asarray(policy.placeholder_ids, np.int64)
        self._stops = StopStrings.of(policy.tokenizer)
        self.replicas: list[Replica] = []
        self.weights = (
            StagedWeights(config.sync, policy, self.replicas)
            if config.sync.transport == "staged"
            else DirectWeights(config, hub, self.replicas)
        )
        self.homes: dict[str, tuple[Replica, int]] = {}
        settings = engine_settings(config, policy)
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
            self.replicas.append(Replica(worker, asyncio.Semaphore(vllm.max_num_seqs)))

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

    def runs(self, policy: Policy) -> bool:
        """See `RunEngine`."""
        return False

    def probe_session(self, order: int, prompt: str) -> _Session:
        """See `RunEngine`: on the replica whose turn it is."""
        up = self._up()
        return _Session(self, "", up[order % len(up)] if up else None)

    def _up(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.worker.alive and not replica.waits]

    def route(self, prompt: str) -> Replica:
        """The replica for a rollout of `prompt`: where others of it are, unless that one has far more than its share; else the
        living one with the fewest rollouts.

        Raises:
            EngineError: none can be started any more, or none has the current weights.
        """
        usable = [replica for replica in self.replicas if replica.worker.broken is None]
        if not usable:
            raise EngineError(f"no engine is left: {self.replicas[0].worker.broken}")
        usable = [replica for replica in usable if not replica.waits]
        if not usable:
            raise EngineError(
                "no engine has the current weights: all were started anew, and the weights can be sent again with the next "
                f"update only ({self.weights.why_not}); run the same command again"
            )
        living = [replica for replica in usable if replica.worker.alive] or usable
        least = min(living, key=lambda replica: replica.sessions)
        home, count = self.homes.get(prompt, (least, 0)) if prompt else (least, 0)
        share = sum(replica.sessions for replica in living) / len(living)
        if home not in living or home.sessions > max(1.0, _SPREAD * share):  # a cache spared is not worth replicas that idle
            home = least
        if prompt:
            self.homes[prompt] = (home, count + 1)
        return home

    def left(self, prompt: str) -> None:
        """A session of `prompt` was closed."""
        home, count = self.homes.get(prompt, (None, 0))
        if home is not None and count > 1:
            self.homes[prompt] = (home, count - 1)
        else:
            self.homes.pop(prompt, None)

    async def generate(
        self,
        replica: Replica,
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
                with span(Lane.ENGINE, f"{replica.worker.name}: message"):
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
        self, replica: Replica, tokens: Sequence[int], spans: Sequence[ImageSpan], new: Mapping[str, bytes], sampling: Sampling
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
            sampling.stop,
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
        if (reply.version < 0).any() or (reply.version > self.weights.newest).any():
            return f"a token of weight version {int(reply.version.max())}, the newest is {self.weights.newest}"
        if not np.isfinite(reply.logp).all() or (reply.logp > 1e-3).any():
            return "a log-prob that is none"
        if (reply.finish == STOPPED) != self._ends(reply.tokens.tolist(), sampling):
            return f"it ended with {reply.finish!r} at token {int(reply.tokens[-1])}"
        return ""

    def _ends(self, tokens: list[int], sampling: Sampling) -> bool:
        return tokens[-1] in sampling.stop_ids or self._stops.completes(tokens, sampling.stop)

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
        living = [replica.worker for replica in self.replicas if replica.worker.alive]
        return [await worker.call("stats", deadline_s=_CALL_S) for worker in living]

    @property
    def restarts(self) -> int:
        """How often replicas were started again."""
        return sum(replica.worker.restarts for replica in self.replicas)

    def workers(self) -> list[Worker]:
        """Of all replicas."""
        return [replica.worker for replica in self.replicas]

    # -- weights and memory ------------------------------------------------------------------------------------------

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """See `Engine`."""
        return await self._hub.run(self.weights.update(weights, version))

    def held(self) -> Mapping[str, Tensor]:
        """See `RunEngine`."""
        return self.weights.held()

    async def _prepare(self, worker: Worker) -> None:
        """After every start of a replica: it has no images, and the weights of the model's folder."""
        replica = next((one for one in self.replicas if one.worker is worker), None)
        if replica is None:  # the very first start, while the list is made
            return
        replica.started()
        await self.weights.prepare(replica)

    async def rest(self) -> None:
        """See `RunEngine`: by `rollout.vllm.sleep`."""
        if self._config.rollout.vllm.sleep:
            await self.sleep()
            self._rests = True

    async def resume(self) -> None:
        """See `RunEngine`."""
        if self._rests:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # of the update; the engines take what they had
            await self.wake()
            self._rests = False

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
        for replica in self.replicas:
            if not replica.worker.alive:
                replica.waiting = None  # a start that was put off counts as no other life
            replica.worker.release()
        await self._hub.run(self._ask_living("wake"))

    async def _ask_living(self, method: str) -> None:
        """One that fails is started again."""

        async def ask(replica: Replica, life: int) -> None:
            try:
                await replica.worker.call(method, deadline_s=LOAD_S, wait=False)
            except InfrastructureError as error:
                _LOG.warning("%s of %s: %s", method, replica.worker.name, error)
                await replica.lose(life, f"{method} failed: {error}")

        await asyncio.gather(*(ask(one, one.worker.restarts) for one in self.replicas if one.worker.alive))
        if all(worker.broken is not None for worker in self.workers()):
            raise EngineError(f"no engine is left: {self.replicas[0].worker.broken}")

    def close(self) -> None:
        """Free what is held for weight updates. The workers end with their hub."""
        self.weights.close()


def engine_settings(config: Config, policy: Policy) -> EngineSettings:
    """What each engine of a run is told."""
    rollout, vllm = config.rollout, config.rollout.vllm
    # a tool call after every message, and each may show that many
    images = _PROMPT_IMAGES + MAX_CALL_IMAGES * rollout.max_turns if policy.reads_images else 0
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
        image_cache_gb=vllm.image_cache_gb,
        sleep=vllm.sleep,
        stall_s=min(vllm.request_s, vllm.stall_s),
        transport=config.sync.transport,
        speculative=vllm.speculative,
        arguments=vllm.arguments,
    )
