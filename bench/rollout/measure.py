"""Runs the variants and measures them.

busy_share: seconds in which the engine was in a step (a prefill or a decoding step, of one row or of many), over the seconds of
the window. The window of `ours` ends when its last trajectory is begun: behind that a real run goes on with the next batches'.
The window of a variant that plays one batch is the whole of it, since waiting for its end is what the scheme does.
trajectories_per_s: those that ended within the window, over its seconds.
p99_s: 99th percentile, over the trajectories that were handed out, of the time from a trajectory's begin to its last token,
failed tries included.
overhead: with tools that take no time and do not fail, the same messages and observations, as many at once: CPU seconds outside
of the engine's steps beyond those of `raw`, over all CPU seconds of `raw`. That leaves out how fast the same steps happened to
run, which differs by more than the loop costs where other work is on the machine; the difference of all CPU seconds and of wall
seconds is given beside it. The runs of a round follow each other, and a variant's share is that of its round; median, least and
most of the rounds.

An engine in another process (vllm) has no steps that could be seen from here: busy is then the time in which it had a request
to work on, CPU seconds are those of this process (all of them outside of steps), and shares are of raw's wall seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metis_fast.config import Config, ModelConfig
from metis_fast.model import Policy, load_policy
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import Engine
from metis_fast.testing.latency import Latency, SlowToolbox
from metis_fast.types import Outcome

from ..candidate import BenchError, Spread
from .check import check_played, check_rewards, expected_repeats, expected_restarts
from .jobs import Handed, Played, Stage, ours, ours_over, ours_sync, raw, reference
from .plan import CONTEXT, SHAPES, Plan, Shape, build_model
from .scripted import Clock, ClockedNative, ClockedRequests, ScriptedEngine
from .server import CompletionsServer
from .weights import SyncRow, measure_engine, measure_sync

OURS, SYNC, OVER, REFERENCE, GATHER, RAW = "ours", "ours, one batch", "ours, over-provisioned", "reference", "gather", "raw"
VARIANTS = {OURS: ours, SYNC: ours_sync, OVER: ours_over, REFERENCE: reference, RAW: raw}
OVERHEADS = (RAW, OURS, GATHER)
"""Those whose overhead is measured."""

BATCHES = (SYNC, OVER, REFERENCE, GATHER)
"""Those that play one batch."""

RESTARTS = (OURS, SYNC, OVER)
"""Those in which a failed tool call starts the trajectory again."""

NO_TOOLS = Latency(0.0, 0.0, 0.0)
ENGINES = ("native", "vllm")


@contextlib.contextmanager
def open_engine(name: str, policy: Policy, clock: Clock, scratch: Path, threads: int, seed: int) -> Iterator[Engine]:
    """The engine of that name; what it does goes to `clock`.

    Raises:
        EngineError: vllm is not installed, or does not start.
    """
    with contextlib.ExitStack() as stack:
        if name == "native":
            engine: Engine = ClockedNative(policy, clock)
        else:
            import torch

            from metis_fast.rollout.vllm.engine import VllmEngine
            from metis_fast.workers.hub import Hub  # these import most of the package, which every `bench` would wait for
            from metis_fast.workers.launch import LocalLauncher, engine_gpus

            config = Config.model_validate(
                {
                    "run": {"dir": scratch, "seed": seed},
                    "model": {"path": policy.folder, "dtype": "float32"},
                    "rollout": {
                        "engine": name,
                        "deterministic": False,
                        "max_prompt_tokens": CONTEXT // 2,
                        "max_response_tokens": CONTEXT // 2,
                        "vllm": {"cpu_threads": threads},
                    },
                }
            )
            gpus = engine_gpus(torch.cuda.device_count(), 0, 1, share=False)
            hub = stack.enter_context(Hub(config.workers, LocalLauncher(scratch / "workers", gpus)))
            vllm = VllmEngine(config, policy, hub)
            vllm.wait(lambda: None)
            engine = ClockedRequests(vllm, clock)
        stack.callback(engine.close)
        yield engine


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a variant. batch: trajectories of a step, of `ours`. cpu_s: of all threads, the client's process included;
    outside_s: of these, not in engine steps.
    whole: [begin, end], window: that of busy_share, in seconds of perf_counter. See the top of this file."""

    variant: str
    concurrency: int
    batch: int
    handed: Handed
    engine: ScriptedEngine
    clock: Clock
    failed_calls: int
    cpu_s: float
    outside_s: float
    whole: tuple[float, float]
    window: tuple[float, float]

    @property
    def wall_s(self) -> float:
        """Seconds of the whole job."""
        return self.whole[1] - self.whole[0]

    @property
    def num_messages(self) -> int:
        """Of the trajectories that were handed out."""
        return sum(len(one.messages) for one in self.handed.played)


