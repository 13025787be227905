"""The parts of a run, opened from its config and closed together: one choice for each."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from metis_fast import host
from metis_fast.checkpoint.export import check_export
from metis_fast.cluster.weights import Publisher
from metis_fast.config import Config
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError
from metis_fast.judge_styles import known_style
from metis_fast.model import Policy, first_device, load_policy
from metis_fast.node.node import InMemory
from metis_fast.node.opening import Host, open_node, share_of
from metis_fast.node.protocol import NodeClient
from metis_fast.run.fleet import Fleet
from metis_fast.run.interrupt import Interrupts
from metis_fast.run.parts import Parts
from metis_fast.run.record import open_record
from metis_fast.run.room import open_room, ranks_by_ray
from metis_fast.summary import Data
from metis_fast.train.megatron.backend import MegatronTrainer, check_settings
from metis_fast.train.optimizer import Schedule
from metis_fast.train.protocol import Trainer
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.workers.launch import engine_gpus

if TYPE_CHECKING:
    from metis_fast.cluster.room import Room
    from metis_fast.evaluate.promptset import PromptSet

_LOG = logging.getLogger(__name__)


def _open_trainer(config: Config, policy: Policy, interrupts: Interrupts, room: Room | None) -> Trainer:
    updates = config.train.steps * config.rollout.prompts_per_step // config.train.prompts_per_mini_batch
    if doubt := Schedule(config.train.optim, updates).doubt("train.optim"):
        _LOG.warning("%s", doubt)
    if config.train.backend == "torch":
        return TorchTrainer(policy, config, config.train.optim, updates)
    placed = room if ranks_by_ray(config) else None
    folder, model = policy.folder, policy.model.config
    check_settings(config, model)
    return MegatronTrainer(config, config.train.optim, updates, folder, model, interrupts.check, placed)


def _gpus(config: Config, training: bool) -> Sequence[str]:
    """Of this machine, for engines."""
    vllm = config.rollout.vllm
    here = training and config.train.backend == "megatron" and config.train.megatron.launch == "local"
    own = _has_gpu(config, training) and not vllm.sleep
    ranks = config.train.megatron.num_ranks if here else int(own)
    return engine_gpus(torch.cuda.device_count(), ranks, vllm.replicas * vllm.tensor_parallel, share=vllm.sleep)


def _open_nodes(
    config: Config,
    files: Mapping[Data, PromptFiles],
    styles: Collection[str],
    host: Host,
    policy: Callable[[], Policy],
    stack: ExitStack,
) -> list[NodeClient]:
    """Nodes of this process. Several stand in for machines: each has engine, tools and judge of its own, all the one model."""
    num, logs = config.workers.nodes, config.run.dir.resolve() / "workers"
    room = math.inf if num == 1 else 1 + -(-config.rollout.max_concurrent // config.rollout.rollouts_per_prompt)
    return [
        stack.enter_context(
            open_node(
                i, share_of(config, i), files, styles, host, policy, InMemory(), logs if num == 1 else logs / f"node-{i}", room
            )
        )
        for i in range(num)
    ]


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


def host_here(config: Config, interrupts: Interrupts, training: bool, alone: bool) -> Host:
    """What nodes of this process run on. alone: see `Host`."""
    return Host(_gpus(config, training), _device(config, training), alone, interrupts.check, interrupts.run)


@contextmanager
def open_parts(
    config: Config, interrupts: Interrupts, training: bool = True, benchmarks: Sequence[Path] = ()
) -> Iterator[Parts]:
    """Open everything that a run needs, cheapest checks first, and close it in reverse order.

    benchmarks: prompts of some, one file behind another (`evaluate.promptset`).

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
    any_style = config.score.judge != "by_row"
    train = PromptFiles(config.data.train, any_style=any_style) if training else None
    heldout = PromptFiles(config.data.heldout, any_style=any_style) if config.data.heldout else None
    named: dict[Data, PromptFiles | None] = {"train": train, "heldout": heldout}
    files: dict[Data, PromptFiles] = {data: part for data, part in named.items() if part is not None}
    styles = {style for part in files.values() for style in part.styles()}
    if config.data.on_bad_row == "skip" and config.score.judge == "by_row":
        styles = {style for style in styles if known_style(style)}  # rows of others are bad ones
    sets = _benchmarks(config) if training else ()
    if benchmarks or sets:  # no judge is asked
        files["benchmark"] = PromptFiles([*benchmarks, *(one.parquet for one in sets)], any_style=True)
    with ExitStack() as stack:
        record = None
        if training:
            data = {"data.train": train, "data.heldout": heldout}
            record = open_record(config, data, ("model", "tools", "score"), interrupts.check)
            stack.callback(record.close)
        source = check_export(config.model.path, config.run.dir / "trained", config.model.dtype) if training else None
        device = _device(config, training)
        room = open_room(config, stack, interrupts.check, training)
        # whether nothing is being sampled while the trainer steps
        waits = config.rollout.mode == "sync" and not config.rollout.over_provision
        models = _Models(config, device, own_sampler=training and not waits and config.train.backend == "torch")
        if room is None:
            here = host_here(config, interrupts, training, waits)
            nodes = _open_nodes(config, files, styles, here, models.sampler, stack)
        else:
            from metis_fast.cluster.nodes import open_nodes

            nodes = open_nodes(config, room, files, styles, waits, stack)
        fleet = Fleet(nodes, config)
        stack.callback(fleet.close)
        policy = models.policy()
        if config.rollout.vllm.sleep:
            fleet.wait(interrupts.check)  # they measure what their GPUs have left, which ranks that load would change
        trainer = None
        if training:
            trainer = _open_trainer(config, policy, interrupts, room)
            stack.callback(trainer.close)
        fleet.wait(interrupts.check)  # they load while the trainer does
        shared = trainer is not None and trainer.shares_policy and room is None and config.rollout.engine == "native"
        parts = Parts(
            config, interrupts, policy, fleet, trainer, train, heldout, record, source,
            shared and models.sampler() is policy, _publisher(config, trainer), sets,
        )  # fmt: skip
        if training:
            stack.callback(parts.log.close)
            schedule = parts.schedule
            if schedule is not None:
                stack.callback(lambda: interrupts.finish(schedule.close()))
        yield parts


