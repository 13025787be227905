"""Images on their way to the vision tower: tokens from the header, pixels in threads and once, patches as transformers' own."""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pictures import MODES, TRANSPARENT, WIDE, encoded, turned
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metis_fast.pictures import ImagePreparer, Picture
from metis_fast.pixels import ImageError, decode
from metis_fast.types import ImageBlob

PIXELS = {"shortest_edge": 64 * 64, "longest_edge": 512 * 512}
MEAN_OF_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def processor(**changes: object) -> Qwen2VLImageProcessorPil:
    """With Qwen3-VL's patches, and limits that keep images small."""
    known = {"patch_size": 16, "size": PIXELS, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen2VLImageProcessorPil(**{**known, **changes})  # pyright: ignore[reportArgumentType]


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def assert_same(prepare: ImagePreparer, own: Qwen2VLImageProcessorPil, data: bytes) -> None:
    blob = ImageBlob.of(data)
    theirs = own([decode(data)], return_tensors="pt")
    ours = prepare(blob)
    assert torch.equal(ours.pixels, theirs["pixel_values"])
    assert list(ours.grid) == theirs["image_grid_thw"][0].tolist() == list(prepare.grid(blob))
    narrow = prepare.patches([prepare.picture(blob)], torch.device("cpu"), torch.bfloat16)
    assert torch.equal(narrow, theirs["pixel_values"].bfloat16())


@pytest.mark.parametrize("settings", [{}, MEAN_OF_CLIP, {"do_normalize": False}, {"do_rescale": False}], ids=str)
def test_patches_are_those_of_transformers_for_all_sizes(settings: dict[str, object]) -> None:
    own = processor(**settings)
    prepare, random = ImagePreparer(own), np.random.default_rng(0)
    sizes = [(2048, 1536), (1, 1), (200, 1), (3, 590), *((int(w), int(h)) for w, h in random.integers(1, 900, (60, 2)))]
    for seed, (width, height) in enumerate(sizes if not settings else sizes[:12]):
        if max(width, height) <= 200 * min(width, height):
            assert_same(prepare, own, encoded(noise(width, height, seed), "JPEG" if seed % 2 else "PNG"))


def test_patches_are_those_of_transformers_for_all_modes_and_orientations() -> None:
    own = processor()
    prepare = ImagePreparer(own)
    files = [turned(turn, kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF") for turn in range(1, 9)]
    for data in (*files, *MODES.values(), *TRANSPARENT.values(), *WIDE.values()):
        assert_same(prepare, own, data)


def test_tokens_are_known_without_decoding() -> None:
    prepare = ImagePreparer(processor())
    whole = encoded(noise(640, 480, 0), "JPEG")
    cut = ImageBlob.of(whole[: len(whole) // 2])
    assert prepare.grid(cut) == prepare.grid(ImageBlob.of(whole))
    with pytest.raises(ImageError, match="image cannot be decoded: image file is truncated"):
        prepare.picture(cut)
    good = ImageBlob.of(whole)
    problems = prepare.broken([good, cut, good])
    assert list(problems) == [cut.sha256] and "truncated" in problems[cut.sha256]
    assert asyncio.run(prepare.ready([good, cut])) == problems


LIMITS = {"shortest_edge": 65536, "longest_edge": 16777216}
"""Qwen3-VL's."""


def test_images_that_have_too_many_tokens_are_scaled_down_and_no_others() -> None:
    prepare = ImagePreparer(processor(size=LIMITS))
    large = [ImageBlob.of(encoded(noise(40, 30, seed).resize((4000, 3000)), "JPEG")) for seed in range(3)]
    crop = ImageBlob.of(encoded(noise(800, 600, 9), "PNG"))
    assert prepare.num_tokens(large[0]) > 8192

    (alone,) = asyncio.run(prepare.scaled(large[:1], 8000))
    assert 7600 < prepare.num_tokens(alone) <= 8000
    width, height = decode(alone.data).size
    assert abs(width / height - 4 / 3) < 0.03

    together = asyncio.run(prepare.scaled([large[0], crop, *large[1:]], 8000))
    assert together[1] is crop
    share = (8000 - prepare.num_tokens(crop)) // 3
    assert all(0.94 * share < prepare.num_tokens(together[i]) <= share for i in (0, 2, 3))

    assert asyncio.run(prepare.scaled([large[0], crop], 20_000)) == (large[0], crop)
    assert asyncio.run(prepare.scaled([crop], 100)) == (crop,)  # nothing that the model takes is so small
    assert asyncio.run(prepare.scaled([crop], -5)) == (crop,)
    damaged = ImageBlob.of(large[0].data[:5000])
    assert asyncio.run(prepare.scaled([damaged], 8000)) == (damaged,)
    assert asyncio.run(ImagePreparer(None).scaled([crop], 8000)) == (crop,)


def test_a_large_photo_is_kept_as_bytes() -> None:
    own = processor(size=LIMITS)
    prepare = ImagePreparer(own)
    photo = ImageBlob.of(encoded(noise(96, 54, 0).resize((3840, 2160)), "JPEG"))
    picture = prepare.picture(photo)
    assert (
        picture.pixels.dtype == torch.uint8 and picture.pixels.nbytes == 3840 * 2176 * 3 and prepare.picture(photo) is picture
    )


def test_an_image_that_several_ask_for_is_made_once() -> None:
    prepare = ImagePreparer(processor())
    images = [ImageBlob.of(encoded(noise(500, 400, seed), "PNG")) for seed in range(3)]
    with ThreadPoolExecutor(8) as pool:
        made: list[Picture] = list(pool.map(prepare.picture, images * 8))
    assert len({id(one) for one in made}) == 3
    assert [id(one) for one in prepare.pictures(images)] == [id(one) for one in made[:3]]


def test_images_used_last_are_kept_in_so_many_bytes() -> None:
    images = [ImageBlob.of(encoded(noise(128, 128, seed), "PNG")) for seed in range(4)]
    prepare = ImagePreparer(processor(), cache_bytes=2 * 128 * 128 * 3).picture
    first = [prepare(image) for image in images[:2]]
    assert prepare(images[0]) is first[0] and prepare(images[1]) is first[1]
    prepare(images[0])
    prepare(images[2])  # in place of 1, which was used longest ago
    assert prepare(images[0]) is first[0]
    assert prepare(images[1]) is not first[1]
    alone = ImagePreparer(processor(), cache_bytes=0).picture
    assert alone(images[0]) is alone(images[0])  # the last one is always there


@pytest.mark.parametrize(
    ("settings", "size", "said"),
    [
        ({}, (2010, 10), "image cannot be resized: absolute aspect ratio"),
        ({"do_resize": False}, (100, 64), "100 x 64 pixels: the processor does not resize, and takes multiples of 32"),
    ],
)
def test_what_the_processor_cannot_take_is_said(settings: dict[str, object], size: tuple[int, int], said: str) -> None:
    with pytest.raises(ImageError, match=said):
        ImagePreparer(processor(**settings)).grid(ImageBlob.of(encoded(noise(*size, 0), "PNG")))


def test_a_processor_that_does_not_resize_takes_what_fits() -> None:
    own = processor(do_resize=False)
    assert_same(ImagePreparer(own), own, encoded(noise(96, 64, 0), "PNG"))


def test_a_model_that_reads_text_only_says_so() -> None:
    with pytest.raises(ImageError, match="reads text only"):
        ImagePreparer(None).grid(ImageBlob.of(encoded(noise(96, 64, 0), "PNG")))


def test_what_is_no_image_is_said() -> None:
    with pytest.raises(ImageError, match="image cannot be decoded: cannot identify image file"):
        ImagePreparer(processor()).grid(ImageBlob.of(io.BytesIO(b"GIF90").getvalue()))
