"""The trainer over data-parallel ranks: real processes, weights split by FSDP2, the numbers of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_cases import assert_close, config, longest, score

from metis_fast.config import MegatronConfig
from metis_fast.errors import ConfigError
from metis_fast.train.megatron.launch import Ranks
from metis_fast.train.torch_backend import TorchTrainer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Started once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        patch.setenv("OMP_NUM_THREADS", "1")
        ranks = Ranks(MegatronConfig(data_parallel=2), "fsdp_worker:Worker", None, tmp_path_factory.mktemp("logs"))
    with ranks:
        yield ranks


@pytest.fixture
def ranks(two_ranks, tiny_folder):
    """Runs the ranks on steps of groups; returns what rank 0 found. folder: of another policy than the tiny one."""

    def run(settings, steps, folder=tiny_folder):
        tree = settings.model_dump(mode="json", include={"loss", "model", "rollout", "train"})
        tree |= {"model": {"dtype": settings.model.dtype, "freeze": settings.model.freeze}}
        return two_ranks.call("train", tree, folder, steps)[0]

    return run


LINEAR = {"lr": 3.0, "eps": 100.0}
"""An epsilon far above the gradients: AdamW moves a weight by its gradient, and rounding stays rounding."""


@pytest.mark.parametrize(
    ("train", "model", "optim", "share"),
    [
        # many packs: ranks run different numbers of them, with and without images
        ({"prompts_per_mini_batch": 2}, {}, LINEAR, 1e-5),
        # mini-batches of one prompt: old log-probs are owed, and one rank has the text, the other the images; Adam's division
        # magnifies rounding
        ({"prompts_per_mini_batch": 1, "activation_checkpointing": True, "skip_zero_advantage": False}, {}, {}, 2e-4),
        ({"prompts_per_mini_batch": 1}, {"dtype": "bfloat16", "freeze": ["vision"]}, LINEAR, 0.05),
    ],
    ids=["one mini-batch", "several, recomputed", "bfloat16, tower frozen"],
)
def test_two_ranks_train_as_one_process_does(ranks, load_tiny, groups, train, model, optim, share):
    settings = config(train={"tokens_per_micro_batch": longest(groups) + 10} | train, model=model, **optim)
    blank = [replace(g, scores=tuple(score(0.0, 0.0) for _ in g.scores)) for g in groups]  # nothing left on any rank
    steps = [groups, blank, groups[::-1], groups]
    alone = TorchTrainer(load_tiny(settings.model.dtype), settings, settings.train.optim, 10)
    got = ranks(settings, steps)
    assert_trains_alike(got, alone, steps, share)
    skipped = settings.train.skip_zero_advantage
    assert [one.skipped_step for one in got["stats"][1]] == [skipped] * (2 // settings.train.prompts_per_mini_batch)
    whole = sum(p.numel() for p in alone.optimizer.masters.values())
    assert got["held"] < 0.56 * whole  # a rank holds its half


def assert_trains_alike(got, alone, steps, share):
    """What ranks wrote, against one process on the same steps: gradients of each step, weights, and what was counted."""
    logp = alone.logprobs([r for g in steps[0] for r in g.rollouts])
    rough = alone.policy.head.dtype == torch.bfloat16
    for one, other in zip(got["logp"], logp, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=0.1 if rough else 2e-5)
    for step, moments, stats in zip(steps, got["moments"], got["stats"], strict=True):
        expected = alone.update(step)
        # linear in the gradients of all steps
        assert_close(moments, {n: v for n, v in alone.state().tensors.items() if n.endswith("exp_avg")}, share)
        for one, other in zip(stats, expected, strict=True):
            assert (one.num_tokens, one.flops, one.avoided) == (other.num_tokens, other.flops, other.avoided)
            for name in ("loss", "grad_norm", "entropy", "kl", "ratio_max"):
                rtol, atol = (0.05, 0.02) if rough else (2e-3, 2e-5)
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=rtol, atol=atol, err_msg=name)
    assert got["same"]
    weights = {n: v for n, v in alone.state().tensors.items() if n.startswith("weight.")}
    assert_close({n: got["tensors"][n] for n in weights}, weights, max(share, 2e-4))


def test_muon_is_refused_because_it_needs_whole_matrices(policy):
    settings = config(muon_lr=0.01)
    with pytest.raises(ConfigError, match=r"optim\.muon_lr works on whole matrices.*set it to 0"):
        TorchTrainer(policy, settings, settings.train.optim, 10, group=object())  # pyright: ignore[reportArgumentType]
