"""What every variant plays: the same prompts, messages of the same lengths, the same tool calls with the same latencies.

A tiny model with random weights calls no tools by itself, so the content of a message is prescribed at its end: see `scripted`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase, logging

from metis_fast.rollout.chat import Chat
from metis_fast.testing.latency import Latency, call_text
from metis_fast.testing.tiny import TinyShape, build_tiny
from metis_fast.types import Message, Observation, Prompt

MAX_OBSERVATION = 512
"""Tokens of an observation, more than any has."""

CONTEXT = 4096
"""Tokens of a trajectory at most, prompt included."""

TOOL = "text_search"
_SEED_OF_WORDS = 7

MODEL = TinyShape(  # the demo's (configs/demo_model.json), whose vision tower no prompt of this benchmark needs
    vocab_size=800,
    image_px=4096,
    text_config={
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
            "rope_theta": 10000.0,
        },
        "tie_word_embeddings": True,
    },
    vision_config={
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": 8,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
)


STATED = Latency(median_s=1.0, p99_s=20.0, failing=0.02)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the work.

    concurrency: trajectories at once, of all variants, and size of a batch. streams: (trajectories at once, of a batch, in all)
    of runs of `ours`, the first with both at `concurrency`. rollouts: of a prompt. calls: tool calls of a trajectory, [least,
    most]. prompt_words, message_tokens, observation_words: [least, most]. latency: of tools. over_provision: begun beyond a
    batch, as a share of it. overhead_trajectories: of one run of the overhead measure, all at once. sync_mb: size of the
    weights that are synchronised.
    """

    concurrency: int = 64
    streams: tuple[tuple[int, int, int], ...] = ((64, 64, 512), (64, 128, 768), (128, 128, 768))
    rollouts: int = 8
    calls: tuple[int, int] = (1, 3)
    prompt_words: tuple[int, int] = (40, 80)
    message_tokens: tuple[int, int] = (48, 144)
    observation_words: tuple[int, int] = (10, 40)
    latency: Latency = STATED
    over_provision: float = 0.25
    overhead_trajectories: int = 64
    sync_mb: int = 64


SHAPES: dict[str, Shape] = {
    "default": Shape(),
    "tiny": Shape(
        concurrency=4,
        streams=((4, 4, 12), (4, 8, 16)),
        rollouts=2,
        calls=(1, 2),
        prompt_words=(10, 20),
        message_tokens=(30, 36),
        observation_words=(4, 8),
        latency=Latency(0.02, 0.4, 0.05),
        overhead_trajectories=4,
        sync_mb=2,
    ),
}


def _words(num: int) -> list[str]:
    random = np.random.default_rng(_SEED_OF_WORDS)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return ["".join(random.choice(letters, size=int(random.integers(3, 9)))) for _ in range(num)]


def build_model(folder: Path, seed: int) -> None:
    """Write the policy: the demo's shape, random weights, a tokenizer that knows the calls of `Plan`."""
    logging.disable_progress_bar()  # the benchmark has one of its own
    calls = [_body(order, turn) for order in range(40) for turn in range(4)]
    build_tiny(folder, MODEL, [*(f"{word} " for word in _words(4000)), *calls], seed)


def _body(order: int, turn: int) -> str:
    return f'{{"name": "{TOOL}", "arguments": {{"query": "{order} {turn}"}}}}'


@dataclass(frozen=True, slots=True)
class PlannedMessage:
    """num_tokens: of the message. tail: its last tokens, a tool call or an answer, the stop token included."""

    num_tokens: int
    tail: tuple[int, ...]


class Plan:
    """Prompts, messages, observations and latencies; a function of (shape, seed, tokenizer).

    prompts: order // shape.rollouts is the one of trajectory `order`. messages: of every trajectory. observations: by
    (order, turn). prompt_tokens, observation_tokens: what they are encoded as, for variants that encode nothing themselves and
    to check the others.
    """

    def __init__(self, shape: Shape, seed: int, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
        self.shape, self.seed = shape, seed
        self._tokenizer = tokenizer
        self._vocabulary = _words(400)
        most = max(num for _, _, num in shape.streams)
        most = max(most, math.ceil(shape.concurrency * (1 + shape.over_provision)), shape.overhead_trajectories)
        self.prompts = [self._prompt(i) for i in range(-(-most // shape.rollouts))]
        self.messages = [self._messages(order) for order in range(len(self.prompts) * shape.rollouts)]
        self.observations = {
            (order, turn): Observation(self._text(self._random(2, order, turn), *shape.observation_words))
            for order, messages in enumerate(self.messages)
            for turn in range(len(messages) - 1)
        }
        self.prompt_tokens = [chat.encode_prompt(prompt).tokens for prompt in self.prompts]
        self.observation_tokens = {
            (order, turn): chat.encode_observation(observation, self.messages[order][turn].tail[-1], MAX_OBSERVATION).tokens
            for (order, turn), observation in self.observations.items()
        }

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def _text(self, random: np.random.Generator, least: int, most: int) -> str:
        return " ".join(random.choice(self._vocabulary, size=int(random.integers(least, most + 1))))

    def _prompt(self, number: int) -> Prompt:
        question = self._text(self._random(0, number), *self.shape.prompt_words)
        return Prompt(f"bench/{number}", "bench", (Message("user", question),), (), "search", ("x",), "rule", question)

    def _messages(self, order: int) -> list[PlannedMessage]:
        random = self._random(1, order)
        num_calls = int(random.integers(self.shape.calls[0], self.shape.calls[1] + 1))
        texts = [f"<tool_call>{_body(order, turn)}</tool_call>" for turn in range(num_calls)] + ["<answer>x</answer><|im_end|>"]
        planned = []
        for text in texts:
            least, most = self.shape.message_tokens
            tail = tuple(self._tokenizer.encode(text, add_special_tokens=False))
            planned.append(PlannedMessage(max(int(random.integers(least, most + 1)), len(tail) + 1), tail))
        return planned

    def with_latency(self, latency: Latency) -> Plan:
        """The same work with other tools."""
        other = copy.copy(self)
        other.shape = replace(self.shape, latency=latency)
        return other

    def order(self, uid: str, index: int) -> int:
        """Which trajectory rollout `index` of a prompt is."""
        return int(uid.rpartition("/")[2]) * self.shape.rollouts + index

    def prompt_of(self, order: int) -> Prompt:
        """The prompt of a trajectory."""
        return self.prompts[order // self.shape.rollouts]

    def observation(self, name: str, arguments: Mapping[str, object]) -> Observation:
        """What a call returns."""
        order, turn = (int(word) for word in str(arguments["query"]).split())
        return self.observations[order, turn]

    def draw(self, order: int, turn: int, attempt: int) -> tuple[float, bool]:
        """(seconds, whether it fails) of a tool call."""
        return self.shape.latency.draw(self.seed, call_text(TOOL, {"query": f"{order} {turn}"}), attempt)
