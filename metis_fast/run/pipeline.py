"""The spine: what a run does, one verb a line."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

from metis_fast.config import Config
from metis_fast.errors import CheckpointError, Interrupted, MetisError, NonFiniteError, TrainerError
from metis_fast.report.heldout import write_heldout
from metis_fast.report.html import write_report
from metis_fast.report.log import failed_rates, read_evaluations
from metis_fast.report.panel import panel
from metis_fast.report.progress import progress
from metis_fast.report.slices import slices
from metis_fast.report.summary import Summary, write_summary
from metis_fast.rollout.engine import SyncReport
from metis_fast.rollout.schedule import Pending, Taken
from metis_fast.run.assembly import open_parts
from metis_fast.run.interrupt import Interrupts
from metis_fast.run.parts import Parts
from metis_fast.score.scoring import score
from metis_fast.spans import Lane, span
from metis_fast.summary import GroupSummary, Job, ScoredSummary
from metis_fast.train.protocol import GroupsLost
from metis_fast.types import Slice, StepStats, UpdateStats

T = TypeVar("T")


def train(config: Config, seconds_before: float = 0.0, goes_on: Callable[[int], bool] = lambda step: True) -> Summary | None:
    """HDPO from `config.model.path`, resumed from the newest checkpoint of `config.run.dir` if there is one.

    `rollout.mode` decides what else goes on while these lines run: nothing (`sync`), or rollouts of coming steps on the event
    loop, which runs whenever a batch is waited for or scored, and while the update runs in a thread (`rollout.schedule`).

    seconds_before: wall seconds of the stages that led here; they count in the summary. goes_on: asked as a step begins; False
    ends the run there, as it is: nothing more is saved, evaluated or exported.

    Raises:
        Interrupted: a signal came; the last whole step is checkpointed.
        NonFiniteError: NaN or Inf; the rollouts that caused it are in `failed/`, the last whole step is checkpointed.
        MetisError: anything that a user can mend.
    """
    with Interrupts() as interrupts, panel(config), open_parts(config, interrupts) as parts, ExitStack() as stack:
        first = parts.state.resume()
        stack.enter_context(_settled())
        for step in range(first, config.train.steps + 1):
            if not goes_on(step):
                return None
            with _saved_on_failure(parts, step):
                clock = _Clock()
                clock("rollout", _finish_ahead(parts, step))
                synced = clock("sync", parts.sync(step))
                clock("gate", _gate_if_due(parts, step, first))
                rates = _evaluate_if_due(parts, step)
                _benchmarks_if_due(parts, step)
                if step > first and _due(step, config.checkpoint.every, config.train.steps):
                    with span(Lane.RUN, "checkpoint"):
                        parts.state.save(step, rates)
                if step == config.train.steps:
                    break
                clock.skip()
                taken = clock("rollout", _next_batch(parts, step))
                scored, updates = _trained(parts, taken.groups, step, clock)
                clock("store", _store(parts, scored, step))
                with span(Lane.RUN, "log"):
                    parts.log.step(_step_stats(parts, step, taken, scored, updates, synced, clock))
                parts.state.finished(step)
                del taken, scored  # their objects go now, not when the next batch is there
        parts.checkpoints.finish()
        parts.export(config.run.dir / "trained")
        return _summarise(parts, seconds_before)


def evaluate(config: Config) -> dict[str, Slice]:
    """Rates of `config.model.path` on the held-out prompts, by ability and kind. Nothing is trained or stored.

    Where a prompt has several samples, rates are over all of them.
    """
    with Interrupts() as interrupts, open_parts(config, interrupts, training=False) as parts:
        return slices(_evaluate(parts, "eval"))


@contextmanager
def _settled() -> Iterator[None]:
    """What is there by now stays: Ray has Python's collector look through everything again and again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # else what is never collected complains when the process ends


