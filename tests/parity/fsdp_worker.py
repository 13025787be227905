"""A data-parallel rank of the tests of `TorchTrainer` on several: trains on groups, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from metis_fast.config import Config, ModelConfig
from metis_fast.model import load_policy
from metis_fast.train.megatron.rank import Context
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import ScoredGroup


class Worker:
    """Started once for many trainers, since starting is what takes long."""

    def __init__(self, context: Context, _: object) -> None:
        self.context = context
        torch.set_num_threads(1)

    def train(self, tree: dict[str, Any], folder: Path, steps: Sequence[Sequence[ScoredGroup]]) -> dict[str, Any] | None:
        """Rank 0: log-probabilities before, statistics and moments of every step, tensors after, and what this rank holds.

        tree: of the settings; its model is the one in `folder`.
        """
        config = Config.model_validate(tree)
        policy = load_policy(ModelConfig.model_validate({"path": folder} | tree["model"]))
        trainer = TorchTrainer(policy, config, config.train.optim, 10, dist.group.WORLD)
        before = trainer.logprobs([rollout for group in steps[0] for rollout in group.rollouts])
        masters: Any = trainer.optimizer.masters.values()
        held = sum(p.to_local().numel() for p in masters)
        stats, moments = [], []
        for groups in steps:
            stats.append(trainer.update(groups))
            moments.append({name: v.clone() for name, v in trainer.state().tensors.items() if name.endswith("exp_avg")})
        state = trainer.state()
        trainer.load(state)  # what was gathered goes back where it came from
        same = all(torch.equal(value, state.tensors[name]) for name, value in trainer.state().tensors.items())
        if self.context.rank:
            return None
        return {
            "tensors": dict(state.tensors),
            "stats": stats,
            "moments": moments,
            "logp": before,
            "held": held,
            "same": same,
        }
