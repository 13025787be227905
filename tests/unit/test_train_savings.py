"""What a mini-batch is said to cost and to save, against what is counted while it runs."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch
from test_train_pack import GROUP, OTHER, sample
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLForConditionalGeneration

from metis_fast.train.flops import FlopModel
from metis_fast.train.pack import balance, split
from metis_fast.train.savings import Passes, account, forward_flops, layout
from metis_fast.types import Savings

FLOPS = FlopModel(token=1000, pair=8, row=300, patch=50, patch_pair=2, merged=70, merge=2)
PASSES = Passes(owed=0, plain=1, vision=True, head=True)


def run(every, kept, share_prompt=True, share_images=True, passes=PASSES, head=None):
    return account(every, kept, split(kept, 1000, share_prompt), passes, FLOPS, share_images, head)


def cost_alone(one, forwards):
    """Of a rollout alone, written out."""
    size = one.rollout.num_tokens
    pairs = sum(i + 1 for i in range(size))
    tower = sum(FLOPS.image(span.grid) for span in one.rollout.image_spans)
    return (3 + forwards) * (1000 * size + 8 * pairs + 300 * size + tower)


def test_what_runs_and_what_was_avoided_add_up_to_the_plain_step():
    every = [*GROUP, *OTHER]
    tokens, flops, avoided = run(every, every[1:], head=(9, 0))
    parts = [getattr(avoided, saving.name) for saving in fields(Savings)]
    assert all(part.flops > 0 and part.tokens > 0 for part in parts)
    assert flops + sum(part.flops for part in parts) == pytest.approx(sum(cost_alone(one, 1) for one in every))
    assert tokens == 8 + 3 + 12 + 6 + 6  # the two prompts once


def test_with_every_saving_off_the_plain_step_runs():
    every = [*GROUP, *OTHER]
    tokens, flops, avoided = run(every, every, False, False, replace(PASSES, owed=1))
    assert avoided == Savings()
    assert flops == pytest.approx(sum(cost_alone(one, 1) for one in every))
    assert tokens == 2 * sum(one.rollout.num_tokens for one in every)


def test_each_saving_is_counted_for_what_it_leaves_out():
    every = [*GROUP, *OTHER]
    _, _, avoided = run(every, every[1:], head=(9, 0))
    assert avoided.old_logprobs.tokens == sum(one.rollout.num_tokens for one in every)
    assert (avoided.rollouts.tokens, avoided.rollouts.flops) == (17, cost_alone(every[0], 0))
    assert avoided.prompts.tokens == 8 + 6
    # once the prompts are shared: picture 0 in the one prompt and in the other, picture 1 in one response
    assert (avoided.images.tokens, avoided.images.flops) == (4, 3 * FLOPS.image((1, 4, 4)))
    assert (avoided.head.tokens, avoided.head.flops) == (35 - 9, 3 * 300 * (35 - 9))


def test_a_frozen_tower_and_head_have_no_backward_pass():
    one = [sample(images=[(1, 0)], prompt=6)]
    trained, frozen = (run(one, one, passes=Passes(0, 1, on, on))[1] for on in (True, False))
    assert trained - frozen == 2 * FLOPS.image((1, 4, 4)) + 300 * 10


@pytest.mark.parametrize("images", [(), ((1, 4, 6), (1, 8, 4), (2, 4, 4))])
def test_the_flop_model_counts_what_torch_counts(policy, images):
    """Forward pass of transformers' own model with plain matrix products, text and images."""
    config = deepcopy(policy.model.config)  # the attention asked for below is written into it
    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="eager")
    flops = FlopModel.of(config)
    merged = [t * h * w // 4 for t, h, w in images]
    tokens = torch.full((1, 30 + sum(merged)), 7)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for grid in images:
            pixels = torch.zeros(grid[0] * grid[1] * grid[2], 3 * 2 * 8 * 8)
            model.model.visual(pixels, grid_thw=torch.tensor([grid]))
        model(input_ids=tokens)
    size = tokens.shape[1]
    # eager attention computes the pairs that are masked too; rotary angles are small outer products
    expected = flops.decoder(size, size * size) + flops.row * size + sum(map(flops.image, images))
    rotary = 2 * 3 * size * config.text_config.head_dim / 2
    assert counter.get_total_flops() == pytest.approx(expected + rotary, rel=2e-3)


def test_a_text_only_model_has_no_tower():
    from transformers import Qwen3Config

    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=500,
    )
    flops = FlopModel.of(config)
    assert flops.token == 2 * 3 * (64 * 8 * 16 + 64 * 64 + 3 * 64 * 96)
    assert (flops.pair, flops.row, flops.patch) == (4 * 3 * 4 * 16, 2 * 64 * 500, 0)


def test_a_layout_counts_the_pairs_that_see_each_other():
    packs = split(GROUP, 1000)
    prompt, responses = 8, (9, 3, 12)
    pairs = prompt * 9 // 2 + sum(n * prompt + n * (n + 1) // 2 for n in responses)
    assert layout(packs, FLOPS, share_images=True).pairs == pairs


def test_packs_of_equal_tokens_differ_in_cost_by_what_they_attend_to_and_by_their_images():
    alone = [sample("long", 0, 5, 35)]  # 40 tokens that all see each other
    short = [sample("short", i, 2, 6) for i in range(5)]  # 40 tokens in five rollouts without a shared prompt
    shown = [sample("shown", 0, 6, 34, images=[(1, 0), (10, 1)])]
    again = [sample("again", 0, 6, 34, images=[(1, 0), (10, 0)])]  # the same picture twice
    (long,), (few,), (two,), (one,) = (split(part, 1000, share_prompt=False) for part in (alone, short, shown, again))
    cost = {name: forward_flops(pack, FLOPS) for name, pack in (("few", few), ("long", long), ("one", one), ("two", two))}
    assert list(cost) == sorted(cost, key=lambda name: cost[name])
    assert cost["long"] - cost["few"] == 8 * (40 * 41 // 2 - 5 * (8 * 9 // 2))
    assert cost["two"] - cost["one"] == FLOPS.image((1, 4, 4))
    # by tokens alone each rank would get two packs
    assert balance([10 * cost["few"], *[cost[name] for name in ("few", "long", "one")]], 2) == [[0], [3, 2, 1]]
