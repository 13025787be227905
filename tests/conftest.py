"""Shared by the tests: a tiny real Qwen3-VL folder, policies loaded from it, pictures, prompts, played rollouts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from tiny_shape import SHAPE, TEXTS

from metis_fast.config import ModelConfig, RolloutConfig
from metis_fast.model import Policy, load_policy
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.episode import SampleKey, run_episode
from metis_fast.testing.fakes import FakeEngine, FakeToolbox
from metis_fast.testing.tiny import build_tiny
from metis_fast.types import ImageBlob, Message, Observation, Prompt, Rollout

# their asserts say what was compared, as those of test files do
pytest.register_assert_rewrite("trainer_cases", "faulty_engines")

# The same examples in every run, and no limit of seconds that a busy machine could miss.
settings.register_profile(
    "tests", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.hookimpl(trylast=True)  # of the tests that have the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests first, unit tests last. The others are the long ones; what is left to share at the end are short tests
    (tests/run.py)."""
    num = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.parent.name == "unit", num[item.path], item.path))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL of 2 layers whose predictions depend on what it reads.

    Fresh weights of std 0.02 in so narrow a model predict the same for every context, so that hardly any mistake in
    attention or positions would show in a log-probability; they are scaled up.
    """
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, SHAPE, TEXTS * 5, seed=0)
    policy = load_policy(ModelConfig(path=folder, dtype="float32"))
    with torch.no_grad():
        for name, weight in policy.decoder.named_parameters():
            if weight.ndim == 2:
                weight.mul_(20.0 if "embed" in name else 8.0)
    policy.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load_tiny(tiny_folder: Path) -> Callable[..., Policy]:
    """Loads a policy of its own for a test that changes weights; `dtype` defaults to float32."""

    def load(dtype: str = "float32") -> Policy:
        return load_policy(ModelConfig.model_validate({"path": tiny_folder, "dtype": dtype}))

    return load


@pytest.fixture(scope="session")
def policy(load_tiny: Callable[..., Policy]) -> Policy:
    """A float32 policy that no test changes."""
    return load_tiny()


@pytest.fixture(scope="session")
def chat(policy: Policy) -> Chat:
    """The chat format of the tiny tokenizer."""
    return Chat(policy.tokenizer, policy.images)


@pytest.fixture(scope="session")
def picture() -> Callable[..., ImageBlob]:
    """Makes a PNG of noise; the same seed and size give the same bytes."""

    def make(seed: int, width: int = 32, height: int = 32) -> ImageBlob:
        pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), np.uint8)
        data = BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        return ImageBlob.of(data.getvalue())

    return make


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., Prompt]:
    """Makes a prompt of a system and a user message."""

    def make(user: str = "Which city?", images: Sequence[ImageBlob] = (), uid: str = "p", system: str = "Be brief.") -> Prompt:
        messages = (Message("system", system), Message("user", user))
        return Prompt(uid, "test", messages, tuple(images), "search", ("Paris",), "rule", user)

    return make


@pytest.fixture(scope="session")
def play(chat: Chat, policy: Policy) -> Callable[..., Rollout]:
    """Plays one rollout through the real episode: the messages and the observations are given."""

    def run(prompt: Prompt, messages: Sequence[str], observations: Sequence[Observation] = (), index: int = 0) -> Rollout:
        engine = FakeEngine(policy.tokenizer, [messages], logp=-5.0)
        toolbox = FakeToolbox(observations or [Observation("ok")])
        return asyncio.run(run_episode(prompt, index, chat, engine, toolbox, RolloutConfig(), SampleKey(0, "test", 0)))

    return run
