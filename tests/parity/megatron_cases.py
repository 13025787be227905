"""Models, layouts and settings for tests of the Megatron back end."""

from __future__ import annotations

import torch
from trainer_cases import config, longest

from metis_fast.config import ModelConfig
from metis_fast.model import load_policy


def scaled_up(folder, embeddings=20.0):
    """Fresh weights of a narrow model predict the same for every context; norms of 1 hide a norm that is left out."""
    policy = load_policy(ModelConfig(path=folder, dtype="float32"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if weight.ndim == 2 and "visual" not in name:
                weight.mul_(embeddings if "embed" in name else 8.0)
            elif "norm" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    policy.model.save_pretrained(folder)
    return folder


def settings_of(data, layout=None, model=None, **optim):
    """Mini-batches of one prompt, so that old log-probabilities are owed, and packs that hold little.

    Adam's epsilon is above the rounding of gradients that are 0, such as those of a key's bias, which would become whole steps.
    """
    optim = {"eps": 1e-4} | optim
    train = {"tokens_per_micro_batch": longest(data) + 10, "prompts_per_mini_batch": 1, "megatron": layout or {}}
    return config(train=train, model=model, **optim)


def joined(parts):
    out: dict = {}
    for part in parts:
        assert not out.keys() & part.keys()
        out |= part
    return out


TP, PP, DP = ({name: 2} for name in ("tensor_parallel", "pipeline_parallel", "data_parallel"))
LAYOUTS = {
    "tp2": TP,
    "tp2 sp": TP | {"sequence_parallel": True},
    "pp2": PP,
    "pp2 uneven": PP | {"first_stage_layers": 3},
    "dp2": DP,
    "dp2 overlapped": DP | {"overlap_reduction": "on"},
    "dp2 whole optimizer": DP | {"distributed_optimizer": False},
    "pp2 interleaved": PP | {"virtual_pipeline": 2},
    "pp2 full recompute": PP | {"recompute": "full"},
    "tp2 sp selective recompute": TP | {"sequence_parallel": True, "recompute": "selective"},
    "tp2 pp2": TP | PP,
    "tp2 sp pp2 interleaved": TP | PP | {"virtual_pipeline": 2, "sequence_parallel": True},
    "tp2 sp pp2 full recompute": TP | PP | {"sequence_parallel": True, "recompute": "full"},
    "tp2 dp2 overlapped": TP | DP | {"overlap_reduction": "on"},
    "pp2 dp2": PP | DP,
}
