"""The image processor of a cold start that shows images smaller than RL does."""

from __future__ import annotations

from copy import copy

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def limited(processor: Qwen2VLImageProcessorPil | None, max_pixels: int) -> Qwen2VLImageProcessorPil | None:
    """The processor with another limit of pixels; the same one where that is 0, or no lower than its own."""
    if processor is None or not max_pixels or max_pixels >= processor.size["longest_edge"]:
        return processor
    made = copy(processor)
    least = min(processor.size["shortest_edge"], max_pixels)
    made.size = dict(processor.size) | {"longest_edge": max_pixels, "shortest_edge": least}
    return made
