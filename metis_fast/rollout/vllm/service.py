"""One vLLM engine in a process of its own (`metis-fast worker`).

A thread owns vLLM's `LLMEngine`: between steps it takes what the event loop has asked for (requests, cancellations, new
weights), so that a weight update falls between two steps and requests go on after it. Their KV cache is computed again with the
new weights: what a token's log-probability says is then the new version's alone. Another thread prepares prompts with
images (see `images`), while steps go on.

A step that raises or hangs ends the process: what state vLLM is in is then unknown, and the run starts another one.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import multiprocessing
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from metis_fast.errors import EngineError, EngineFailure, SyncError
from metis_fast.model_folder import load_tokenizer
from metis_fast.rollout.stops import StopStrings, Watch
from metis_fast.rollout.vllm.images import Images
from metis_fast.rollout.vllm.opening import explained, open_engine
from metis_fast.rollout.vllm.settings import STOPPED, EngineSettings, EngineStats, GenerateReply, GenerateRequest

if TYPE_CHECKING:
    from vllm import LLMEngine, SamplingParams
    from vllm.multimodal.cache import BaseMultiModalProcessorCache
    from vllm.outputs import RequestOutput
    from vllm.renderers import BaseRenderer

_LOG = logging.getLogger(__name__)
_STEP_FAILED, _STALLED = 70, 75  # exit codes
_DRAFTED, _ACCEPTED = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"  # vLLM's counters
_STALL_SLACK_S = 5.0  # twice that is longer than a machine under load lets a thread wait

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Running:
    """A request. prompt: what must have come of it. followers wait until the prompt is computed, and then share it.

    watch: for its stop strings; it has seen `num_seen` sampled tokens.
    """

    future: asyncio.Future[GenerateReply]
    prompt: np.ndarray
    watch: Watch | None = None
    num_seen: int = 0
    followers: list[Callable[[], None]] = field(default_factory=list)


def _end() -> NoReturn:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(_STEP_FAILED)


def _refused(error: Exception) -> Exception:
    """As an error of ours."""
    if isinstance(error, EngineFailure):
        return error
    return (EngineError if isinstance(error, ValueError) else EngineFailure)(f"vLLM refuses a request: {error}")


class VllmService:
    """Serves one engine; see `settings`.

    Raises:
        ModelError: vLLM cannot load the model. EngineError: vllm is not installed, or a setting is not its.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._began = time.perf_counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._leaders: dict[bytes, _Running] = {}
        self._images = Images(settings.image_cache_gb * (1 << 30))
        # one thread: vLLM's cache of images has two halves, and both must see the prompts in one order
        self._preparing = ThreadPoolExecutor(1, "prepare")
        self._renderer: BaseRenderer[Any] | None = None
        self._number = 0
        self._stops: StopStrings | None = None  # with the first request that has any
        self._busy_s, self._steps, self._tokens = 0.0, 0, 0
        self._stepping_since: float | None = None
        self._paused = False  # a step of a paused engine that is a process of its own waits for ever
        self._children: list[BaseProcess] = []
        self._refusals: tuple[type[Exception], ...] = ()  # what vLLM raises for a request that it does not take
        ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        error = ready.get()
        if error is not None:
            raise error
        threading.Thread(target=self._watch, name="stall", daemon=True).start()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _work(self, ready: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            self._engine = self._open_engine()
            self._children = multiprocessing.active_children()
        except Exception as error:  # handed on, whatever it is
            traceback.print_exc()
            ready.put(explained(error, self._settings))
            return
        ready.put(None)
        try:
            self._serve()
        except BaseException:  # whatever a step raised, vLLM's state is unknown: the process must not go on
            _end()

    def _serve(self) -> None:
        while True:
            while self._paused or not self._running or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    self._shut_down()
                    return
                command()
            self._stepping_since = began = time.perf_counter()
            outputs = self._step()
            self._stepping_since = None
            self._busy_s += time.perf_counter() - began
            self._steps += 1
            for output in outputs:
                self._take(output)

    def _open_engine(self) -> LLMEngine:
        engine = open_engine(self._settings)
        from vllm.exceptions import VLLMClientError
        from vllm.multimodal.cache import MultiModalCacheMissError

        self._renderer = engine.renderer
        self._refusals = (VLLMClientError, MultiModalCacheMissError)
        return engine

    def _step(self) -> list[Any]:
        return self._engine.step()

    def _shut_down(self) -> None:
        self._engine.engine_core.shutdown()

    def _watch(self) -> None:
        """Ends the process when a step hangs: the thread that hangs cannot. Likewise when a process of vLLM's has died, which a
        step that waits for it does not notice."""
        while True:
            # one that keeps Python's lock stops this thread, too, and then nobody puts this off any more
            faulthandler.dump_traceback_later(self._settings.stall_s + _STALL_SLACK_S, exit=True)
            time.sleep(1.0)
            dead = [child for child in self._children if not child.is_alive()]
            if dead:
                print(f"{dead[0].name} of vLLM ended with {dead[0].exitcode}", file=sys.stderr, flush=True)
                os._exit(_STEP_FAILED)
            since = self._stepping_since
            if since is not None and time.perf_counter() - since > self._settings.stall_s:
                print(f"a step took longer than {self._settings.stall_s:g} s; where it is:", file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                sys.stderr.flush()
                os._exit(_STALLED)

    def _take(self, output: RequestOutput) -> None:
        running = self._running.get(output.request_id)
        if running is None:
            return
        if running.followers:
            followers, running.followers = running.followers, []
            for follow in followers:
                follow()
        sampled = output.outputs[0]
        end = self._stop_string(running, sampled.token_ids)
        if not output.finished and end is None:
            return
        if not output.finished:
            self._engine.abort_request([output.request_id])
        self._forget(output.request_id)
        tokens = np.asarray(sampled.token_ids[:end], np.int32)  # a step may have sampled more than one
        self._tokens += len(tokens)
        prompt = np.asarray(output.prompt_token_ids, np.int32)
        if not np.array_equal(prompt, running.prompt):
            error = EngineError(
                f"vLLM made {len(prompt)} tokens of a prompt that has {len(running.prompt)}: it cuts images up in another way "
                "than the trainer does; see that preprocessor_config.json is that of the model"
            )
            self._resolve(running.future, error)
            return
        entries: Any = (sampled.logprobs or ())[:end]
        logp = np.array([entry[token].logprob for entry, token in zip(entries, tokens.tolist(), strict=True)])
        version = np.zeros(len(tokens), np.int32)
        for span in sampled.weight_versions or ():
            version[span.start : span.end] = int(span.version)
        finish = STOPPED if end is not None else sampled.finish_reason or ""
        self._resolve(running.future, GenerateReply(tokens, logp.astype(np.float32), version, finish))

    @staticmethod
    def _stop_string(running: _Running, tokens: Sequence[int]) -> int | None:
        """How many tokens there are to the end of a stop string, where one is complete.

        Not vLLM's own search: that makes text of every message, and keeps what a step sampled behind the string.
        """
        if running.watch is not None:
            for number in range(running.num_seen, len(tokens)):
                if running.watch.ends(tokens[number]):
                    return number + 1
            running.num_seen = len(tokens)
        return None

    def _watch_for(self, strings: tuple[str, ...]) -> Watch | None:
        if not strings:
            return None
        if self._stops is None:
            self._stops = StopStrings.of(load_tokenizer(Path(self._settings.model)))
        return self._stops.watch(strings)

    def _forget(self, request_id: str) -> None:
        self._leave(self._running.pop(request_id))

    def _leave(self, running: _Running) -> None:
        """Nobody waits for its prompt any more."""
        key = running.prompt.tobytes()
        if self._leaders.get(key) is running:
            del self._leaders[key]
        for follow in running.followers:
            follow()

    def _resolve(self, future: asyncio.Future[T], result: T | Exception) -> None:
        def set_it() -> None:
            if future.done():
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        assert self._loop is not None
        self._loop.call_soon_threadsafe(set_it)

    def _add(self, request_id: str, request: GenerateRequest, future: asyncio.Future[GenerateReply]) -> None:
        """Hand a request to vLLM; after the one that computes the same prompt, if there is one."""
        running = _Running(future, request.tokens, self._watch_for(request.stop))
        leader = self._leaders.setdefault(request.tokens.tobytes(), running)
        if leader is running:
            self._start(request_id, request, running)
        else:
            leader.followers.append(lambda: self._start(request_id, request, running))

    def _start(self, request_id: str, request: GenerateRequest, running: _Running) -> None:
        if running.future.cancelled():
            self._leave(running)
        else:
            self._prepare(request, lambda prompt: self._enter(request_id, request, running, prompt))

    def _enter(self, request_id: str, request: GenerateRequest, running: _Running, prompt: Any) -> None:
        """prompt: prepared for vLLM, or what was raised."""
        if not isinstance(prompt, Exception):
            try:
                self._engine.add_request(request_id, prompt, self._params(request))
            except (ValueError, *self._refusals) as error:
                self._distrust(request)
                prompt = error
        if isinstance(prompt, Exception):
            self._leave(running)
            self._resolve(running.future, _refused(prompt))
            return
        self._running[request_id] = running
        if running.future.cancelled():  # vLLM had to get its images all the same: prompts behind it may count on them
            self._abort(request_id)

    # -- prompts -----------------------------------------------------------------------------------------------------

    def _prepare(self, request: GenerateRequest, then: Callable[[Any], None]) -> None:
        """Have the engine's thread call `then` with the prompt as vLLM takes it, or with what it or Pillow raised."""

        def prepare() -> None:
            try:
                prompt: Any = self._prompt(request)
                if self._renderer is not None:
                    (prompt,) = self._renderer.render_cmpl([prompt])
            except (ValueError, OSError, EngineFailure, *self._refusals) as error:  # what vLLM does not take, or no picture
                self._distrust(request)
                prompt = error
            except BaseException:  # nobody else would hear of it
                _end()
            self._commands.put(lambda: then(prompt))

        if request.spans:
            self._preparing.submit(prepare)
        else:
            prepare()

    @property
    def _image_cache(self) -> BaseMultiModalProcessorCache | None:
        return self._renderer.mm_processor_cache if self._renderer is not None else None

    def _distrust(self, request: GenerateRequest) -> None:
        """It was refused: the half of vLLM's cache that prompts are prepared with may list images that the other one, in
        its engine, has never got."""
        cache = self._image_cache
        if cache is not None and request.spans:
            self._preparing.submit(lambda: [cache.invalidate(sha256) for _, _, sha256 in request.spans])

    def _prompt(self, request: GenerateRequest) -> Any:
        return self._images.prompt(request, self._settings.image_pad, self._image_cache)

    def _params(self, request: GenerateRequest) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = self._settings
        speculative = settings.speculative is not None  # vLLM takes no logit_bias then
        return SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k or -1,
            seed=request.seed % (1 << 63) if settings.seeded else None,
            stop_token_ids=list(request.stop_ids),
            ignore_eos=True,  # the model's own end-of-text is among the stop ids, where it is one
            logprobs=0,
            detokenize=False,
            logit_bias=None if speculative else dict.fromkeys(settings.banned, -100.0) or None,
            bad_words=list(settings.banned_text) if speculative else None,
            # every step's output: the first one tells that the prompt is computed
            output_kind=RequestOutputKind.CUMULATIVE,
        )

    # -- calls -------------------------------------------------------------------------------------------------------

    async def _ask(self, command: Callable[[], T]) -> T:
        """Run something on the engine's thread, between two steps."""
        self._loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                self._resolve(future, command())
            except (EngineFailure, EngineError) as error:
                self._resolve(future, error)

        self._commands.put(run)
        return await future

    async def generate(self, request: GenerateRequest) -> GenerateReply:
        """Sample one message.

        Raises:
            ImagesMissingError: see there. EngineError: a request that vLLM does not take.
        """
        self._loop = asyncio.get_running_loop()
        self._images.keep(request)
        future: asyncio.Future[GenerateReply] = self._loop.create_future()
        self._number += 1
        request_id = str(self._number)
        self._commands.put(lambda: self._add(request_id, request, future))
        try:
            return await future
        except asyncio.CancelledError:
            self._commands.put(lambda: self._abort(request_id))
            raise

    def _abort(self, request_id: str) -> None:
        if request_id in self._running:
            self._forget(request_id)
            self._engine.abort_request([request_id])

    async def layer_outputs(self, request: GenerateRequest) -> dict[str, bytes]:
        """What the layers make of a request's tokens (`LayerRecorder.stop`). Requests under way fail."""
        self._loop = asyncio.get_running_loop()
        self._images.keep(request)
        future: asyncio.Future[dict[str, bytes]] = self._loop.create_future()

        def work(prompt: Any) -> None:
            result = _refused(prompt) if isinstance(prompt, Exception) else self._layer_outputs(request, prompt)
            self._resolve(future, result)

        self._commands.put(lambda: self._prepare(request, work))
        return await future

    def _layer_outputs(self, request: GenerateRequest, prompt: Any) -> dict[str, bytes]:
        engine = self._engine
        while self._running:
            request_id, running = next(iter(self._running.items()))
            self._abort(request_id)
            self._resolve(running.future, EngineFailure("the engine was asked for what its layers make"))
        engine.reset_prefix_cache(reset_running_requests=True)
        engine.reset_encoder_cache()
        engine.collective_rpc("record_layers")
        engine.add_request("layers", prompt, self._params(request))
        while engine.has_unfinished_requests():
            engine.step()
        return engine.collective_rpc("recorded_layers")[0]  # the same in all ranks

    async def stats(self) -> EngineStats:
        """Where the time went."""
        alive = time.perf_counter() - self._began
        drafted, accepted = self._drafts()
        return EngineStats(
            alive, self._busy_s, self._steps, self._tokens, len(self._running), drafted, accepted, self._images.prepared
        )

    def _drafts(self) -> tuple[int, int]:
        """Tokens that speculation proposed, and how many of them the model took; vLLM counts them across steps."""
        if self._settings.speculative is None or not self._engine.log_stats:
            return 0, 0
        totals = {metric.name: getattr(metric, "value", 0) for metric in self._engine.get_metrics()}
        return int(totals.get(_DRAFTED, 0)), int(totals.get(_ACCEPTED, 0))

    async def load_staged(self, manifest: dict[str, Any]) -> float:
        """Sample with a version that lies in this machine's shared memory (`Manifest.to_dict`); seconds that requests waited.

        Raises:
            SyncError: it is not as it was staged; the old version goes on.
        """
        return await self._ask(lambda: self._load(manifest, int(manifest["version"])))

    def _load(self, update: dict[str, Any], version: int) -> float:
        """Requests go on after success or a refusal; with weights half loaded they never do, and the run ends the engine."""
        engine = self._engine
        began = time.perf_counter()
        self._pause()
        try:
            refusals = engine.collective_rpc("load_staged", args=(update,))
        except Exception as error:  # from vLLM's own worker process it comes as text
            raise EngineError(f"weight version {version} was not loaded: {error}") from None
        if any(refusals):  # by all ranks, then
            self._wake()
            raise SyncError(f"weight version {version}: {next(filter(None, refusals))}")
        self._go_on(version)
        return time.perf_counter() - began

    def _pause(self) -> None:
        self._engine.sleep(level=0, mode="keep")
        self._paused = True

    def _wake(self) -> None:
        self._engine.wake_up(tags=["scheduling"])
        self._paused = False

    def _go_on(self, version: int) -> None:
        """With new weights: nothing computed with the old ones is used again."""
        self._engine.set_weight_version(str(version))
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.reset_encoder_cache()
        self._wake()

    async def transfer(self, method: str, argument: dict[str, Any] | None) -> None:
        """A step of vLLM's own transfers (NCCL, CUDA IPC): `init_weight_transfer_engine`, `update_weights`, and so on."""
        arguments = () if argument is None else (argument,)
        await self._ask(lambda: self._engine.collective_rpc(method, args=arguments))

    async def pause(self) -> None:
        """Make no further step; requests are kept."""
        await self._ask(self._pause)

    async def resume(self, version: int) -> None:
        """Go on after `pause` and `transfer`, with this version."""
        await self._ask(lambda: self._go_on(version))

    async def sleep(self) -> None:
        """Give the GPU's memory back. No request may be under way; the weights are gone until they are sent again."""
        await self._ask(lambda: self._engine.sleep(level=2, mode="abort"))

    async def wake(self) -> None:
        """Take the memory again; weights must follow."""
        await self._ask(lambda: self._engine.wake_up())

    def close(self) -> None:
        """End the engine."""
        self._commands.put(None)
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._images.close()
        self._thread.join(timeout=5.0)
