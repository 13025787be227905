"""The batches that are measured: synthetic, stated, the same for every variant.

Shape letters: S tokens of a rollout, G rollouts of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from transformers import logging

from metis_fast.config import ScoreConfig
from metis_fast.model import Policy
from metis_fast.model_folder import VISION_END, VISION_START
from metis_fast.score.advantage import GroupRewards, advantages
from metis_fast.score.reward import accuracy_reward, tool_reward
from metis_fast.testing.tiny import TinyShape, build_tiny
from metis_fast.types import (
    ImageBlob,
    ImageSpan,
    Message,
    Outcome,
    Prompt,
    Rollout,
    Score,
    ScoredGroup,
    Verdict,
)

Kind = Literal["mixed", "economy", "uniform"]
"""mixed: right and wrong rollouts. economy: all right, differing numbers of calls. uniform: all wrong, nothing to learn."""

PATCH, MERGE = 8, 2
IMAGE_PIXELS = 128 * 64
"""Of every image: 128 patches, 32 tokens."""

MODEL = TinyShape(
    vocab_size=2048,
    image_px=IMAGE_PIXELS,
    text_config={
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
            "rope_theta": 10000.0,
        },
        "tie_word_embeddings": False,
    },
    vision_config={
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": MERGE,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1],
    },
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch.

    kinds: of the groups of a mini-batch. prompt_tokens, response_tokens: of a rollout, images included; lengths of responses
    vary by a quarter around theirs. observed: share of the response that tools wrote. calls: tool calls of a rollout, 1 to
    this many. prompt_images, tool_images: of a prompt; of every observation, out of four that its search finds.
    tokens_per_micro_batch: of a pass, for all variants.
    """

    kinds: tuple[Kind, ...]
    prompt_tokens: int
    response_tokens: int
    observed: float = 0.5
    calls: int = 2
    prompt_images: int = 0
    tool_images: int = 0
    rollouts: int = 16
    mini_batches: int = 2
    tokens_per_micro_batch: int = 6144


SHAPES: dict[str, Shape] = {
    # two prompt tokens to a response token; 40 % of the groups uniform in accuracy, half of these in their calls too
    "paper": Shape(("mixed", "economy", "mixed", "uniform", "mixed"), 192, 96, prompt_images=2),
    "tool-heavy": Shape(("mixed", "economy", "mixed"), 128, 320, observed=0.7, calls=4, prompt_images=1, tool_images=1),
    "long-response": Shape(("mixed", "mixed"), 48, 384, prompt_images=1),  # where sharing pays least
    "text": Shape(("mixed", "economy", "mixed", "uniform"), 128, 128),
    "tiny": Shape(("mixed", "uniform"), 80, 40, prompt_images=1, tool_images=1, rollouts=4, tokens_per_micro_batch=512),
}


def build_model(folder: Path, seed: int) -> None:
    """Write the policy that all variants train: a small Qwen3-VL with random weights."""
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ("".join(random.choice(letters, size=int(random.integers(3, 9)))) for _ in range(12_000))
    logging.disable_progress_bar()  # the benchmark has one of its own
    build_tiny(folder, MODEL, [f"{word} " for word in words], seed)


class _Images:
    """Pictures of noise, each another one."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(self) -> ImageBlob:
        pixels = self._random.integers(0, 256, (64, 128, 3), np.uint8)
        data = BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        return ImageBlob.of(data.getvalue())


@dataclass(slots=True, eq=False)
class _Writer:
    """Tokens of a rollout as they are written, in the policy's own vocabulary."""

    policy: Policy
    random: np.random.Generator
    tokens: list[int]
    sampled: list[bool]
    images: list[ImageBlob]
    spans: list[ImageSpan]

    def text(self, num: int, *, sampled: bool) -> None:
        self.tokens += self.random.integers(300, self.policy.vocab_size - 16, num).tolist()
        self.sampled += [sampled] * num

    def image(self, image: ImageBlob) -> int:
        """Returns the number of its tokens, markers included."""
        num = self.policy.images.num_tokens(image)
        start = len(self.tokens) + 1
        first, last = (self.policy.tokenizer.get_vocab()[name] for name in (VISION_START, VISION_END))
        self.tokens += [first, *[self.policy.image_token_id] * num, last]
        self.sampled += [False] * (num + 2)
        if image.sha256 not in {known.sha256 for known in self.images}:
            self.images.append(image)
        self.spans.append(ImageSpan(image.sha256, start, start + num, self.policy.images(image).grid))
        return num + 2

    def copy(self) -> _Writer:
        return _Writer(self.policy, self.random, list(self.tokens), list(self.sampled), list(self.images), list(self.spans))


