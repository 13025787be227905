"""Image to patches in one launch, one program a patch.

A program reads each of its pixels once, three bytes that lie together (the three passes over them meet in the L1 cache), looks
them up in the table, which all programs keep there, and writes 3 x temporal whole runs of patch x patch numbers.

Memory traffic: 3 bytes read and 3 x temporal x size of the dtype written a pixel: 27 bytes for float32 and two frames.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis_kernels._launch import launch


@triton.jit(do_not_specialize=["columns"])
def patchify_kernel(
    image_ptr: tl.tensor,
    table_ptr: tl.tensor,
    out_ptr: tl.tensor,
    columns: int,
    PATCH: tl.constexpr,
    TEMPORAL: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program i: patch i, in the order of blocks. columns: patches of a row of the image."""
    number = tl.program_id(0)
    block, inside = number // (MERGE * MERGE), number % (MERGE * MERGE)
    blocks = columns // MERGE
    row = block // blocks * MERGE + inside // MERGE
    column = block % blocks * MERGE + inside % MERGE
    at = tl.arange(0, BLOCK)
    real = at < PATCH * PATCH
    first = (row.to(tl.int64) * PATCH * columns + column) * (3 * PATCH)
    pixel = (at // PATCH * (columns * PATCH) + at % PATCH) * 3
    to = out_ptr + number.to(tl.int64) * (3 * TEMPORAL * PATCH * PATCH) + at
    for colour in tl.static_range(3):  # pyright: ignore[reportGeneralTypeIssues]
        level = tl.load(image_ptr + first + pixel + colour, mask=real, other=0)
        value = tl.load(table_ptr + colour * 256 + level.to(tl.int32), mask=real, other=0.0)
        for frame in tl.static_range(TEMPORAL):  # pyright: ignore[reportGeneralTypeIssues]
            tl.store(to + (colour * TEMPORAL + frame) * (PATCH * PATCH), value, mask=real)


def patchify(image_HWC: Tensor, table: Tensor, patch: int, temporal: int, merge: int) -> Tensor:
    """[patches, 3 x temporal x patch x patch] of the numbers of `table` [3, 256] that the bytes of the image stand for."""
    rows, columns = image_HWC.shape[0] // patch, image_HWC.shape[1] // patch
    size = 3 * temporal * patch * patch
    out = torch.empty((rows * columns, size), dtype=table.dtype, device=image_HWC.device)
    if len(out):
        block = triton.next_power_of_2(patch * patch)
        launch(
            patchify_kernel,
            (len(out),),
            image_HWC.contiguous(),
            table,
            out,
            columns,
            num_warps=min(max(block // 128, 1), 8),  # 16 bytes of float32 a lane and store
            PATCH=patch,
            TEMPORAL=temporal,
            MERGE=merge,
            BLOCK=block,
        )
    return out
