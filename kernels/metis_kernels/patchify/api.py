"""`patchify`: a resized image to the rows of pixels that a Qwen-VL vision tower takes.

Shape letters: h, w patches of a column and of a row of the image, C colours, T frames of a patch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metis_kernels import _check
from metis_kernels._impl import Impl, choose

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COLOURS = 3
LEVELS = 256
"""Values of a uint8."""


def patchify(
    image_HWC: Tensor,
    *,
    patch: int,
    temporal: int,
    merge: int,
    mean: Sequence[float],
    std: Sequence[float],
    rescale: float,
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> Tensor:
    """(image x rescale - mean) / std in patches: the `pixel_values` of transformers' Qwen2VLImageProcessorPil, bit for bit.

    Patches come in blocks of merge x merge, row by row, and row by row inside a block; a row of the result is [C, T, patch,
    patch], the same pixels in each of the T frames.

    A byte has 256 values, so there are 256 results a colour: a table of them is made once, on the CPU, by the operations of
    that image processor, and all that is done here is to look up and to move.

    Args:
        image_HWC: uint8 [height, width, 3]; both are multiples of patch x merge. No gradient.
        patch: pixels of a patch's side.
        temporal: T, frames of a patch, all of them this image.
        merge: patches of the side of a block, which the tower makes one token of.
        mean, std: of each colour; std > 0.
        rescale: what a byte is multiplied by before, 1 / 255 as a rule; > 0.
        dtype: float32, bfloat16 or float16; the narrow ones are float32, rounded.
        impl: see `metis_kernels`.

    Returns:
        [h w, 3 T patch patch] in `dtype`.

    Raises:
        ValueError: a shape, dtype, device or option is not as stated, or `impl` cannot run here.
    """
    for name, number in (("patch", patch), ("temporal", temporal), ("merge", merge)):
        _check.at_least(name, number, 1, whole=True)
    _check.tensor("image_HWC", image_HWC, (None, None, COLOURS), (torch.uint8,), axes="[height, width, 3]")
    height, width, _ = image_HWC.shape
    if height % (patch * merge) or width % (patch * merge):
        unit = f"patch x merge = {patch * merge}"
        raise ValueError(f"image_HWC: expected height and width that are multiples of {unit}, got {height} x {width}")
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != COLOURS:
            raise ValueError(f"{name}: expected a number for each of {COLOURS} colours, got {len(numbers)}")
    for number in mean:
        _check.at_least("mean", number, -math.inf)
    for name, number in (*(("std", number) for number in std), ("rescale", rescale)):
        _check.at_least(name, number, 0, strictly=True)
    if dtype not in FLOATS:
        names = " or ".join(str(one).removeprefix("torch.") for one in FLOATS)
        raise ValueError(f"dtype: expected {names}, got {str(dtype).removeprefix('torch.')}")
    chosen = choose(impl, image_HWC.device, torch.float32)  # numbers are moved, not computed with: all take every dtype
    return torch.ops.metis_kernels.patchify(
        image_HWC, patch, temporal, merge, [float(x) for x in mean], [float(x) for x in std], float(rescale), dtype, chosen
    )


@functools.lru_cache(maxsize=16)
def table_of(
    mean: tuple[float, ...], std: tuple[float, ...], rescale: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[C, 256]: what each byte becomes. The image processor multiplies in float64, rounds to float32 and goes on in that."""
    scaled = (torch.arange(LEVELS, dtype=torch.float64) * rescale).float()
    shift, spread = (torch.tensor(numbers, dtype=torch.float32)[:, None] for numbers in (mean, std))
    return ((scaled - shift) / spread).to(dtype).contiguous().to(device)


@torch.library.custom_op("metis_kernels::patchify", mutates_args=())
def _patchify(
    image: Tensor,
    patch: int,
    temporal: int,
    merge: int,
    mean: list[float],
    std: list[float],
    rescale: float,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    table = table_of(tuple(mean), tuple(std), rescale, dtype, image.device)
    # the local imports keep triton and the C++ library out of processes that do not use them
    if impl == "triton":
        from metis_kernels.patchify import triton

        return triton.patchify(image, table, patch, temporal, merge)
    if impl == "cpu":
        from metis_kernels.patchify import cpu

        return cpu.patchify(image, table, patch, temporal, merge)
    from metis_kernels.patchify import reference

    return reference.patchify(image, table, patch, temporal, merge)


@_patchify.register_fake
def _(
    image: Tensor,
    patch: int,
    temporal: int,
    merge: int,
    mean: list[float],
    std: list[float],
    rescale: float,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    height, width, _ = image.shape
    num_patches = (height // patch) * (width // patch)
    return image.new_empty((num_patches, COLOURS * temporal * patch * patch), dtype=dtype)
