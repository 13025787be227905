"""The run's side of the Megatron back end, with ranks of its own: a trainer like the torch one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron_cases import PP, settings_of
from trainer_cases import score
from transformers import AutoConfig

from metis_fast.errors import Interrupted, NonFiniteError
from metis_fast.train.megatron.backend import MegatronTrainer


@pytest.fixture(scope="module")
def trainer(models, groups, tmp_path_factory):
    """Its ranks are started once. The first test needs it as it was made, the second one does not."""
    settings = settings_of(groups, PP)
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": tmp_path_factory.mktemp("run")})})
    model = AutoConfig.from_pretrained(models("untied"))
    trainer = MegatronTrainer(settings, settings.train.optim, 10, models("untied"), model)
    yield trainer
    trainer.close()


def test_the_runs_side_is_a_trainer_like_the_torch_one(trainer, truth):
    data, logp, _, stats, *_ = truth("untied")
    for got, expected in zip(trainer.logprobs([r for g in data for r in g.rollouts]), logp, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    calls = iter([False, True])  # between the sending of the groups and the first optimizer step

    def check():
        if next(calls, True):
            raise Interrupted

    before = dict(trainer.weights())
    with pytest.raises(Interrupted):
        trainer.update(data * 20, check)  # 39 passes for old log-probabilities come before the first step
    assert trainer.num_updates == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.weights())
    for one, other in zip(trainer.update(data), stats[0], strict=True):
        for field in ("loss", "loss_acc", "loss_tool", "grad_norm", "entropy", "engine_gap", "kl", "ratio_max", "clip_acc"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-4, abs=1e-6), field
        assert (one.num_tokens, one.flops, one.avoided, one.n_acc) == (
            other.num_tokens,
            other.flops,
            other.avoided,
            other.n_acc,
        )
    assert trainer.num_updates == 2


def test_a_step_that_was_half_taken_is_counted(trainer, groups):
    good, bad = groups
    bad = replace(bad, scores=(score(3e38, 0.0), *bad.scores[1:]))  # finite, but the square of its gradient is not
    before = trainer.num_updates
    with pytest.raises(NonFiniteError, match="in mini-batch 1"):
        trainer.update([good, bad])
    assert trainer.num_updates == before + 1
