"""Checks of arguments: every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor


def tensor(
    name: str,
    value: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    axes: str = "",
) -> None:
    """Check type, shape (None: any length), dtype and device of one argument.

    axes: the shape in letters, for the message, for example "[T, H]".

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    wrong_size = value.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(value.shape, shape, strict=True)
    )
    if wrong_size:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        axes = f" {axes} =" if axes else ""
        raise ValueError(f"{name}: expected shape{axes} {wanted}, got {list(value.shape)}")
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected dtype {names}, got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like the others, got one on {value.device}")


def at_least(name: str, value: float, low: float, strictly: bool = False, finite: bool = True, whole: bool = False) -> None:
    """Check a number.

    Raises:
        ValueError: it is none, below `low` (or equal to it, if `strictly`), NaN, infinite where it has to be `finite`, or
            no int where it has to be `whole`.
    """
    bound = f"{'>' if strictly else '>='} {low}"
    if not isinstance(value, int if whole else Real):
        raise ValueError(f"{name}: expected {'an int' if whole else 'a number'} {bound}, got {value!r}")
    if not (value > low if strictly else value >= low) or (finite and math.isinf(value)):
        kind = "a finite number" if math.isinf(value) else "a number"
        raise ValueError(f"{name}: expected {kind} {bound}, got {value}")


def indices(name: str, value: Tensor, size: int | None, ascending: bool = False) -> None:
    """Check indices that are on the host, where looking costs nothing. size: None where it is not known.

    Raises:
        ValueError: one is below 0, not below `size`, or, if `ascending`, not above the one before it.
    """
    if value.device.type != "cpu" or not value.numel():
        return
    low, high = int(value.min()), int(value.max())
    if low < 0 or (size is not None and high >= size):
        limit = ">= 0" if size is None else f"[0, {size})"
        raise ValueError(f"{name}: expected indices in {limit}, got {low if low < 0 else high}")
    if ascending and len(value) > 1 and int(value.diff().min()) <= 0:
        i = int(value.diff().argmin())
        raise ValueError(f"{name}: expected ascending indices, got {int(value[i])} then {int(value[i + 1])}")
