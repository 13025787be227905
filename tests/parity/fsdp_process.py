"""A data-parallel rank of `test_trainer_fsdp.py`, started by torchrun: trains on pickled groups; rank 0 writes the outcome."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from metis_fast.config import Config, ModelConfig
from metis_fast.model import load_policy
from metis_fast.train.torch_backend import TorchTrainer


def main(folder: Path) -> None:
    with (folder / "task.pickle").open("rb") as handle:
        tree, model, steps = pickle.load(handle)
    config = Config.model_validate(tree)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    policy = load_policy(ModelConfig.model_validate({"path": model} | tree["model"]))
    trainer = TorchTrainer(policy, config, config.train.optim, 10, dist.group.WORLD)
    before = trainer.logprobs([rollout for group in steps[0] for rollout in group.rollouts])
    held = sum(p.to_local().numel() for p in trainer.optimizer.masters.values())  # pyright: ignore[reportAttributeAccessIssue]
    stats, moments = [], []
    for groups in steps:
        stats.append(trainer.update(groups))
        moments.append({name: v.clone() for name, v in trainer.state().tensors.items() if name.endswith("exp_avg")})
    state = trainer.state()
    trainer.load(state)  # what was gathered goes back where it came from
    same = all(torch.equal(value, state.tensors[name]) for name, value in trainer.state().tensors.items())
    if dist.get_rank() == 0:
        torch.save(
            {
                "tensors": dict(state.tensors),
                "stats": stats,
                "moments": moments,
                "logp": before,
                "held": held,
                "same": same,
            },
            folder / "out.pt",
        )
    dist.barrier()  # a rank that leaves first would close the connections of one that still works
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