@dataclass(frozen=True, slots=True)
class Overhead:
    """Of a variant beyond raw, see the top of this file. outside: of CPU seconds outside of the engine's steps; cpu: of all,
    None with an engine in another process; wall: of wall seconds. message_s: outside, CPU seconds for each message."""

    outside: Spread
    cpu: Spread | None
    wall: Spread
    message_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """A variant. concurrency, batch: trajectories at once, and of a step. rows: that decode together, in the mean over the busy
    time of the window."""

    variant: str
    concurrency: int
    batch: int
    busy_share: float
    busy_share_whole: float
    trajectories_per_s: float
    p99_s: float
    rows: float
    tokens_per_s: float
    wall_s: float
    trajectories: int
    dropped: int
    failed_calls: int
    infrastructure_errors: int
    overhead: Overhead | None


class WrongResult(Exception):
    """A variant did not play what the plan says; nothing of it may be shown."""


class Client:
    """The process of `client`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @staticmethod
    @contextlib.asynccontextmanager
    async def start(folder: Path, shape: str, seed: int) -> AsyncIterator[Client]:
        """While open, it takes jobs. Raises BenchError where it cannot start."""
        with tempfile.TemporaryFile("w+") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                f"{__package__}.client",
                str(folder),
                shape,
                str(seed),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=1 << 26,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            try:
                client = Client(process)
                await client._answer()
                yield client
            except EOFError:
                code = await process.wait()
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["no message"])[-1]
                raise BenchError(f"the process of {GATHER} ended with code {code}: {last}") from None
            finally:
                if process.returncode is None:
                    process.kill()
                await process.communicate()

    async def _answer(self) -> str:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise EOFError
        return line.decode()

    async def play(self, stage: Stage, num: int) -> tuple[Handed, int, float]:
        """(trajectories, failed calls, CPU seconds of the process) of a batch."""
        assert self._process.stdin is not None
        async with CompletionsServer(stage) as port:
            job = {"port": port, "num": num, "latency": dataclasses.asdict(stage.toolbox.latency)}
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            answer = json.loads(await self._answer())
        played = [
            Played(one["order"], tuple(one["messages"]), tuple(one["observations"]), Outcome(one["outcome"]))
            for one in answer["played"]
        ]
        return Handed(played), answer["num_failed"], answer["cpu_s"]


class Runner:
    """Plays jobs on one engine.

    engine: tells `clock` what it does.
    """

    def __init__(self, policy: Policy, shape: Shape, seed: int, engine: Engine, clock: Clock) -> None:
        self.shape, self.seed, self.engine, self.clock = shape, seed, engine, clock
        self._policy, self._tokenizer = policy, policy.tokenizer
        self.chat = Chat(policy.tokenizer, policy.images)
        self.plan = Plan(shape, seed, self.chat, policy.tokenizer)

    async def run(
        self, variant: str, num: int, concurrency: int, latency: Latency, client: Client, batch: int | None = None
    ) -> Job:
        """One job, checked. batch: of a step of `ours`; None: `concurrency`.

        Raises:
            WrongResult: it did not play what the plan says.
        """
        plan = self.plan if latency == self.shape.latency else self.plan.with_latency(latency)
        scripted = ScriptedEngine(self.engine, plan, self._tokenizer)
        toolbox = SlowToolbox(latency, self.seed, plan.observation)
        batch = concurrency if batch is None else batch
        stage = Stage(plan, self._policy, self.chat, scripted, toolbox, concurrency, batch)
        self.clock.clear()
        cpu, began = time.process_time(), time.perf_counter()
        if variant == GATHER:
            handed, failed, client_s = await client.play(stage, num)
        else:
            handed, client_s = await VARIANTS[variant](stage, num), 0.0
            failed = toolbox.num_failed
        ended, cpu = time.perf_counter(), time.process_time() - cpu + client_s
        clock = self.clock.copy()
        stop = max(life.began for life in scripted.lives.values()) if variant == OURS and num > concurrency else ended
        job = Job(
            variant, concurrency, batch, handed, scripted, clock, failed, cpu, cpu - clock.cpu_s, (began, ended), (began, stop)
        )
        wrong = await self._wrong(job, stage, num)
        if wrong:
            raise WrongResult("\n".join(f"{variant} at {concurrency}: {line}" for line in wrong))
        return job

    async def _wrong(self, job: Job, stage: Stage, num: int) -> list[str]:
        retries = stage.config.retries
        expected = expected_restarts if job.variant in RESTARTS else expected_repeats
        if job.variant == RAW:
            return check_played(stage.plan, job.handed.played, num, lambda _: True)
        wrong = check_played(stage.plan, job.handed.played, num, lambda order: expected(stage.plan, order, retries)[1])
        failures = {one.order: expected(stage.plan, one.order, retries)[0] for one in job.handed.played}
        if not job.handed.dropped and job.failed_calls != sum(failures.values()):
            wrong.append(f"{job.failed_calls} tool calls failed, expected {sum(failures.values())}")
        if job.variant in RESTARTS:
            for order, failed in failures.items():
                sessions = job.engine.lives[order].num_sessions
                if sessions != min(failed, retries) + 1:
                    wrong.append(f"trajectory {order} was begun {sessions} times after {failed} failed calls")
            wrong += await check_rewards(job.handed.groups)
        if stage.toolbox.num_open:
            wrong.append(f"{stage.toolbox.num_open} tool sessions were not closed")
        return wrong


def to_row(job: Job, overhead: Overhead | None) -> Row:
    """The figures of a job."""
    lives = [job.engine.lives[one.order] for one in job.handed.played]
    start, stop = job.window
    seconds = np.array([life.ended - life.began for life in lives])
    tokens = sum(sum(one.messages) for one in job.handed.played)
    return Row(
        variant=job.variant,
        concurrency=job.concurrency,
        batch=job.batch,
        busy_share=job.clock.busy_s(start, stop) / (stop - start),
        busy_share_whole=job.clock.busy_s(*job.whole) / job.wall_s,
        trajectories_per_s=sum(life.ended <= stop for life in lives) / (stop - start),
        p99_s=float(np.percentile(seconds, 99)),
        rows=job.clock.mean_rows(start, stop),
        tokens_per_s=tokens / job.wall_s,
        wall_s=job.wall_s,
        trajectories=len(lives),
        dropped=job.handed.dropped * job.engine.plan.shape.rollouts,
        failed_calls=job.failed_calls,
        infrastructure_errors=sum(one.outcome is Outcome.INFRASTRUCTURE_ERROR for one in job.handed.played),
        overhead=overhead,
    )


def _spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def to_overhead(mine: Sequence[Job], base: Sequence[Job]) -> Overhead:
    """Of the jobs of a variant beyond those of raw, round by round."""

    def shares(of: Callable[[Job], float], by: Callable[[Job], float]) -> Spread:
        return _spread([(of(a) - of(b)) / by(b) for a, b in zip(mine, base, strict=True)])

    seen = all(job.clock.cpu_s > 0 for job in base)
    beyond = [(a.outside_s - b.outside_s) / a.num_messages for a, b in zip(mine, base, strict=True)]
    return Overhead(
        outside=shares(lambda job: job.outside_s, lambda job: job.cpu_s if seen else job.wall_s),
        cpu=shares(lambda job: job.cpu_s, lambda job: job.cpu_s) if seen else None,
        wall=shares(lambda job: job.wall_s, lambda job: job.wall_s),
        message_s=statistics.median(beyond),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The loop warns of every failed call, and here they fail on purpose. A collection of all that torch has made takes half a
    second: what is there now is left out of collections."""
    logger = logging.getLogger("metis_fast.rollout.episode")
    level = logger.level
    logger.setLevel(logging.ERROR)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logger.setLevel(level)


