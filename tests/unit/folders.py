"""Tiny model folders for tests, and what is in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

from metis_fast.checkpoint.export import export_model, read_source
from metis_fast.checkpoint.safetensors_folder import FolderReader
from metis_fast.config import ModelConfig
from metis_fast.errors import ModelError
from metis_fast.model import Policy, load_policy
from metis_fast.testing.tiny import TinyShape, build_tiny

Tree = dict[str, Any]
Weights = dict[str, torch.Tensor]

EMBED = "model.language_model.embed_tokens.weight"

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def tiny(folder: Path, tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A model folder as `from_pretrained` saves it, with a generation config of its own."""
    shape = TinyShape(
        vocab_size=300,
        image_px=1024,
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
    )  # fmt: skip
    build_tiny(folder, shape, ["a word of it"] * 5, seed=seed)
    if dtype != torch.float32:
        Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    GenerationConfig(top_p=0.7, do_sample=True).save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> Weights:
    return dict(Qwen3VLForConditionalGeneration.from_pretrained(folder).named_parameters())


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def copy_through(source: Path, out: Path, max_shard_bytes: int = 50_000) -> None:
    """Read every tensor and write it again."""
    reader = FolderReader(source)
    stream = ((name, reader.read(name)) for name in reader.shapes)
    export_model(stream, reader.shapes, read_source(source), out, max_shard_bytes=max_shard_bytes)


def load(folder: Path, dtype: str = "float32") -> Policy:
    return load_policy(ModelConfig.model_validate({"path": folder, "dtype": dtype}))


def change(path: Path, edit: Callable[[Tree], object]) -> None:
    """Edit a JSON file in place."""
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def respell(folder: Path, edit: Callable[[Weights], Weights]) -> None:
    """Rewrite the weights."""
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def refusal(folder: Path) -> str:
    """The one line that is said of it."""
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)
