"""Matrix products of half-precision operands with a float32 result that is never rounded to their dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b. a [M, K] and b [K, N] of one dtype (bfloat16, float16 or float32), out [M, N] float32.

    float32 operands follow `torch.backends.cuda.matmul.fp32_precision`; nothing is computed on meta tensors.
    """
    if out.is_meta:
        return out
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)  # CPU: torch has no out_dtype there


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b, inside the product (beta = 1) where the device can. Arguments as `multiply`."""
    if total.is_meta:
        return total
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if a.is_cuda:
        return torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))