class _Clock:
    """Wall and CPU seconds by stage; each call closes the stage whose result it is given. Stages of one name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.skip()

    def __call__(self, stage: str, result: T) -> T:
        wall, cpu = self._since
        self.skip()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._since[0] - wall
        self.cpu_seconds[stage] = self.cpu_seconds.get(stage, 0.0) + self._since[1] - cpu
        return result

    def skip(self) -> None:
        """What ran since the last stage belongs to none."""
        self._since = time.perf_counter(), time.process_time()


@contextmanager
def _saved_on_failure(parts: Parts, step: int) -> Iterator[None]:
    """Whatever ends a step half-way (a signal, a dead judge, a NaN): the state before the step is put on disk first."""
    try:
        yield
    except (Interrupted, MetisError) as error:
        if not isinstance(error, CheckpointError | TrainerError):  # after these there is nothing that could be saved
            parts.state.save_boundary(step)
        raise


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _finish_ahead(parts: Parts, step: int) -> None:
    """One step off, weights change between batches: the one that was begun during the last update is waited for first."""
    if parts.schedule is not None and parts.config.rollout.mode == "one_step_off" and step < parts.config.train.steps:
        with span(Lane.RUN, "rollout"):
            parts.interrupts.run(parts.schedule.ready(step))


def _next_batch(parts: Parts, step: int) -> Taken[GroupSummary]:
    config = parts.config
    if parts.schedule is not None:
        count = progress(config.rollout.prompts_per_step, f"train/{step}", config.log, "group")
        with span(Lane.RUN, "rollout"), count as bar:
            return parts.interrupts.run(parts.schedule.batch(step, bar.update))
    rows = parts.interrupts.run(parts.cursor.begin(config.rollout.prompts_per_step))
    first = step * len(rows)
    jobs = [parts.job(Pending(first + i, row)) for i, (row, _) in enumerate(rows)]
    groups = _rollout(parts, jobs, config.rollout.rollouts_per_prompt, f"train/{step}")
    return Taken(groups, in_flight=0, carried=0, dropped=0)


def _rollout(parts: Parts, jobs: Sequence[Job], repeats: int, what: str) -> list[GroupSummary]:
    with span(Lane.RUN, "rollout"), progress(len(jobs) * repeats, what, parts.config.log, "rollout") as bar:
        return parts.interrupts.run(parts.fleet.play_all(jobs, bar.update))


def _trained(
    parts: Parts, groups: Sequence[GroupSummary], step: int, clock: _Clock
) -> tuple[list[ScoredSummary], tuple[UpdateStats, ...]]:
    """Score a batch and train on it. What a node took with it before it was trained is played again first."""
    lost: tuple[int, ...] = ()
    while True:
        groups = clock("rollout", parts.interrupts.run(parts.fleet.whole(groups, lost)))
        scored = clock("score", _score(parts, groups, step))
        try:
            return scored, clock("update", _update(parts, scored, step))
        except GroupsLost as gone:
            lost = clock("update", gone.numbers)
            if parts.config.rollout.mode == "sync":  # engines rest, and cannot play before they are awake and have weights
                clock("sync", parts.sync(step))


def _score(parts: Parts, groups: Sequence[GroupSummary], step: int | None = None) -> list[ScoredSummary]:
    """step: of training; None: an evaluation."""
    with span(Lane.RUN, "score"):
        scores = score(groups, parts.config, parts.missing, step)
    return [ScoredSummary(group, own) for group, own in zip(groups, scores, strict=True)]


def _update(parts: Parts, scored: Sequence[ScoredSummary], step: int) -> tuple[UpdateStats, ...]:
    parts.interrupts.check()
    assert parts.trainer is not None
    parts.checkpoints.finish()  # written while the rollouts were sampled; whatever ends the update, it is there

    def update() -> tuple[UpdateStats, ...]:
        groups = scored if parts.trainer.fetches else parts.fleet.fetch_scored(scored)
        with span(Lane.TRAINER, "update"):
            return parts.trainer.update(groups, parts.interrupts.check)

    try:
        with span(Lane.RUN, "update"):
            if parts.config.rollout.mode == "sync":
                parts.rest()
                return update()
            return parts.interrupts.run(_beside(update))
    except NonFiniteError as error:
        path = parts.interrupts.finish(parts.fleet.write("failed", f"step-{step:06d}", scored))
        raise NonFiniteError(f"step {step}: {error}; its rollouts are in {path}") from None


async def _beside(update: Callable[[], T]) -> T:
    """Run an update in a thread, while rollouts go on.

    A stop that is asked for meanwhile ends it at its next check; one that has taken an optimizer step is completed.
    """
    running = asyncio.ensure_future(asyncio.to_thread(update))
    while not running.done():  # Ctrl-C and then SIGTERM cancel twice
        with suppress(asyncio.CancelledError):
            await asyncio.shield(running)
    return running.result()


def _store(parts: Parts, scored: Sequence[ScoredSummary], step: int) -> None:
    with span(Lane.RUN, "store"):
        if parts.config.log.rollouts:
            parts.interrupts.finish(parts.fleet.write("rollouts", f"step-{step:06d}", scored))
        parts.fleet.drop([one.group for one in scored])


def _evaluate(parts: Parts, stream: str) -> list[ScoredSummary]:
    """Sample the held-out prompts.

    Training rollouts may go on beside: no update is under way, so that every token is of the weights that the rates are of.
    """
    repeats = parts.config.eval.rollouts_per_prompt
    jobs = [Job("heldout", row, stream, i * repeats) for i, row in enumerate(parts.heldout())]
    return _score(parts, _rollout(parts, jobs, repeats, stream))


def _gate_if_due(parts: Parts, step: int, first: int) -> None:
    """The truth gate: before the first step of this process, before the second one, and every `gate.every` steps."""
    gate = parts.config.gate
    # at first both have the folder's weights, and an update that changes nothing in the engine would not show
    changed = step == first + 1 and parts.config.rollout.engine == "vllm"
    if gate.prompts and (step == first or changed or (gate.every and step % gate.every == 0)):
        with span(Lane.RUN, "gate"):
            parts.gate()


def _evaluate_if_due(parts: Parts, step: int) -> tuple[float, ...] | None:
    """Held-out rates before and after training and every `eval.every` steps. Returns what "best" is measured by."""
    config = parts.config
    if not config.data.heldout or not (step == 0 or _due(step, config.eval.every, config.train.steps)):
        return None
    # one stream for all steps: the same noise for every policy, so that differences are the policy's
    with span(Lane.RUN, "evaluate"):
        scored = _evaluate(parts, "eval")
    rates = slices(scored)
    write_heldout(config.run.dir, step, scored)
    parts.log.evaluation(step, rates)
    return rates["all"].accuracy, -rates["all"].tool_calls


def _benchmarks_if_due(parts: Parts, step: int) -> None:
    """`eval.benchmarks`, as often as the held-out prompts are played."""
    if parts.benchmarks and (step == 0 or _due(step, parts.config.eval.every, parts.config.train.steps)):
        from metis_fast.evaluate.training import play_benchmarks  # with the client of judges, which only such runs need

        with span(Lane.RUN, "evaluate"):
            play_benchmarks(parts, step)


def _staleness(step: int, scored: Sequence[ScoredSummary]) -> tuple[int, ...]:
    """Trained tokens by the number of updates that the weights which sampled them lacked."""
    ages = Counter[int]()
    for group in scored:
        for rollout, own in zip(group.rollouts, group.scores, strict=True):
            if own.verdict is not None:
                for version, tokens in rollout.versions:
                    ages[step - version] += tokens
    return tuple(ages[age] for age in range(max(ages) + 1)) if ages else ()


def _step_stats(
    parts: Parts,
    step: int,
    taken: Taken[GroupSummary],
    scored: Sequence[ScoredSummary],
    updates: tuple[UpdateStats, ...],
    synced: SyncReport,
    clock: _Clock,
) -> StepStats:
    scores = [own for group in scored for own in group.scores]
    judged = [own for own in scores if own.verdict is not None]
    outcomes = dict(Counter(str(own.outcome) for own in scores))
    infra_failed_rate, judge_failed_rate = failed_rates(outcomes)
    return StepStats(
        step=step,
        epoch=parts.cursor.epoch,
        reward_acc=sum(own.r_acc for own in judged) / max(1, len(judged)),
        reward_tool=sum(own.r_tool for own in judged) / max(1, len(judged)),
        slices=slices(scored),
        outcomes=outcomes,
        infra_failed_rate=infra_failed_rate,
        judge_failed_rate=judge_failed_rate,
        tool_errors=sum(rollout.num_tool_errors for group in scored for rollout in group.rollouts),
        qualifying_share=sum(own.qualifies for own in judged) / max(1, len(judged)),
        signal_share=sum(any(own.in_tool_denominator for own in group.scores) for group in scored) / len(scored),
        bad_rows_skipped=parts.cursor.skipped,
        updates=updates,
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        staleness=_staleness(step, scored),
        groups_in_flight=taken.in_flight,
        groups_carried=taken.carried,
        groups_dropped=taken.dropped,
        groups_replayed=parts.fleet.take_replayed(),
        sync_bytes=synced.num_bytes,
        sync_retries=synced.retries,
    )


def _summarise(parts: Parts, seconds_before: float) -> Summary | None:
    """`summary.json` and `report.html` of a finished run; no summary without held-out prompts."""
    folder, summary = parts.config.run.dir, None
    evaluations = read_evaluations(folder)
    if evaluations:
        summary = write_summary(
            folder / "summary.json",
            seed=parts.config.run.seed,
            wall_s=seconds_before + parts.state.wall_s,
            before=evaluations[0].slices,
            after=evaluations[-1].slices,
        )
    write_report(folder)
    return summary
