"""What a mini-batch costs, and what each saving left out of it, in tokens and model FLOPs. Known before anything runs.

The plain step runs every rollout alone, its images with it, the LM head on each token, forward and backward, and a pass for old
log-probabilities before. The savings are taken off one after the other, each by what is left to save, so that their sum is the
plain step less what runs:

    old_logprobs   passes for mini-batches whose old policy is the current one, or the engine's
    rollouts       rollouts whose advantages are both 0
    prompts        copies of a prompt within a pack
    images         copies of an image within a pack
    head           tokens without a gradient coefficient (training), without loss (log-probabilities)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from metis_fast.train.flops import FlopModel
from metis_fast.train.pack import Family, Sample, balance
from metis_fast.types import Avoided, ImageSpan, Savings


@dataclass(frozen=True, slots=True)
class Layout:
    """What goes through the model in one pass over a mini-batch.

    pairs: (query, key) pairs that see each other. tower: FLOPs of the vision tower; image_tokens: that come out of it. rows:
    tokens at the LM head in the training pass; forward_rows: in a pass for log-probabilities.
    """

    tokens: int
    pairs: int
    tower: float
    image_tokens: int
    rows: int
    forward_rows: int


@dataclass(frozen=True, slots=True)
class Passes:
    """How often a mini-batch runs, beside its training pass.

    owed: passes for log-probabilities. plain: those of the plain step. vision, head: whether their weights are trained.
    """

    owed: int
    plain: int
    vision: bool
    head: bool


def _triangle(num: int) -> int:
    return num * (num + 1) // 2


def _tower(spans: Iterable[ImageSpan], flops: FlopModel) -> tuple[float, int]:
    total, tokens = 0.0, 0
    for span in spans:
        total += flops.image(span.grid)
        tokens += span.stop - span.start
    return total, tokens


def _spans(family: Family) -> list[ImageSpan]:
    """Of the prompt once, then of every response."""
    first, prompt = family.samples[0].rollout, family.prompt_len
    in_prompt = [span for span in first.image_spans if span.start < prompt]
    return in_prompt + [span for s in family.samples for span in s.rollout.image_spans if span.start >= prompt]


def _apart(samples: Sequence[Sample], flops: FlopModel) -> dict[int, Layout]:
    """Of each sample as a pack of its own, by its `id`: what `layout` gives, without a family for each."""
    found: dict[int, Layout] = {}
    for sample in samples:
        rollout, num = sample.rollout, sample.num_response
        pairs = _triangle(rollout.prompt_len) + rollout.prompt_len * num + _triangle(num)
        tower, image_tokens = _tower(rollout.image_spans, flops)
        found[id(sample)] = Layout(rollout.num_tokens, pairs, tower, image_tokens, rollout.num_tokens, rollout.num_tokens)
    return found


def _sum(apart: Iterable[Layout]) -> Layout:
    every = list(apart)
    tokens = sum(one.tokens for one in every)
    tower = 0.0  # from here: the order in which `layout` adds
    for one in every:
        tower += one.tower
    return Layout(tokens, sum(one.pairs for one in every), tower, sum(one.image_tokens for one in every), tokens, tokens)


def layout(packs: Sequence[Sequence[Family]], flops: FlopModel, share_images: bool) -> Layout:
    """Of packs, with the LM head on every token."""
    tokens = pairs = image_tokens = 0
    tower = 0.0
    for pack in packs:
        spans = [span for family in pack for span in _spans(family)]
        if share_images:
            spans = list({span.sha256: span for span in spans}.values())
        cost, num = _tower(spans, flops)
        tower, image_tokens = tower + cost, image_tokens + num
        for family in pack:
            tokens += family.num_tokens
            pairs += _triangle(family.prompt_len)
            pairs += sum(family.prompt_len * s.num_response + _triangle(s.num_response) for s in family.samples)
    return Layout(tokens, pairs, tower, image_tokens, tokens, tokens)


def forward_flops(pack: Sequence[Family], flops: FlopModel) -> float:
    """Predicted cost of a pack: decoder, attention and distinct images; the LM head has its own rows and costs little."""
    one = layout([pack], flops, share_images=True)
    return flops.decoder(one.tokens, one.pairs) + one.tower


def deal(packs: Sequence[Sequence[Family]], flops: FlopModel, num_ranks: int) -> list[list[int]]:
    """Which of the packs each data-parallel rank runs, by predicted cost; see `balance`."""
    return balance([forward_flops(pack, flops) for pack in packs], num_ranks)


def _total(what: Layout, num_forward: int, passes: Passes, flops: FlopModel) -> float:
    decoder = flops.decoder(what.tokens, what.pairs)
    head = flops.row * (num_forward * what.forward_rows + (3 if passes.head else 2) * what.rows)
    return (num_forward + 3) * decoder + (num_forward + (3 if passes.vision else 1)) * what.tower + head


def account(
    every: Sequence[Sample],
    run: Sequence[Sample],
    packs: Sequence[Sequence[Family]],
    passes: Passes,
    flops: FlopModel,
    share_images: bool,
    head_rows: tuple[int, int] | None,
) -> tuple[int, float, Savings]:
    """Tokens through the decoder, FLOPs, and what was avoided.

    every: rollouts with a verdict. run: those of them that are run, in `packs`. head_rows: tokens at the LM head in training
    and in passes for log-probabilities; None: every token.
    """
    apart = _apart(every, flops)
    plain, alone = _sum(apart.values()), _sum(apart[id(sample)] for sample in run)
    prompts = layout(packs, flops, share_images=False)
    images = layout(packs, flops, share_images)
    final = images if head_rows is None else replace(images, rows=head_rows[0], forward_rows=head_rows[1])
    times = 1 + passes.owed
    totals = [
        _total(plain, passes.plain, passes, flops),
        *(_total(what, passes.owed, passes, flops) for what in (plain, alone, prompts, images, final)),
    ]
    tokens = (
        plain.tokens * (passes.plain - passes.owed),
        (plain.tokens - alone.tokens) * times,
        (alone.tokens - prompts.tokens) * times,
        (prompts.image_tokens - images.image_tokens) * times,
        images.rows - final.rows + (images.forward_rows - final.forward_rows) * passes.owed,
    )
    avoided = [Avoided(num, before - after) for num, (before, after) in zip(tokens, pairwise(totals), strict=True)]
    return final.tokens * times, totals[-1], Savings(*avoided)
