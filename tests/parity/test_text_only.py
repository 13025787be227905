"""A text-only Qwen3 goes the same way as a Qwen3-VL: the same engine, packs, loss and export."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_engine_logprob import sample_rollout
from test_trainer_fsdp import LINEAR, assert_trains_alike, ranks, two_ranks  # noqa: F401
from trainer_cases import assert_close, config, gradients, longest, score
from transformers import Qwen3Config, Qwen3ForCausalLM

from metis_fast.checkpoint.export import export_policy, read_source
from metis_fast.config import ModelConfig
from metis_fast.errors import DataError, ModelError
from metis_fast.model import load_policy
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.native import NativeEngine
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Observation, ScoredGroup


@pytest.fixture(scope="module")
def folder(tmp_path_factory, policy):
    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(policy.tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8.0)
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def load(folder):
    return lambda: load_policy(ModelConfig(path=folder, dtype="float32"))


@pytest.fixture
def groups(load, make_prompt):
    """Two groups of multi-turn rollouts, sampled by the native engine."""
    policy = load()
    chat, engine = Chat(policy.tokenizer, policy.images), NativeEngine(policy)
    prompts = [make_prompt("Which city?", uid="a"), make_prompt("user reads python code", uid="b")]
    seen = [Observation("nothing"), Observation("the answer is known")]

    async def run():
        sessions = [engine.session(i) for i in range(6)]
        return await asyncio.gather(
            *(sample_rollout(engine, s, chat, prompts[i // 3], seen[: i % 3], i, 1.0) for i, s in enumerate(sessions))
        )

    rollouts = asyncio.run(run())
    scores = (score(0.7, 0.9), score(-1.1, -0.4), score(0.0, 0.0))
    return [ScoredGroup(p, tuple(rollouts[3 * i : 3 * i + 3]), scores) for i, p in enumerate(prompts)]


def test_engine_and_trainer_agree_on_log_probabilities(load, groups):
    settings = config()
    trainer = TorchTrainer(load(), settings, settings.train.optim, 10)
    rollouts = [r for g in groups for r in g.rollouts]
    for rollout, logp in zip(rollouts, trainer.logprobs(rollouts), strict=True):
        np.testing.assert_allclose(logp, rollout.logp, rtol=0, atol=1e-5)


def test_every_gradient_equals_the_derivation_over_transformers_own_forward_pass_in_float64(load, groups):
    settings = config()
    trainer = TorchTrainer(load(), settings, settings.train.optim, 10)
    (stats,) = trainer.update(groups)
    model = load().model.double()
    model.config._attn_implementation = "sdpa"
    rows = [(r, s) for g in groups for r, s in zip(g.rollouts, g.scores, strict=True)]
    n_acc = sum(r.num_sampled for r, _ in rows)
    n_tool = sum(r.num_sampled for r, s in rows if s.in_tool_denominator)
    total = torch.zeros((), dtype=torch.float64)
    for rollout, one in rows:
        logits = model(input_ids=torch.from_numpy(rollout.tokens.astype(np.int64))[None]).logits[0]
        where = np.flatnonzero(rollout.sampled)
        logp = logits.log_softmax(-1)[where - 1, rollout.tokens[where].astype(np.int64)]
        total = total - ((logp - logp.detach()).exp() * (one.adv_acc / n_acc + 0.15 * one.adv_tool / n_tool)).sum()
    assert stats.loss == pytest.approx(float(total.detach()), rel=1e-5, abs=1e-7)
    named = dict(model.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
    assert_close({name: g.double() for name, g in gradients(trainer).items()}, expected, share=2e-5)


def test_two_ranks_with_activation_checkpointing_train_as_one_process_does(ranks, load, folder, groups):  # noqa: F811
    train = {"prompts_per_mini_batch": 1, "activation_checkpointing": True, "tokens_per_micro_batch": longest(groups) + 10}
    settings = config(train=train, **LINEAR)
    alone = TorchTrainer(load(), settings, settings.train.optim, 10)
    assert_trains_alike(ranks(settings, [groups, groups], folder=folder), alone, [groups, groups], share=1e-5)


def test_an_export_loads_again_and_has_the_trained_weights(load, groups, tmp_path):
    settings = config()
    trainer = TorchTrainer(load(), settings, settings.train.optim, 10)
    trainer.update(groups)
    export_policy(trainer.policy, read_source(trainer.policy.folder), tmp_path / "out")
    again = load_policy(ModelConfig(path=tmp_path / "out", dtype="float32"))
    for (name, one), (_, other) in zip(again.model.named_parameters(), trainer.policy.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_prompt_with_an_image_is_refused_by_name(load, make_prompt, picture):
    policy = load()
    prompt = replace(make_prompt("<image> Which city?", [picture(0)]), uid="shown")
    with pytest.raises(DataError, match=r"prompt shown: the model reads text only; use a Qwen3-VL"):
        Chat(policy.tokenizer, policy.images).encode_prompt(prompt)


def test_an_image_that_a_tool_returns_is_left_out_and_said(load, picture):
    policy = load()
    piece = Chat(policy.tokenizer, policy.images).encode_observation(Observation("see <image>", (picture(0),)), 0, 1000)
    assert not piece.images and not piece.spans
    assert "text only" in policy.tokenizer.decode(piece.tokens)


def test_another_architecture_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"expected model_type qwen3_vl \(or qwen3 for text only\), got 'llama'; give"):
        load_policy(ModelConfig(path=tmp_path))
