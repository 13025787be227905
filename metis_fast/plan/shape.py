"""The sizes of a Qwen3 or Qwen3-VL that memory and time follow from, and the parameters of each part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import PretrainedConfig

from metis_fast.config import Config
from metis_fast.errors import ConfigError
from metis_fast.model_folder import check_is_folder, config_of, read_json
from metis_fast.train.megatron.layout import parts


def read_model_config(config: Config, given: Path | None) -> PretrainedConfig:
    """The model's config.json: of `given` (a folder or the file), else of `model.path`, else `model.config`.

    Raises:
        ConfigError: there is none. ModelError: it cannot be read, or is not that of a Qwen3 or Qwen3-VL.
    """
    folder, described = config.model.path, config.model.config
    path = given if given is not None else folder
    file = path / "config.json" if path.is_dir() or given is None else path
    if given is None and not file.is_file():
        if described is None:
            if folder.suffix == ".gguf" or folder.is_dir():
                check_is_folder(folder)
            raise ConfigError(
                f"{file} does not exist, so the model's shape is unknown; set model.path to a model folder, or model.config to "
                "a config.json that describes the model (metis-fast plan takes it as --model, too)"
            )
        file = described
    return config_of(read_json(file), file)


@dataclass(frozen=True, slots=True)
class TowerShape:
    """The vision tower. wide: columns of `merge`^2 patches side by side."""

    depth: int
    hidden: int
    intermediate: int
    pixels: int
    positions: int
    merge: int
    out: int
    deepstack: int

    @property
    def wide(self) -> int:
        """Columns of a merger's first product."""
        return self.hidden * self.merge**2

    def parameters(self) -> tuple[int, ...]:
        """Elements of every parameter, biases and norms included."""
        h, i, wide = self.hidden, self.intermediate, self.wide
        block = (h, h, h, h, 3 * h * h, 3 * h, h * h, h, h * i, i, i * h, h)
        products = (wide * wide, wide, wide * self.out, self.out)
        return (
            self.pixels * h, h, self.positions * h,
            *(self.depth * block),
            h, h, *products,
            *(self.deepstack * (wide, wide, *products)),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """The decoder's sizes, and the tower's where there is one."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    tied: bool
    tower: TowerShape | None

    @staticmethod
    def of(config: PretrainedConfig) -> Shape:
        """From a transformers config."""
        text, vision = parts(config)
        heads = text.num_attention_heads
        tower = None
        if vision is not None:
            # transformers' annotations allow pairs, which Qwen3-VL does not have
            patch, frames = cast(int, vision.patch_size), cast(int, vision.temporal_patch_size)
            tower = TowerShape(
                vision.depth, vision.hidden_size, vision.intermediate_size, vision.in_channels * frames * patch**2,
                vision.num_position_embeddings, vision.spatial_merge_size, vision.out_hidden_size,
                len(tuple(vision.deepstack_visual_indexes)),
            )  # fmt: skip
        return Shape(
            text.hidden_size, text.num_hidden_layers, heads, text.num_key_value_heads or heads,
            text.head_dim or text.hidden_size // heads, text.intermediate_size, text.vocab_size,
            bool(config.tie_word_embeddings), tower,
        )  # fmt: skip

    def layer_parameters(self, tensor_parallel: int) -> tuple[int, ...]:
        """Elements of a layer's parameters on one of so many tensor-parallel ranks; norms are whole on each."""
        t, h, size = tensor_parallel, self.hidden, self.head_size
        qkv = h * (self.heads + 2 * self.kv_heads) * size // t
        mlp = h * self.intermediate // t
        return (h, qkv, size, size, self.heads * size * h // t, h, 2 * mlp, mlp)

    @property
    def num_parameters(self) -> int:
        """Of the whole model, a tied head counted once."""
        tower = sum(self.tower.parameters()) if self.tower is not None else 0
        ends = self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden
        return self.layers * sum(self.layer_parameters(1)) + ends + tower

    @property
    def kv_bytes(self) -> int:
        """bfloat16 keys and values of one token in an engine's cache."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size
