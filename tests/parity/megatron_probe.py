"""A worker of the tests of the Megatron back end: makes the real one anew for every layout that it is asked about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from metis_fast.train.megatron.step import Context, Worker
from metis_fast.train.megatron.task import Task


class Probe:
    """Started once for many layouts of as many ranks, since starting is what takes long."""

    def __init__(self, context: Context, _: object) -> None:
        self.context = context
        torch.set_num_threads(1)

    def run(self, task: Task, steps, rollouts, save: Path | None, load: Path | None):
        """Log-probabilities before, the results of the steps, and what this rank sends of its weights afterwards."""
        worker = Worker(self.context, task)
        if load is not None:
            worker.load(load, 2)
        logp = worker.logprobs(rollouts)
        results = []
        for i, groups in enumerate(steps):
            results.append(worker.update(groups))
            if i == 0 and save is not None:
                worker.save(save)
                worker.saved()
        return logp, results, dict(worker.weights())

    def move(self, task: Task, load: Path, save: Path):
        """A checkpoint, loaded and saved."""
        worker = Worker(self.context, task)
        worker.load(load, 2)
        worker.save(save)
        worker.saved()

    def linear(self, task: Task, groups):
        """Weights after one step of an optimizer whose step is the gradient, as `run` returns them.

        AdamW with an epsilon far above every gradient steps by lr / eps times its first moment, which is the gradient where
        beta1 is 0. It is made large against the weights, so that rounding a weight loses nothing of it.
        """
        optim = task.optim.model_copy(update={"lr": 1e16, "eps": 1e10, "betas": (0.0, 0.999), "weight_decay": 0.0})
        worker = Worker(self.context, replace(task, optim=optim))
        return worker.update(groups), dict(worker.weights())
