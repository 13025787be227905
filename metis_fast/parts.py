"""The parts of a run, opened from its config and closed together."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from metis_fast import host
from metis_fast.checkpoint.export import Source, check_export, check_logprobs, export_model, export_policy, probe_rollout
from metis_fast.checkpoint.resume import CheckpointStore, ResumeState
from metis_fast.checkpoint.rng import RngState, capture_rng, restore_rng
from metis_fast.config import Config
from metis_fast.data.cursor import CursorState, PromptCursor, decode_all, read_once
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError, DataError, EngineError, ToolSetupError
from metis_fast.interrupt import Interrupts
from metis_fast.judge_styles import known_style
from metis_fast.machine import memory_bytes
from metis_fast.model import Policy, first_device, load_policy
from metis_fast.model_folder import hf_shapes, read_config
from metis_fast.report.log import RunLog
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import Engine, SyncReport, update
from metis_fast.rollout.gate import GateReport, choose, compare, locate, probe, require, worst
from metis_fast.rollout.layers import reference
from metis_fast.rollout.native import NativeEngine, check_room
from metis_fast.rollout.schedule import Pending, Rules, Schedule, group_player
from metis_fast.rollout.store import RolloutStore
from metis_fast.rollout.vllm.engine import VllmEngine
from metis_fast.run_record import RunRecord, open_record
from metis_fast.score.judge import StyleJudge, open_judge
from metis_fast.score.protocol import Judge
from metis_fast.score.remote import RemoteJudge, start_judge_workers
from metis_fast.tools import open_toolbox
from metis_fast.tools.protocol import Toolbox
from metis_fast.tools.remote import RemoteToolbox, start_tool_workers
from metis_fast.train.megatron.backend import MegatronTrainer, check_settings
from metis_fast.train.protocol import Trainer, TrainerState
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Prompt
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import Launcher, LocalLauncher, engine_gpus
from metis_fast.workers.worker import WorkerError, wait_ready

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Boundary:
    """What a checkpoint of the last whole step holds besides weights and moments, which nothing moves until the next update."""

    cursor: CursorState
    num_updates: int
    rng: RngState
    pending: tuple[Pending, ...]


class Parts:
    """What a run consists of. Made by `open_parts`.

    wall_s: seconds that this run has taken, over all its resumptions.
    schedule: samples ahead of training; None in the plain synchronous mode.
    """

    def __init__(
        self,
        config: Config,
        interrupts: Interrupts,
        policy: Policy,
        sampler: Policy,
        engine: Engine,
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
        self._asleep = False
        if trainer is None or files is None or record is None or source is None:
            return
        self.trainer, self._record, self._source = trainer, record, source
        self._shared = trainer.shares_policy and sampler is policy and isinstance(engine, NativeEngine)
        self.cursor = PromptCursor(files, config.run.seed, config.data.shuffle, config.data.on_bad_row, self._check_images)
        self.store = RolloutStore(config.run.dir / "rollouts")
        self.checkpoints = CheckpointStore(config.run.dir / "checkpoints", config.checkpoint.keep_last)
        self.log = RunLog(config.run.dir, config.log)
        self.schedule: Schedule | None = None
        if config.rollout.mode != "sync" or config.rollout.over_provision:
            play = group_player(self.chat, engine, toolbox, config.rollout, config.run.seed)
            self.schedule = Schedule(Rules.of(config.rollout, config.train.steps), self.cursor, play)
        self._boundary = self._here()
        self._saved: int | None = None
        self._wall_before, self._opened = 0.0, time.perf_counter()

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

    @property
    def wall_s(self) -> float:
        """Seconds so far, interruptions left out."""
        return self._wall_before + time.perf_counter() - self._opened

    def resume(self) -> int:
        """Continue from the newest intact checkpoint; returns the number of steps done (0: a new run)."""
        loaded = self.checkpoints.latest()
        if loaded is None:
            self.log.truncate(0)
            self._record.save(0)
            return 0
        state = loaded.state
        self.trainer.load(TrainerState(state.tensors, state.scalars["trainer"]), loaded.path)
        self.cursor.restore(CursorState(**state.scalars["cursor"]))
        self._wall_before = float(state.scalars["wall_s"])
        if self.schedule is not None:
            self.schedule.restore(state.step, (Pending(**entry) for entry in state.scalars["pending"]))
        self._saved = state.step
        self.log.truncate(state.step)
        restore_rng(state.rng)
        self._record.save(state.step)
        self._boundary = self._here()
        return state.step

    def sync(self, version: int) -> SyncReport:
        """Let the engine sample with the trainer's weights. version: training steps done; `Rollout.weight_version` of what is
        sampled from here on.

        Raises:
            Interrupted: a stop was asked for. The weights have been read to their end: ranks that send them do nothing else
                meanwhile, a checkpoint included.
        """
        self.interrupts.check()
        if self._asleep and isinstance(self.engine, VllmEngine):
            if self.policy.head.device.type == "cuda":
                torch.cuda.empty_cache()  # of the update; the engine takes what it had
            self.interrupts.run(self.engine.wake())
            self._asleep = False

        def weights() -> Iterator[tuple[str, Tensor]]:
            return iter(()) if self._shared else self.trainer.weights()

        report = self.interrupts.finish(update(self.engine, weights, version, self.config.sync.retries))
        self.interrupts.check()
        return report

    def rest(self) -> None:
        """Until the next `sync`, the GPUs are the trainer's (`rollout.vllm.sleep`)."""
        if self.config.rollout.vllm.sleep and isinstance(self.engine, VllmEngine):
            self.interrupts.run(self.engine.sleep())
            self._asleep = True

    def gate(self) -> GateReport:
        """Engine against trainer, on some of the prompts that come next; every replica is asked.

        Raises:
            EngineError: they differ by more than `gate.threshold`.
        """
        if self._probes is None:
            place = self.cursor.state()
            coming = self.cursor.next(self.config.rollout.prompts_per_step)
            self.cursor.restore(place)
            replicas = self.config.rollout.vllm.replicas if isinstance(self.engine, VllmEngine) else 1
            self._probes = choose(coming, self.config.gate.prompts, least=replicas)
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

    def _here(self) -> _Boundary:
        pending = () if self.schedule is None else self.schedule.pending()
        return _Boundary(self.cursor.state(), self.trainer.num_updates, capture_rng(), pending)

    def finished(self, step: int) -> None:
        """A step is whole: from here on, `step + 1` is what a checkpoint holds."""
        self._boundary = self._here()

    def save(self, step: int, score: tuple[float, ...] | None) -> None:
        """Checkpoint the state after `step` whole steps."""
        at = self._boundary
        assert at.num_updates == self.trainer.num_updates
        trainer = self.trainer.state()
        scalars = {"cursor": asdict(at.cursor), "wall_s": self.wall_s, "trainer": trainer.scalars}
        if self.schedule is not None:
            scalars["pending"] = [asdict(place) for place in at.pending]
        self.checkpoints.save(step, ResumeState(step, trainer.tensors, scalars, at.rng, trainer.shards), score)
        self._saved = step

    def save_boundary(self, step: int) -> None:
        """Checkpoint the last whole step, unless that is done or an optimizer step of the next one was already taken."""
        self.checkpoints.finish()
        if self._saved != step and step > 0 and self._boundary.num_updates == self.trainer.num_updates:
            self.save(step, None)
            self.checkpoints.finish()


