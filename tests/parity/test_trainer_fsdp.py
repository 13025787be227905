"""The trainer over data-parallel ranks: real processes, weights split by FSDP2, the numbers of one process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import assert_close, config, groups, longest  # noqa: F401

from metis_fast.errors import ConfigError
from metis_fast.train.torch_backend import TorchTrainer

HERE = Path(__file__).parent


@pytest.fixture
def ranks(tmp_path, tiny_folder):
    """Runs two ranks on steps of groups; returns what rank 0 wrote."""

    def run(settings, steps, num_ranks=2):
        tree = settings.model_dump(mode="json", include={"loss", "model", "rollout", "train"})
        tree |= {"model": {"dtype": settings.model.dtype}}
        (tmp_path / "task.pickle").write_bytes(pickle.dumps((tree, tiny_folder, steps)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        done = subprocess.run(
            [*command, HERE / "fsdp_process.py", tmp_path],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(tmp_path / "out.pt", weights_only=False)

    return run


@pytest.mark.parametrize(
    "train",
    [
        # many packs: ranks run different numbers of them, with and without images
        {"prompts_per_mini_batch": 2, "activation_checkpointing": False},
        # mini-batches of one prompt: old log-probs are owed, and one rank has the text, the other the images
        {"prompts_per_mini_batch": 1, "activation_checkpointing": True, "skip_zero_advantage": False},
    ],
    ids=["one mini-batch", "several, recomputed"],
)
def test_two_ranks_train_as_one_process_does(ranks, load_tiny, groups, train):  # noqa: F811
    settings = config(train={"tokens_per_micro_batch": longest(groups) + 10} | train)
    steps = [groups, groups[::-1], groups]
    alone = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    logp = alone.logprobs([r for g in groups for r in g.rollouts])
    stats = [alone.update(step) for step in steps]
    got = ranks(settings, steps)
    expected = dict(alone.state().tensors)
    assert got["same"]
    for one, other in zip(got["logp"], logp, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    # moments are linear in the gradients of all steps; weights went through Adam's division, which magnifies rounding
    moments = [name for name in expected if name.endswith("exp_avg")]
    assert moments
    assert_close({n: got["tensors"][n] for n in moments}, {n: expected[n] for n in moments}, share=2e-4)
    weights = [name for name in expected if name.startswith("weight.")]
    assert_close({n: got["tensors"][n] for n in weights}, {n: expected[n] for n in weights}, share=2e-4)
    for ours, theirs in zip(got["stats"], stats, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.num_tokens, one.flops, one.avoided) == (other.num_tokens, other.flops, other.avoided)
            for name in ("loss", "grad_norm", "entropy", "kl", "ratio_max"):
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=2e-3, atol=2e-5, err_msg=name)
    whole = sum(p.numel() for p in alone.optimizer.masters.values())
    assert got["held"] < 0.56 * whole  # a rank holds its half


def test_muon_is_refused_because_it_needs_whole_matrices(policy):
    settings = config(muon_lr=0.01)
    with pytest.raises(ConfigError, match=r"optim\.muon_lr works on whole matrices.*set it to 0"):
        TorchTrainer(policy, settings, settings.train.optim, 10, group=object())  # pyright: ignore[reportArgumentType]
