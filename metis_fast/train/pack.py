"""Scored rollouts to the tensors of one forward pass: prompts once, their rollouts behind them, no padding.

A pack is one row of tokens. A prompt that several of its rollouts share stands there once, as a segment that they see whole;
positions, images and targets are those of an unpacked run. How samples are cut into packs changes memory and speed, never the
gradient (the denominators are global).

Shape letters: N tokens of a pack, S segments, T tokens of the loss.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metis_fast.errors import DataError
from metis_fast.model import rope_positions
from metis_fast.summary import Outline
from metis_fast.types import ImageBlob, Outcome, Rollout, Score
from metis_kernels.prefix_attention.segments import Segments


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A rollout on its way into the loss; where it goes follows from its outline, only `build` needs all of it."""

    rollout: Outline
    score: Score

    @property
    def num_response(self) -> int:
        """Tokens behind the prompt, observations included."""
        return self.rollout.num_tokens - self.rollout.prompt_len


UNSCORED = Score(None, Outcome.ANSWERED)
"""Of a rollout of which only log-probabilities are wanted."""


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Samples that share a prompt, token for token and image for image; one sample alone is a family too."""

    samples: tuple[Sample, ...]

    @property
    def prompt_len(self) -> int:
        """Tokens that stand in the pack once."""
        return self.samples[0].rollout.prompt_len

    @property
    def num_tokens(self) -> int:
        """Tokens in the pack."""
        return self.prompt_len + sum(sample.num_response for sample in self.samples)


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Tensors of one pass.

    tokens_N, positions_3N: the model's input. images: what goes through the vision tower; image_order: for every placeholder
    span in order of the tokens, which of `images` it shows. segments: what sees what. select_T: row of the hidden state that
    predicts each token of the loss (the last of the prompt for the first token of every rollout); targets_T: that token;
    sample_T: which of `samples` it belongs to; sampled_T: whether the policy sampled it (all, unless rows were asked for that
    carry no loss). engine_logp_T, adv_acc_T, adv_tool_T repeat or gather the samples' numbers. old_logp_T, anchor_T:
    log-probabilities and log-sum-exps of the proximal policy, None where it is the current one; ref_logp_T: of the
    reference policy.
    """

    samples: tuple[Sample, ...]
    tokens_N: Tensor
    positions_3N: Tensor
    segments: Segments
    images: tuple[ImageBlob, ...]
    image_order: tuple[int, ...]
    select_T: Tensor
    targets_T: Tensor
    sample_T: Tensor
    sampled_T: Tensor
    engine_logp_T: Tensor
    adv_acc_T: Tensor
    adv_tool_T: Tensor
    old_logp_T: Tensor | None = None
    anchor_T: Tensor | None = None
    ref_logp_T: Tensor | None = None


def families(samples: Sequence[Sample], share_prompt: bool) -> list[Family]:
    """Samples by prompt, in the order in which prompts first appear; one family a sample if nothing is to be shared."""
    if not share_prompt:
        return [Family((sample,)) for sample in samples]
    by_prompt: dict[bytes, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.rollout.prompt_key, []).append(sample)
    return [Family(tuple(members)) for members in by_prompt.values()]


