"""Rollouts whose tokens were sampled by different weights, from the engine to the gradient."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from metis_fast.config import Config
from metis_fast.rollout.episode import SampleKey, run_episode
from metis_fast.rollout.native import NativeEngine
from metis_fast.testing.fakes import FakeToolbox
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Score, ScoredGroup, Verdict

TOKENS = 24


def config(**train) -> Config:
    return Config.model_validate(
        {
            "loss": {"tis_cap": 2.0},
            "model": {"dtype": "float32"},
            "rollout": {
                "mode": "async",
                "prompts_per_step": 2,
                "rollouts_per_prompt": 3,
                "max_prompt_tokens": 200,
                "max_response_tokens": TOKENS,
            },
            "train": {"prompts_per_mini_batch": 2, "optim": {"lr": 1e-3, "grad_clip": 1e9, "weight_decay": 0.0}} | train,
        }
    )


@torch.no_grad()
def newer(policy):
    """Weights some updates later."""
    noise = torch.Generator().manual_seed(3)
    return {
        name: p + 0.02 * p.std() * torch.randn(p.shape, generator=noise) if p.ndim == 2 else p.clone()
        for name, p in policy.model.named_parameters()
    }


@pytest.fixture(scope="module")
def mixed(load_tiny, chat, make_prompt, picture):
    """Two groups, sampled while weights of version 1 took the place of those of version 0; and these weights."""
    sampler = load_tiny()
    weights = newer(sampler)
    prompts = [make_prompt("Which city?", uid="a"), make_prompt("<image>?", [picture(0)], uid="b")]

    async def run():
        engine, toolbox, settings = NativeEngine(sampler, deterministic=False), FakeToolbox(), config().rollout
        running = [
            asyncio.create_task(
                run_episode(prompts[i // 3], i % 3, chat, engine, toolbox, settings, SampleKey(0, "train/0", i))
            )
            for i in range(6)
        ]
        for _ in range(14):
            await asyncio.sleep(0)
        await engine.update(iter(weights.items()), 1)
        rollouts = await asyncio.gather(*running)
        engine.close()
        return rollouts

    rollouts = asyncio.run(run())
    advantages = ((0.8, 0.3), (-1.1, 0.0), (0.4, -0.5))

    def scored(rollout, acc, tool):
        verdict = Verdict(True, True, "Paris")
        return Score(verdict, rollout.outcome, adv_acc=acc, adv_tool=tool, in_tool_denominator=True, needs_gradient=True)

    groups = [
        ScoredGroup(
            prompt,
            tuple(rollouts[3 * i : 3 * i + 3]),
            tuple(scored(r, *a) for r, a in zip(rollouts[3 * i : 3 * i + 3], advantages, strict=True)),
        )
        for i, prompt in enumerate(prompts)
    ]
    return groups, weights


def trainer_with(load_tiny, weights, settings):
    policy = load_tiny()
    if weights is not None:
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                parameter.copy_(weights[name])
    return TorchTrainer(policy, settings, settings.train.optim, 10)


def test_every_token_has_the_log_probability_of_the_weights_that_its_version_names(load_tiny, mixed):
    groups, weights = mixed
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    by_version = [trainer_with(load_tiny, w, config()).logprobs(rollouts) for w in (None, weights)]
    seen = np.zeros(2, int)
    for i, rollout in enumerate(rollouts):
        for version in (0, 1):
            own = rollout.weight_version == version
            seen[version] += own.sum()
            np.testing.assert_allclose(rollout.logp[own], by_version[version][i][own], atol=1e-4)
    assert seen.min() > TOKENS  # both halves are there
    assert max(np.abs(a - b).max() for a, b in zip(*by_version, strict=True)) > 1e-2


def test_the_first_mini_batch_of_mixed_versions_needs_no_pass_for_its_proximal_policy(load_tiny, mixed):
    """It is the policy at the start of the step, whatever sampled the tokens; the truncated weight corrects to the engine's."""
    groups, weights = mixed
    made = []
    for skip in (True, False):
        trainer = trainer_with(load_tiny, weights, config(skip_old_logprobs=skip))
        (stats,) = trainer.update(groups)
        state = trainer.optimizer.adamw.state
        made.append((stats, {name: state[master]["exp_avg"] for name, master in trainer.optimizer.masters.items()}))
    (short, first), (full, second) = made
    largest = max(float(value.norm()) for value in second.values())
    for name, value in second.items():
        assert float((first[name] - value).norm()) <= 5e-6 * max(float(value.norm()), 1e-3 * largest), name
    assert short.loss == pytest.approx(full.loss, abs=1e-6)
    assert short.ratio_max == short.ratio_min == 1.0
    # the gap that is logged is over all tokens: only the older ones have one
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    current = trainer_with(load_tiny, weights, config()).logprobs(rollouts)
    gaps = np.concatenate([np.abs(c - r.logp)[r.sampled] for c, r in zip(current, rollouts, strict=True)])
    old = np.concatenate([r.weight_version[r.sampled] for r in rollouts]) == 0
    assert short.engine_gap == pytest.approx(gaps.mean(), rel=1e-3)
    assert gaps[old].mean() > 100 * gaps[~old].mean()


def test_the_importance_weight_of_older_tokens_is_in_the_gradient(load_tiny, mixed):
    """Without it the gradient is another one."""
    groups, weights = mixed
    plain = config().model_copy(update={"loss": config().loss.model_copy(update={"tis_cap": 0.0})})
    norms = [trainer_with(load_tiny, weights, settings).update(groups)[0].grad_norm for settings in (config(), plain)]
    assert abs(norms[0] - norms[1]) > 1e-3 * norms[1]
