"""`prefix_attention` by flash-attention's kernels."""

from __future__ import annotations

import torch


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Returns "" if it can run on tensors of this device and dtype, else why it cannot."""
    return f"it needs CUDA tensors of bfloat16 or float16, these are {dtype} on {device}"
