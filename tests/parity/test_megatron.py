"""The Megatron back end under every layout: real ranks over gloo, against transformers and the torch back end, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron_cases import LAYOUTS, joined, settings_of
from transformers import AutoConfig

from metis_fast.model import load_policy
from metis_fast.train.megatron.layout import check
from metis_fast.train.megatron.task import Task

STEP = 1e6  # of the probe's linear optimizer, lr / eps

CASES = [(name, "deep" if "interleaved" in name else "untied") for name in LAYOUTS] + [
    (name, model) for name in ("pp2", "tp2 sp", "tp2 pp2", "dp2") for model in ("tied", "text")
]


@pytest.mark.parametrize(("layout", "model"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_layout_computes_what_one_process_does(start, truth, models, layout, model):
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
