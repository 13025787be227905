"""`normalization: reference` equals the public recipe (verl-style), written out in float64 (ALGORITHM sections 3 and 4).

The recipe: advantages in float32 with the noise of uniform groups; per micro-batch, the accuracy term is the mean over its
tokens, the tool term divides by the tokens of its rollouts with A_tool != 0; each micro-batch weighs as its share of rows.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from metis_fast.config import Config
from metis_fast.score.scoring import score_groups
from metis_fast.testing.judge import FakeJudge
from metis_fast.train.pack import Sample, split
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Group, Score

CALL = '<tool_call>{"name": "python", "arguments": {"code": "%s"}}</tool_call>'
ANSWER = "<reason>%s</reason><answer>%s</answer><|im_end|>"


def settings_of(tokens_per_micro_batch, **loss):
    return Config.model_validate(
        {
            "loss": {"normalization": "reference"} | loss,
            "model": {"dtype": "float32"},
            "rollout": {"prompts_per_step": 6, "rollouts_per_prompt": 4, "max_prompt_tokens": 1, "max_response_tokens": 1},
            "train": {
                "prompts_per_mini_batch": 3,
                "tokens_per_micro_batch": tokens_per_micro_batch,
                "optim": {"lr": 2e-3, "grad_clip": 1e9, "weight_decay": 0.0},
            },
        }
    )


@pytest.fixture(scope="module")
def groups(play, make_prompt):
    """Six groups: mixed, uniform wrong, uniform right with equal calls (noise only), uniform right with signal, one
    right answer alone, and one that lost a rollout to its judge."""
    #          (answer is right, calls) of every rollout
    plans = [
        [(True, 0), (False, 1), (True, 2), (True, 1)],
        [(False, 0), (False, 0), (False, 2), (False, 0)],
        [(True, 2)] * 7,  # float32's mean of seven thirds is not a third
        [(True, 0), (True, 1), (True, 1), (True, 3)],
        [(False, 1), (False, 0), (True, 0), (False, 1)],
        [(True, 0), (None, 0), (True, 1), (False, 0)],
    ]
    out = []
    for g, plan in enumerate(plans):
        prompt = make_prompt("Which city?" + "?" * g, uid=f"p{g}")
        rollouts = []
        for i, (right, calls) in enumerate(plan):
            final = ANSWER % ("so " * (2 * g + i), {True: "Paris", False: "Lyon", None: "lost"}[right])
            rollouts.append(play(prompt, [CALL % (k + i) for k in range(calls)] + [final], index=i))
        out.append(Group(prompt, tuple(rollouts)))
    return out


def scored(groups, settings):
    judge = FakeJudge(lambda prompt, answer: None if answer == "lost" else answer == "Paris")
    return asyncio.run(score_groups(groups, judge, settings))


def float32_advantages(rewards):
    """As the recipe: no test for equal rewards, so rounding of the mean is divided by the tiny std and stays."""
    tensor = torch.tensor(rewards, dtype=torch.float32)
    if len(rewards) == 1:
        return [float(tensor[0] / (1.0 + 1e-6))]
    return ((tensor - tensor.mean()) / (tensor.std() + 1e-6)).tolist()


def recipe_rows(groups):
    """(rollout, A_acc, A_tool) of every rollout with a verdict."""
    rows = []
    for group in groups:
        kept = [r for r in group.rollouts if "lost" not in r.turns[-1].text]
        right = ["Paris" in r.turns[-1].text for r in kept]
        acc = float32_advantages([0.9 * ok + 0.1 for ok in right])
        tool = [0.0] * len(kept)
        inside = [i for i, ok in enumerate(right) if ok]
        if len(inside) >= 2:
            values = float32_advantages([1 / (kept[i].num_tool_calls + 1) for i in inside])
            for i, value in zip(inside, values, strict=True):
                tool[i] = value
        rows += list(zip(kept, acc, tool, strict=True))
    return rows


def clipped(ratio, advantage, config):
    """The recipe's dual-clip policy loss of every token."""
    unclipped = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
    worst = torch.maximum(unclipped, bounded)
    return torch.minimum(worst, torch.as_tensor(-advantage * config.dual_clip)) if advantage < 0 else worst


def recipe_loss(logps, olds, rows, config, micro_batches):
    """Loss of one mini-batch. micro_batches: lists of row numbers."""
    total = torch.zeros((), dtype=torch.float64)
    for part in micro_batches:
        acc = tool = torch.zeros((), dtype=torch.float64)
        tokens = tool_tokens = 0
        for i in part:
            _, adv_acc, adv_tool = rows[i]
            ratio = (logps[i] - olds[i]).exp()
            acc = acc + clipped(ratio, adv_acc, config).sum()
            tool = tool + clipped(ratio, adv_tool, config).sum()
            tokens += len(ratio)
            tool_tokens += len(ratio) * (adv_tool != 0)
        micro = config.w_acc * acc / tokens + config.w_tool * (tool / tool_tokens if tool_tokens else 0.0)
        total = total + micro * len(part) / len(rows)
    return total


