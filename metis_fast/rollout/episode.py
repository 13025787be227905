"""One multi-turn rollout, as a coroutine: sample a message, run its tool, append the observation, go on.

ALGORITHM section 6.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from metis_fast.config import RolloutConfig
from metis_fast.errors import DataError, EngineFailure, InfrastructureError
from metis_fast.recording.rollout import PLAYED, Played
from metis_fast.rollout.chat import Chat, TokenPiece
from metis_fast.rollout.engine import Completion, Engine, EngineSession, Sampling
from metis_fast.spans import Lane, span
from metis_fast.tools.protocol import Toolbox, ToolSession
from metis_fast.types import Group, ImageBlob, ImageSpan, Outcome, Prompt, Rollout, ToolCall, Turn

log = logging.getLogger(__name__)
_NAMED = 3  # prompts that an error names; the others are counted


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Names one rollout of one batch; its sampling noise is a function of this alone.

    seed: the run's. stream: which batch (a training step, an evaluation). order: the rollout's place in the batch.
    """

    seed: int
    stream: str
    order: int

    def turn_seed(self, turn: int) -> int:
        """Seed of one message."""
        text = f"{self.seed}/{self.stream}/{self.order}/{turn}".encode()
        return zlib.crc32(text) << 32 | zlib.adler32(text[::-1])


@dataclass(slots=True)
class Trace:
    """A rollout while it grows; what fails half-way is still here."""

    prompt_len: int
    tokens: list[int]
    images: list[ImageBlob]
    spans: list[ImageSpan]
    turns: list[Turn] = field(default_factory=list)
    sampled: list[tuple[int, Completion]] = field(default_factory=list)  # where each message starts

    def append(self, piece: TokenPiece) -> None:
        at = len(self.tokens)
        self.tokens += piece.tokens
        self.spans += [replace(span, start=span.start + at, stop=span.stop + at) for span in piece.spans]
        self.images += piece.images

    def finish(self, prompt: Prompt, index: int, outcome: Outcome, error: str = "") -> Rollout:
        size = len(self.tokens)
        mask, logp = np.zeros(size, np.bool_), np.zeros(size, np.float32)
        version = np.full(size, -1, np.int32)
        for start, message in self.sampled:
            stop = start + len(message.tokens)
            mask[start:stop], logp[start:stop], version[start:stop] = True, message.logp, message.weight_version
        return Rollout(
            prompt_uid=prompt.uid,
            index=index,
            tokens=np.asarray(self.tokens, np.int32),
            prompt_len=self.prompt_len,
            sampled=mask,
            logp=logp,
            weight_version=version,
            images=tuple({image.sha256: image for image in self.images}.values()),
            image_spans=tuple(self.spans),
            turns=tuple(self.turns),
            outcome=outcome,
            error=error,
        )


class _Seat:
    """A rollout's session in the engine; a new one where the engine failed.

    first: a session that is open already.
    """

    def __init__(
        self, engine: Engine, key: SampleKey, prompt: Prompt, index: int, retries: int, first: EngineSession | None
    ) -> None:
        self._engine, self._key, self._prompt, self._index, self._retries = engine, key, prompt, index, retries
        self._session = first if first is not None else self._open()

    def _open(self) -> EngineSession:
        return self._engine.session(self._key.order, self._prompt.uid)

    async def generate(self, trace: Trace, sampling: Sampling) -> Completion:
        """The next message. A failed engine is asked again from where the rollout stands, `retries` times in a row.

        Raises:
            EngineFailure: the last one.
        """
        attempt = 0
        while True:
            try:
                return await self._session.generate(trace.tokens, trace.images, trace.spans, sampling)
            except EngineFailure as failure:
                attempt += 1
                name = f"{self._prompt.uid}#{self._index}"
                log.warning("rollout %s, message %d, try %d: %s", name, len(trace.turns) + 1, attempt, failure)
                if attempt > self._retries:
                    raise
            self._session.close()
            self._session = self._open()

    def close(self) -> None:
        self._session.close()


