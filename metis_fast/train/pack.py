"""Scored rollouts to the tensors of one forward pass: prompts once, their rollouts behind them, no padding.

A pack is one row of tokens. A prompt that several of its rollouts share stands there once, as a segment that they see whole;
positions, images and targets are those of an unpacked run. How samples are cut into packs changes memory and speed, never the
gradient (the denominators are global).

Shape letters: N tokens of a pack, S segments, T sampled tokens of the pack (the ones that carry loss).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metis_fast.errors import DataError
from metis_fast.model import rope_positions
from metis_fast.types import ImageBlob, ImageSpan, Rollout, Score
from metis_kernels.prefix_attention.segments import Segments


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A rollout on its way into the loss.

    old_logp, anchor: [tokens] float32, log-probability and log-sum-exp under the proximal policy; None where that is the
    current one (first mini-batch of a step).
    """

    rollout: Rollout
    score: Score
    old_logp: np.ndarray | None = None
    ref_logp: np.ndarray | None = None
    anchor: np.ndarray | None = None

    @property
    def num_response(self) -> int:
        """Tokens behind the prompt, observations included."""
        return len(self.rollout.tokens) - self.rollout.prompt_len


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

    tokens_N, positions_3N: the model's input. images: each distinct image once; image_order: for every placeholder span in
    order of the tokens, which of `images` it shows. segments: what sees what. select_T: row of the hidden state that predicts
    each sampled token (the last of the prompt for the first token of every rollout); targets_T: that token; sample_T: which
    sample it belongs to. The other [T] tensors repeat or gather the samples' numbers.
    num_shared: tokens that stand here once instead of once a rollout.
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
    engine_logp_T: Tensor
    old_logp_T: Tensor | None
    ref_logp_T: Tensor | None
    anchor_T: Tensor | None
    adv_acc_T: Tensor
    adv_tool_T: Tensor
    num_shared: int


def families(samples: Sequence[Sample], share_prompt: bool) -> list[Family]:
    """Samples by prompt, in the order in which prompts first appear; one family a sample if nothing is to be shared."""
    if not share_prompt:
        return [Family((sample,)) for sample in samples]
    by_prompt: dict[tuple[bytes, tuple[ImageSpan, ...]], list[Sample]] = {}
    for sample in samples:
        rollout = sample.rollout
        spans = tuple(span for span in rollout.image_spans if span.start < rollout.prompt_len)
        by_prompt.setdefault((rollout.tokens[: rollout.prompt_len].tobytes(), spans), []).append(sample)
    return [Family(tuple(members)) for members in by_prompt.values()]


def cut(family: Family, budget: int) -> list[Family]:
    """The family in as few parts as first-fit decreasing finds, each of at most `budget` tokens; every part repeats the prompt.

    Raises:
        DataError: a sample does not fit alone.
    """
    if family.num_tokens <= budget:
        return [family]
    parts: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(family.samples, key=lambda s: (-s.num_response, s.rollout.index)):
        if family.prompt_len + sample.num_response > budget:
            rollout = sample.rollout
            raise DataError(
                f"rollout {rollout.prompt_uid}#{rollout.index} has {len(rollout.tokens)} tokens, more than the "
                f"{budget} of a pack; raise train.tokens_per_micro_batch or lower rollout.max_response_tokens"
            )
        at = next((i for i, left in enumerate(room) if sample.num_response <= left), None)
        if at is None:
            at = len(parts)
            parts.append([])
            room.append(budget - family.prompt_len)
        parts[at].append(sample)
        room[at] -= sample.num_response
    return [Family(tuple(sorted(part, key=lambda s: s.rollout.index))) for part in parts]


def split(samples: Sequence[Sample], budget: int, share_prompt: bool) -> list[list[Family]]:
    """Samples into packs of at most `budget` tokens, by first-fit decreasing. Deterministic.

    Raises:
        DataError: a sample does not fit into a pack alone; it is named.
    """
    parts = [part for family in families(samples, share_prompt) for part in cut(family, budget)]
    order = sorted(range(len(parts)), key=lambda i: (-parts[i].num_tokens, i))
    packs: list[list[Family]] = []
    room: list[int] = []
    for i in order:
        at = next((k for k, left in enumerate(room) if parts[i].num_tokens <= left), None)
        if at is None:
            at = len(packs)
            packs.append([])
            room.append(budget)
        packs[at].append(parts[i])
        room[at] -= parts[i].num_tokens
    return packs