def _open_trainer(config: Config, policy: Policy, total_steps: int, interrupts: Interrupts, hub: Hub | None) -> Trainer:
    if config.train.backend == "torch":
        return TorchTrainer(policy, config, config.train.optim, total_steps)
    launcher = hub.launcher if hub is not None and _ranks_by_ray(config) else None
    folder, model = policy.folder, policy.model.config
    return MegatronTrainer(config, config.train.optim, total_steps, folder, model, interrupts.check, launcher)


def needs_hub(config: Config, training: bool = True) -> bool:
    """Whether a run of these settings has workers, or ranks that Ray starts."""
    workers = config.rollout.engine == "vllm" or config.workers.tools > 0 or config.workers.judges > 0
    return workers or (training and _ranks_by_ray(config))


def _ranks_by_ray(config: Config) -> bool:
    train = config.train
    return config.workers.launcher == "ray" and train.backend == "megatron" and train.megatron.launch == "local"


def open_hub(config: Config, stack: ExitStack, check: Callable[[], None], training: bool = True) -> Hub:
    """What starts the run's workers and watches them; they end with `stack`.

    check: called while a cluster makes room; what it raises goes on. training: with the trainer's ranks, if Ray places them.

    Raises:
        ConfigError: `workers` cannot work, or there is no such cluster or no room in it.
    """
    launcher: Launcher
    if config.workers.launcher == "ray":
        try:
            from metis_fast.cluster import RayLauncher  # at first use: nothing else needs Ray
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise ConfigError(
                "workers.launcher=ray needs Ray; pip install 'metis-fast[ray]', or set workers.launcher=local"
            ) from None
        launcher = RayLauncher(config, training and _ranks_by_ray(config), check)
    else:
        here = training and config.train.backend == "megatron" and config.train.megatron.launch == "local"
        wanted = config.rollout.vllm.replicas * config.rollout.vllm.tensor_parallel
        own = _has_gpu(config, training) and not config.rollout.vllm.sleep
        ranks = config.train.megatron.num_ranks if here else int(own)
        gpus = engine_gpus(torch.cuda.device_count(), ranks, wanted, share=config.rollout.vllm.sleep)
        launcher = LocalLauncher(config.run.dir.resolve() / "workers", gpus)
    stack.callback(launcher.close)
    return stack.enter_context(Hub(config.workers, launcher))


def _open_judge(config: Config, styles: Collection[str], hub: Hub | None) -> StyleJudge | RemoteJudge:
    if config.workers.judges == 0:
        return open_judge(config.score, styles)
    assert hub is not None
    return RemoteJudge(config.score, start_judge_workers(hub, config.score, styles, config.workers.judges))


