"""Settings, scores and comparisons for tests of a trainer, and the gradient of section 4 in float64.

Gradients are read from AdamW: with `grad_clip` out of reach, after one step `exp_avg` is (1 - beta1) * gradient.
"""

from __future__ import annotations

import numpy as np
import torch

from metis_fast.config import Config
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Outcome, Score, Verdict

CALL = '<tool_call>{"name": "python", "arguments": {"code": "%s"}}</tool_call>'
ANSWER = "<reason>known</reason><answer>%s</answer><|im_end|>"


def config(loss=None, train=None, model=None, **optim) -> Config:
    """Two prompts a mini-batch, gradient clipping out of reach."""
    return Config.model_validate(
        {
            "loss": loss or {},
            "model": {"dtype": "float32"} | (model or {}),
            "rollout": {"prompts_per_step": 4, "rollouts_per_prompt": 3, "max_prompt_tokens": 1, "max_response_tokens": 1},
            "train": {"prompts_per_mini_batch": 2}
            | (train or {})
            | {"optim": {"lr": 1e-3, "grad_clip": 1e9, "weight_decay": 0.0} | optim},
        }
    )


def score(adv_acc, adv_tool, signal=None):
    signal = adv_tool != 0 if signal is None else signal
    return Score(
        Verdict(True, True, "Paris"),
        Outcome.ANSWERED,
        adv_acc=adv_acc,
        adv_tool=adv_tool,
        in_tool_denominator=signal,
        needs_gradient=bool(adv_acc or adv_tool),
    )


def gradients(trainer):
    """Exact gradient of the first step by parameter name."""
    beta1 = trainer.optimizer.adamw.param_groups[0]["betas"][0]
    state = trainer.optimizer.adamw.state
    return {name: state[master]["exp_avg"] / (1 - beta1) for name, master in trainer.optimizer.masters.items()}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


def assert_close(got, expected, share=1e-6):
    """Every tensor within `share` of its norm; one that is nothing but rounding, within `share` of the largest norm."""
    assert got.keys() == expected.keys()
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        difference = float((got[name] - value).norm())
        assert difference <= share * max(float(value.norm()), 1e-3 * largest), name


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def longest(groups):
    """Tokens of the longest rollout: the smallest pack that there can be."""
    return max(len(r.tokens) for g in groups for r in g.rollouts)


SWITCHES = ("share_packs", "share_prompt", "share_images", "skip_zero_advantage", "skip_head_rows", "skip_old_logprobs")


def derived_gradient(load_tiny, groups, settings, reference=None, dtype=torch.float64):
    """Gradient of section 4: autograd through transformers' model, in float64, the loss written out over whole logits."""
    policy = load_tiny()
    policy.model.to(dtype)
    trainer = TorchTrainer(policy, settings, settings.train.optim, 10)  # for its attention and packing only
    loss_config = settings.loss
    rows = [(r, s) for g in groups for r, s in zip(g.rollouts, g.scores, strict=True) if s.verdict is not None]
    n_acc = sum(r.num_sampled for r, _ in rows)
    n_tool = sum(r.num_sampled for r, s in rows if s.in_tool_denominator)
    total = torch.zeros((), dtype=dtype)
    for i, (rollout, one) in enumerate(rows):
        logits = forward(policy, rollout) / settings.rollout.temperature
        all_logp = logits.log_softmax(-1)
        where = torch.from_numpy(np.flatnonzero(rollout.sampled))
        targets = torch.from_numpy(rollout.tokens[rollout.sampled].astype(np.int64))
        rows_logp = all_logp[where - 1]
        logp = rows_logp.gather(1, targets[:, None])[:, 0]
        ratio = (logp - logp.detach()).exp()  # first mini-batch: the proximal policy is the current one
        weight = torch.ones_like(logp)
        if loss_config.tis_cap:
            engine = torch.from_numpy(rollout.logp[rollout.sampled]).to(dtype)
            weight = (logp.detach() - engine).exp().clamp(max=loss_config.tis_cap)
        total = total - loss_config.w_acc * (weight * one.adv_acc * ratio).sum() / n_acc
        total = total - loss_config.w_tool * (weight * one.adv_tool * ratio).sum() / max(1, n_tool)
        total = total + loss_config.entropy_coef * (rows_logp.exp() * rows_logp).sum() / n_acc
        if reference is not None:
            d = torch.from_numpy(reference[i][rollout.sampled]).to(dtype) - logp
            total = total + loss_config.kl_coef * (d.exp() - d - 1).sum() / n_acc
    named = trainer.optimizer.parameters
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True)), float(total.detach())


def forward(policy, rollout):
    """Logits of one rollout by transformers' own forward pass, images and positions included."""
    patches = [policy.images(next(i for i in rollout.images if i.sha256 == s.sha256)) for s in rollout.image_spans]
    tokens = torch.from_numpy(rollout.tokens.astype(np.int64))[None]
    images = {}
    if patches:
        images = {
            "pixel_values": torch.cat([p.pixels for p in patches]).to(policy.head.dtype),
            "image_grid_thw": torch.tensor([p.grid for p in patches]),
            "mm_token_type_ids": (tokens == policy.image_token_id).int(),
        }
    return policy.model(input_ids=tokens, **images).logits[0]
