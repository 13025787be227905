"""Model FLOPs of a Qwen3 or Qwen3-VL, in closed form: what metrics count and what packs are balanced by.

A multiply-add is 2; only matrix products and attention count; a backward pass is twice its forward pass (recomputation is
work, not model FLOPs). Figures follow from the model's shape alone:

    token   layers * 2 * (H (q + 2 k) D + q D H + 3 H I)          H hidden, q and k heads, D head size, I MLP width
    pair    layers * 4 * q D                                      a (query, key) pair that sees each other
    row     2 * H * V                                             a token at the LM head
    patch   2 * C P^2 T h + blocks * 2 * (4 h^2 + 2 h i)          h, i of the vision tower; pairs within a frame: blocks * 4 h
    merged  (1 + deepstack mergers) * 2 * (m^2 h)(m^2 h + H)      a token that comes out of the tower, m merge size
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from transformers import PretrainedConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig


@dataclass(frozen=True, slots=True)
class FlopModel:
    """FLOPs of one forward pass, by what is in it (see the module). merge: the vision tower's spatial merge size."""

    token: float
    pair: float
    row: float
    patch: float = 0.0
    patch_pair: float = 0.0
    merged: float = 0.0
    merge: int = 1

    @staticmethod
    def of(config: PretrainedConfig) -> FlopModel:
        """From a transformers config of a Qwen3 or Qwen3-VL."""
        vision = cast("Qwen3VLVisionConfig | None", getattr(config, "vision_config", None))
        text = cast(Qwen3VLTextConfig, config if vision is None else config.text_config)  # pyright: ignore[reportAttributeAccessIssue]
        hidden, heads = text.hidden_size, text.num_attention_heads
        kv_heads = text.num_key_value_heads or heads
        size = text.head_dim or hidden // heads
        matrices = hidden * (heads + 2 * kv_heads) * size + heads * size * hidden + 3 * hidden * text.intermediate_size
        decoder = (
            2.0 * text.num_hidden_layers * matrices,
            4.0 * text.num_hidden_layers * heads * size,
            2.0 * hidden * text.vocab_size,
        )
        if vision is None:
            return FlopModel(*decoder)
        width, merge = vision.hidden_size, vision.spatial_merge_size
        patch = cast(int, vision.patch_size)  # transformers' annotations allow pairs, which Qwen3-VL does not have
        pixels = vision.in_channels * patch**2 * cast(int, vision.temporal_patch_size)
        block = 4 * width * width + 2 * width * vision.intermediate_size
        wide = width * merge**2
        return FlopModel(
            *decoder,
            patch=2.0 * (pixels * width + vision.depth * block),
            patch_pair=4.0 * vision.depth * width,
            merged=2.0 * (1 + len(tuple(vision.deepstack_visual_indexes))) * wide * (wide + vision.out_hidden_size),
            merge=merge,
        )

    def decoder(self, num_tokens: int, num_pairs: int) -> float:
        """A pass over so many tokens, with so many visible (query, key) pairs a head."""
        return self.token * num_tokens + self.pair * num_pairs

    def image(self, grid: tuple[int, int, int]) -> float:
        """An image (or its frames) of a (t, h, w) grid of patches through the tower."""
        t, h, w = grid
        patches = t * h * w
        return self.patch * patches + self.patch_pair * t * (h * w) ** 2 + self.merged * patches / self.merge**2
