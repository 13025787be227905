"""The truth gate: equal models pass; what differs is refused, and the message says where to look."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import torch

from metis_fast.config import Config
from metis_fast.errors import EngineError
from metis_fast.model import Policy
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.gate import GateReport, choose, compare, probe, require, worst
from metis_fast.rollout.native import NativeEngine
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import ImageBlob, Prompt, Score, ScoredGroup

CONFIG = Config.model_validate(
    {
        "model": {"dtype": "float32"},
        "rollout": {"max_prompt_tokens": 400, "max_response_tokens": 100, "temperature": 0.7},
        "train": {"tokens_per_micro_batch": 500},
        "gate": {"tokens": 24},
    }
)


def _report(engine_policy: Policy, trainer_policy: Policy, prompts: list[Prompt]) -> GateReport:
    chat = Chat(engine_policy.tokenizer, engine_policy.images)
    rollouts = asyncio.run(probe(prompts, chat, NativeEngine(engine_policy), CONFIG))
    trainer = TorchTrainer(trainer_policy, CONFIG, CONFIG.train.optim, 1)
    scored = [ScoredGroup(prompt, (one,), (Score(None, one.outcome),)) for prompt, one in zip(prompts, rollouts, strict=True)]
    return compare(trainer.gaps(scored), [bool(prompt.images) for prompt in prompts])


@pytest.fixture
def prompts(make_prompt: Callable[..., Prompt], picture: Callable[..., ImageBlob]) -> list[Prompt]:
    with_images = [make_prompt(f"<image> Which city is {i}?", [picture(i)], uid=f"i{i}") for i in range(3)]
    return [*with_images, *(make_prompt(f"Which city is {i}?", uid=f"t{i}") for i in range(3))]


def test_one_model_agrees_with_itself(policy: Policy, prompts: list[Prompt]) -> None:
    report = _report(policy, policy, prompts)
    assert report.tokens > 60 and report.max < 1e-4
    require(report, CONFIG)


def test_another_vision_tower_is_named(policy: Policy, load_tiny: Callable[..., Policy], prompts: list[Prompt]) -> None:
    other = load_tiny()
    with torch.no_grad():
        for weight in other.model.model.visual.parameters():  # pyright: ignore[reportAttributeAccessIssue]
            weight.mul_(1.3)
    report = _report(policy, other, prompts)
    with pytest.raises(EngineError, match="Look at: the vision tower"):
        require(report, CONFIG)


def test_another_mlp_is_named_with_the_path_of_every_token(
    policy: Policy, load_tiny: Callable[..., Policy], prompts: list[Prompt]
) -> None:
    other = load_tiny()
    with torch.no_grad():
        other.decoder.norm.weight.mul_(1.2)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(EngineError, match="Look at: weights of every token's path"):
        require(_report(policy, other, prompts), CONFIG)


def test_positions_are_blamed_for_what_grows() -> None:
    report = GateReport(0.5, 0.5, 2.0, 100, float("nan"), 0.5, 0.01, 1.0)
    assert report.likely(1e-4).startswith("rotary positions")


def test_not_a_number_is_no_agreement() -> None:
    report = GateReport(float("nan"), float("nan"), float("nan"), 100, 0.0, 0.0, 0.0, 0.0)
    with pytest.raises(EngineError, match="differ by nan"):
        require(report, CONFIG)


def test_prompts_with_images_come_first_and_one_without_is_kept(prompts: list[Prompt]) -> None:
    assert [prompt.uid for prompt in choose(prompts[::-1], 3)] == ["i2", "i1", "t2"]
    assert [prompt.uid for prompt in choose(prompts, 1)] == ["i0"]
    assert [prompt.uid for prompt in choose(prompts[3:], 2)] == ["t0", "t1"]
    assert len(choose(prompts, 100)) == 6


def test_prompts_are_repeated_where_there_are_more_replicas(prompts: list[Prompt]) -> None:
    assert [prompt.uid for prompt in choose(prompts, 2, least=5)] == ["i0", "t0", "i0", "t0", "i0"]
    assert choose(prompts, 4, least=3) == choose(prompts, 4)


def test_one_message_that_differs_is_not_hidden_by_many_that_do_not(policy: Policy, prompts: list[Prompt]) -> None:
    engine = NativeEngine(policy)
    sampled = asyncio.run(probe(prompts, Chat(policy.tokenizer, policy.images), engine, CONFIG))
    gaps, with_image = [np.zeros(rollout.num_sampled, np.float32) for rollout in sampled], [False] * len(sampled)
    require(compare(gaps, with_image), CONFIG)
    gaps[2] += 2e-4
    report = compare(gaps, with_image)
    assert worst(gaps) == 2
    assert report.mean < 1e-4 < report.worst
    with pytest.raises(EngineError, match="in the worst message"):
        require(report, CONFIG)


def test_the_threshold_follows_the_dtype() -> None:
    report = GateReport(1e-3, 1e-3, 1e-2, 100, 1e-3, 1e-3, 1e-3, 1e-3)
    require(report, CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"dtype": "bfloat16"})}))
    with pytest.raises(EngineError, match=r"allowed is 0\.0001"):
        require(report, CONFIG)
    loose = CONFIG.model_copy(update={"gate": CONFIG.gate.model_copy(update={"threshold": 0.01})})
    require(report, loose)
    assert np.isfinite(report.mean)