def micro_batches_of(rows, budget):
    """Row numbers of each pass."""
    samples = [Sample(rollout, Score(None, rollout.outcome)) for rollout, _, _ in rows]
    number = {id(sample): i for i, sample in enumerate(samples)}
    return [[number[id(s)] for family in part for s in family.samples] for part in split(samples, budget, share_prompt=True)]


def longest(groups):
    return max(len(r.tokens) for g in groups for r in g.rollouts)


def logp_float64(policy, rollout):
    """Log-probability of the sampled tokens by transformers' own forward pass."""
    tokens = torch.from_numpy(rollout.tokens.astype(np.int64))[None]
    where = torch.from_numpy(np.flatnonzero(rollout.sampled))
    all_logp = policy.model(input_ids=tokens).logits[0].log_softmax(-1)
    return all_logp[where - 1].gather(1, tokens[0, where][:, None])[:, 0]


def check_gradients(trainer, expected, before=None):
    for name, master in trainer.optimizer.masters.items():
        momentum = trainer.optimizer.adamw.state[master]["exp_avg"].double()
        got = (momentum - 0.9 * before[name] if before else momentum) / 0.1
        difference = float((got - expected[name]).abs().max())
        assert difference <= 1e-4 * max(float(expected[name].abs().max()), 1e-4), name


@pytest.mark.parametrize("more_tokens", [0, 150, 400, 100_000])
def test_loss_and_gradients_of_both_mini_batches_are_the_recipes(load_tiny, groups, more_tokens):
    budget = longest(groups) + more_tokens
    settings = settings_of(budget, w_tool=0.4)
    batch = scored(groups, settings)
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    probe = load_tiny()
    probe.model.double()
    parameters = {name: p for name, p in probe.model.named_parameters() if name in trainer.optimizer.parameters}
    halves = [recipe_rows(groups[:3]), recipe_rows(groups[3:])]
    with torch.no_grad():
        start = [[logp_float64(probe, row[0]) for row in half] for half in halves]

    # first mini-batch alone: its gradient stands in AdamW's average
    (first,) = trainer.update(batch[:3])
    parts = micro_batches_of(halves[0], budget)
    logps = [logp_float64(probe, row[0]) for row in halves[0]]
    total = recipe_loss(logps, start[0], halves[0], settings.loss, parts)
    grads = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values()), allow_unused=True), strict=True))
    grads = {n: g if g is not None else torch.zeros(()) for n, g in grads.items()}
    assert first.loss == pytest.approx(float(total.detach()), rel=2e-5, abs=1e-7)
    check_gradients(trainer, grads)

    # both in one step: the second one's ratios are off 1, some of them clipped
    both = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    before = {n: both_state.double() for n, both_state in _momentum(trainer)}
    stats = both.update(batch)
    with torch.no_grad():
        for name, parameter in probe.model.named_parameters():
            parameter.copy_(dict(trainer.policy.model.named_parameters())[name])
    logps = [logp_float64(probe, row[0]) for row in halves[1]]
    total = recipe_loss(logps, start[1], halves[1], settings.loss, micro_batches_of(halves[1], budget))
    grads = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values()), allow_unused=True), strict=True))
    grads = {n: g if g is not None else torch.zeros(()) for n, g in grads.items()}
    assert stats[1].loss == pytest.approx(float(total.detach()), rel=5e-4, abs=1e-6)
    assert stats[1].clip_acc > 0.05
    check_gradients(both, grads, before)


def _momentum(trainer):
    return [(n, trainer.optimizer.adamw.state[m]["exp_avg"]) for n, m in trainer.optimizer.masters.items()]


def test_the_recipes_gradient_depends_on_the_micro_batch_size_and_ours_does_not(load_tiny, groups):
    """Why the mode exists, and why it is not the default."""
    losses, budgets = {}, (longest(groups), 100_000)
    for mode in ("reference", "global"):
        for budget in budgets:
            settings = settings_of(budget, normalization=mode)
            trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
            losses[mode, budget] = trainer.update(scored(groups, settings)[:3])[0].loss
    small, large = budgets
    assert losses["global", small] == pytest.approx(losses["global", large], rel=1e-5, abs=1e-7)
    assert abs(losses["reference", small] - losses["reference", large]) > 1e-2 * abs(losses["reference", small])


def test_reference_mode_trains_on_the_noise_of_uniform_groups(load_tiny, groups):
    settings = settings_of(100_000)
    uniform = scored(groups, settings)[1:3]
    assert all(s.adv_tool != 0 and s.in_tool_denominator for s in uniform[1].scores)
    (stats,) = TorchTrainer(load_tiny(), settings, settings.train.optim, 10).update(uniform)
    assert stats.grad_norm > 0 and not stats.skipped_step
    exact = settings_of(100_000, normalization="global")
    (stats,) = TorchTrainer(load_tiny(), exact, exact.train.optim, 10).update(scored(groups, exact)[1:3])
    assert stats.grad_norm == 0 and stats.skipped_step
