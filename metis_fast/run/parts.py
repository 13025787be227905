"""What a run consists of, and what it does with its engine and its trainer together."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from torch import Tensor

from metis_fast.checkpoint.export import Source, check_logprobs, export_model, export_policy, probe_rollout
from metis_fast.checkpoint.resume import CheckpointStore
from metis_fast.config import Config
from metis_fast.data.cursor import PromptCursor, decode_all, read_once
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError, DataError, EngineError
from metis_fast.model import Policy
from metis_fast.model_folder import hf_shapes
from metis_fast.report.log import RunLog
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import RunEngine, SyncReport, update
from metis_fast.rollout.gate import GateReport, choose, compare, locate, probe, require, worst
from metis_fast.rollout.layers import reference
from metis_fast.rollout.schedule import Rules, Schedule, group_player
from metis_fast.rollout.store import RolloutStore
from metis_fast.run.interrupt import Interrupts
from metis_fast.run.record import RunRecord
from metis_fast.run.state import RunState
from metis_fast.score.protocol import Judge
from metis_fast.tools.protocol import Toolbox
from metis_fast.train.protocol import Trainer
from metis_fast.types import Prompt

log = logging.getLogger(__name__)


class Parts:
    """What a run consists of. Made by `open_parts`.

    state: between steps, with what resumes and saves it. schedule: samples ahead of training; None in the plain synchronous
    mode.
    """

    def __init__(
        self,
        config: Config,
        interrupts: Interrupts,
        policy: Policy,
        sampler: Policy,
        engine: RunEngine,
        toolbox: Toolbox,
        judge: Judge,
        trainer: Trainer | None,
        files: PromptFiles | None,
        heldout: PromptFiles | None,
        record: RunRecord | None = None,
        source: Source | None = None,
    ) -> None:
        self.config, self.interrupts, self.policy = config, interrupts, policy
        self.engine, self.toolbox, self.judge = engine, toolbox, judge
        self.chat = Chat(sampler.tokenizer, sampler.images, config.tools.call_syntax)
        # a model that reads text only says so of the first image that it meets; none is a bad one for that
        self._check_images = sampler.images.broken if sampler.reads_images else decode_all
        self._heldout_files = heldout
        self._heldout: list[Prompt] | None = None
        self._probes: list[Prompt] | None = None
        if trainer is None or files is None or record is None or source is None:
            return
        self.trainer, self._source = trainer, source
        self._shared = trainer.shares_policy and engine.runs(policy)
        self.cursor = PromptCursor(files, config.run.seed, config.data.shuffle, config.data.on_bad_row, self._check_images)
        self.store = RolloutStore(config.run.dir / "rollouts")
        self.checkpoints = CheckpointStore(config.run.dir / "checkpoints", config.checkpoint.keep_last)
        self.log = RunLog(config.run.dir, config.log)
        self.schedule: Schedule | None = None
        if config.rollout.mode != "sync" or config.rollout.over_provision:
            play = group_player(self.chat, engine, toolbox, config.rollout, config.run.seed)
            self.schedule = Schedule(Rules.of(config.rollout, config.train.steps), self.cursor, play)
        self.state = RunState(trainer, self.cursor, self.schedule, self.checkpoints, self.log, record)

    def heldout(self) -> list[Prompt]:
        """The held-out prompts, read once."""
        if self._heldout is None:
            files = self._heldout_files
            if files is None:
                raise ConfigError("no held-out prompts; set data.heldout to Parquet files")
            limit = self.config.eval.max_prompts or len(files)
            self._heldout = list(islice(read_once(files, self.config.data.on_bad_row, self._check_images), limit))
            if not self._heldout:
                raise DataError(f"no usable row among {len(files)} held-out ones; run `metis-fast data check` on data.heldout")
        return self._heldout

    def sync(self, version: int) -> SyncReport:
        """Let the engine sample with the trainer's weights. version: training steps done; `Rollout.weight_version` of what is
        sampled from here on.

        Raises:
            Interrupted: a stop was asked for. The weights have been read to their end: ranks that send them do nothing else
                meanwhile, a checkpoint included.
        """
        self.interrupts.check()
        self.interrupts.run(self.engine.resume())

        def weights() -> Iterator[tuple[str, Tensor]]:
            return iter(()) if self._shared else self.trainer.weights()

        report = self.interrupts.finish(update(self.engine, weights, version, self.config.sync.retries))
        self.interrupts.check()
        return report

    def rest(self) -> None:
        """Until the next `sync`, the GPUs are the trainer's (`rollout.vllm.sleep`)."""
        self.interrupts.run(self.engine.rest())

    def gate(self) -> GateReport:
        """Engine against trainer, on some of the prompts that come next; every replica is asked.

        Raises:
            EngineError: they differ by more than `gate.threshold`.
        """
        if self._probes is None:
            place = self.cursor.state()
            coming = self.cursor.next(self.config.rollout.prompts_per_step)
            self.cursor.restore(place)
            self._probes = choose(coming, self.config.gate.prompts, least=self.engine.num_replicas)
        rollouts = self.interrupts.run(probe(self._probes, self.chat, self.engine, self.config))
        own = self.trainer.logprobs(rollouts)
        report = compare(rollouts, own)
        log.info("truth gate: log-probs differ by %.2e (largest %.2e, %d tokens)", report.mean, report.max, report.tokens)
        try:
            require(report, self.config)
        except EngineError as error:
            log.warning("%s; looking for the layer", error)  # said now: what follows takes memory for the model once more
            order = worst(rollouts, own)
            model = reference(self.policy, self.trainer.weights(), rollouts[order], self.config.rollout.temperature)
            where = self.interrupts.run(locate(order, rollouts[order], own[order], model, self.engine, self.config))
            raise EngineError(f"{error}. {where}") from None
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