def cut(family: Family, budget: int) -> list[Family]:
    """The family in the fewest parts of at most `budget` tokens each; every part repeats the prompt. Deterministic.

    Raises:
        DataError: a sample does not fit alone.
    """
    if family.num_tokens <= budget:
        return [family]
    samples = sorted(family.samples, key=lambda s: (-s.num_response, s.rollout.index))
    if family.prompt_len + samples[0].num_response > budget:
        rollout = samples[0].rollout
        raise DataError(
            f"rollout {rollout.prompt_uid}#{rollout.index} has {rollout.num_tokens} tokens, more than the {budget} of a pack; "
            "raise the tokens_per_micro_batch of train (or sft), or lower rollout.max_response_tokens"
        )
    sizes, room = [sample.num_response for sample in samples], budget - family.prompt_len
    where = _first_fit(sizes, room)
    for num_parts in range(-(-sum(sizes) // room), max(where) + 1):
        if better := _fit(sizes, room, num_parts):
            where = better
            break
    parts = [[sample for sample, own in zip(samples, where, strict=True) if own == part] for part in range(max(where) + 1)]
    return [Family(tuple(sorted(part, key=lambda s: s.rollout.index))) for part in parts]


def _first_fit(sizes: Sequence[int], room: int) -> list[int]:
    """The bin of each size: the first that has room for it."""
    where: list[int] = []
    left: list[int] = []
    for size in sizes:
        at = next((i for i, free in enumerate(left) if size <= free), len(left))
        if at == len(left):
            left.append(room)
        left[at] -= size
        where.append(at)
    return where


_MOST_TRIES = 20_000
"""Placements tried by `_fit`: some milliseconds. A group of 16 rarely needs a hundredth."""


def _fit(sizes: Sequence[int], room: int, num_bins: int) -> list[int] | None:
    """Sizes, in falling order, into so many bins; None where that was not found possible."""
    left, where, tries = [room] * num_bins, list[int](), 0

    def place(i: int) -> bool:
        nonlocal tries
        if i == len(sizes):
            return True
        seen: set[int] = set()  # bins with equal room are one choice
        for at in range(num_bins):
            if sizes[i] <= left[at] and left[at] not in seen and tries < _MOST_TRIES:
                tries += 1
                seen.add(left[at])
                left[at] -= sizes[i]
                where.append(at)
                if place(i + 1):
                    return True
                where.pop()
                left[at] += sizes[i]
        return False

    return where if place(0) else None


def split(samples: Sequence[Sample], budget: int, share_prompt: bool = True, share_packs: bool = True) -> list[list[Family]]:
    """Samples into packs of at most `budget` tokens, by first-fit decreasing. Deterministic.

    share_prompt: False gives every sample its own copy of the prompt. share_packs: False gives every prompt its own packs.

    Raises:
        DataError: a sample does not fit into a pack alone; it is named.
    """
    parts = [part for family in families(samples, share_prompt) for part in cut(family, budget)]
    order = sorted(range(len(parts)), key=lambda i: (-parts[i].num_tokens, i))
    if not share_packs:
        return [[parts[i]] for i in order]
    where = _first_fit([parts[i].num_tokens for i in order], budget)
    return [
        [parts[i] for i, own in zip(order, where, strict=True) if own == pack] for pack in range(max(where, default=-1) + 1)
    ]


def balance(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Which packs each rank runs: the costliest first, each to the rank with the least so far. Deterministic.

    costs: predicted, of every pack (`savings.forward_flops`). The costliest rank has at most the mean and one pack more.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, rank = heapq.heappop(heap)
        ranks[rank].append(i)
        heapq.heappush(heap, (total + costs[i], rank))
    return ranks


def _check_images(rollout: Rollout, merge: int) -> None:
    """What a rollout cannot know of itself: how the tower merges, and that its prompt will stand apart from the rest.

    Raises:
        DataError: an image has another number of tokens than its grid makes, or lies across the end of the prompt.
    """
    name = f"rollout {rollout.prompt_uid}#{rollout.index}"
    for span in rollout.image_spans:
        t, h, w = span.grid
        if h % merge or w % merge or t * h * w != (span.stop - span.start) * merge**2:
            raise DataError(
                f"{name}: the image at tokens {span.start} to {span.stop} has a grid of {t} x {h} x {w} patches, which the "
                f"model merges {merge} x {merge} to a token; encode the rollout with the model's own image processor"
            )
        if span.start < rollout.prompt_len < span.stop:
            raise DataError(
                f"{name}: the image at tokens {span.start} to {span.stop} lies across the end of the prompt at "
                f"{rollout.prompt_len}; an image belongs to the prompt or to an observation, whole"
            )


class _Builder:
    """A pack while it is filled, segment by segment."""

    def __init__(self, merge: int, share_images: bool, every_row: bool) -> None:
        self.rollouts: list[Rollout] = []
        self._merge, self._share_images, self._every_row = merge, share_images, every_row
        self.tokens: list[npt.NDArray[np.int64]] = []
        self.positions: list[npt.NDArray[np.int64]] = []
        self.offsets, self.prefix = [0], list[int]()
        self.images: list[ImageBlob] = []
        self._known: dict[str, int] = {}
        self.order: list[int] = []
        self.select: list[npt.NDArray[np.int64]] = []
        self.where: list[npt.NDArray[np.int64]] = []

    def _segment(self, rollout: Rollout, start: int, stop: int, prefix: int) -> int:
        """Append tokens [start, stop) of a rollout as a segment; returns its index."""
        self.tokens.append(rollout.tokens[start:stop].astype(np.int64))
        self.positions.append(rope_positions(len(rollout.tokens), rollout.image_spans, self._merge)[:, start:stop])
        by_hash = {image.sha256: image for image in rollout.images}
        for span in rollout.image_spans:
            if start <= span.start < stop:
                index = self._known.get(span.sha256) if self._share_images else None
                if index is None:
                    index = self._known[span.sha256] = len(self.images)
                    self.images.append(by_hash[span.sha256])
                self.order.append(index)
        self.offsets.append(self.offsets[-1] + stop - start)
        self.prefix.append(prefix)
        return len(self.prefix) - 1

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """A family: the prompt, then its rollouts. One rollout alone is one segment: nothing is shared."""
        for rollout in rollouts:
            _check_images(rollout, self._merge)
        self.rollouts += rollouts
        prompt_len = rollouts[0].prompt_len
        shared = len(rollouts) > 1
        prompt = self._segment(rollouts[0], 0, prompt_len, -1) if shared else -1
        for rollout in rollouts:
            start = self.offsets[-1]
            self._segment(rollout, prompt_len if shared else 0, len(rollout.tokens), prompt)
            where = np.flatnonzero(rollout.sampled)
            if self._every_row:  # what follows the prompt; the prompt itself with the first rollout
                where = np.arange(1 if rollout is rollouts[0] or not shared else prompt_len, len(rollout.tokens))
            # row of the token before, which predicts; a shared prompt stands elsewhere
            before = start + where - 1
            if shared:
                before = np.where(where <= prompt_len, self.offsets[prompt] + where - 1, before - prompt_len)
            self.select.append(before)
            self.where.append(where)


def itself(outline: Outline) -> Rollout:
    """Of samples that were made of whole rollouts."""
    assert isinstance(outline, Rollout), f"{outline.prompt_uid}#{outline.index} is not here"
    return outline


def build(
    pack: Sequence[Family],
    merge: int,
    share_images: bool = True,
    every_row: bool = False,
    whole: Callable[[Outline], Rollout] = itself,
) -> Pack:
    """The tensors of a pack.

    merge: the vision tower's spatial merge size. share_images: the tower runs once for each distinct image. every_row: a row of
    the loss for every token, also for those that carry none. whole: finds the rollout of an outline.

    Raises:
        DataError: an image of a rollout does not fit its tokens; the rollout is named.
    """
    builder = _Builder(merge, share_images, every_row)
    for family in pack:
        builder.add([whole(sample.rollout) for sample in family.samples])
    rollouts = builder.rollouts
    samples = tuple(sample for family in pack for sample in family.samples)
    where = builder.where

    def gather(values: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([value[w] for value, w in zip(values, where, strict=True)]))

    sample_T = torch.from_numpy(np.repeat(np.arange(len(samples)), [len(w) for w in where]))
    sampled_T = gather([rollout.sampled for rollout in rollouts])
    return Pack(
        samples=samples,
        tokens_N=torch.from_numpy(np.concatenate(builder.tokens)),
        positions_3N=torch.from_numpy(np.concatenate(builder.positions, axis=1)),
        segments=Segments(tuple(builder.offsets), tuple(builder.prefix)),
        images=tuple(builder.images),
        image_order=tuple(builder.order),
        select_T=torch.from_numpy(np.concatenate(builder.select)),
        targets_T=gather([rollout.tokens for rollout in rollouts]).long(),
        sample_T=sample_T,
        sampled_T=sampled_T,
        engine_logp_T=gather([rollout.logp for rollout in rollouts]),
        adv_acc_T=torch.tensor([sample.score.adv_acc for sample in samples])[sample_T],
        adv_tool_T=torch.tensor([sample.score.adv_tool for sample in samples])[sample_T],
    )


def filler() -> Pack:
    """A pass of one token without any loss: what a rank runs while others run their last packs."""
    one = torch.zeros(1, dtype=torch.long)
    zero = torch.zeros(1)
    return Pack(
        samples=(),
        tokens_N=one,
        positions_3N=one.expand(3, 1),
        segments=Segments((0, 1), (-1,)),
        images=(),
        image_order=(),
        select_T=one,
        targets_T=one,
        sample_T=one,
        sampled_T=one.bool(),
        engine_logp_T=zero,
        adv_acc_T=zero,
        adv_tool_T=zero,
    )
