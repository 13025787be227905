"""Image to patches, as defined: see api.patchify."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(image_HWC: Tensor, table: Tensor, patch: int, temporal: int, merge: int) -> Tensor:
    """[patches, 3 x temporal x patch x patch] of the numbers of `table` [3, 256] that the bytes of the image stand for."""
    pixels = torch.stack([row[image_HWC[:, :, colour].int()] for colour, row in enumerate(table)])
    # colour, block row, patch row, y, block column, patch column, x
    parts = pixels.unflatten(2, (-1, merge, patch)).unflatten(1, (-1, merge, patch))
    ordered = parts.permute(1, 4, 2, 5, 0, 3, 6)
    frames = ordered[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, temporal, -1, -1)
    return frames.reshape(-1, 3 * temporal * patch * patch)
