"""The policy is transformers' model to the bit, and what the engine says of a token is what the trainer says of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3VLForConditionalGeneration

from metis_fast.attention import CausalSdpa
from metis_fast.config import Config
from metis_fast.model import rope_positions
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import Sampling
from metis_fast.rollout.native import NativeEngine
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import ImageSpan, Observation, Outcome, Rollout, Turn


@pytest.fixture(scope="module")
def transformers_model(tiny_folder):
    """The same weights behind transformers' own attention."""
    return Qwen3VLForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation="sdpa")


# -- positions ------------------------------------------------------------------------------------------------------------

grids = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7), st.integers(1, 7)), max_size=5)


@given(layout=grids, tail=st.integers(0, 5))
@settings(max_examples=100)
def test_rotary_positions_are_transformers_own(transformers_model, layout, tail):
    """layout: text tokens before each image, and its height and width in merged patches."""
    config = transformers_model.config
    tokens, spans, grid_thw = [], [], []
    for i, (text, height, width) in enumerate(layout):
        tokens += [20] * text + [config.vision_start_token_id]
        spans.append(ImageSpan(str(i), len(tokens), len(tokens) + height * width, (1, 2 * height, 2 * width)))
        grid_thw.append(spans[-1].grid)
        tokens += [config.image_token_id] * (height * width) + [config.vision_end_token_id]
    tokens += [20] * (tail + 1)
    row = torch.tensor([tokens])
    expected, _ = transformers_model.model.get_rope_index(
        row,
        mm_token_type_ids=(row == config.image_token_id).int(),
        image_grid_thw=torch.tensor(grid_thw) if grid_thw else None,
        attention_mask=torch.ones_like(row),
    )
    np.testing.assert_array_equal(rope_positions(len(tokens), spans, merge=2), expected[:, 0].numpy())


# -- forward pass ---------------------------------------------------------------------------------------------------------

CALL = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'


@pytest.fixture(scope="module")
def rollouts(play, make_prompt, picture):
    """Rollouts of different lengths; images in prompts and observations, one shown twice."""
    text = make_prompt("Which city lies in France?", uid="text")
    images = make_prompt("<image> or <image>?", [picture(0), picture(1, 96, 32)], uid="images")
    shown = [Observation("see <image> and <image>", (picture(2, 32, 64), picture(0))), Observation("nothing")]
    return [
        play(text, ["<answer>Paris</answer><|im_end|>"]),
        play(images, [CALL, "so " + CALL, "<answer>both</answer><|im_end|>"], shown),
        play(images, ["<answer>first, 17</answer><|im_end|>"]),
        play(text, [CALL, "<answer>Lyon</answer><|im_end|>"], shown),
    ]


def forward(policy, rollouts, plan):
    """Logits [B, S, V] of right-padded rows by `Policy.hidden`, each distinct image encoded once."""
    size = max(len(r.tokens) for r in rollouts)
    tokens, positions = (
        torch.zeros(len(rollouts), size, dtype=torch.long),
        torch.zeros(3, len(rollouts), size, dtype=torch.long),
    )
    images, order = {}, []
    for row, rollout in enumerate(rollouts):
        num = len(rollout.tokens)
        tokens[row, :num] = torch.from_numpy(rollout.tokens.astype(np.int64))
        positions[:, row, :num] = torch.from_numpy(rope_positions(num, rollout.image_spans, policy.merge))
        by_hash = {image.sha256: image for image in rollout.images}
        order += [images.setdefault(span.sha256, (len(images), by_hash[span.sha256]))[0] for span in rollout.image_spans]
    features = policy.encode_images([image for _, image in images.values()]).take(order) if images else None
    hidden = policy.hidden(tokens, positions, features, plan)
    return torch.nn.functional.linear(hidden, policy.head)


def own_forward(policy, model, rollout):
    """Logits [S, V] of one row by transformers' whole forward pass, from pixels."""
    by_hash = {image.sha256: image for image in rollout.images}
    patches = [policy.images(by_hash[span.sha256]) for span in rollout.image_spans]
    tokens = torch.from_numpy(rollout.tokens.astype(np.int64))[None]
    extra = {}
    if patches:
        extra = {
            "pixel_values": torch.cat([p.pixels for p in patches]),
            "image_grid_thw": torch.tensor([p.grid for p in patches]),
            "mm_token_type_ids": (tokens == policy.image_token_id).int(),
        }
    return model(input_ids=tokens, **extra).logits[0]