async def _play(
    trace: Trace,
    chat: Chat,
    engine: _Seat,
    tools: ToolSession,
    config: RolloutConfig,
    key: SampleKey,
    last_try: bool,
    max_sampled: int,
) -> Outcome:
    limit = trace.prompt_len + config.max_response_tokens
    dialect = chat.dialect
    while True:
        room = min(limit - len(trace.tokens), max_sampled - sum(len(message.tokens) for _, message in trace.sampled))
        if room == 0:
            return Outcome.LENGTH
        sampling = Sampling(
            max_tokens=min(room, config.max_turn_tokens or room),
            stop_ids=chat.stop_ids,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=key.turn_seed(len(trace.turns)),
            stop=chat.stop,
        )
        with span(Lane.EPISODES, "message"):
            message = await engine.generate(trace, sampling)
        start = len(trace.tokens)
        trace.tokens += message.tokens.tolist()
        trace.sampled.append((start, message))
        stop = len(trace.tokens)
        text = chat.message_text(trace.tokens[start:stop])
        parsed = dialect.parse(text)
        unrun = parsed.call if dialect.counts_unrun else None

        def turn(
            outcome: Outcome,
            call: ToolCall | None,
            text: str = text,
            span: tuple[int, int] = (start, stop),
            observation: str = "",
            seconds: float = 0.0,
        ) -> Turn:
            return Turn(text, *span, len(trace.tokens), outcome, call, observation, seconds)

        if not message.stopped:
            # an unfinished message ran no tool; in some protocols a call that it opened is still one, a malformed one
            trace.turns.append(turn(Outcome.LENGTH, unrun))
            return Outcome.LENGTH
        if parsed.call is None:
            trace.turns.append(turn(Outcome.ANSWERED, None))
            return Outcome.ANSWERED
        if len(trace.turns) + 1 == dialect.num_messages(config.max_turns):
            trace.turns.append(turn(Outcome.TURN_LIMIT, unrun))
            return Outcome.TURN_LIMIT
        began = time.perf_counter()
        ends = parsed.ends
        if parsed.arguments is None:
            observation = dialect.malformed(parsed)
        else:
            try:
                with span(Lane.TOOLS, parsed.call.name):
                    result = await tools.call(parsed.call.name, dialect.arguments(parsed.call.name, parsed.arguments))
            except InfrastructureError as failure:
                read = dialect.unreachable(failure) if last_try else None
                if read is None:
                    raise
                result, ends = read, True
            observation = dialect.word(result)
        seconds = time.perf_counter() - began
        observation = await chat.fit(observation, config.max_observation_tokens)
        unusable = await chat.unusable(observation.images) if observation.images else None
        piece = chat.encode_observation(observation, trace.tokens[-1], config.max_observation_tokens, unusable)
        if len(trace.tokens) + len(piece.tokens) >= limit:
            trace.turns.append(turn(observation.outcome, parsed.call, observation=piece.text, seconds=seconds))
            return Outcome.LENGTH
        trace.append(piece)
        trace.turns.append(turn(observation.outcome, parsed.call, observation=piece.text, seconds=seconds))
        if ends:
            return Outcome.TURN_LIMIT


async def encode_prompts(prompts: Sequence[Prompt], chat: Chat, config: RolloutConfig) -> list[TokenPiece]:
    """All of them, before any is sampled. A DataError names every one that cannot be used."""
    pieces: list[TokenPiece] = []
    wrong: list[str] = []
    too_long: list[str] = []
    for prompt in prompts:
        await asyncio.sleep(0)  # a signal must get through
        try:
            pieces.append(chat.encode_prompt(prompt))
        except DataError as error:
            wrong.append(str(error))
            continue
        if len(pieces[-1].tokens) > config.max_prompt_tokens:
            too_long.append(f"prompt {prompt.uid} has {len(pieces[-1].tokens)} tokens")
    if too_long:
        rows = "row" if len(too_long) == 1 else "rows"
        more = f" and {len(too_long) - _NAMED} more" if len(too_long) > _NAMED else ""
        wrong.append(
            f"{', '.join(too_long[:_NAMED])}{more}, rollout.max_prompt_tokens is {config.max_prompt_tokens}; raise the limit "
            f"or remove the {rows} (metis-fast data check FILE --model FOLDER finds all of a file; tools that are told of in a "
            "prompt count, see tools.describe)"
        )
    if wrong:
        raise DataError("; ".join(wrong))
    return pieces


