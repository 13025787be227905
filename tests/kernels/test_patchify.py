"""Patches of an image against transformers' image processor, bit for bit.

Shape letters: C colours, T frames of a patch.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from contract.cases import IMPLS, Chosen
from torch import Tensor

import metis_fast  # noqa: F401  makes transformers importable where only a part of it can be
from metis_kernels import Impl, patchify
from metis_kernels.inspect.sanitizer import sanitize
from metis_kernels.inspect.tally import tally
from metis_kernels.patchify.api import table_of

transformers = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

QWEN3 = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "rescale": 1 / 255}
QWEN2 = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "rescale": 0.00392156862745098,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def picture(height: int, width: int) -> Tensor:
    draw = torch.Generator().manual_seed(height * 1009 + width)
    return torch.randint(256, (height, width, 3), generator=draw, dtype=torch.uint8)


def theirs(image: Tensor, patch: int, temporal: int, merge: int, mean: Any, std: Any, rescale: float) -> Tensor:
    """pixel_values of transformers' processor, told not to resize."""
    processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch, temporal_patch_size=temporal, merge_size=merge, image_mean=list(mean), image_std=list(std),
        rescale_factor=rescale, do_resize=False,
    )  # fmt: skip
    return processor([image.numpy()], return_tensors="pt", input_data_format="channels_last")["pixel_values"]


