"""Attention of decoder and vision tower, plugged into transformers' attention registry as `metis` and `metis_images`.

transformers hands every keyword argument of the decoder through to its attention function. That is the official way in: the
caller passes an `AttentionPlan` that says what this forward pass attends to, and no model code is patched. Without a plan
the pass is plain causal attention. The vision tower, which by itself loops over its images, hands over all of them at once
where it is told that they are one (`cu_seqlens`), and where each begins in `frames`.

Shape letters: B rows, H query heads, K key/value heads, S new tokens of a row, C cached tokens of a row, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from metis_kernels.prefix_attention.api import AttentionImpl, full_attention, prefix_attention
from metis_kernels.prefix_attention.segments import Segments

NAME = "metis"
IMAGES = "metis_images"


class AttentionPlan(Protocol):
    """What one forward pass attends to."""

    def attend(self, layer: int, query_BHSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, scale: float) -> Tensor:
        """Returns [B, H, S, D]."""
        ...


class CausalSdpa:
    """Causal attention by torch's scaled_dot_product_attention."""

    def attend(self, layer: int, query_BHSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(query_BHSD, key_BKSD, value_BKSD, is_causal=True, scale=scale, enable_gqa=True)


class PrefixShared:
    """Packed groups: each rollout sees its prompt, which stands there once, and itself causally (B = 1)."""

    def __init__(self, segments: Segments, impl: AttentionImpl) -> None:
        self._segments = segments
        self._impl: AttentionImpl = impl

    def attend(self, layer: int, query_BHSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, scale: float) -> Tensor:
        query, key, value = (part[0].transpose(0, 1) for part in (query_BHSD, key_BKSD, value_BKSD))
        out_NHD = prefix_attention(query, key, value, self._segments, scale=scale, impl=self._impl)
        return out_NHD.transpose(0, 1)[None]


def _registered(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    plan: AttentionPlan | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    plan = plan if plan is not None else CausalSdpa()
    return plan.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None  # pyright: ignore[reportArgumentType]


AttentionInterface.register(NAME, _registered)


def _images(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    frames: Sequence[int] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Each patch attends to its image. frames: patches of each, in order; None: one."""
    offsets = tuple(accumulate(frames if frames is not None else [query.shape[2]], initial=0))
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return full_attention(query, key, value, offsets, scale=scaling)[None], None


AttentionInterface.register(IMAGES, _images)
