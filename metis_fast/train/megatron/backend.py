"""The Megatron-core trainer as the run sees it: ranks in processes of their own do the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PretrainedConfig

from metis_fast.checkpoint.resume import Shards
from metis_fast.config import Config, OptimConfig
from metis_fast.errors import CheckpointError, ConfigError, NonFiniteError
from metis_fast.train.flops import FlopModel
from metis_fast.train.megatron import layout, names
from metis_fast.train.megatron.launch import Ranks
from metis_fast.train.megatron.task import StepResult, Task
from metis_fast.train.megatron.wire import parse_address
from metis_fast.train.minibatch import Trained, plan, prunes, update_stats
from metis_fast.train.protocol import TrainerState
from metis_fast.types import Rollout, ScoredGroup, UpdateStats
from metis_fast.workers.launch import Launcher

_FOLDER = "trainer"


def _nothing() -> None:
    pass


def check_settings(config: Config, model: PretrainedConfig) -> None:
    """Whether a run of these settings could start. model: transformers' config.

    Raises:
        ConfigError: a layout or an option that cannot work.
    """
    layout.check(config.train.megatron, model)
    parse_address(config.train.megatron.listen, "train.megatron.listen")
    if config.train.optim.muon_lr:
        raise ConfigError("train.optim.muon_lr works on whole matrices, which Megatron splits over the ranks; set it to 0")
    if config.train.activation_checkpointing:
        raise ConfigError(
            "train.activation_checkpointing is the torch back end's; set it to false and train.megatron.recompute instead"
        )
    if config.loss.normalization == "reference":
        raise ConfigError("loss.normalization=reference is for parity runs of the torch back end; set it to global")


class MegatronTrainer:
    """A `Trainer` whose weights live in the ranks. Close it to end them.

    model: transformers' config of `folder`. total_steps: optimizer steps of the whole run, for the schedule. check: called
    while the ranks start; what it raises goes on. launcher: see `Ranks`.

    Raises:
        ConfigError: a layout or an option that cannot work; nothing was started.
        TrainerError: a rank could not start.
    """

    def __init__(
        self,
        config: Config,
        optim: OptimConfig,
        total_steps: int,
        folder: Path,
        model: PretrainedConfig,
        check: Callable[[], None] = _nothing,
        launcher: Launcher | None = None,
    ) -> None:
        check_settings(config, model)
        self._config = config
        self._prunes = prunes(config)
        frozen = config.model.freeze
        self._trained = Trained(FlopModel.of(model), "vision" not in frozen, "embeddings" not in frozen)
        self._num_weights = sum(math.prod(shape) for shape in names.hf_shapes(model).values())
        self._num_updates = 0
        self._ranks = Ranks(
            config.train.megatron,
            "metis_fast.train.megatron.step:Worker",
            Task(config, folder.resolve(), optim, total_steps),
            config.run.dir / "ranks",
            check,
            launcher,
        )

    def close(self) -> None:
        """End the ranks."""
        self._ranks.close()

    @property
    def num_updates(self) -> int:
        """See `Trainer`."""
        return self._num_updates

    @property
    def shares_policy(self) -> bool:
        """See `Trainer`: the ranks have weights of their own."""
        return False

    def update(self, groups: Sequence[ScoredGroup], check: Callable[[], None] = _nothing) -> tuple[UpdateStats, ...]:
        """See `Trainer`; also raises TrainerError where a rank died."""
        check()
        size = self._config.train.prompts_per_mini_batch
        batches = [
            plan(groups[i : i + size], i == 0, self._config, self._prunes, self._trained) for i in range(0, len(groups), size)
        ]
        try:
            results: list[StepResult] = self._ranks.call("update", groups, check=check)[0]
        except NonFiniteError:  # maybe of a later mini-batch: what is there is no whole step then, and must not be saved as one
            self._num_updates = self._ranks.call("steps_taken")[0]
            raise
        self._num_updates += len(results)
        return tuple(
            update_stats(batch, [values for values, _ in result.table], result.norm, result.lr, self._config)
            for batch, result in zip(batches, results, strict=True)
        )

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """See `Trainer`."""
        found: dict[int, np.ndarray] = {}
        for part in self._ranks.call("logprobs", rollouts):
            found |= part
        return [found[i] for i in range(len(rollouts))]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer`."""
        for _, (name, tensor) in self._ranks.stream("weights"):
            yield name, tensor

    def state(self) -> TrainerState:
        """See `Trainer`; the tensors are written by the ranks."""
        weight = 2 if self._config.model.dtype == "bfloat16" else 4
        shards = Shards(
            begin=self._begin,
            finish=self._finish,
            num_bytes=self._num_weights * (weight + 12),  # masters and two moments
        )
        return TrainerState({}, {"num_steps": self._num_updates}, shards)

    def load(self, state: TrainerState, folder: Path) -> None:
        """See `Trainer`; also raises CheckpointError where another back end wrote it."""
        where = folder / _FOLDER
        if not where.is_dir():
            raise CheckpointError(f"{folder} was written by another back end; resume with its train.backend")
        self._num_updates = int(state.scalars["num_steps"])
        self._ranks.call("load", where.resolve(), self._num_updates)

    def _begin(self, folder: Path) -> None:
        where = (folder / _FOLDER).resolve()
        where.mkdir()
        self._ranks.call("save", where)

    def _finish(self) -> None:
        try:
            self._ranks.call("saved")
        except CheckpointError as error:  # the store says which checkpoints are safe
            raise OSError(str(error)) from None
