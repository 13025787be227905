"""`patchify` in C++ (kernels/csrc/patchify.cpp): one pass over the bytes, 3 x temporal numbers written a pixel."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(image_HWC: Tensor, table: Tensor, patch: int, temporal: int, merge: int) -> Tensor:
    """[patches, 3 x temporal x patch x patch] of the numbers of `table` [3, 256] that the bytes of the image stand for."""
    return torch.ops.metis_kernels_cpu.patchify(image_HWC.contiguous(), table, patch, temporal, merge)
