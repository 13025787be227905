"""Models, layouts and settings for tests of `metis-fast plan`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import Qwen3VLConfig

from metis_fast.config import Config, MegatronConfig, build
from metis_fast.plan.duration import Setting
from metis_fast.plan.gpus import GPUS
from metis_fast.plan.shape import Shape
from metis_fast.plan.workload import Workload
from metis_fast.train.flops import FlopModel

CONFIGS = Path(__file__).parents[2] / "configs"
EIGHT_B = json.loads((CONFIGS / "qwen3vl_8b.json").read_text(encoding="utf-8"))


def tiny(tied: bool) -> Qwen3VLConfig:
    text = {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 64, "vocab_size": 400,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 8, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def big() -> Qwen3VLConfig:
    return Qwen3VLConfig(**EIGHT_B)


def layout(**sizes: object) -> MegatronConfig:
    return MegatronConfig.model_validate(sizes)


def config(**model: object) -> Config:
    return build({"model": model})


def setting(gpus: int = 64, changes: Mapping[str, object] | None = None) -> Setting:
    settings = build({"rollout": {"max_concurrent": 2048}, **(changes or {})})
    return Setting(settings, Shape.of(big()), FlopModel.of(big()), Workload(3072, 2048), GPUS["h100"], gpus, 0.3)
