"""Judges in workers: `JudgeService` is served there, `RemoteJudge` is the run's side."""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from metis_fast.config import LlmJudgeConfig, ScoreConfig
from metis_fast.errors import InfrastructureError, JudgeError
from metis_fast.score.judge import open_judge
from metis_fast.score.protocol import JudgeUnavailable
from metis_fast.types import Prompt, Rollout, Verdict
from metis_fast.workers.hub import Hub
from metis_fast.workers.worker import Worker, WorkerError

SERVICE = "metis_fast.score.remote:JudgeService"
_MATH_S = 300.0  # a few comparisons of three CPU seconds each, behind others of the same kind, on a loaded machine
_REQUEST_SLACK_S = 70.0  # of an LLM judge's request, the wait before its next try included (at most 66 s, if it asks for that)


class JudgeService:
    """The judge of a worker. Its methods are called by `RemoteJudge` alone.

    Raises:
        ConfigError, JudgeError: see `open_judge`.
    """

    def __init__(self, config: ScoreConfig, styles: Collection[str]) -> None:
        self._judge = open_judge(config, styles)

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """See `Judge.judge`."""
        return await self._judge.judge(prompt, rollout)

    async def check(self) -> None:
        """See `StyleJudge.check`."""
        await self._judge.check()

    def close(self) -> None:
        """End helper processes and caches."""
        self._judge.close()


def start_judge_workers(
    hub: Hub, config: ScoreConfig, styles: Collection[str], num: int, service: str = SERVICE, max_restarts: int = 20
) -> list[Worker]:
    """Workers judge-0, judge-1, ...; they start in the background. service: one of another kind, for tests."""
    llm = config.llm
    # a worker's working folder is another; and `concurrency` is that of the whole run
    files = {"cache": llm.cache, "prompt": llm.prompt}
    paths = {name: None if path is None else path.resolve() for name, path in files.items()}
    llm = llm.model_copy(update={**paths, "concurrency": _share(llm, num)})
    config = config.model_copy(update={"llm": llm})
    secret = {name: os.environ[name] for name in llm.key_names() if name in os.environ}
    return [
        hub.worker(f"judge-{i}", "judge", service, config, tuple(sorted(styles)), max_restarts=max_restarts, environment=secret)
        for i in range(num)
    ]


def _share(config: LlmJudgeConfig, num_workers: int) -> int:
    return max(1, config.concurrency // num_workers)


@dataclass(frozen=True, slots=True, eq=False)
class _Lane:
    """What belongs to one event loop.

    slots: by worker; calls beyond what it does at once wait on our side, so that a deadline counts a call's own time.
    alone: held during a second try, so that a rollout which kills workers takes no other's second try along.
    """

    loop: asyncio.AbstractEventLoop
    slots: dict[str, asyncio.Semaphore]
    alone: asyncio.Lock


class RemoteJudge:
    """Spreads prompts over workers. See `Judge` for the contract.

    The rollouts of a prompt go to one worker, which asks a model only once for answers that are the same.
    """

    def __init__(self, config: ScoreConfig, workers: Sequence[Worker]) -> None:
        """workers: from `start_judge_workers`; they end with their hub."""
        self._workers = list(workers)
        self._in_flight = _share(config.llm, len(workers))
        self._request_s = (config.llm.retries + 1) * (config.llm.timeout_s + _REQUEST_SLACK_S)
        # a worker looks for those that are not named first, also after it was started again
        self._names_model = not all(one.model for one in config.llm.each())
        self._lane: _Lane | None = None

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """See `Judge.judge`. A worker that is lost is no verdict: another one is asked, once."""
        # what judges read; pictures and token ids would be most of the bytes
        prompt = replace(prompt, messages=(), images=())
        rollout = replace(rollout, images=(), image_spans=())
        lane = self._get_lane()
        try:
            worker = self._choose(prompt.uid, 0)
            async with lane.slots[worker.name]:
                return await self._ask(worker, prompt, rollout)
        except WorkerError as error:
            first = error
        try:
            async with lane.alone:
                return await self._ask(self._choose(prompt.uid, 1), prompt, rollout)
        except WorkerError as error:
            raise JudgeUnavailable("no verdict from two workers", f"{first}; {error}") from None

    async def _ask(self, worker: Worker, prompt: Prompt, rollout: Rollout) -> Verdict:
        # a model (of several all at once) is asked about each ground truth; as many rollouts as have places at once share
        # those of its requests
        requests = max(1, len(prompt.answers)) + self._names_model
        deadline_s = _MATH_S + requests * self._request_s
        verdict = await worker.call("judge", prompt, rollout, deadline_s=deadline_s)
        if not isinstance(verdict, Verdict):
            await worker.lose(f"it answered {type(verdict).__name__}, which is no verdict")
            raise WorkerError(f"worker {worker.name}: its answer is no verdict")
        return verdict

    async def check(self) -> None:
        """Whether every worker's judge works.

        Raises:
            ConfigError, JudgeError: it does not; the message says what to set.
        """
        try:
            deadline_s = _MATH_S + (2 + self._names_model) * self._request_s  # two verdicts
            await asyncio.gather(*(worker.call("check", deadline_s=deadline_s) for worker in self._workers))
        except InfrastructureError as error:
            raise JudgeError(f"a judge worker could not be tried: {error}; see its log in run.dir/workers") from None

    def close(self) -> None:
        """The workers end with their hub."""

    def _choose(self, uid: str, attempt: int) -> Worker:
        """The prompt's worker among those that live, or at least are being started; a second attempt takes the next one."""
        left = [worker for worker in self._workers if worker.broken is None]
        if not left:
            raise JudgeUnavailable("no judge worker is left", str(self._workers[0].broken))
        living = [worker for worker in left if worker.alive] or left
        return living[(zlib.crc32(uid.encode()) + attempt) % len(living)]

    def _get_lane(self) -> _Lane:
        loop = asyncio.get_running_loop()
        if self._lane is None or self._lane.loop is not loop:
            slots = {worker.name: asyncio.Semaphore(self._in_flight) for worker in self._workers}
            self._lane = _Lane(loop, slots, asyncio.Lock())
        return self._lane