@torch.no_grad()
def test_the_policys_forward_pass_is_transformers_own_to_the_bit(policy, rollouts):
    for rollout in rollouts:
        got, expected = forward(policy, [rollout], CausalSdpa())[0], own_forward(policy, policy.model, rollout)
        if not rollout.images:  # transformers' own loop gives attention one image after the other
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_registered_attention_equals_transformers_sdpa(policy, transformers_model, rollouts):
    for rollout in rollouts:
        got, expected = forward(policy, [rollout], CausalSdpa())[0], own_forward(policy, transformers_model, rollout)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_padded_row_of_a_batch_is_the_row_alone(policy, rollouts):
    """Distinct images once, repeats by reference, rows in any order: nothing of it shows."""
    batch = forward(policy, rollouts, CausalSdpa())
    for row, rollout in zip(batch, rollouts, strict=True):
        alone = forward(policy, [rollout], CausalSdpa())[0]
        torch.testing.assert_close(row[: len(rollout.tokens)], alone, rtol=0, atol=2e-5)


# -- engine and trainer ---------------------------------------------------------------------------------------------------


async def sample_rollout(engine, session, chat: Chat, prompt, observations, index, temperature) -> Rollout:
    """Turns of random tokens with an observation between them, whatever the messages say."""
    piece = chat.encode_prompt(prompt)
    tokens, images, spans = list(piece.tokens), list(piece.images), list(piece.spans)
    turns, messages = [], []
    for turn in range(len(observations) + 1):
        start = len(tokens)
        sampling = Sampling(9 + 4 * index, chat.stop_ids, temperature, seed=index * 10 + turn)
        out = await session.generate(tokens, images, spans, sampling)
        tokens += out.tokens.tolist()
        messages.append((start, out))
        turns.append(Turn("", start, len(tokens), len(tokens), Outcome.LENGTH))
        if turn < len(observations):
            more = chat.encode_observation(observations[turn], tokens[-1], 100)
            spans += [replace(s, start=s.start + len(tokens), stop=s.stop + len(tokens)) for s in more.spans]
            images += more.images
            tokens += more.tokens
    session.close()
    sampled, logp = np.zeros(len(tokens), bool), np.zeros(len(tokens), np.float32)
    for start, out in messages:
        sampled[start : start + len(out.tokens)] = True
        logp[start : start + len(out.tokens)] = out.logp
    return Rollout(
        prompt.uid,
        index,
        np.asarray(tokens, np.int32),
        len(piece.tokens),
        sampled,
        logp,
        np.where(sampled, 0, -1).astype(np.int32),
        tuple({image.sha256: image for image in images}.values()),
        tuple(spans),
        tuple(turns),
        Outcome.LENGTH,
    )


@pytest.fixture(scope="module")
def gap(load_tiny, make_prompt, picture):
    """|trainer - engine| of every sampled token of eight multi-turn rollouts."""

    def measure(dtype, attention, deterministic=True, temperature=1.0):
        policy = load_tiny(dtype)
        chat = Chat(policy.tokenizer, policy.images)
        prompts = [make_prompt("Which city?"), make_prompt("<image> or <image>?", [picture(0), picture(1, 96, 32)])]
        seen = [Observation("see <image>", (picture(2),)), Observation("and <image> again", (picture(0),))]
        engine = NativeEngine(policy, deterministic)

        async def run():
            sessions = [engine.session(i) for i in range(8)]
            play = (
                sample_rollout(engine, s, chat, prompts[i % 2], seen[: i % 3], i, temperature) for i, s in enumerate(sessions)
            )
            return await asyncio.gather(*play)

        rollouts = asyncio.run(run())
        config = Config.model_validate(
            {
                "rollout": {"temperature": temperature, "max_prompt_tokens": 200, "max_response_tokens": 200},
                "train": {"tokens_per_micro_batch": 400, "attention": attention},
            }
        )
        logp = TorchTrainer(policy, config, config.train.optim, 1).logprobs(rollouts)
        assert all((v[~r.sampled] == 0).all() for v, r in zip(logp, rollouts, strict=True))
        return np.concatenate([np.abs(v - r.logp)[r.sampled] for v, r in zip(logp, rollouts, strict=True)])

    return measure


@pytest.mark.parametrize("attention", ["cpu", "reference"])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_log_probabilities_are_the_trainers_in_float32(gap, attention, deterministic, temperature):
    difference = gap("float32", attention, deterministic, temperature)
    assert len(difference) > 100
    # measured: mean 5e-7, max 6e-6, which is six units in the last place of logits of about 10
    assert difference.mean() < 2e-6
    assert difference.max() < 1e-5


@pytest.mark.parametrize("attention", ["cpu", "reference"])
def test_engine_log_probabilities_are_the_trainers_in_bfloat16_to_its_rounding(gap, attention):
    difference = gap("bfloat16", attention)
    assert difference.mean() < 0.02
    # measured: mean 0.0076, max 0.084; logits of both are float32, activations are rounded at other places
    assert difference.mean() < 0.012
    assert difference.max() < 0.15
