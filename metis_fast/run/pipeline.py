"""The spine: what a run does, one verb a line."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import numpy as np

from metis_fast.config import Config
from metis_fast.errors import CheckpointError, Interrupted, MetisError, NonFiniteError, TrainerError
from metis_fast.report.html import write_report
from metis_fast.report.log import read_evaluations
from metis_fast.report.progress import progress
from metis_fast.report.slices import slices
from metis_fast.report.summary import Summary, write_summary
from metis_fast.rollout.engine import SyncReport
from metis_fast.rollout.episode import collect
from metis_fast.rollout.schedule import Taken
from metis_fast.rollout.store import RolloutStore
from metis_fast.run.assembly import open_parts
from metis_fast.run.interrupt import Interrupts
from metis_fast.run.parts import Parts
from metis_fast.score.scoring import score_groups
from metis_fast.types import Group, Outcome, Prompt, ScoredGroup, Slice, StepStats, UpdateStats

T = TypeVar("T")


def train(config: Config, seconds_before: float = 0.0) -> Summary | None:
    """HDPO from `config.model.path`, resumed from the newest checkpoint of `config.run.dir` if there is one.

    `rollout.mode` decides what else goes on while these lines run: nothing (`sync`), or rollouts of coming steps on the event
    loop, which runs whenever a batch is waited for or scored, and while the update runs in a thread (`rollout.schedule`).

    seconds_before: wall seconds of the stages that led here; they count in the summary.

    Raises:
        Interrupted: a signal came; the last whole step is checkpointed.
        NonFiniteError: NaN or Inf; the rollouts that caused it are in `failed/`, the last whole step is checkpointed.
        MetisError: anything that a user can mend.
    """
    with Interrupts() as interrupts, open_parts(config, interrupts) as parts:
        first = parts.state.resume()
        for step in range(first, config.train.steps + 1):
            with _saved_on_failure(parts, step):
                clock = _Clock()
                clock("rollout", _finish_ahead(parts, step))
                synced = clock("sync", parts.sync(step))
                clock("gate", _gate_if_due(parts, step, first))
                score = _evaluate_if_due(parts, step)
                if step > first and _due(step, config.checkpoint.every, config.train.steps):
                    parts.state.save(step, score)
                if step == config.train.steps:
                    break
                clock.skip()
                taken = clock("rollout", _next_batch(parts, step))
                scored = clock("score", _score(parts, taken.groups))
                updates = clock("update", _update(parts, scored, step))
                clock("store", _store(parts, scored, step))
                parts.log.step(_step_stats(parts, step, taken, scored, updates, synced, clock.seconds))
                parts.state.finished(step)
        parts.checkpoints.finish()
        parts.export(config.run.dir / "trained")
        return _summarise(parts, seconds_before)


def evaluate(config: Config) -> dict[str, Slice]:
    """Rates of `config.model.path` on the held-out prompts, by ability and kind. Nothing is trained or stored."""
    with Interrupts() as interrupts, open_parts(config, interrupts, training=False) as parts:
        return _evaluate(parts, "eval")


class _Clock:
    """Wall seconds by stage; each call closes the stage whose result it is given. Stages of one name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def __call__(self, stage: str, result: T) -> T:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now
        return result

    def skip(self) -> None:
        """What ran since the last stage belongs to none."""
        self._since = time.perf_counter()


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


def _rollout(parts: Parts, prompts: Sequence[Prompt], stream: str, evaluation: bool = False) -> list[Group]:
    config = parts.config
    rollout, repeats = config.rollout, config.rollout.rollouts_per_prompt
    if evaluation:
        rollout = rollout.model_copy(update={"temperature": config.eval.temperature, "top_p": 1.0, "top_k": 0})
        repeats = config.eval.rollouts_per_prompt
    with progress(len(prompts) * repeats, stream, config.log, "rollout") as bar:
        return parts.interrupts.run(
            collect(prompts, repeats, parts.chat, parts.engine, parts.toolbox, rollout, config.run.seed, stream, bar.update)
        )


def _finish_ahead(parts: Parts, step: int) -> None:
    """One step off, weights change between batches: the one that was begun during the last update is waited for first."""
    if parts.schedule is not None and parts.config.rollout.mode == "one_step_off" and step < parts.config.train.steps:
        parts.interrupts.run(parts.schedule.ready(step))