@dataclass(frozen=True, slots=True)
class CostModel:
    """Predicted FLOPs of a pass: what packs are balanced by over data-parallel ranks.

    dense: of a token in the decoder's matrices. pair: of a visible (query, key) pair over all layers and heads. patch: of an
    image patch in the vision tower, attention within the image aside.
    """

    dense: float
    pair: float
    patch: float

    def of(self, pack: Sequence[Family]) -> float:
        """FLOPs of a pack, distinct images counted once."""
        total = 0.0
        images: dict[str, int] = {}
        for family in pack:
            prompt = family.prompt_len
            total += self.dense * family.num_tokens + self.pair * prompt * (prompt + 1) / 2
            for sample in family.samples:
                response = sample.num_response
                total += self.pair * (prompt * response + response * (response + 1) / 2)
                for span in sample.rollout.image_spans:
                    images[span.sha256] = int(np.prod(span.grid))
        return total + self.patch * sum(images.values())


def balance(packs: Sequence[Sequence[Family]], num_ranks: int, cost: CostModel) -> list[list[int]]:
    """Which packs each rank runs: the costliest first, each to the rank with the least so far. Deterministic."""
    costs = [cost.of(pack) for pack in packs]
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for i in sorted(range(len(packs)), key=lambda i: (-costs[i], i)):
        total, rank = heapq.heappop(heap)
        ranks[rank].append(i)
        heapq.heappush(heap, (total + costs[i], rank))
    return ranks


class _Builder:
    """A pack while it is filled, segment by segment."""

    def __init__(self, merge: int) -> None:
        self._merge = merge
        self.tokens: list[npt.NDArray[np.int64]] = []
        self.positions: list[npt.NDArray[np.int64]] = []
        self.offsets, self.prefix = [0], list[int]()
        self.images: dict[str, tuple[int, ImageBlob]] = {}
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
                index, _ = self.images.setdefault(span.sha256, (len(self.images), by_hash[span.sha256]))
                self.order.append(index)
        self.offsets.append(self.offsets[-1] + stop - start)
        self.prefix.append(prefix)
        return len(self.prefix) - 1

    def add(self, family: Family) -> None:
        """The prompt, then its rollouts. One rollout alone is one segment: nothing is shared."""
        prompt_len = family.prompt_len
        shared = len(family.samples) > 1
        prompt = self._segment(family.samples[0].rollout, 0, prompt_len, -1) if shared else -1
        for sample in family.samples:
            rollout = sample.rollout
            where = np.flatnonzero(rollout.sampled)
            start = self.offsets[-1]
            self._segment(rollout, prompt_len if shared else 0, len(rollout.tokens), prompt)
            if shared:
                # the first response token is predicted by the last token of the prompt, which stands elsewhere
                before = np.where(where == prompt_len, self.offsets[prompt + 1] - 1, start + where - 1 - prompt_len)
            else:
                before = start + where - 1
            self.select.append(before)
            self.where.append(where)


def build(pack: Sequence[Family], merge: int) -> Pack:
    """The tensors of a pack. merge: the vision tower's spatial merge size."""
    builder = _Builder(merge)
    for family in pack:
        builder.add(family)
    samples = tuple(sample for family in pack for sample in family.samples)
    where = builder.where

    def gather(values: Sequence[np.ndarray | None]) -> Tensor | None:
        if any(value is None for value in values):
            return None
        return torch.from_numpy(np.concatenate([v[w] for v, w in zip(values, where, strict=True) if v is not None]))

    sample_T = torch.from_numpy(np.repeat(np.arange(len(samples)), [len(w) for w in where]))
    engine_logp = gather([sample.rollout.logp for sample in samples])
    targets = gather([sample.rollout.tokens for sample in samples])
    assert engine_logp is not None and targets is not None
    unshared = sum(len(sample.rollout.tokens) for sample in samples)
    return Pack(
        samples=samples,
        tokens_N=torch.from_numpy(np.concatenate(builder.tokens)),
        positions_3N=torch.from_numpy(np.concatenate(builder.positions, axis=1)),
        segments=Segments(tuple(builder.offsets), tuple(builder.prefix)),
        images=tuple(image for _, image in builder.images.values()),
        image_order=tuple(builder.order),
        select_T=torch.from_numpy(np.concatenate(builder.select)),
        targets_T=targets.long(),
        sample_T=sample_T,
        engine_logp_T=engine_logp,
        old_logp_T=gather([sample.old_logp for sample in samples]),
        ref_logp_T=gather([sample.ref_logp for sample in samples]),
        anchor_T=gather([sample.anchor for sample in samples]),
        adv_acc_T=torch.tensor([sample.score.adv_acc for sample in samples])[sample_T],
        adv_tool_T=torch.tensor([sample.score.adv_tool for sample in samples])[sample_T],
        num_shared=unshared - builder.offsets[-1],
    )