async def run_episode(
    prompt: Prompt,
    index: int,
    chat: Chat,
    engine: Engine,
    toolbox: Toolbox,
    config: RolloutConfig,
    key: SampleKey,
    encoded: TokenPiece | None = None,
    first: EngineSession | None = None,
    max_sampled: int | None = None,
) -> Rollout:
    """Sample one rollout; never raises for our own failures.

    An engine that fails is asked again for the same message, in a new session and with all that there is so far: the tools
    live on and are not called twice. A tool that fails starts the episode again from the prompt: a Python session that was
    lost half-way cannot be continued fairly. Either is tried `config.retries` times (an engine: for each message), then the
    rollout ends in INFRASTRUCTURE_ERROR and has no verdict.

    encoded: the prompt's tokens, where they are known. first: an engine session that was opened before (it fixes the batch's
    shape), only with `encoded`; later tries open their own. max_sampled: most tokens that the policy may write, over all
    messages; None: as `config` says.

    Raises:
        DataError: the prompt is longer than `max_prompt_tokens` or holds an image that cannot be used.
    """
    if encoded is None:
        assert first is None  # nothing would close it
        (encoded,) = await encode_prompts([prompt], chat, config)
    PLAYED.set(Played(f"{key.seed}/{key.stream}/{key.order}", f"{prompt.uid}, rollout {index}"))
    error, most = "", config.max_response_tokens if max_sampled is None else max_sampled
    trace = Trace(len(encoded.tokens), [], [], [])
    for attempt in range(config.retries + 1):
        trace = Trace(len(encoded.tokens), list(encoded.tokens), list(encoded.images), list(encoded.spans))
        seat, first = _Seat(engine, key, prompt, index, config.retries, first), None
        tools = chat.offer.limited(prompt, toolbox.session(prompt.images, prompt.extra, chat.seen(prompt.images)))
        try:
            with span(Lane.EPISODES, f"rollout {prompt.uid}#{index}"):
                outcome = await _play(trace, chat, seat, tools, config, key, attempt == config.retries, most)
            return trace.finish(prompt, index, outcome)
        except EngineFailure as failure:
            error = str(failure)
            break
        except InfrastructureError as failure:
            error = str(failure)
            log.warning("rollout %s#%d, try %d: %s", prompt.uid, index, attempt + 1, error)
        finally:
            seat.close()
            await tools.close()
    return trace.finish(prompt, index, Outcome.INFRASTRUCTURE_ERROR, error)


async def collect(
    prompts: Sequence[Prompt],
    rollouts_per_prompt: int,
    chat: Chat,
    engine: Engine,
    toolbox: Toolbox,
    config: RolloutConfig,
    seed: int,
    stream: str,
    on_done: Callable[[], object] = lambda: None,
    first: int = 0,
) -> list[Group]:
    """Sample `rollouts_per_prompt` rollouts of every prompt, at most `config.max_concurrent` at once.

    first: order of the first rollout, where others play what comes before it in the stream.

    Every prompt is encoded once, before anything is sampled. With `config.deterministic` the native engine's rollouts run in
    fixed blocks, so that what shares a batch does not depend on timing.
    on_done is called after every rollout.

    Raises:
        DataError: prompts longer than `max_prompt_tokens` or with an image that cannot be used; names all of them.
    """
    pieces = await encode_prompts(prompts, chat, config)
    total = len(prompts) * rollouts_per_prompt
    blocks = config.deterministic and config.engine == "native"  # others have no order that a block could keep
    gate = asyncio.Semaphore(total if blocks else config.max_concurrent)

    async def one(place: int, session: EngineSession | None) -> Rollout:
        async with gate:
            rollout = await run_episode(
                prompts[place // rollouts_per_prompt],
                place % rollouts_per_prompt,
                chat,
                engine,
                toolbox,
                config,
                SampleKey(seed, stream, first + place),
                pieces[place // rollouts_per_prompt],
                session,
            )
        on_done()
        return rollout

    rollouts: list[Rollout] = []
    block = config.max_concurrent if blocks else total
    for start in range(0, total, block):
        places = range(start, min(start + block, total))
        # opened before any of them runs: the engine must know whom to wait for
        sessions = [
            engine.session(first + place, prompts[place // rollouts_per_prompt].uid) if blocks else None for place in places
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(one(place, session)) for place, session in zip(places, sessions, strict=True)]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the others were cancelled because of the first
        rollouts += [task.result() for task in running]
    return [
        Group(prompt, tuple(rollouts[i * rollouts_per_prompt : (i + 1) * rollouts_per_prompt]))
        for i, prompt in enumerate(prompts)
    ]


async def play_group(
    prompt: Prompt,
    rollouts_per_prompt: int,
    chat: Chat,
    engine: Engine,
    toolbox: Toolbox,
    config: RolloutConfig,
    key: SampleKey,
    places: asyncio.Semaphore,
    started: Callable[[], object] = lambda: None,
    on_done: Callable[[], object] = lambda: None,
) -> Group:
    """Sample the rollouts of one prompt, each as soon as it gets one of the `places`, which groups share.

    key: of its first rollout. started: called when a rollout gets its place. on_done: after every rollout.

    Raises:
        DataError: see `collect`.
    """
    (piece,) = await encode_prompts([prompt], chat, config)
    rollouts: dict[int, Rollout] = {}

    async def one(index: int) -> None:
        async with places:
            started()
            own = replace(key, order=key.order + index)
            rollouts[index] = await run_episode(prompt, index, chat, engine, toolbox, config, own, piece)
        on_done()

    try:
        async with asyncio.TaskGroup() as tasks:
            for index in range(rollouts_per_prompt):
                tasks.create_task(one(index))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None  # the others were cancelled because of the first
    return Group(prompt, tuple(rollouts[index] for index in range(rollouts_per_prompt)))