def _next_batch(parts: Parts, step: int) -> Taken:
    config = parts.config
    if parts.schedule is None:
        prompts = parts.cursor.next(config.rollout.prompts_per_step)
        return Taken(_rollout(parts, prompts, f"train/{step}"), in_flight=0, carried=0, dropped=0)
    with progress(config.rollout.prompts_per_step, f"train/{step}", config.log, "group") as bar:
        return parts.interrupts.run(parts.schedule.batch(step, bar.update))


def _score(parts: Parts, groups: Sequence[Group]) -> list[ScoredGroup]:
    return parts.interrupts.run(score_groups(groups, parts.judge, parts.config))


def _update(parts: Parts, scored: Sequence[ScoredGroup], step: int) -> tuple[UpdateStats, ...]:
    parts.interrupts.check()
    assert parts.trainer is not None
    parts.checkpoints.finish()  # written while the rollouts were sampled; whatever ends the update, it is there

    def update() -> tuple[UpdateStats, ...]:
        return parts.trainer.update(scored, parts.interrupts.check)

    try:
        if parts.config.rollout.mode == "sync":
            parts.rest()
            return update()
        return parts.interrupts.run(_beside(update))
    except NonFiniteError as error:
        path = RolloutStore(parts.config.run.dir / "failed").write(f"step-{step:06d}", scored)
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


def _store(parts: Parts, scored: Sequence[ScoredGroup], step: int) -> None:
    if parts.config.log.rollouts:
        parts.store.write(f"step-{step:06d}", scored)


def _evaluate(parts: Parts, stream: str) -> dict[str, Slice]:
    """Sample the held-out prompts; where a prompt has several samples, rates are over all of them.

    Training rollouts may go on beside: no update is under way, so that every token is of the weights that the rates are of.
    """
    return slices(_score(parts, _rollout(parts, parts.heldout(), stream, evaluation=True)))


def _gate_if_due(parts: Parts, step: int, first: int) -> None:
    """The truth gate: before the first step of this process, before the second one, and every `gate.every` steps."""
    gate = parts.config.gate
    # at first both have the folder's weights, and an update that changes nothing in the engine would not show
    changed = step == first + 1 and parts.config.rollout.engine == "vllm"
    if gate.prompts and (step == first or changed or (gate.every and step % gate.every == 0)):
        parts.gate()


def _evaluate_if_due(parts: Parts, step: int) -> tuple[float, ...] | None:
    """Held-out rates before and after training and every `eval.every` steps. Returns what "best" is measured by."""
    config = parts.config
    if not config.data.heldout or not (step == 0 or _due(step, config.eval.every, config.train.steps)):
        return None
    # one stream for all steps: the same noise for every policy, so that differences are the policy's
    rates = _evaluate(parts, "eval")
    parts.log.evaluation(step, rates)
    return rates["all"].accuracy, -rates["all"].tool_calls


def _staleness(step: int, scored: Sequence[ScoredGroup]) -> tuple[int, ...]:
    """Trained tokens by the number of updates that the weights which sampled them lacked."""
    members = [pair for group in scored for pair in zip(group.rollouts, group.scores, strict=True)]
    versions = [rollout.weight_version[rollout.sampled] for rollout, score in members if score.verdict is not None]
    return tuple(np.bincount(step - np.concatenate(versions)).tolist()) if versions else ()


def _step_stats(
    parts: Parts,
    step: int,
    taken: Taken,
    scored: Sequence[ScoredGroup],
    updates: tuple[UpdateStats, ...],
    synced: SyncReport,
    seconds: Mapping[str, float],
) -> StepStats:
    scores = [score for group in scored for score in group.scores]
    judged = [score for score in scores if score.verdict is not None]
    turns = [turn for group in scored for rollout in group.rollouts for turn in rollout.turns]
    return StepStats(
        step=step,
        epoch=parts.cursor.epoch,
        reward_acc=sum(score.r_acc for score in judged) / max(1, len(judged)),
        reward_tool=sum(score.r_tool for score in judged) / max(1, len(judged)),
        slices=slices(scored),
        outcomes=dict(Counter(str(score.outcome) for score in scores)),
        tool_errors=sum(turn.outcome is Outcome.TOOL_ERROR for turn in turns),
        qualifying_share=sum(score.qualifies for score in judged) / max(1, len(judged)),
        signal_share=sum(any(score.in_tool_denominator for score in group.scores) for group in scored) / len(scored),
        bad_rows_skipped=parts.cursor.skipped,
        updates=updates,
        seconds=seconds,
        staleness=_staleness(step, scored),
        groups_in_flight=taken.in_flight,
        groups_carried=taken.carried,
        groups_dropped=taken.dropped,
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