def _respond(writer: _Writer, shape: Shape, num_calls: int, length: int, found: Sequence[ImageBlob]) -> None:
    """Turns and observations of together about `length` tokens, the last turn the answer."""
    observed = round(length * shape.observed / num_calls)
    turn = max(1, round((length - observed * num_calls) / (num_calls + 1)))
    for _ in range(num_calls):
        writer.text(turn, sampled=True)
        rest = observed - sum(writer.image(found[int(writer.random.integers(len(found)))]) for _ in range(shape.tool_images))
        writer.text(max(1, rest), sampled=False)
    writer.text(turn, sampled=True)


def _correct(kind: Kind, index: int) -> bool:
    return kind == "economy" or (kind == "mixed" and index % 2 == 0)


def _group(policy: Policy, shape: Shape, kind: Kind, uid: str, random: np.random.Generator, pictures: _Images) -> ScoredGroup:
    images = tuple(pictures() for _ in range(shape.prompt_images))
    found = [pictures() for _ in range(4)]
    prompt = _Writer(policy, random, [], [], [], [])
    prompt.text(8, sampled=False)
    used = sum(prompt.image(image) for image in images)
    prompt.text(max(1, shape.prompt_tokens - 8 - used), sampled=False)
    rollouts, num_calls = [], []
    for index in range(shape.rollouts):
        writer = prompt.copy()
        # a uniform group's rollouts all call as often; nobody qualifies for the tool reward there anyway
        calls = shape.calls if kind == "uniform" else 1 + index // 2 % shape.calls
        length = round(shape.response_tokens * random.uniform(0.75, 1.25))
        _respond(writer, shape, calls, length, found)
        sampled = np.array(writer.sampled)
        rollouts.append(
            Rollout(
                prompt_uid=uid,
                index=index,
                tokens=np.array(writer.tokens, np.int32),
                prompt_len=len(prompt.tokens),
                sampled=sampled,
                logp=np.where(sampled, np.float32(-1), np.float32(0)),
                weight_version=np.where(sampled, 0, -1).astype(np.int32),
                images=tuple(writer.images),
                image_spans=tuple(writer.spans),
                turns=(),
                outcome=Outcome.ANSWERED,
            )
        )
        num_calls.append(calls)
    message = Message("user", "<image>" * len(images) + "?")
    task = Prompt(uid, "bench", (message,), images, "search", ("x",), "rule", "?")
    return ScoredGroup(task, tuple(rollouts), _scores(kind, num_calls))


def _scores(kind: Kind, num_calls: list[int]) -> tuple[Score, ...]:
    """Real rewards and advantages of those calls."""
    config = ScoreConfig()
    verdicts = [Verdict(_correct(kind, i), True, "") for i in range(len(num_calls))]
    r_acc = np.array([accuracy_reward(verdict, config) for verdict in verdicts])
    r_tool = np.array([tool_reward(verdict, num) for verdict, num in zip(verdicts, num_calls, strict=True)])
    correct = np.array([verdict.correct for verdict in verdicts])
    (found,) = advantages([GroupRewards(r_acc, r_tool, correct, np.ones(len(num_calls), bool))], config)
    return tuple(
        Score(
            verdict,
            Outcome.ANSWERED,
            r_acc=float(r_acc[i]),
            r_tool=float(r_tool[i]),
            adv_acc=float(found.adv_acc[i]),
            adv_tool=float(found.adv_tool[i]),
            qualifies=bool(correct[i]),
            in_tool_denominator=bool(found.in_tool_denominator[i]),
            needs_gradient=bool(found.needs_gradient[i]),
        )
        for i, verdict in enumerate(verdicts)
    )


def build_batch(policy: Policy, shape: Shape, seed: int) -> list[ScoredGroup]:
    """The groups of one step, mini-batch after mini-batch."""
    random, pictures = np.random.default_rng(seed), _Images(seed)
    kinds = shape.kinds * shape.mini_batches
    return [_group(policy, shape, kind, f"{kind}{i}", random, pictures) for i, kind in enumerate(kinds)]
