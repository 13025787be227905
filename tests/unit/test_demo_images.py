"""The weave of a panel is invisible in the halved image, by the real image processor, and visible in a crop."""

import random
from io import BytesIO
from itertools import product

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metis_fast.demo.images import COLORS, FABRICS, MAX_JITTER, PANEL_BOXES, PLAIN, png, render

PROCESSOR = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size={"shortest_edge": 4096, "longest_edge": 4096})


def view(image):
    """Pixel values [patches, values] as the model gets them."""
    return PROCESSOR(images=[Image.fromarray(image)], return_tensors="np")["pixel_values"]


def draw(rng: random.Random):
    return rng.choices(list(COLORS), k=4), [rng.randint(-MAX_JITTER, MAX_JITTER) for _ in range(4)]


@pytest.mark.parametrize("fabric", FABRICS)
def test_the_processor_makes_a_weave_equal_to_plain_cloth(fabric: str) -> None:
    """Every pixel, those next to image, panel and weave borders included, to the last bit: no level of rounding is left."""
    rng = random.Random(fabric)
    for _ in range(8):
        colors, jitter = draw(rng)
        others = rng.choices([*FABRICS, PLAIN], k=3)
        woven, plain = render(colors, [fabric, *others], jitter), render(colors, [PLAIN] * 4, jitter)
        assert (woven != plain).any()
        np.testing.assert_array_equal(view(woven), view(plain))


def test_before_rounding_a_weave_is_below_a_sixth_of_a_grey_level() -> None:
    rng = random.Random(1)
    for fabrics in (FABRICS[:4], FABRICS[4:8], FABRICS[5:]):
        colors, jitter = draw(rng)
        halves = [
            np.asarray(Image.fromarray(render(colors, cloth, jitter)[..., 0].astype(np.float32)).resize((64, 64)))
            for cloth in (fabrics, [PLAIN] * 4)
        ]
        assert np.abs(halves[0] - halves[1]).max() < 1 / 6


def test_a_crop_is_seen_at_full_size_and_tells_every_two_fabrics_apart_in_each_patch() -> None:
    crops = {}
    for fabric in (*FABRICS, PLAIN):
        image = render(["cyan"] * 4, [fabric] * 4, [0] * 4)
        seen = [view(image[top:bottom, left:right]) for left, top, right, bottom in PANEL_BOXES]
        assert all((one == seen[0]).all() for one in seen)  # the place of a panel does not change its weave
        assert seen[0].shape[0] == 64  # 8 x 8 patches of 8 pixels: nothing was scaled
        crops[fabric] = image[:64, :64, 0].astype(int) - image[0, 0, 0]
    # Away from the frame and the bent ends every aligned 8 x 8 patch separates them, by orthogonality.
    patches = {name: crop[24:32, 24:32].ravel() for name, crop in crops.items() if name != PLAIN}
    for first, second in product(patches, repeat=2):
        cosine = patches[first] @ patches[second] / np.linalg.norm(patches[first]) / np.linalg.norm(patches[second])
        assert cosine == pytest.approx(float(first == second), abs=0.02)
    assert not crops[PLAIN].any()


def test_no_pixel_comes_near_clipping() -> None:
    extremes = [
        render([color] * 4, cloth, [jitter] * 4)
        for color in COLORS
        for cloth in (FABRICS[:4], FABRICS[4:8], FABRICS[5:])
        for jitter in (-MAX_JITTER, MAX_JITTER)
    ]
    assert min(image.min() for image in extremes) > 0
    assert max(image.max() for image in extremes) < 255


def test_colors_are_clearly_apart_in_spite_of_jitter() -> None:
    values = {name: np.array(value) for name, value in COLORS.items()}
    distances = [np.abs(values[a] - values[b]).max() for a, b in product(values, repeat=2) if a < b]
    assert min(distances) > 6 * MAX_JITTER


def test_a_png_holds_the_pixels_and_stays_small() -> None:
    rng = random.Random(2)
    colors, jitter = draw(rng)
    image = render(colors, FABRICS[:4], jitter)
    data = png(image)
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(data))), image)
    assert len(data) < 2000
