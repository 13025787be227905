"""The vision tower in passes: features and gradients are those of one pass, and of float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metis_fast.model import Policy
from metis_fast.tower import ImageFeatures, TowerCost, cut, encode

COST = TowerCost(waiting=100, again=20, working=10)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(0, 10_000), st.booleans())
def test_passes_hold_every_image_once_and_no_more_than_fits(patches: list[int], room: int, trained: bool) -> None:
    plan = cut(patches, COST, room, trained)
    assert [i for part in plan.passes for i in part] == list(range(len(patches)))
    each = COST.working if not trained else COST.again if plan.blocks_again else COST.waiting
    for part in plan.passes:
        assert len(part) == 1 or sum(patches[i] for i in part) * each <= room
    assert not (plan.blocks_again and sum(patches) * COST.waiting <= room)
    if trained and len(plan.passes) > 1:  # computed again in any case: its blocks only where one image needs it
        assert plan.blocks_again == (max(patches) * COST.waiting > room)


def _gradients(policy: Policy, features: ImageFeatures) -> dict[str, torch.Tensor]:
    outputs = [*features.embeds, *(part for layer in features.deepstack for part in layer)]
    generator = torch.Generator().manual_seed(0)
    total = sum((one * torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one.dtype)).sum() for one in outputs)
    assert isinstance(total, torch.Tensor)
    visual: Any = policy.model.model.visual
    named = dict(visual.named_parameters())
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


@pytest.mark.parametrize("room", ["plenty", "blocks again", "a pass an image", "passes", "blocks of a pass again"])
def test_how_the_tower_is_cut_changes_no_feature_and_no_gradient(
    load_tiny: Any, picture: Callable[..., Any], room: str
) -> None:
    policy = load_tiny(dtype="float32")
    images = [picture(0), picture(1, 96, 32), picture(2), picture(3, 32, 96)]
    pictures = policy.images.pictures(images)
    visual = policy.model.model.visual
    cost = TowerCost.of(visual.config, 4)
    total = sum(one.grid[1] * one.grid[2] for one in pictures)
    largest = max(one.grid[1] * one.grid[2] for one in pictures)
    most = {
        "plenty": total * cost.waiting,
        "blocks again": total * cost.again,
        "passes": largest * cost.waiting,
        "a pass an image": largest * cost.again,
        "blocks of a pass again": 1,
    }[room]
    runs = []
    hook = visual.register_forward_hook(lambda *_: runs.append(1))
    features = encode(visual, policy.images, pictures, most)
    assert (len(runs) > 1) == (room not in ("plenty", "blocks again"))
    gradients = _gradients(policy, features)
    hook.remove()
    assert not visual.training and not visual.blocks[0].gradient_checkpointing  # as it was
    wide = load_tiny(dtype="float32")
    wide.model.model.visual.double()
    exact = encode(wide.model.model.visual, wide.images, pictures, None)
    for one, expected in zip(features.embeds, exact.embeds, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-4, atol=1e-5)
    for name, expected in _gradients(wide, exact).items():
        torch.testing.assert_close(
            gradients[name].double(), expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