def _open_toolbox(config: Config, scratch: Path, hub: Hub | None, check: Callable[[], None]) -> Toolbox:
    if config.workers.tools == 0:
        return open_toolbox(config.tools, scratch)
    assert hub is not None
    here = scratch if config.workers.launcher == "local" else None
    workers = start_tool_workers(hub, config.tools, config.workers.tools, here)
    try:
        wait_ready(workers, check)
    except WorkerError as error:
        raise ToolSetupError(str(error)) from None
    return RemoteToolbox(config.tools, workers)


def _device(config: Config, training: bool) -> torch.device:
    """Of the policy in this process: a GPU where it samples, or trains, here. Megatron's ranks and vLLM's engines have the
    GPUs to themselves, but for the first one where the torch back end has that (`_has_gpu`)."""
    if training and config.train.backend == "megatron":
        return torch.device("cpu")
    return first_device() if config.rollout.engine == "native" or _has_gpu(config, training) else torch.device("cpu")


def _has_gpu(config: Config, training: bool) -> bool:
    """Whether the torch back end has this machine's first GPU beside vLLM engines: by turns, or because they leave one."""
    vllm = config.rollout.vllm
    taken = 0 if vllm.sleep else vllm.replicas * vllm.tensor_parallel
    return (
        training
        and config.train.backend == "torch"
        and config.workers.launcher == "local"
        and (torch.cuda.device_count() > taken)
    )


@contextmanager
def open_parts(config: Config, interrupts: Interrupts, training: bool = True) -> Iterator[Parts]:
    """Open everything that a run needs, cheapest checks first, and close it in reverse order.

    Raises:
        ConfigError, DataError, ModelError, ToolSetupError, JudgeError: whatever cannot work is found here, before a rollout.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "this release runs rollouts in one process, but WORLD_SIZE="
            f"{os.environ['WORLD_SIZE']} (torchrun?); start `metis-fast` directly"
        )
    if training and not config.data.train:
        raise ConfigError("no training prompts; set data.train to Parquet files")
    host.prepare(config.run.threads)
    # nothing draws from the global generators today; seeded, they make checkpoints of equal runs equal byte for byte
    random.seed(config.run.seed)
    np.random.seed(config.run.seed % 2**32)
    torch.manual_seed(config.run.seed)
    files = PromptFiles(config.data.train) if training else None
    heldout = PromptFiles(config.data.heldout) if config.data.heldout else None
    record = None
    if training:
        data = {"data.train": files, "data.heldout": heldout}
        record = open_record(config, data, ("model", "tools"), interrupts.check)
    source = check_export(config.model.path, config.run.dir / "trained", config.model.dtype) if training else None
    styles = {style for part in (files, heldout) if part is not None for style in part.styles()}
    if config.data.on_bad_row == "skip":
        styles = {style for style in styles if known_style(style)}  # rows of others are bad ones
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="metis-tools-")))
        hub = open_hub(config, stack, interrupts.check, training) if needs_hub(config, training) else None
        judge = _open_judge(config, styles, hub)
        stack.callback(judge.close)
        toolbox = _open_toolbox(config, scratch, hub, interrupts.check)
        stack.callback(toolbox.close)
        interrupts.run(judge.check())
        device = _device(config, training)
        if config.rollout.engine == "native":
            memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_bytes()
            element = 4 if config.model.dtype == "float32" else 2
            check_room(config.rollout, read_config(config.model.path), element, memory)
        policy = load_policy(config.model, device=device)
        # whether nothing is being sampled while the trainer steps
        sampler, waits = policy, config.rollout.mode == "sync" and not config.rollout.over_provision
        if config.rollout.engine == "vllm":
            assert hub is not None
            engine = VllmEngine(config, policy, hub)
        else:
            if training and not waits and config.train.backend == "torch":
                sampler = load_policy(config.model, device=device)
            engine = NativeEngine(sampler, config.rollout.deterministic and waits)
        stack.callback(engine.close)
        if isinstance(engine, VllmEngine) and config.rollout.vllm.sleep:
            engine.wait(interrupts.check)  # they measure what their GPUs have left, which ranks that load would change
        trainer = None
        if training:
            if config.train.backend == "megatron":
                check_settings(config, policy.model.config)
            updates = config.train.steps * config.rollout.prompts_per_step // config.train.prompts_per_mini_batch
            trainer = _open_trainer(config, policy, updates, interrupts, hub)
            stack.callback(trainer.close)
        if isinstance(engine, VllmEngine):
            engine.wait(interrupts.check)  # they load while the trainer does
        parts = Parts(config, interrupts, policy, sampler, engine, toolbox, judge, trainer, files, heldout, record, source)
        if training:
            stack.callback(parts.log.close)
            schedule = parts.schedule
            if schedule is not None:
                stack.callback(lambda: interrupts.finish(schedule.close()))
        yield parts
