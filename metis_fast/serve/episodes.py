"""Plays requests: an episode for each choice, so many at once, and so many that wait for their turn."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from metis_fast.config import Config, RolloutConfig
from metis_fast.errors import DataError, MetisError
from metis_fast.node.opening import Agent
from metis_fast.pixels import ImageError
from metis_fast.rollout.chat import TokenPiece
from metis_fast.rollout.episode import SampleKey, run_episode
from metis_fast.serve.metrics import Metrics
from metis_fast.serve.refusal import Fault, Refusal, Refused, wrong
from metis_fast.serve.request import ChatRequest
from metis_fast.serve.system import SystemText
from metis_fast.types import Message, Outcome, Prompt, Rollout

_LOG = logging.getLogger(__name__)
_SEEDS = 1 << 63
_FAILING_S = 30.0
_BROKEN_OFF_S = 5.0  # for replies that say so, after episodes were broken off

DRAINING = Refusal(Fault.DRAINING, "the server is about to end and takes no more requests; ask another one, or later")
FAILED = Refusal(
    Fault.INFRASTRUCTURE,
    "the server's own tools or engine failed, not the request, and there is no answer; try again (the server's log says more)",
)
DEFECT = Refusal(Fault.DEFECT, "a defect of the server's, whose log has it")


@dataclass(frozen=True, slots=True)
class Ready:
    """A request as it is played. config: sampling as it asks for. key: of the first choice."""

    prompt: Prompt
    piece: TokenPiece
    config: RolloutConfig
    key: SampleKey
    n: int
    max_sampled: int | None


class Place:
    """Room for a request, from its arrival to the end of its reply. Leave it once it is over; twice is as good."""

    def __init__(self, episodes: Episodes) -> None:
        self._episodes = episodes
        self.num = 0

    def take(self, num: int) -> None:
        """Have room for so many episodes.

        Raises:
            Refused: BUSY, DRAINING.
        """
        self._episodes.reserve(num - self.num)
        self.num = num

    def leave(self) -> None:
        """Give all of it back."""
        num, self.num = self.num, 0
        self._episodes.release(num)


class Episodes:
    """In one event loop. agent: closed by whoever has opened it. config: the server's (`serving.agent_config`)."""

    def __init__(self, agent: Agent, config: Config, system: SystemText, metrics: Metrics) -> None:
        self._agent, self._config, self._system, self._metrics = agent, config, system, metrics
        self._slots = asyncio.Semaphore(config.serve.max_concurrent)
        self._taken = self._running = 0
        self._tasks: set[asyncio.Task[list[Rollout]]] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.draining = False
        self._failed = -math.inf

    @property
    def failing(self) -> bool:
        """Whether the last episode failed of the server, lately: who asks nothing of a failing server has to come back."""
        return time.monotonic() - self._failed < _FAILING_S

    # -- room ---------------------------------------------------------------------------------------------------------

    def enter(self) -> Place:
        """Room for a request of one episode. See `Place.take`."""
        if self.draining:
            raise Refused(DRAINING)
        place = Place(self)
        place.take(1)
        return place

    def reserve(self, num: int) -> None:
        """Of a `Place`."""
        serve = self._config.serve
        if self._taken + num > serve.max_concurrent + serve.queue:
            raise Refused(
                Refusal(
                    Fault.BUSY,
                    f"serve.max_concurrent={serve.max_concurrent} episodes run or are about to, and serve.queue={serve.queue} "
                    "may wait; come again",
                )
            )
        self._taken += num
        self._empty.clear()
        self._count()

    def release(self, num: int) -> None:
        """Of a `Place`."""
        self._taken -= num
        if self._taken == 0:
            self._empty.set()
        self._count()

    def _count(self) -> None:
        self._metrics.running.set(self._running)
        self._metrics.waiting.set(self._taken - self._running)

    # -- requests -----------------------------------------------------------------------------------------------------

    async def ready(self, request: ChatRequest) -> Ready:
        """A request with its prompt encoded and its images looked at.

        Raises:
            Refused: an image cannot be used, or the prompt is too long.
        """
        prompt = self._prompt(request)
        await self._check_images(request)
        try:
            piece = self._agent.chat.encode_prompt(prompt)
        except DataError as error:  # of the images all was asked before
            raise wrong("messages", str(error)) from None
        rollout = self._config.rollout
        if len(piece.tokens) > rollout.max_prompt_tokens:
            raise wrong(
                "messages",
                f"expected at most {rollout.max_prompt_tokens} tokens with the agent's own text and images "
                f"(rollout.max_prompt_tokens), got {len(piece.tokens)}; send less, or smaller images",
                "context_length_exceeded",
            )
        serve = self._config.serve
        sampling = {
            "temperature": serve.temperature if request.temperature is None else request.temperature,
            "top_p": serve.top_p if request.top_p is None else request.top_p,
            "top_k": serve.top_k if request.top_k is None else request.top_k,
        }
        seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed
        # by content: the same request with the same seed has the same noise, whoever asks beside it
        key = SampleKey(seed, f"serve/{_digest(prompt)}", 0)
        config = rollout.model_copy(update=sampling)
        return Ready(prompt, piece, config, key, request.n, request.max_tokens)

    def _prompt(self, request: ChatRequest) -> Prompt:
        serve = self._config.serve
        if request.system and serve.client_system == "refuse":
            raise wrong("messages[0].role", "expected no system message: this server has its own (serve.client_system)")
        tools = tuple(self._agent.toolbox.names) if request.use_tools else ()
        system = "\n\n".join(text for text in (request.system, self._system.of(tools)) if text)
        first = (Message("system", system, (system,)),) if system else ()
        question = " ".join(" ".join(request.messages[-1].around_images).split())
        return Prompt(
            uid=f"chat-{secrets.token_hex(8)}",
            data_source="serve",
            messages=(*first, *request.messages),
            images=request.images,
            ability="serve",
            answers=(),
            judge_style="",
            question=question,
            tools=tools,
        )

    async def _check_images(self, request: ChatRequest) -> None:
        """Raises Refused for the first that cannot be used; all of them are prepared for the engine."""
        if not request.images:
            return
        images = self._agent.policy.images
        for image, place in zip(request.images, request.places, strict=True):
            try:
                images.grid(image)
            except ImageError as error:
                raise wrong(f"{place}.image_url", str(error)) from None
        problems = await images.ready(request.images)
        for image, place in zip(request.images, request.places, strict=True):
            if image.sha256 in problems:
                raise wrong(f"{place}.image_url", problems[image.sha256])

    def start(self, ready: Ready) -> asyncio.Task[list[Rollout]]:
        """Play a request that has its place. Cancelled, its episodes end with what they hold.

        The task raises Refused: INFRASTRUCTURE, DRAINING (broken off), DEFECT.
        """
        task = asyncio.create_task(self._play(ready))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _play(self, ready: Ready) -> list[Rollout]:
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._one(ready, index)) for index in range(ready.n)]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the others were cancelled because of the first
        return [task.result() for task in running]

    async def _one(self, ready: Ready, index: int) -> Rollout:
        agent = self._agent
        key = SampleKey(ready.key.seed, ready.key.stream, index)
        async with self._slots:
            self._running += 1
            self._count()
            began = time.monotonic()
            try:
                rollout = await run_episode(
                    ready.prompt, index, agent.chat, agent.engine, agent.toolbox, ready.config, key, ready.piece, None,
                    ready.max_sampled,
                )  # fmt: skip
            except MetisError as error:  # no engine is left, or a replay lacks this call
                self._failed = time.monotonic()
                _LOG.error("%s: %s", ready.prompt.uid, error)
                raise Refused(FAILED) from None
            finally:
                self._running -= 1
                self._count()
        self._metrics.episode(rollout, time.monotonic() - began)
        self._failed = time.monotonic() if rollout.outcome is Outcome.INFRASTRUCTURE_ERROR else -math.inf
        if rollout.outcome is Outcome.INFRASTRUCTURE_ERROR:
            _LOG.warning("%s: %s", ready.prompt.uid, rollout.error)
            raise Refused(FAILED)
        return rollout

    # -- the end ------------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Take nothing more; wait until what is here has its reply, for at most `serve.drain_s`; then break off the rest."""
        self.draining = True
        if not await self._all_left(self._config.serve.drain_s):
            left = len(self._tasks)
            _LOG.warning("serve.drain_s=%g is over: %d requests are broken off", self._config.serve.drain_s, left)
            await self.close()

    async def close(self) -> None:
        """Break off what still runs."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        await self._all_left(_BROKEN_OFF_S)

    async def _all_left(self, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True


def outcome_of(task: asyncio.Task[list[Rollout]]) -> Sequence[Rollout] | Refusal:
    """What came of a request that was played."""
    if task.cancelled():
        return DRAINING
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, Refused):
        return error.refusal
    _LOG.error("a defect in an episode", exc_info=error)
    return DEFECT


def _digest(prompt: Prompt) -> str:
    digest = hashlib.sha256()
    for message in prompt.messages:
        digest.update(repr((message.role, message.around_images)).encode())
    for image in prompt.images:
        digest.update(image.sha256.encode())
    return digest.hexdigest()[:32]