def sizes(num: int, unit: int, most: int) -> list[tuple[int, int]]:
    """Multiples of `unit` up to `most` pixels, the smallest one first."""
    draw = random.Random(unit)
    return [
        (unit, unit),
        *((unit * draw.randint(1, most // unit), unit * draw.randint(1, most // unit)) for _ in range(num - 1)),
    ]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """-0 is not 0 here."""
    whole = torch.int32 if one.dtype == torch.float32 else torch.int16
    return one.dtype == other.dtype and torch.equal(one.view(whole), other.view(whole))


MOST = {"cpu": 700, "reference": 700, "triton": 84}  # pixels of a side; the interpreter takes its time
MANY = [pytest.param(impl, 200, marks=pytest.mark.slow) for impl in MOST]


# patches of 14 and of 16 pixels in blocks of two are Qwen2-VL's and Qwen3-VL's
@pytest.mark.parametrize(("impl", "num"), [("cpu", 60), ("reference", 60), ("triton", 30), *MANY])
@pytest.mark.parametrize(("patch", "numbers"), [(14, QWEN2), (16, QWEN3)], ids=["qwen2", "qwen3"])
def test_random_sizes_are_those_of_the_image_processor(impl: Impl, num: int, patch: int, numbers: dict[str, Any]):
    for index, (height, width) in enumerate(sizes(num // 2, 2 * patch, MOST[impl])):
        image = picture(height, width)
        want = theirs(image, patch, 2, 2, **numbers)
        dtype = DTYPES[index % len(DTYPES)]
        got = patchify(image, patch=patch, temporal=2, merge=2, **numbers, dtype=dtype, impl=impl)
        assert got.shape == (height // patch * (width // patch), 6 * patch * patch)
        assert same_bits(got, want.to(dtype)), (height, width, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("patch", "temporal", "merge"), [(14, 2, 2), (16, 2, 2), (8, 1, 1), (3, 3, 3), (5, 1, 2), (1, 2, 1)])
def test_every_shape_of_patch_is_that_of_the_image_processor(
    impl: Chosen, dtype: torch.dtype, patch: int, temporal: int, merge: int
):
    image = picture(3 * patch * merge, 2 * patch * merge)
    want = theirs(image, patch, temporal, merge, **QWEN2).to(dtype)
    got = patchify(image, patch=patch, temporal=temporal, merge=merge, **QWEN2, dtype=dtype, impl=impl)
    assert same_bits(got, want)


@pytest.mark.parametrize("rescale", [1 / 255, 1 / 127.5, 1.0, 0.1])
def test_each_byte_becomes_what_the_image_processor_makes_of_it(rescale: float):
    image = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1).expand(-1, -1, 3).contiguous()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    want = theirs(image, 16, 1, 1, mean, std, rescale)
    table = table_of(mean, std, rescale, torch.float32, torch.device("cpu"))
    assert same_bits(table, want.reshape(3, 256))


@pytest.mark.parametrize("impl", IMPLS)
def test_an_image_is_read_where_it_is_and_none_gives_none(impl: Chosen):
    options: dict[str, Any] = {"patch": 4, "temporal": 2, "merge": 2, **QWEN3, "impl": impl}
    image = picture(16, 24)
    planes = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    window = picture(40, 48)[8:24, 16:40]
    assert torch.equal(patchify(planes, **options), patchify(image, **options))
    assert torch.equal(patchify(window, **options), patchify(window.contiguous(), **options))
    assert patchify(image[:0], **options).shape == (0, 96)


def test_the_number_of_threads_changes_nothing():
    image, threads, found = picture(224, 448), torch.get_num_threads(), []
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            found.append(patchify(image, patch=16, temporal=2, merge=2, **QWEN3, impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_triton_moves_each_byte_once_and_writes_what_is_asked_for():
    for patch, temporal, dtype in ((16, 2, torch.float32), (14, 3, torch.bfloat16)):
        image = picture(2 * patch, 4 * patch)
        with tally() as counted:
            patchify(image, patch=patch, temporal=temporal, merge=2, **QWEN3, dtype=dtype, impl="triton")
        found = counted.kernels["patchify_kernel"]
        assert (found.launches, found.store_bytes) == (1, image.numel() * temporal * dtype.itemsize)
        assert found.load_bytes == image.numel() * (1 + dtype.itemsize)  # the byte, and its number from the table


def test_triton_stays_inside_its_tensors():
    for patch in (14, 16):
        options: dict[str, Any] = {"patch": patch, "temporal": 2, "merge": 2, **QWEN3}
        image = picture(2 * patch, 4 * patch)
        with sanitize():  # raises
            patches = patchify(image, **options, impl="triton")
        assert torch.equal(patches, patchify(image, **options, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_registration_is_sound_and_it_traces(impl: Chosen):
    image = picture(8, 12)
    arguments = (image, 2, 2, 2, [0.5] * 3, [0.4] * 3, 1 / 255, torch.bfloat16, impl)
    assert set(torch.library.opcheck(torch.ops.metis_kernels.patchify.default, arguments).values()) == {"SUCCESS"}
    options: dict[str, Any] = {"patch": 2, "temporal": 2, "merge": 2, **QWEN3, "impl": impl}
    compiled = torch.compile(lambda x: patchify(x, **options) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image), patchify(image, **options) * 2)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"image_HWC": [1]}, "image_HWC: expected a tensor, got list"),
    (
        {"image_HWC": torch.zeros(8, 8, dtype=torch.uint8)},
        r"image_HWC: expected shape \[height, width, 3\] = \[any, any, 3\], got .*",
    ),
    (
        {"image_HWC": torch.zeros(3, 8, 8, dtype=torch.uint8)},
        r"image_HWC: expected shape .* = \[any, any, 3\], got \[3, 8, 8\]",
    ),
    ({"image_HWC": torch.zeros(8, 8, 3)}, "image_HWC: expected dtype uint8, got float32"),
    (
        {"image_HWC": torch.zeros(8, 10, 3, dtype=torch.uint8)},
        "image_HWC: expected height and width that are multiples of patch x merge = 4, got 8 x 10",
    ),
    ({"patch": 0}, "patch: expected a number >= 1, got 0"),
    ({"patch": 2.0}, "patch: expected an int >= 1, got 2.0"),
    ({"temporal": -1}, "temporal: expected a number >= 1, got -1"),
    ({"merge": 3}, "image_HWC: expected height and width that are multiples of patch x merge = 6, got 8 x 8"),
    ({"mean": (0.5, 0.5)}, "mean: expected a number for each of 3 colours, got 2"),
    ({"mean": (0.5, 0.5, float("nan"))}, "mean: expected a number >= -inf, got nan"),
    ({"std": (0.5, 0.0, 0.5)}, "std: expected a number > 0, got 0.0"),
    ({"std": (0.5, "a", 0.5)}, "std: expected a number > 0, got 'a'"),
    ({"rescale": float("inf")}, "rescale: expected a finite number > 0, got inf"),
    ({"dtype": torch.float64}, "dtype: expected float32 or bfloat16 or float16, got float64"),
    ({"impl": "fast"}, "impl: expected one of auto, triton, cpu, reference, got 'fast'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[f"{next(iter(change))}{i}" for i, (change, _) in enumerate(BAD)])
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str):
    good: dict[str, Any] = {"image_HWC": picture(8, 8), "patch": 2, "temporal": 2, "merge": 2, **QWEN3}
    patchify(**good)
    with pytest.raises(ValueError, match=f"^{message}$"):
        patchify(**(good | change))
