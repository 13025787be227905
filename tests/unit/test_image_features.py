"""The vision tower's features, image by image, whichever way transformers hands them out."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("joined", [False, True], ids=["by image (5.18)", "in one tensor (5.17)"])
def test_features_of_each_image_come_apart(policy, picture, monkeypatch, joined):
    images = [picture(0), picture(1, 96, 32)]
    inner = policy.model.model
    encode = inner.get_image_features

    def handed_out(pixels, grid):
        out = encode(pixels, grid)
        layers = [layer if isinstance(layer, torch.Tensor) else torch.cat(tuple(layer)) for layer in out.deepstack_features]
        if not joined:
            layers = [layer.split([policy.images.num_tokens(image) for image in images]) for layer in layers]
        out.deepstack_features = layers
        return out

    with torch.no_grad():
        alone = [policy.encode_images([image]) for image in images]
        monkeypatch.setattr(inner, "get_image_features", handed_out)
        both = policy.encode_images(images)
    for i, one in enumerate(alone):
        torch.testing.assert_close(both.embeds[i], one.embeds[0])
        for layer, single in zip(both.deepstack, one.deepstack, strict=True):
            torch.testing.assert_close(layer[i], single[0])
