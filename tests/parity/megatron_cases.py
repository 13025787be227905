"""Models, layouts and settings for tests of the Megatron back end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trainer_cases import config, longest
from transformers import AutoConfig

from metis_fast.config import MegatronConfig, ModelConfig
from metis_fast.model import load_policy
from metis_fast.train.megatron.layout import check
from metis_fast.train.megatron.task import Task

STEP = 1e6  # of the probe's linear optimizer, lr / eps


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


SLOW = {
    ("tp2 sp", "untied"), ("pp2", "untied"), ("dp2", "untied"), ("tp2 sp", "text"), ("dp2", "text"),
    ("tp2 pp2", "untied"), ("tp2 pp2", "text"), ("tp2 sp pp2 full recompute", "untied"), ("pp2 dp2", "untied"),
}  # fmt: skip
"""Cases of which each part is in another one: the layout with another model, the model under another layout."""


def cases(num_ranks):
    """(layout, model): every layout of so many ranks, several of them with every model."""
    found = [(name, "deep" if "interleaved" in name else "untied") for name in LAYOUTS]
    found += [(name, model) for name in ("pp2", "tp2 sp", "tp2 pp2", "dp2") for model in ("tied", "text")]
    own = [case for case in found if MegatronConfig(**LAYOUTS[case[0]]).num_ranks == num_ranks]
    return [pytest.param(*case, id=" ".join(case), marks=pytest.mark.slow if case in SLOW else ()) for case in own]


def assert_layout_computes_what_one_process_does(start, truth, models, layout, model):
    """A step of gradients, log-probabilities, and training steps of a layout, against transformers and the torch back end."""
    data, logp, largest, stats, weights, gradient, loss = truth(model)
    settings = settings_of(data, LAYOUTS[layout])
    task = Task(settings, models(model), settings.train.optim, 10)
    ranks = start(settings.train.megatron)
    check(settings.train.megatron, AutoConfig.from_pretrained(models(model)))

    # one step of the loss of a mini-batch: every gradient, vision tower included, to 1e-5 of its own norm
    before = {
        n: p.detach().double()
        for n, p in load_policy(settings.model.model_copy(update={"path": models(model)})).model.named_parameters()
    }
    found = ranks.call("linear", task, data[-1:])
    after = joined(part for _, part in found)
    assert after.keys() == before.keys()
    for name, expected in gradient.items():
        got = (before[name] - after[name].double()) / STEP
        assert float((got - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-12, name
    (result,) = found[0][0]
    assert sum(values[0] for values, _ in result.table) == pytest.approx(loss, rel=1e-5, abs=3e-7)
    norm = float(torch.stack([g.norm() for g in gradient.values()]).norm())
    assert result.norm == pytest.approx(norm, rel=1e-5)

    # log-probabilities, two training steps of two mini-batches each by AdamW, and the weights after
    found = ranks.call("run", task, [data, data[::-1]], [r for g in data for r in g.rollouts], None, None)
    got_logp = joined(part for part, _, _ in found)
    for i, expected in enumerate(logp):
        # logits are sums of that size: 2e-6 for those of a real model
        np.testing.assert_allclose(got_logp[i], expected, rtol=0, atol=2e-6 * max(1, largest / 16))
    for got, expected in zip(found[0][1], stats, strict=True):
        for one, other in zip(got, expected, strict=True):
            assert one.norm == pytest.approx(other.grad_norm, rel=1e-5)
            assert sum(values[0] for values, _ in one.table) == pytest.approx(other.loss, rel=1e-5, abs=1e-6)
            assert one.lr == other.lr
    after = joined(part for _, _, part in found)
    for name, expected in weights.items():
        assert float((after[name] - expected).norm()) <= 1e-5 * float(expected.norm()), name
