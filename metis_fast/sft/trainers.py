"""The two back ends as the cold start uses them, and what they are told of the config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from metis_fast.checkpoint.export import Source, check_logprobs, export_model, export_policy, probe_rollout
from metis_fast.config import Config
from metis_fast.config.cold_start import backend
from metis_fast.errors import ConfigError
from metis_fast.model import Policy, first_device
from metis_fast.model_folder import hf_shapes, load_processor
from metis_fast.pictures import ImagePreparer
from metis_fast.train.megatron.backend import MegatronTrainer
from metis_fast.train.processor import limited
from metis_fast.train.protocol import Trainer
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Rollout

if TYPE_CHECKING:
    from metis_fast.cluster.room import Room


class Imitator(Trainer, Protocol):
    """A trainer that learns from what others said."""

    def imitate(self, rollouts: Sequence[Rollout]) -> tuple[float, float]:
        """One optimizer step on the mean negative log-likelihood of every sampled token; loss and gradient norm.

        Raises:
            NonFiniteError: loss or gradient is NaN or Inf; the step was not applied.
        """
        ...


def check_backend(config: Config) -> None:
    """
    Raises:
        ConfigError: a back end that the cold start cannot run on.
    """
    if backend(config) == "megatron" and config.sft.optim.muon_lr:
        raise ConfigError(
            "sft.optim.muon_lr works on whole matrices, which Megatron splits over the ranks; set it to 0, or sft.backend=torch"
        )


def open_images(config: Config) -> ImagePreparer:
    """Of the model's processor, within `sft.image_max_pixels`.

    Raises:
        ModelError: see `load_processor`.
    """
    processor = limited(load_processor(config.model.path), config.sft.image_max_pixels)
    return ImagePreparer(processor, round(config.model.image_cache_gb * (1 << 30)))


def device(config: Config) -> torch.device:
    """Of the policy in this process: Megatron's ranks have the GPUs to themselves."""
    return torch.device("cpu") if config.train.backend == "megatron" else first_device()


def open_trainer(
    config: Config, policy: Policy, total_steps: int, check: Callable[[], None], room: Room | None = None
) -> Imitator:
    """config: as `training_config` gives it. check: called while ranks start; what it raises goes on. room: in which Ray places
    the ranks; None: on this machine.

    Raises:
        ConfigError: a layout or an option that cannot work. TrainerError: a rank could not start.
    """
    if config.train.backend == "torch":
        return TorchTrainer(policy, config, config.sft.optim, total_steps)
    return MegatronTrainer(
        config, config.sft.optim, total_steps, policy.folder, policy.model.config, check, room,
        image_max_pixels=config.sft.image_max_pixels,
    )  # fmt: skip


def export(config: Config, trainer: Imitator, policy: Policy, source: Source, out: Path) -> None:
    """Write the trained model as a Hugging Face folder; ranks send their weights one by one.

    Raises:
        CheckpointError: the disk failed, or the export is not the model; an older export is as it was.
    """
    if config.train.backend == "torch":
        export_policy(policy, source, out)
        return
    probe, temperature = probe_rollout(policy), config.rollout.temperature
    (logp,) = trainer.logprobs([probe])
    export_model(
        trainer.weights(), hf_shapes(policy.model.config), source, out,
        check=lambda tmp: check_logprobs(policy, probe, logp, temperature, tmp),
    )  # fmt: skip
