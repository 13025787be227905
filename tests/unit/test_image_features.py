"""The vision tower's features, image by image, whichever way transformers hands them out."""

from __future__ import annotations

import torch
import transformers


def test_features_of_each_image_come_apart(policy, picture):
    images = [picture(1, 96, 32), picture(0), picture(2, 96, 32)]  # run in another order, by their sizes
    with torch.no_grad():
        alone = [policy.encode_images([image]) for image in images]
        together = policy.encode_images(images)
    for i, one in enumerate(alone):
        torch.testing.assert_close(together.embeds[i], one.embeds[0])
        for layer, single in zip(together.deepstack, one.deepstack, strict=True):
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
