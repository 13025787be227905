"""Packs: every token of every rollout once, prompts and images as often as asked, and nothing over the budget."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from metis_fast.config import Config
from metis_fast.errors import DataError
from metis_fast.model import rope_positions
from metis_fast.train.pack import Family, Sample, _first_fit, balance, build, cut, families, itself, split
from metis_fast.types import ImageBlob, ImageSpan, Outcome, Rollout, Score, Verdict

PICTURES = [ImageBlob.of(bytes([i])) for i in range(4)]
MERGE = 2


def sample(uid="p", index=0, prompt=5, response=4, images=(), adv=(0.5, -0.25)) -> Sample:
    """images: (token where it starts, which picture); each takes 4 tokens (a 4 x 4 grid of patches, merged by 2)."""
    size = prompt + response
    spans = tuple(ImageSpan(PICTURES[which].sha256, at, at + 4, (1, 4, 4)) for at, which in images)
    sampled = np.zeros(size, bool)
    sampled[prompt:] = (np.arange(response) % 3 != 1) & np.array(
        [not any(s.start <= prompt + i < s.stop for s in spans) for i in range(response)], bool
    )
    base = sum(map(ord, uid)) % 50
    tokens = np.concatenate([base + np.arange(prompt), 100 + 50 * index + np.arange(response)]).astype(np.int32)
    rollout = Rollout(
        prompt_uid=uid,
        index=index,
        tokens=tokens,
        prompt_len=prompt,
        sampled=sampled,
        logp=np.where(sampled, -np.arange(size) / 7, 0).astype(np.float32),
        weight_version=np.where(sampled, 0, -1).astype(np.int32),
        images=tuple(PICTURES[i] for i in dict.fromkeys(which for _, which in images)),
        image_spans=spans,
        turns=(),
        outcome=Outcome.ANSWERED,
    )
    return Sample(
        rollout, Score(Verdict(True, True, ""), Outcome.ANSWERED, adv_acc=adv[0], adv_tool=adv[1], needs_gradient=True)
    )


GROUP = [
    sample(index=0, prompt=8, response=9, images=[(2, 0), (10, 1)]),
    sample(index=1, prompt=8, response=3, images=[(2, 0)], adv=(-1.0, 0.0)),
    sample(index=2, prompt=8, response=12, images=[(2, 0), (12, 1)], adv=(0.0, 2.0)),
]
OTHER = [sample("q", 0, 6, 5, images=[(1, 0)]), sample("q", 1, 6, 1, images=[(1, 0)])]


def visible(pack, row):
    """Tokens that a row of the pack sees, in order, with their positions."""
    for segment in pack.segments:
        if segment.start <= row < segment.stop:
            seen = [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, row + 1)]
            return pack.tokens_N[seen].numpy(), pack.positions_3N[:, seen].numpy()
    raise AssertionError(row)


@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("share", [True, False])
def test_every_token_of_the_loss_is_predicted_from_exactly_what_came_before_it(share, every_row):
    (packed,) = split([*GROUP, *OTHER], 1000, share_prompt=share)
    pack = build(packed, MERGE, every_row=every_row)
    count = 0
    for row, target, which, sampled, engine in zip(
        pack.select_T, pack.targets_T, pack.sample_T, pack.sampled_T, pack.engine_logp_T, strict=True
    ):
        one = pack.samples[int(which)]
        rollout = itself(one.rollout)
        tokens, positions = visible(pack, int(row))
        at = len(tokens)
        np.testing.assert_array_equal(tokens, rollout.tokens[:at])
        np.testing.assert_array_equal(positions, rope_positions(len(rollout.tokens), rollout.image_spans, MERGE)[:, :at])
        assert int(target) == rollout.tokens[at] and bool(sampled) == rollout.sampled[at] and float(engine) == rollout.logp[at]
        count += bool(sampled)
    assert count == sum(s.rollout.num_sampled for s in [*GROUP, *OTHER])
    for name in ("adv_acc", "adv_tool"):
        expected = [getattr(pack.samples[i].score, name) for i in pack.sample_T.tolist()]
        np.testing.assert_allclose(getattr(pack, f"{name}_T"), expected)
    if every_row:  # all but the first token of each prompt that stands there
        assert len(pack.select_T) == len(pack.tokens_N) - (2 if share else 5)
        assert len(set(pack.select_T[~pack.sampled_T].tolist()) | set(pack.select_T.tolist())) > count


@pytest.mark.parametrize(
    ("share", "share_images", "num_tokens", "shown"),
    [(True, True, 24 + 8 + 6 + 6, [0, 1]), (True, False, 44, [0, 0, 1, 1]), (False, True, 66, [0, 1])],
)
def test_prompts_and_images_stand_in_a_pack_as_often_as_asked(share, share_images, num_tokens, shown):
    (packed,) = split([*GROUP, *OTHER], 1000, share_prompt=share)
    pack = build(packed, MERGE, share_images)
    assert len(pack.tokens_N) == num_tokens == pack.segments.num_tokens
    assert sorted(PICTURES.index(image) for image in pack.images) == shown
    # every placeholder span, in reading order, shows its own picture
    spans = []
    for segment, family in _segments(packed):
        first, start, stop = family
        spans += [(segment + s.start - start, s.sha256) for s in first.image_spans if start <= s.start < stop]
    assert [pack.images[i].sha256 for i in pack.image_order] == [sha for _, sha in sorted(spans)]


def _segments(packed):
    at = 0
    for family in packed:
        prompt = family.prompt_len if len(family.samples) > 1 else 0
        if prompt:
            yield at, (family.samples[0].rollout, 0, prompt)
            at += prompt
        for one in family.samples:
            yield at, (one.rollout, prompt, len(one.rollout.tokens))
            at += len(one.rollout.tokens) - prompt


def test_equal_tokens_with_other_images_are_another_prompt():
    same_tokens = sample(index=1, prompt=8, response=3, images=[(2, 3)])
    assert [len(family.samples) for family in families([GROUP[0], same_tokens], share_prompt=True)] == [1, 1]


drawn = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=24)


@given(drawn, st.integers(40, 120), st.booleans(), st.booleans())
@settings(max_examples=80)
def test_packs_hold_every_sample_once_within_the_budget_and_with_few_repeats(shape, budget, share, packs_shared):
    every = [sample(f"p{uid}", i, prompt=3 + uid, response=response) for i, (uid, response) in enumerate(shape)]
    packs = split(every, budget, share, packs_shared)
    assert sorted(s.rollout.index for pack in packs for family in pack for s in family.samples) == list(range(len(every)))
    assert all(sum(family.num_tokens for family in pack) <= budget for pack in packs)
    assert numbers(packs) == numbers(split(every, budget, share, packs_shared))
    if not packs_shared:
        assert all(len(pack) == 1 for pack in packs)


def numbers(packs):
    return [[[s.rollout.index for s in family.samples] for family in pack] for pack in packs]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(20, 40))
@settings(max_examples=60)
def test_a_group_is_cut_with_the_fewest_repeats_of_its_prompt(responses, room):
    family = Family(tuple(sample("p", i, prompt=4, response=response) for i, response in enumerate(responses)))
    parts = cut(family, 4 + room)
    assert len(parts) == fewest(responses, room)


def fewest(sizes, room):
    """By trying every assignment to one bin fewer, until none works."""
    for num in range(1, len(sizes) + 1):
        for where in itertools.product(range(num), repeat=len(sizes)):
            if all(sum(s for s, own in zip(sizes, where, strict=True) if own == part) <= room for part in range(num)):
                return num
    raise AssertionError


def test_a_group_that_first_fit_cuts_badly_is_cut_well():
    sizes = [31, 27, 25, 18, 17, 17, 11, 9, 9, 9, 7, 7]
    family = Family(tuple(sample("p", i, prompt=4, response=size) for i, size in enumerate(sizes)))
    assert max(_first_fit(sizes, 48)) + 1 == 5
    assert len(cut(family, 4 + 48)) == 4


def test_a_family_that_fits_is_not_cut_and_one_that_does_not_repeats_its_prompt():
    family = Family(tuple(GROUP))
    assert cut(family, 32) == [family]
    parts = cut(family, 29)
    assert [[s.rollout.index for s in part.samples] for part in parts] == [[0, 2], [1]]
    with pytest.raises(DataError, match=r"rollout p#2 has 20 tokens, more than the 19 of a pack; raise the tokens_per"):
        cut(family, 19)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(1, 8))
@settings(max_examples=60)
def test_ranks_are_balanced_by_cost(costs, num_ranks):
    shares = balance(costs, num_ranks)
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    totals = [sum(costs[i] for i in share) for share in shares]
    # list scheduling, longest first (Graham, 1969)
    assert max(totals) <= sum(costs) / num_ranks + max(costs) * (1 - 1 / num_ranks) + 1e-9
    assert shares == balance(costs, num_ranks)


def test_a_rank_gets_few_long_packs_or_many_short_ones():
    assert balance([4.0, 1.0, 1.0, 1.0, 1.0], 2) == [[0], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampled": np.zeros(3, bool)}, "sampled has shape"),
        ({"image_spans": (GROUP[0].rollout.image_spans[0],) * 2}, "overlaps its neighbour"),
        ({"image_spans": (replace(GROUP[0].rollout.image_spans[0], stop=99),)}, "does not match the images"),
    ],
)
def test_a_rollout_that_contradicts_itself_cannot_be_made(change, message):
    with pytest.raises(ValueError, match=rf"^rollout p#0: .*{message}"):
        replace(itself(GROUP[0].rollout), **change)


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (
            ImageSpan(PICTURES[0].sha256, 2, 6, (1, 4, 8)),
            r"2 to 6 has a grid of 1 x 4 x 8 patches, which the model merges 2 x 2",
        ),
        (ImageSpan(PICTURES[0].sha256, 2, 6, (1, 16, 1)), "2 to 6 has a grid of 1 x 16 x 1 patches"),
        (ImageSpan(PICTURES[0].sha256, 6, 10, (1, 4, 4)), "6 to 10 lies across the end of the prompt at 8"),
    ],
)
@pytest.mark.parametrize("share", [True, False])
def test_an_image_that_does_not_fit_its_tokens_is_named(span, message, share):
    none = {"sampled": np.zeros(11, bool), "logp": np.zeros(11, np.float32), "weight_version": np.full(11, -1, np.int32)}
    rollout = replace(itself(GROUP[1].rollout), image_spans=(span,), **none)
    (packed,) = split([GROUP[0], replace(GROUP[1], rollout=rollout)], 1000, share)
    with pytest.raises(DataError, match=rf"^rollout p#1: the image at tokens {message}"):
        build(packed, MERGE)


@pytest.mark.parametrize("prompt", [8, 19, 20, 40])
def test_a_prompt_longer_than_the_budget_is_named_with_its_rollout(prompt):
    group = [sample(index=i, prompt=prompt, response=20 - min(prompt, 19)) for i in range(3)]
    with pytest.raises(DataError, match=rf"^rollout p#0 has {group[0].rollout.num_tokens} tokens, more than the 19 of a pack"):
        split(group, 19)


def test_limits_that_fit_into_no_pack_are_refused_when_settings_are_read():
    rollout = {"max_prompt_tokens": 3000, "max_response_tokens": 1097, "max_turn_tokens": 500}
    tree = {"rollout": rollout, "train": {"tokens_per_micro_batch": 4096}}
    with pytest.raises(ValidationError, match=r"= 4097 tokens, more than train\.tokens_per_micro_batch=4096; raise the latter"):
        Config.model_validate(tree)
    Config.model_validate(tree | {"rollout": rollout | {"max_response_tokens": 1096}})


@pytest.mark.parametrize("name", ["adv_acc", "adv_tool", "r_acc", "r_tool"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_no_number_cannot_be_made(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected a finite number, got {value}"):
        replace(GROUP[0].score, **{name: value})


def test_no_row_is_asked_twice_of_the_head_unless_it_predicts_several_rollouts():
    (packed,) = split(GROUP, 1000)
    rows = build(packed, MERGE).select_T
    values, counts = torch.unique(rows, return_counts=True)
    assert values[counts > 1].tolist() == [7]  # the last token of the prompt
