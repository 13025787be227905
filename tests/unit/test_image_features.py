"""The vision tower's features, image by image, whichever way transformers hands them out."""

from __future__ import annotations

import pytest
import torch
import transformers

from metis_fast.model import ImagePreparer


@pytest.mark.parametrize("joined", [False, True], ids=["by image (5.18)", "in one tensor (5.17)"])
def test_features_of_each_image_come_apart(policy, picture, monkeypatch, joined):
    images = [picture(1, 96, 32), picture(0)]  # in the order of their grids, as they go in
    inner = policy.model.model
    encode = inner.get_image_features

    def handed_out(pixels, grid, **known):
        out = encode(pixels, grid, **known)
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


def test_images_of_all_sizes_are_encoded_as_transformers_own_loop_does(policy, tiny_folder, picture):
    images = [picture(0), picture(1, 96, 32), picture(2), picture(3, 32, 96), picture(4, 96, 32), picture(5)]
    plain = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tiny_folder, attn_implementation="eager")
    plain = plain.to(policy.model.dtype).model.visual
    ours = policy.model.model.visual
    patches = [policy.images(image) for image in images]
    noise = [torch.randn(policy.images.num_tokens(image), policy.text.hidden_size) for image in images]
    features = policy.encode_images(images)
    theirs = plain(torch.cat([p.pixels for p in patches]), torch.tensor([p.grid for p in patches]))
    torch.testing.assert_close(torch.cat(features.embeds), theirs.pooler_output)
    for ours_layer, layer in zip(features.deepstack, theirs.deepstack_features, strict=True):
        torch.testing.assert_close(torch.cat(ours_layer), layer)
    sums = [(torch.cat(noise) * one).sum() for one in (torch.cat(features.embeds), theirs.pooler_output)]
    weights = [tower.blocks[0].attn.qkv.weight for tower in (ours, plain)]
    torch.testing.assert_close(*(torch.autograd.grad(s, [w])[0] for s, w in zip(sums, weights, strict=True)))


def test_images_used_last_are_kept_in_so_many_bytes(policy, picture):
    images = [picture(i) for i in range(4)]
    size = policy.images(images[0]).pixels.nbytes
    prepare = ImagePreparer(policy.images._processor, cache_bytes=2 * size)
    first = [prepare(image) for image in images[:2]]
    assert prepare(images[0]) is first[0] and prepare(images[1]) is first[1]
    prepare(images[0])
    prepare(images[2])  # in place of 1, which was used longest ago
    assert prepare(images[0]) is first[0]
    assert prepare(images[1]) is not first[1]
    alone = ImagePreparer(policy.images._processor, cache_bytes=0)
    assert alone(images[0]) is alone(images[0])  # the last one is always there
