"""The LLM judge: asks a model behind any OpenAI-compatible endpoint whether an answer is right."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import httpx2

from metis_fast.config import LlmJudgeConfig
from metis_fast.errors import JudgeError
from metis_fast.score.llm_endpoint import Endpoint
from metis_fast.score.llm_prompt import Message, read_prompt
from metis_fast.score.llm_reply import READING, Said, read_reply, read_text, tokens_in
from metis_fast.score.protocol import Cost, JudgeUnavailable, Match, TryAgain, shown
from metis_fast.score.verdict_cache import VerdictCache
from metis_fast.types import Prompt

T = TypeVar("T")

_MAX_ANSWER_CHARS = 4000  # about 1,000 tokens; what is longer is not an answer to a question with a short ground truth
_MAX_BACKOFF_S = 30.0


@dataclass(eq=False)
class _Lane:
    """What belongs to one event loop.

    pending: requests under way, so that equal answers of a group cost one. naming: the one that looks for the model.
    """

    loop: asyncio.AbstractEventLoop
    client: httpx2.AsyncClient
    slots: asyncio.Semaphore
    pending: dict[str, asyncio.Task[Said]] = field(default_factory=dict)
    naming: asyncio.Task[None] | None = None


class LlmMatcher:
    """Judge style "llm".

    backoff_s: the first wait after a failed request; it doubles with each try, up to half a minute, less a random part.

    Raises:
        JudgeError: no endpoint is configured, or its address, the cache or the prompt cannot be used.
    """

    def __init__(self, config: LlmJudgeConfig, backoff_s: float = 0.5) -> None:
        if not config.base_url:
            raise JudgeError(
                "answers are to be judged by a model (score.judge, or judge style llm in the data), but score.llm.base_url is "
                "empty; set score.llm.base_url to an OpenAI-compatible endpoint, like http://127.0.0.1:8000/v1, or "
                "score.judge to one that needs no model (rule, choice, math)"
            )
        self._config = config
        self._backoff_s = backoff_s
        self._prompt = read_prompt(config.prompt)
        self._endpoint = Endpoint(config)
        self._cache = VerdictCache(config.cache)
        self._lane: _Lane | None = None
        self._cost = Cost()

    @property
    def cost(self) -> Cost:
        """See `Matcher.cost`."""
        return self._cost

    @property
    def model(self) -> str:
        """Which one is asked; "" as long as it is not known."""
        return self._endpoint.model

    @property
    def found(self) -> LlmJudgeConfig:
        """Its settings, with the model that is asked and the address as requests have it."""
        return self._config.model_copy(update={"model": self._endpoint.model, "base_url": str(self._endpoint)})

    async def compare(self, prompt: Prompt, answer: str) -> Match:
        """Whether the model says that the answer is right by one of the ground truths, each of which it is asked about alone.

        No answer, one too long to be one, and no ground truth are wrong without a request.

        Raises:
            JudgeUnavailable: of no ground truth the model said CORRECT, and of one or more it did not say the one word that was
                asked for, after all tries.
            JudgeError: the cache or the proxy cannot be used.
        """
        truths = list(dict.fromkeys(truth for truth in prompt.answers if truth.strip()))
        if not answer or len(answer) > _MAX_ANSWER_CHARS or not truths:
            return _wrong_without_request(answer)
        await self.find_model()
        asked = (self._compare_one(prompt.question, truth, answer) for truth in truths)
        found = await asyncio.gather(*asked, return_exceptions=True)
        failures = [one for one in found if isinstance(one, BaseException)]
        for failure in failures:
            if not isinstance(failure, JudgeUnavailable):
                raise failure
        said = [(truth, one) for truth, one in zip(truths, found, strict=True) if isinstance(one, Said)]
        right = next(((truth, one) for truth, one in said if one.correct), None)
        if right is None and failures:
            raise failures[0]
        truth, one = right or said[0]
        others = f" and for {len(said) - 1} more" if right is None and len(said) > 1 else ""
        reason = f"says {'CORRECT' if one.correct else 'INCORRECT'} for the ground truth {shown(truth)}{others}"
        return Match(one.correct, f"llm {self.model}", reason + (f", having thought: {one.thought}" if one.thought else ""))

    async def _compare_one(self, question: str, truth: str, answer: str) -> Said:
        messages = self._prompt.messages(question, truth, answer)
        # a verdict holds for the prompt and the settings it was given under, and the way it was read
        asked = json.dumps([READING, self._endpoint.model, self._config.extra_body, messages], sort_keys=True)
        key = hashlib.sha256(asked.encode()).hexdigest()
        known = self._cache.get(key)
        if known is not None:
            return known
        pending = self._get_lane().pending
        if key not in pending:

            def done(task: asyncio.Task[Said]) -> None:
                pending.pop(key, None)
                _seen(task)

            pending[key] = asyncio.create_task(self._ask(messages))
            pending[key].add_done_callback(done)
        said = await asyncio.shield(pending[key])  # one that gives up must not take it from the others
        self._cache.put(key, said)
        return said

    async def check(self) -> None:
        """Find the model where none is named, and ask for two verdicts that are beyond doubt.

        Raises:
            JudgeError: none came, or a wrong one; the message says what to do.
        """
        for answer, correct in (("2", True), ("7", False)):
            try:
                await self.find_model()
                verdict = await self._ask(self._prompt.messages("What is 1 + 1?", "2", answer))
            except JudgeUnavailable as error:
                raise JudgeError(f"{self}: {error}") from None
            if verdict.correct != correct:
                said = "CORRECT" if verdict.correct else "INCORRECT"
                raise JudgeError(
                    f"{self} says that {answer} is {said} for 1 + 1; name one that can judge with score.llm.model"
                    + (", or mend the prompt in score.llm.prompt" if self._config.prompt else "")
                )

    def __str__(self) -> str:
        model = f" {self._endpoint.model!r}" if self._endpoint.model else ""
        return f"LLM judge{model} at {self._endpoint}"

    def close(self) -> None:
        """Close the cache."""
        self._cache.close()

    def _get_lane(self) -> _Lane:
        loop = asyncio.get_running_loop()
        if self._lane is None or self._lane.loop is not loop:  # a caller may use one asyncio.run for every step
            self._lane = _Lane(loop, self._endpoint.client(), asyncio.Semaphore(self._config.concurrency))
        return self._lane

    async def find_model(self) -> None:
        """Once, where none is configured; here, too, and not in `check` alone: a worker may have started again.

        Raises:
            JudgeUnavailable: there is not one model and no other.
        """
        if self._endpoint.model:
            return
        lane = self._get_lane()
        if lane.naming is None or lane.naming.done():
            lane.naming = asyncio.create_task(self._tried(self._endpoint.find_model))
            lane.naming.add_done_callback(_seen)
        await asyncio.shield(lane.naming)

    async def _ask(self, messages: list[Message]) -> Said:
        async def request(client: httpx2.AsyncClient) -> Said:
            body = await self._endpoint.complete(client, messages)
            prompt_tokens, completion_tokens = tokens_in(body)
            self._cost += Cost(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
            return read_reply(body)

        return await self._tried(request)

    async def say(self, messages: list[Message], temperature: float = 0.0) -> str:
        """What the model answers, its thoughts left out; asked again as often as the settings say where nothing came.

        Raises:
            JudgeUnavailable: nothing came.
        """
        await self.find_model()

        async def request(client: httpx2.AsyncClient) -> str:
            body = await self._endpoint.complete(client, messages, temperature)
            prompt_tokens, completion_tokens = tokens_in(body)
            self._cost += Cost(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
            return read_text(body)

        return await self._tried(request)

    async def _tried(self, request: Callable[[httpx2.AsyncClient], Awaitable[T]]) -> T:
        """What a request gives, tried again as often as the settings say."""
        tries = self._config.retries + 1
        attempt = 1
        while True:
            try:
                return await self._in_time(request)
            except TryAgain as error:
                if attempt == tries:
                    tried = f"no verdict after {tries} tries; the last one: " if tries > 1 else ""
                    raise JudgeUnavailable(tried + error.reason, error.detail, error.advice) from None
                pause_s = self._pause_s(attempt, error.wait_s)
            await asyncio.sleep(pause_s)
            attempt += 1

    def _pause_s(self, attempt: int, asked_s: float) -> float:
        """What the endpoint asked for and a little more, so that not all come back at once; else by the number of tries."""
        if asked_s > 0:
            return asked_s * random.uniform(1.0, 1.1)
        return min(self._backoff_s * 2 ** (attempt - 1), _MAX_BACKOFF_S) * random.uniform(0.5, 1.0)

    async def _in_time(self, request: Callable[[httpx2.AsyncClient], Awaitable[T]]) -> T:
        lane, timeout_s = self._get_lane(), self._config.timeout_s
        try:
            async with lane.slots, asyncio.timeout(timeout_s):
                began = time.perf_counter()
                try:
                    return await request(lane.client)
                finally:
                    self._cost += Cost(requests=1, seconds=time.perf_counter() - began)
        except TimeoutError:
            advice = "raise score.llm.timeout_s, lower score.llm.concurrency, or see the log of the server"
            raise TryAgain(f"no answer within {timeout_s:g} s{self._endpoint.way}", advice=advice) from None


async def find_models(config: LlmJudgeConfig) -> tuple[str, ...]:
    """The model of every single judge of `config`: as the settings name it, else the one that the endpoint serves.

    Raises:
        JudgeUnavailable: there is not one model and no other, or the endpoint does not tell.
        JudgeError: see `LlmMatcher`.
    """
    names: list[str] = []
    for one in config.each():
        matcher = LlmMatcher(one.model_copy(update={"cache": None}))
        try:
            await matcher.find_model()
            names.append(matcher.model)
        finally:
            matcher.close()
    return tuple(names)


def _wrong_without_request(answer: str) -> Match:
    if not answer:
        return Match(False, "", "no answer")
    if len(answer) > _MAX_ANSWER_CHARS:
        return Match(False, "", f"an answer of {len(answer)} characters, more than {_MAX_ANSWER_CHARS}")
    return Match(False, "", "there is no ground truth")


def _seen(task: asyncio.Task[T]) -> None:
    """Nobody may wait for it any more: then asyncio would tell of its failure."""
    if not task.cancelled():
        task.exception()
