"""What the settings of a cold start are to a trainer, which reads those of RL."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from metis_fast.config.tree import Config


def training_config(config: Config, folder: Path) -> Config:
    """The config in which the settings of the cold start stand where trainers look for those of RL. folder: for logs."""
    sft = config.sft
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": folder}),
            "model": config.model.model_copy(update={"freeze": sft.freeze}),
            "train": config.train.model_copy(
                update={
                    "backend": backend(config),
                    "tokens_per_micro_batch": sft.tokens_per_micro_batch,
                    "optim": sft.optim,
                }
            ),
            "loss": config.loss.model_copy(update={"kl_coef": 0.0}),  # it would keep a copy of the weights
        }
    )


def backend(config: Config) -> Literal["torch", "megatron"]:
    """That the cold start of a config runs on."""
    if config.sft.backend == "auto":
        return "torch" if config.sft.optim.muon_lr else config.train.backend
    return config.sft.backend
