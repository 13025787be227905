"""The vision tower over several images, in passes that fit a share of memory. How they are cut changes no gradient.

An image of 2048 x 1536 pixels is 12,288 patches, which leave 14 GB for the backward pass in the tower of the 8B model (depth
27, bfloat16). So a trained tower computes its blocks again in the backward pass where all images of a pass together would take
more than the share; and where that is too much still, the images run in several passes, each computed again by itself. An
image is never cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from metis_fast.machine import memory_bytes
from metis_fast.pictures import ImagePreparer, Picture

SHARE = 8
"""The tower's activations may take the 8th part of a device's memory, by default."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageFeatures:
    """Vision tower output for several images: `embeds[i]` [n_i, H], and one such list per deepstack layer."""

    embeds: tuple[Tensor, ...]
    deepstack: tuple[tuple[Tensor, ...], ...]

    def take(self, order: Sequence[int]) -> ImageFeatures:
        """The features of images `order` (repeats allowed)."""
        return ImageFeatures(
            tuple(self.embeds[i] for i in order), tuple(tuple(layer[i] for i in order) for layer in self.deepstack)
        )

    @staticmethod
    def join(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Of several passes, one after the other."""
        if len(parts) == 1:
            return parts[0]
        embeds = tuple(embed for part in parts for embed in part.embeds)
        layers = range(len(parts[0].deepstack))
        return ImageFeatures(embeds, tuple(tuple(one for part in parts for one in part.deepstack[i]) for i in layers))


@dataclass(frozen=True, slots=True)
class TowerCost:
    """Bytes a patch. waiting: what a trained tower keeps for its backward pass; again: the same where blocks are computed
    again, with the one that is; working: a pass without gradient."""

    waiting: int
    again: int
    working: int

    @staticmethod
    def of(vision: Qwen3VLVisionConfig, element: int) -> TowerCost:
        """By the shape of the tower; element: bytes of an activation. See docs/plan.md."""
        hidden, mlp, depth = vision.hidden_size, vision.intermediate_size, vision.depth
        block = (11 * hidden + 2 * mlp) * element + 16
        return TowerCost(depth * block, depth * hidden * element + block, (5 * hidden + 2 * mlp) * element)


@dataclass(frozen=True, slots=True)
class Cut:
    """Which images go through the tower together, and whether their blocks are computed again in the backward pass."""

    passes: tuple[tuple[int, ...], ...]
    blocks_again: bool


def cut(patches: Sequence[int], cost: TowerCost, room: int, trained: bool) -> Cut:
    """Images of so many patches into passes.

    room: bytes that their activations may take; what is larger alone is a pass of its own. trained: whether there is a backward
    pass.
    """
    total, every = sum(patches), (tuple(range(len(patches))),)
    if not trained:
        return Cut(every if total * cost.working <= room else _fill(patches, room // cost.working), False)
    if total * cost.waiting <= room:
        return Cut(every, False)
    if total * cost.again <= room:
        return Cut(every, True)
    alone = max(patches) * cost.waiting <= room  # computing a pass again is enough, then
    return Cut(_fill(patches, room // (cost.waiting if alone else cost.again)), not alone)


def _fill(patches: Sequence[int], most: int) -> tuple[tuple[int, ...], ...]:
    passes: list[list[int]] = []
    size = 0
    for i, num in enumerate(patches):
        if not passes or size + num > most:
            passes.append([])
            size = 0
        passes[-1].append(i)
        size += num
    return tuple(map(tuple, passes))


def default_room(device: torch.device) -> int:
    """An eighth of the device's memory, or of what this process may use of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // SHARE
    return memory_bytes() // SHARE


def encode(visual: Qwen3VLVisionModel, prepare: ImagePreparer, pictures: Sequence[Picture], room: int | None) -> ImageFeatures:
    """Features of some images, each of them run once.

    room: bytes that activations may take (see `cut`); None runs them in one pass in any case, for towers whose weights are
    split over ranks, which gather them together.
    """
    order = sorted(range(len(pictures)), key=lambda i: pictures[i].grid)  # images of a size are one batch for attention
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in visual.parameters())
    plan = Cut((tuple(range(len(order))),), False)
    if room is not None:
        sizes = [int(np.prod(pictures[i].grid)) for i in order]
        plan = cut(sizes, TowerCost.of(visual.config, visual.dtype.itemsize), room, trained)
    parts: list[ImageFeatures] = []
    for part in plan.passes:
        run = partial(_run, visual, prepare, [pictures[order[i]] for i in part], plan.blocks_again)
        # of several passes, only one has activations at a time
        features = checkpoint(run, use_reentrant=False) if trained and len(plan.passes) > 1 else run()
        assert isinstance(features, ImageFeatures)
        parts.append(features)
    return ImageFeatures.join(parts).take(np.argsort(order).tolist())


@contextmanager
def _blocks_again(visual: Qwen3VLVisionModel, wanted: bool) -> Iterator[None]:
    """Blocks are computed again in the backward pass (transformers' own switch), unless they are so by a setting already."""
    if not wanted or visual.blocks[0].gradient_checkpointing:
        yield
        return
    was_training = visual.training
    visual.gradient_checkpointing_enable({"use_reentrant": False})
    visual.train()
    try:
        yield
    finally:
        visual.gradient_checkpointing_disable()
        visual.train(was_training)


def _run(visual: Qwen3VLVisionModel, prepare: ImagePreparer, pictures: Sequence[Picture], blocks_again: bool) -> ImageFeatures:
    """One pass; neighbours of one size are one batch for attention."""
    device, merge = visual.device, visual.spatial_merge_size
    grids = [picture.grid for picture in pictures]
    patches = prepare.patches(pictures, device, visual.dtype)
    with _blocks_again(visual, blocks_again):  # in here, so that a pass that is run again does the same
        out = visual(
            patches,
            grid_thw=torch.tensor(grids, device=device),
            return_dict=True,
            cu_seqlens=torch.tensor([0, len(patches)], dtype=torch.int32),  # see `attention`
            frames=tuple(h * w for t, h, w in grids for _ in range(t)),
        )
    sizes = [t * h * w // merge**2 for t, h, w in grids]
    return ImageFeatures(out.pooler_output.split(sizes), tuple(layer.split(sizes) for layer in out.deepstack_features))
