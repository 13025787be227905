"""A cold start as plans and the doctor see it: a trainer with the settings of `sft`, and no engine."""

from __future__ import annotations

from metis_fast.config import Config
from metis_fast.config.cold_start import training_config


def is_cold_start(config: Config) -> bool:
    """Whether the config has nothing but a cold start."""
    return bool(config.sft.phases) and not config.data.train


def as_trained(config: Config) -> Config:
    """The config with the settings of its cold start where trainers look for those of RL; nothing is played."""
    trained = training_config(config, config.run.dir)
    rollout = {"engine": "native", "vllm": config.rollout.vllm.model_copy(update={"sleep": False})}
    return trained.model_copy(update={"rollout": config.rollout.model_copy(update=rollout)})


def as_planned(config: Config) -> Config:
    """`as_trained`, a conversation standing for a group of one rollout whose prompt is half of it: up to there it may be
    images."""
    trained = as_trained(config)
    longest = config.sft.max_tokens or config.sft.tokens_per_micro_batch
    rollout = {
        "prompts_per_step": config.sft.batch_size,
        "rollouts_per_prompt": 1,
        "max_prompt_tokens": max(1, longest // 2),
        "max_response_tokens": max(1, longest - longest // 2),
    }
    return trained.model_copy(
        update={
            "rollout": trained.rollout.model_copy(update=rollout),
            "train": trained.train.model_copy(update={"prompts_per_mini_batch": config.sft.batch_size}),
            "loss": trained.loss.model_copy(update={"proximal": "engine"}),  # the loss has no ratio
        }
    )
