"""Scored groups for tests of a trainer, a trainer that has taken a step on some; models and ranks for the Megatron back end."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from megatron_cases import scaled_up, settings_of
from tiny_shape import SHAPE, TEXTS
from trainer_cases import ANSWER, CALL, derived_gradient, forward, score
from transformers import Qwen3Config, Qwen3ForCausalLM

from metis_fast.config import Config, ModelConfig
from metis_fast.model import load_policy
from metis_fast.testing.tiny import TinyShape, build_tiny
from metis_fast.train.megatron.launch import Ranks
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Observation, ScoredGroup


@pytest.fixture(scope="module")
def groups(play, make_prompt, picture) -> list[ScoredGroup]:
    """Two groups of odd lengths: text and images, in prompts and observations, advantages of all signs, one rollout without
    any, one without a verdict."""
    one, two = (
        make_prompt("Which city?", uid="a"),
        make_prompt("<image> or <image>?", [picture(0), picture(1, 96, 32)], uid="b"),
    )
    shown = [Observation("see <image>", (picture(2),)), Observation("nothing")]
    rollouts_of_one = (
        play(one, [ANSWER % "Paris"], index=0),
        play(one, [CALL % "1", "hm " + CALL % "2 + 2", ANSWER % "Lyon"], shown, index=1),
        play(one, [ANSWER % ("no " * 9)], index=2),
    )
    rollouts_of_two = (
        play(two, [CALL % "x", ANSWER % "first"], shown, index=0),
        play(two, [ANSWER % "second"], index=1),
        play(two, ["I look. " + CALL % "y", ANSWER % "both"], index=2),
    )
    return [
        ScoredGroup(one, rollouts_of_one, (score(0.7, 0.9), score(-1.1, -0.4), score(0.0, 0.0))),
        ScoredGroup(two, rollouts_of_two, (score(0.0, 0.0), score(0.5, 0.0), score(1.3, -0.6))),
    ]


@pytest.fixture
def trained(load_tiny):
    """A trainer after one `update` of a fresh policy."""

    def run(groups: Sequence[ScoredGroup], settings: Config, steps: int = 1) -> TorchTrainer:
        trainer = TorchTrainer(load_tiny(settings.model.dtype), settings, settings.train.optim, 10)
        for _ in range(steps):
            trainer.update(groups)
        return trainer

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory, policy):
    """Folder of a model by its name, built when it is first asked for: Qwen3-VL of 4 layers, 2 of them fed by deepstack, with
    "tied" and with "untied" embeddings, and "deep" of 8; "text", a text-only Qwen3."""

    @functools.cache
    def build(name):
        folder = tmp_path_factory.mktemp(name)
        if name == "text":
            torch.manual_seed(0)
            same = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
            shape = {name: SHAPE.text_config[name] for name in same} | {"num_key_value_heads": 2, "num_hidden_layers": 4}
            more = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
            Qwen3ForCausalLM(Qwen3Config(vocab_size=len(policy.tokenizer), **shape, **more)).save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
            return scaled_up(folder)
        tied, num_layers = name == "tied", 8 if name == "deep" else 4
        text = SHAPE.text_config | {"num_hidden_layers": num_layers, "tie_word_embeddings": tied}
        vision = SHAPE.vision_config | {"depth": 3, "deepstack_visual_indexes": [0, 1]}
        build_tiny(folder, TinyShape(SHAPE.vocab_size, SHAPE.image_px, text, vision), TEXTS * 5, seed=0)
        return scaled_up(folder, 10.0 if tied else 20.0)

    return build


@pytest.fixture(scope="module")
def text_groups(play, make_prompt):
    """Two groups without images."""
    one, two = make_prompt("Which city?", uid="a"), make_prompt("And the other?", uid="b")
    said = [Observation("nothing to see"), Observation("4")]
    scores = ((score(0.7, 0.9), score(-1.1, -0.4)), (score(0.0, 0.3), score(1.0, 0.0)))
    return [
        ScoredGroup(
            prompt,
            (play(prompt, [ANSWER % "Paris"]), play(prompt, [CALL % "1", CALL % "2 + 2", ANSWER % "Lyon"], said, 1)),
            scored,
        )
        for prompt, scored in zip((one, two), scores, strict=True)
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Ranks by their number, started once."""
    patch, started = pytest.MonkeyPatch(), {}
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def ranks(layout):
        number = layout.num_ranks
        if number not in started:
            started[number] = Ranks(layout, "megatron_probe:Probe", None, tmp_path_factory.mktemp("logs"))
        return started[number]

    yield ranks
    for one in started.values():
        one.close()
    patch.undo()


@pytest.fixture(scope="module")
def truth(models, groups, text_groups):
    """What a model gives in one process: gradients by transformers, rollout by rollout, the rest by the torch back end."""

    @functools.cache
    def compute(name):
        data = text_groups if name == "text" else groups

        def load():
            return load_policy(ModelConfig(path=models(name), dtype="float32"))

        settings = settings_of(data)
        trainer = TorchTrainer(load(), settings, settings.train.optim, 10)
        logp = trainer.logprobs([r for g in data for r in g.rollouts])
        stats = [trainer.update(step) for step in (data, data[::-1])]
        weights = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters()}
        with torch.no_grad():
            largest = max(float(forward(trainer.policy, r).abs().max()) for g in data for r in g.rollouts)
        gradient, loss = derived_gradient(load, data[-1:], settings, dtype=torch.float32)
        return data, logp, largest, stats, weights, gradient, loss

    return compute
