"""What a run consists of, and what it does with its nodes and its trainer together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from metis_fast.checkpoint.export import Source, check_logprobs, export_model, export_policy, probe_rollout
from metis_fast.checkpoint.resume import CheckpointStore
from metis_fast.config import Config
from metis_fast.data.cursor import RowCursor, read_once
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError, DataError, EngineError
from metis_fast.model import Policy
from metis_fast.model_folder import hf_shapes
from metis_fast.node.protocol import Head
from metis_fast.report.log import RunLog
from metis_fast.rollout.engine import SyncReport
from metis_fast.rollout.gate import GateReport, choose, compare, locate, require, worst
from metis_fast.rollout.layers import reference
from metis_fast.rollout.schedule import Pending, Rules, Schedule
from metis_fast.run.fleet import Fleet
from metis_fast.run.interrupt import Interrupts
from metis_fast.run.record import RunRecord
from metis_fast.run.state import RunState
from metis_fast.run.weights import TrainerWeights
from metis_fast.score.missing import MissingVerdicts
from metis_fast.spans import Lane, span
from metis_fast.summary import GroupSummary, Job, ScoredSummary
from metis_fast.train.protocol import GroupsLost, Trainer
from metis_fast.types import Score

if TYPE_CHECKING:
    from metis_fast.evaluate.promptset import PromptSet

log = logging.getLogger(__name__)


def training_job(place: Pending, prompts_per_step: int, rollouts_per_prompt: int) -> Job:
    """What is played at a place of the run's sequence of prompts. Its noise is that of the place, as in the synchronous mode,
    and another one after a drop."""
    step, index = divmod(place.number, prompts_per_step)
    stream = f"train/{step}" + (f"/{place.tries}" if place.tries else "")
    return Job("train", place.row, stream, index * rollouts_per_prompt)


class Parts:
    """What a run consists of. Made by `open_parts`.

    state: between steps, with what resumes and saves it. schedule: samples ahead of training; None in the plain synchronous
    mode. benchmarks: of `eval.benchmarks`. shared: whether all nodes sample with the trainer's own module. publish: see
    `TrainerWeights`, for a version.
    """

    def __init__(
        self,
        config: Config,
        interrupts: Interrupts,
        policy: Policy,
        fleet: Fleet,
        trainer: Trainer | None,
        files: PromptFiles | None,
        heldout: PromptFiles | None,
        record: RunRecord | None = None,
        source: Source | None = None,
        shared: bool = False,
        publish: Callable[[int], object] = lambda version: (),
        benchmarks: Sequence[PromptSet] = (),
    ) -> None:
        self.config, self.interrupts, self.policy, self.fleet = config, interrupts, policy, fleet
        self.missing = MissingVerdicts(config.score)
        self._heldout_files = heldout
        self._heldout: list[int] | None = None
        self._probes: list[int] | None = None
        self._shared, self._publish = shared, publish
        self.benchmarks = benchmarks
        if trainer is None or files is None or record is None or source is None:
            return
        self.trainer, self._source = trainer, source
        self.cursor: RowCursor[Head] = RowCursor(
            files.layout,
            config.run.seed,
            lambda rows: fleet.look("train", rows),
            config.data.shuffle,
            config.data.on_bad_row,
        )
        self.checkpoints = CheckpointStore(config.run.dir / "checkpoints", config.checkpoint.keep_last)
        self.log = RunLog(config.run.dir, config.log)
        self.schedule: Schedule[Head, GroupSummary] | None = None
        if config.rollout.mode != "sync" or config.rollout.over_provision:
            rules = Rules.of(config.rollout, config.train.steps)
            self.schedule = Schedule(rules, self.cursor, self._play, lambda group: fleet.drop([group]))
        self.state = RunState(trainer, self.cursor, self.schedule, self.checkpoints, self.log, record)

    async def _play(self, head: Head, place: Pending, started: Callable[[], None]) -> GroupSummary:
        return await self.fleet.play(self.job(place), started)

    def job(self, place: Pending) -> Job:
        """See `training_job`."""
        return training_job(place, self.config.rollout.prompts_per_step, self.config.rollout.rollouts_per_prompt)

    def heldout(self) -> list[int]:
        """Rows of the held-out prompts, looked at once."""
        if self._heldout is None:
            files = self._heldout_files
            if files is None:
                raise ConfigError("no held-out prompts; set data.heldout to Parquet files")
            rows = read_once(lambda rows: self.fleet.look("heldout", rows), len(files), self.config.data.on_bad_row)
            self._heldout = [row for row, _ in islice(rows, self.config.eval.max_prompts or len(files))]
            if not self._heldout:
                raise DataError(f"no usable row among {len(files)} held-out ones; run `metis-fast data check` on data.heldout")
        return self._heldout

    def sync(self, version: int) -> SyncReport:
        """Let the nodes sample with the trainer's weights. version: training steps done; that of what is sampled from here on.

        Raises:
            Interrupted: a stop was asked for. The weights have been read to their end: ranks that send them do nothing else
                meanwhile, a checkpoint included.
        """
        self.interrupts.check()
        self.interrupts.run(self.fleet.resume())

        def tensors() -> Iterator[tuple[str, Tensor]]:
            return iter(()) if self._shared else self.trainer.weights()

        with span(Lane.RUN, "sync"):
            report = self.interrupts.finish(
                self.fleet.update(TrainerWeights(version, tensors, partial(self._publish, version)))
            )
        self.interrupts.check()
        return report

    def rest(self) -> None:
        """Until the next `sync`, the GPUs are the trainer's (`rollout.vllm.sleep`)."""
        self.interrupts.run(self.fleet.rest())

    def gate(self) -> GateReport:
        """Engine against trainer, on some of the prompts that come next; every replica of every node is asked.

        Raises:
            EngineError: they differ by more than `gate.threshold`.
        """
        if self._probes is None:
            place = self.cursor.state()
            coming = self.cursor.next(self.config.rollout.prompts_per_step)
            self.cursor.restore(place)
            self._probes = [one.row for one in choose(coming, self.config.gate.prompts, least=self.fleet.num_replicas)]
        by_node = self.interrupts.run(self.fleet.probe(self._probes))
        asked = [(order, group) for groups in by_node for order, group in enumerate(groups)]
        groups = [group for _, group in asked]
        unscored = [ScoredSummary(group, (Score(None, group.rollouts[0].outcome),)) for group in groups]
        try:
            gaps = self.trainer.gaps(unscored if self.trainer.fetches else self.fleet.fetch_scored(unscored))
            report = compare(gaps, [bool(group.rollouts[0].image_spans) for group in groups])
            log.info("truth gate: log-probs differ by %.2e (largest %.2e, %d tokens)", report.mean, report.max, report.tokens)
            try:
                require(report, self.config)
            except EngineError as error:
                log.warning("%s; looking for the layer", error)  # said now: what follows takes memory for the model once more
                order, group = asked[worst(gaps)]
                ((rollout,),) = (one.rollouts for one in self.fleet.fetch([group]))  # the run ends: it may be looked at here
                (own,) = self.trainer.logprobs([rollout])
                model = reference(self.policy, self.trainer.weights(), rollout, self.config.rollout.temperature)
                layers = self.fleet.layer_outputs(order, group)
                where = self.interrupts.run(locate(rollout, own, model, layers, self.config))
                raise EngineError(f"{error}. {where}") from None
        except GroupsLost:
            log.warning("a node was lost with its messages for the truth gate; others are asked")
            return self.gate()
        finally:
            self.fleet.drop(groups)
        return report

    def export(self, out: Path) -> None:
        """Write the trained model as a Hugging Face folder; a back end that holds the weights elsewhere sends them one by one.

        Raises:
            CheckpointError: the disk failed, or the export is not the model; an older export is as it was.
        """
        if self.config.train.backend == "torch":
            export_policy(self.policy, self._source, out)
        else:
            probe, temperature = probe_rollout(self.policy), self.config.rollout.temperature
            (logp,) = self.trainer.logprobs([probe])
            export_model(
                self.trainer.weights(), hf_shapes(self.policy.model.config), self._source, out,
                check=lambda tmp: check_logprobs(self.policy, probe, logp, temperature, tmp),
            )  # fmt: skip
