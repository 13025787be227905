"""A model like the config's own, but narrow and shallow: the same classes, patches, pixel limits and files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PretrainedConfig

from metis_fast.config import Config
from metis_fast.errors import ConfigError
from metis_fast.model_folder import load_processor
from metis_fast.plan.shape import read_model_config
from metis_fast.rehearse.settings import small_layout
from metis_fast.testing.tiny import TinyShape, build_tiny

_PIXELS = (65_536, 16_777_216)
"""Least and most of an image as Qwen3-VL sees it."""
_LAYERS, _HEADS, _WIDTH, _HEAD_DIM = 4, 4, 64, 32  # more layers where a pipeline asks for them


def write_model(config: Config, folder: Path, texts: Iterable[str]) -> None:
    """Write a model folder; its tokenizer is trained on `texts`.

    Raises:
        ConfigError: the config's model is no Qwen3-VL, or not described anywhere.
    """
    shape = read_model_config(config, None)
    if shape.model_type != "qwen3_vl":
        raise ConfigError(f"a rehearsal is for a Qwen3-VL, got a model of type {shape.model_type}; name another model.path")
    processor = load_processor(config.model.path) if config.model.path.is_dir() else None
    sizes = _PIXELS if processor is None else (processor.size["shortest_edge"], processor.size["longest_edge"])
    layout, _ = small_layout(config.train.megatron)
    chunks = layout.pipeline_parallel * layout.virtual_pipeline if config.train.backend == "megatron" else 1
    build_tiny(folder, _narrow(shape, sizes, chunks), texts, config.run.seed)


def _narrow(shape: PretrainedConfig, pixels: tuple[int, int], chunks: int) -> TinyShape:
    """chunks: of the pipeline; the first one must have all layers that the vision tower feeds."""
    text, vision = shape.get_text_config(), shape.vision_config
    # as many heads a group as the model has, so that tensor parallelism cuts the same way
    group = max(1, text.num_attention_heads // text.num_key_value_heads)
    kv = 2
    sections = (_HEAD_DIM // 2 - 2 * (_HEAD_DIM // 6), _HEAD_DIM // 6, _HEAD_DIM // 6)
    rope = {"rope_type": "default", "mrope_section": list(sections), "mrope_interleaved": True, "rope_theta": 5e6}
    depth = 1 + len(vision.deepstack_visual_indexes)
    return TinyShape(
        vocab_size=2048,
        image_px=list(pixels),
        text_config={
            "hidden_size": _WIDTH,
            "intermediate_size": 2 * _WIDTH,
            "num_hidden_layers": max(_LAYERS, chunks * (depth - 1)),
            "num_attention_heads": kv * min(group, 4),
            "num_key_value_heads": kv,
            "head_dim": _HEAD_DIM,
            "max_position_embeddings": text.max_position_embeddings,
            "rope_parameters": rope,
            "tie_word_embeddings": bool(shape.tie_word_embeddings),
        },
        vision_config={
            "depth": depth,
            "hidden_size": _WIDTH,
            "intermediate_size": 2 * _WIDTH,
            "num_heads": _HEADS,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "num_position_embeddings": vision.num_position_embeddings,
            "deepstack_visual_indexes": list(range(depth - 1)),
        },
    )
