"""Scored rollouts to the tensors of one forward pass.

Rows are right-padded; causal attention never looks at padding, so it needs no mask. Micro-batches are cut by a token budget
after sorting by length; how they are cut changes memory and speed, never the gradient (the denominators are global).

Shape letters: B rows, S tokens of the longest row, T sampled tokens of the micro-batch (the ones that carry loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metis_fast.model import rope_positions
from metis_fast.types import ImageBlob, Rollout, Score


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A rollout on its way into the loss.

    old_logp: [S] float32 under the proximal policy, None where that is the current one (first mini-batch of a step).
    """

    rollout: Rollout
    score: Score
    old_logp: np.ndarray | None = None
    ref_logp: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Tensors of one pass.

    tokens_BS, positions_3BS: the model's input. images: each distinct image once; image_order: for every placeholder span
    in reading order, which of `images` it shows. select_T: flat index (row * S + column) of the hidden state that predicts
    each sampled token; targets_T: that token; row_T: its row. The other [T] tensors repeat or gather the samples' numbers.
    """

    tokens_BS: Tensor
    positions_3BS: Tensor
    images: tuple[ImageBlob, ...]
    image_order: tuple[int, ...]
    select_T: Tensor
    targets_T: Tensor
    row_T: Tensor
    engine_logp_T: Tensor
    old_logp_T: Tensor | None
    ref_logp_T: Tensor | None
    adv_acc_T: Tensor
    adv_tool_T: Tensor
    in_tool_T: Tensor
    num_tokens: int

    @property
    def num_padding(self) -> int:
        """Padded positions that the model computes for nothing."""
        return self.tokens_BS.numel() - self.num_tokens


def split(samples: Sequence[Sample], tokens_per_micro_batch: int) -> list[list[Sample]]:
    """Cut samples into micro-batches of at most that many padded tokens (at least one sample each), longest first."""
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i].rollout.tokens), i))
    batches: list[list[Sample]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].rollout.tokens) > tokens_per_micro_batch:
            batches.append([])
        batches[-1].append(samples[i])
    return batches


def pack(samples: Sequence[Sample], merge: int) -> MicroBatch:
    """Pad samples to one micro-batch. merge: the vision tower's spatial merge size."""
    size = max(len(sample.rollout.tokens) for sample in samples)
    tokens = np.zeros((len(samples), size), np.int64)
    positions = np.zeros((3, len(samples), size), np.int64)
    images: dict[str, tuple[int, ImageBlob]] = {}
    order: list[int] = []
    where: list[np.ndarray] = []
    for row, sample in enumerate(samples):
        rollout = sample.rollout
        num = len(rollout.tokens)
        tokens[row, :num] = rollout.tokens
        positions[:, row, :num] = rope_positions(num, rollout.image_spans, merge)
        by_hash = {image.sha256: image for image in rollout.images}
        for span in rollout.image_spans:
            index, _ = images.setdefault(span.sha256, (len(images), by_hash[span.sha256]))
            order.append(index)
        where.append(np.flatnonzero(rollout.sampled))
    row_T = np.repeat(np.arange(len(samples)), [len(w) for w in where])
    where_T = np.concatenate(where)

    def gather(values: Sequence[np.ndarray | None]) -> Tensor | None:
        if any(value is None for value in values):
            return None
        return torch.from_numpy(np.concatenate([v[w] for v, w in zip(values, where, strict=True) if v is not None]))

    def repeat(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[torch.from_numpy(row_T)]

    engine_logp = gather([sample.rollout.logp for sample in samples])
    assert engine_logp is not None
    return MicroBatch(
        tokens_BS=torch.from_numpy(tokens),
        positions_3BS=torch.from_numpy(positions),
        images=tuple(image for _, image in images.values()),
        image_order=tuple(order),
        select_T=torch.from_numpy(row_T * size + where_T - 1),
        targets_T=torch.from_numpy(tokens[row_T, where_T]),
        row_T=torch.from_numpy(row_T),
        engine_logp_T=engine_logp,
        old_logp_T=gather([sample.old_logp for sample in samples]),
        ref_logp_T=gather([sample.ref_logp for sample in samples]),
        adv_acc_T=repeat([sample.score.adv_acc for sample in samples]),
        adv_tool_T=repeat([sample.score.adv_tool for sample in samples]),
        in_tool_T=repeat([float(sample.score.in_tool_denominator) for sample in samples]),
        num_tokens=sum(len(sample.rollout.tokens) for sample in samples),
    )
