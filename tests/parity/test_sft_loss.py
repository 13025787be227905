"""The cold start's step: transformers' own cross-entropy on the same conversations, whatever is packed, on both back ends."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch
from coldstart import conversations, write
from megatron_cases import DP, PP, TP
from trainer_cases import assert_close, gradients
from transformers import AutoConfig

from metis_fast.config import Config, ModelConfig
from metis_fast.config.cold_start import training_config
from metis_fast.data.coldstart import ConversationFiles
from metis_fast.model import load_policy
from metis_fast.model_folder import load_processor
from metis_fast.pictures import ImagePreparer
from metis_fast.sft.encoding import Encoder
from metis_fast.train.megatron.backend import MegatronTrainer
from metis_fast.train.processor import limited
from metis_fast.train.torch_backend import TorchTrainer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ConversationFiles(write(tmp_path_factory.mktemp("set") / "a.parquet", conversations(8)))


def rollouts_of(policy, files):
    encode = Encoder(policy.tokenizer, policy.images)
    return [encode(files.read(i)) for i in range(len(files))]


def config(tmp_path, layout=None, freeze=(), tokens=4096, **optim):
    settings = Config.model_validate(
        {
            "model": {"dtype": "float32"},
            "train": {"megatron": layout or {}},
            "sft": {
                "tokens_per_micro_batch": tokens,
                "freeze": freeze,
                "optim": {"lr": 1e-3, "grad_clip": 1e9, "weight_decay": 0.0} | optim,
            },
        }
    )
    return training_config(settings, tmp_path)


def by_transformers(policy, rollouts):
    """Loss and gradients: one row at a time, with labels and transformers' own loss."""
    count = sum(rollout.num_sampled for rollout in rollouts)
    parameters = dict(policy.model.named_parameters())
    total = torch.zeros(())
    for rollout in rollouts:
        tokens = torch.from_numpy(rollout.tokens.astype(np.int64))[None]
        labels = tokens.masked_fill(~torch.from_numpy(rollout.sampled)[None], -100)
        patches = [policy.images(next(i for i in rollout.images if i.sha256 == s.sha256)) for s in rollout.image_spans]
        images = {}
        if patches:
            images = {
                "pixel_values": torch.cat([p.pixels for p in patches]),
                "image_grid_thw": torch.tensor([p.grid for p in patches]),
                "mm_token_type_ids": (tokens == policy.image_token_id).int(),
            }
        total = total + policy.model(input_ids=tokens, labels=labels, num_items_in_batch=torch.tensor(count), **images).loss
    found = torch.autograd.grad(total, list(parameters.values()))
    return float(total.detach()), dict(zip(parameters, found, strict=True))


@pytest.fixture(scope="module")
def plain(models):
    """A model as transformers runs it: its attention is its own."""
    policy = load_policy(ModelConfig(path=models("untied"), dtype="float32"))
    policy.model.set_attn_implementation("sdpa")
    return policy


@pytest.mark.parametrize("tokens", [4096, 400])
def test_loss_and_every_gradient_are_those_of_transformers_cross_entropy(models, plain, files, tmp_path, tokens):
    rollouts = rollouts_of(plain, files)
    assert max(rollout.num_tokens for rollout in rollouts) < 400 < sum(rollout.num_tokens for rollout in rollouts)
    loss, expected = by_transformers(plain, rollouts)
    settings = config(tmp_path, tokens=tokens)
    trainer = TorchTrainer(load_policy(ModelConfig(path=models("untied"), dtype="float32")), settings, settings.sft.optim, 10)
    logp = np.concatenate([v[r.sampled] for v, r in zip(trainer.logprobs(rollouts), rollouts, strict=True)])
    assert -logp.astype(np.float64).mean() == pytest.approx(loss, rel=1e-5)  # the held-out loss
    got, norm = trainer.imitate(rollouts)
    assert got == pytest.approx(loss, rel=1e-5)
    assert norm == pytest.approx(float(torch.stack([g.norm() for g in expected.values()]).norm()), rel=1e-5)
    assert_close(gradients(trainer), expected, share=1e-5)


def test_frozen_parts_stay_and_the_others_get_the_gradient_that_they_get_anyway(models, plain, files, tmp_path):
    rollouts = rollouts_of(plain, files)
    _, expected = by_transformers(plain, rollouts)
    settings = config(tmp_path, freeze=["vision"])
    policy = load_policy(ModelConfig(path=models("untied"), dtype="float32"))
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    trainer = TorchTrainer(policy, settings, settings.sft.optim, 10)
    trainer.imitate(rollouts)
    assert_close(gradients(trainer), {name: g for name, g in expected.items() if ".visual." not in name}, share=1e-5)
    moved = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any(".visual." in name for name in moved)


@pytest.mark.parametrize(
    ("layout", "freeze", "pixels"),
    [
        pytest.param(DP, [], 512, id="dp2, small images"),  # test_sft_run.py has a quick one of tp2, with a frozen tower
        pytest.param(TP | PP, [], 0, id="tp2 pp2", marks=pytest.mark.slow),
        pytest.param(
            TP | PP | {"sequence_parallel": True},
            ["vision"],
            512,
            id="tp2 pp2 sp, frozen tower, small images",
            marks=pytest.mark.slow,
        ),
        pytest.param(PP | DP, [], 0, id="pp2 dp2", marks=pytest.mark.slow),
    ],
)
def test_megatron_ranks_take_the_steps_of_the_torch_back_end(models, files, tmp_path, layout, freeze, pixels):
    """Two of them, by AdamW with an epsilon above the rounding of gradients that are 0; then every weight."""
    folder = models("untied")
    settings = config(tmp_path, layout, freeze, tokens=400, eps=1e-4)
    policy = load_policy(ModelConfig(path=folder, dtype="float32"))
    policy.images = ImagePreparer(limited(load_processor(folder), pixels))
    rollouts = rollouts_of(policy, files)
    trainer = TorchTrainer(policy, settings, settings.sft.optim, 10)
    start = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    expected = [trainer.imitate(rollouts), trainer.imitate(rollouts[::-1][:5])]
    logp = trainer.logprobs(rollouts)
    model = AutoConfig.from_pretrained(folder)
    with closing(MegatronTrainer(settings, settings.sft.optim, 10, folder, model, image_max_pixels=pixels)) as ranks:
        got = [ranks.imitate(rollouts), ranks.imitate(rollouts[::-1][:5])]
        assert ranks.num_updates == 2
        for one, other in zip(ranks.logprobs(rollouts), logp, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
        weights = dict(ranks.weights())
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for name, p in policy.model.named_parameters():
        assert float((weights[name] - p.detach()).norm()) <= 1e-5 * float(p.detach().norm()), name
    still = {name for name, value in start.items() if torch.equal(weights[name], value)}
    assert {name for name in still if ".visual." not in name} == set()
    assert bool(freeze) == any(".visual." in name for name in still)