@dataclass(frozen=True, slots=True)
class Result:
    """What the benchmark found."""

    rows: list[Row]
    sync: list[SyncRow]


async def measure(
    shape: str, seed: int, runs: int, engine: str, threads: int, scratch: Path, progress: Callable[[str], object]
) -> Result:
    """Rows of all variants. runs: rounds of the overhead. threads: of an engine in another process. scratch: an empty folder.
    progress: called with what comes next.

    Raises:
        WrongResult: a variant did not play what the plan says.
        BenchError: a process died.
    """
    sizes, folder = SHAPES[shape], scratch / "policy"
    build_model(folder, seed)
    policy = load_policy(ModelConfig(path=folder, dtype="float32"))
    clock = Clock()
    with open_engine(engine, policy, clock, scratch / "run", threads, seed) as opened, _quiet():
        runner = Runner(policy, sizes, seed, opened, clock)
        async with Client.start(folder, shape, seed) as client:

            async def play(
                variant: str, num: int, concurrency: int, latency: Latency = sizes.latency, batch: int | None = None
            ) -> Job:
                progress(f"{variant}, {concurrency} at once" + ("" if latency.median_s else ", no tool time"))
                return await runner.run(variant, num, concurrency, latency, client, batch)

            rounds: dict[str, list[Job]] = {name: [] for name in OVERHEADS}
            for name in OVERHEADS:  # the first run of each loads and allocates
                await play(name, sizes.rollouts, sizes.rollouts, NO_TOOLS)
            size = sizes.overhead_trajectories
            for number in range(runs):
                at = number % len(OVERHEADS)
                for name in [*OVERHEADS[at:], *OVERHEADS[:at]]:
                    rounds[name].append(await play(name, size, size, NO_TOOLS))
            overheads = {name: to_overhead(found, rounds[RAW]) for name, found in rounds.items()}
            jobs = [await play(OURS, num, concurrency, batch=batch) for concurrency, batch, num in sizes.streams]
            jobs += [await play(name, sizes.concurrency, sizes.concurrency) for name in BATCHES]
        progress("weight synchronisation")
        sync = await asyncio.to_thread(measure_sync, policy, sizes.sync_mb, runs)
        if engine == "vllm":
            sync.append(await asyncio.to_thread(measure_engine, opened, policy, runs))
    typical = sorted(rounds[RAW], key=lambda job: job.wall_s)[runs // 2]
    rows = [
        to_row(job, overheads.get(job.variant) if job.batch == job.concurrency == sizes.concurrency else None) for job in jobs
    ]
    return Result([*rows, to_row(typical, overheads[RAW])], sync)


def num_jobs(shape: Shape, runs: int) -> int:
    """How often `measure` says what comes next."""
    return len(OVERHEADS) * (runs + 1) + len(BATCHES) + len(shape.streams) + 1
