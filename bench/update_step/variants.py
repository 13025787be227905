"""What is compared: the public recipe, and ours with its savings switched on one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from metis_fast.config import Config, ModelConfig
from metis_fast.model import Policy, load_policy
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import ScoredGroup

from .reference import ReferenceTrainer
from .shapes import Shape

SAVINGS = (
    "skip_old_logprobs",
    "skip_zero_advantage",
    "share_packs",
    "share_prompt",
    "share_images",
    "skip_head_rows",
)
"""In the order in which they are switched on."""

REFERENCE, NONE, OURS = "reference", "none", "ours"
VARIANTS = (REFERENCE, NONE, *(f"+{name}" for name in SAVINGS[:-1]), OURS)
"""none: ours without any saving. +name: with this one and those before it. ours: with all of them."""


def make_config(variant: str, shape: Shape, dtype: str, optim: dict[str, float]) -> Config:
    """Settings of a variant; `optim`: those of the optimizer that matter here."""
    num_on = {NONE: 0, OURS: len(SAVINGS)} | {f"+{name}": i + 1 for i, name in enumerate(SAVINGS[:-1])}
    switches = {name: i < num_on.get(variant, 0) for i, name in enumerate(SAVINGS)}
    return Config.model_validate(
        {
            "model": {"dtype": dtype},
            "rollout": {
                "prompts_per_step": len(shape.kinds) * shape.mini_batches,
                "rollouts_per_prompt": shape.rollouts,
                "max_prompt_tokens": 1,
                "max_response_tokens": 1,
            },
            "train": {
                "prompts_per_mini_batch": len(shape.kinds),
                "tokens_per_micro_batch": shape.tokens_per_micro_batch,
                "optim": optim,
                **switches,
            },
        }
    )


class Stepper:
    """A variant, ready to take steps. decoder_tokens, flops: of the last step."""

    def __init__(self, variant: str, folder: Path, shape: Shape, dtype: str, optim: dict[str, float]) -> None:
        config = make_config(variant, shape, dtype, optim)
        self.policy: Policy = load_policy(ModelConfig(path=folder, dtype=config.model.dtype))
        self._trainer: ReferenceTrainer | TorchTrainer
        if variant == REFERENCE:
            self._trainer = ReferenceTrainer(self.policy, config)
        else:
            self._trainer = TorchTrainer(self.policy, config, config.train.optim, 10_000)
        self.decoder_tokens, self.flops = 0, 0.0

    def step(self, groups: Sequence[ScoredGroup]) -> None:
        """Both mini-batches, optimizer steps included."""
        if isinstance(self._trainer, ReferenceTrainer):
            self._trainer.flops, self._trainer.num_tokens = 0.0, 0
            self._trainer.update(groups)
            self.flops, self.decoder_tokens = self._trainer.flops, self._trainer.num_tokens
            return
        stats = self._trainer.update(groups)
        self.flops, self.decoder_tokens = sum(one.flops for one in stats), sum(one.num_tokens for one in stats)

    def on_step(self, then: Callable[[dict[str, Tensor]], None]) -> None:
        """Calls `then` with the gradient of every parameter, by name, before each optimizer step."""
        optimizer = self._trainer.optimizer

        def hook(*_: object) -> None:
            then({name: master.grad.clone() for name, master in optimizer.masters.items() if master.grad is not None})

        optimizer.adamw.register_step_pre_hook(hook)

    def count_images(self) -> Callable[[], int]:
        """The number of images through the vision tower from here on."""
        count = 0

        def hook(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            nonlocal count
            grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            assert isinstance(grid, Tensor)
            count += len(grid)

        tower = self.policy.model.get_submodule("model.visual")
        tower.register_forward_pre_hook(hook, with_kwargs=True)
        return lambda: count