def _benchmarks(config: Config) -> Sequence[PromptSet]:
    if not config.eval.benchmarks:
        return ()
    from metis_fast.evaluate.training import open_sets  # which only runs that need it import, with the client of judges

    return open_sets(config)


class _Models:
    """The model in this process, loaded at first use: the trainer's, and what native engines here sample with."""

    def __init__(self, config: Config, device: torch.device, own_sampler: bool) -> None:
        """own_sampler: whether the trainer steps while they sample."""
        self._config, self._device, self._own_sampler = config, device, own_sampler and config.rollout.engine == "native"
        self._policy: Policy | None = None
        self._sampler: Policy | None = None

    def policy(self) -> Policy:
        """The trainer's, or the one for tokens and shapes."""
        if self._policy is None:
            self._policy = load_policy(self._config.model, device=self._device)
        return self._policy

    def sampler(self) -> Policy:
        """What native engines run."""
        if not self._own_sampler:
            return self.policy()
        if self._sampler is None:
            self._sampler = load_policy(self._config.model, device=self._device)
            self._sampler.images = self.policy().images  # decoded once for both
        return self._sampler


def _publisher(config: Config, trainer: Trainer | None) -> Callable[[int], object]:
    """Puts the trainer's weights into the cluster's store, as a version."""
    if isinstance(trainer, MegatronTrainer):
        return trainer.publish
    publisher = Publisher(config.sync.bucket_mb << 20, delta=config.sync.mode == "delta")

    def publish(version: int) -> object:
        assert trainer is not None
        return publisher.publish(trainer.weights(), version)

    return publish
