"""Which layers a stage has, and which layouts cannot work, found out before anything is started. Needs no megatron.

Ranks are numbered as Megatron-core does it: tensor parallel fastest, then data parallel, then pipeline stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PretrainedConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

from metis_fast.config import MegatronConfig
from metis_fast.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands: its indices along the tensor-, data- and pipeline-parallel axes."""

    tensor: int
    data: int
    stage: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one model chunk of a stage holds: decoder layers [start, stop), and the parts at the ends of the model."""

    start: int
    stop: int
    first: bool
    last: bool


def place(rank: int, layout: MegatronConfig) -> Place:
    """Of a rank's number."""
    tensor, rest = rank % layout.tensor_parallel, rank // layout.tensor_parallel
    return Place(tensor, rest % layout.data_parallel, rest // layout.data_parallel)


def parts(config: PretrainedConfig) -> tuple[Qwen3VLTextConfig, Qwen3VLVisionConfig | None]:
    """Text and vision config of a Qwen3-VL; of a text-only Qwen3 itself and None."""
    vision = cast("Qwen3VLVisionConfig | None", getattr(config, "vision_config", None))
    text = config if vision is None else config.text_config  # pyright: ignore[reportAttributeAccessIssue]
    return cast(Qwen3VLTextConfig, text), vision


def chunks(layout: MegatronConfig, num_layers: int) -> list[list[Chunk]]:
    """Of every stage, its chunks (one, unless interleaved).

    Raises:
        ConfigError: the layers cannot be dealt out so.
    """
    stages, interleaved = layout.pipeline_parallel, layout.virtual_pipeline
    if interleaved > 1:
        each = num_layers // (stages * interleaved)
        return [
            [
                Chunk(at, at + each, first=at == 0, last=at + each == num_layers)
                for at in ((chunk * stages + stage) * each for chunk in range(interleaved))
            ]
            for stage in range(stages)
        ]
    sizes = _stage_sizes(layout, num_layers)
    bounds = [sum(sizes[:stage]) for stage in range(stages + 1)]
    return [[Chunk(bounds[stage], bounds[stage + 1], first=stage == 0, last=stage == stages - 1)] for stage in range(stages)]


def _stage_sizes(layout: MegatronConfig, num_layers: int) -> list[int]:
    stages, first, last = layout.pipeline_parallel, layout.first_stage_layers, layout.last_stage_layers
    middle = stages - bool(first) - bool(last)
    rest = num_layers - first - last
    if rest < 0 or (rest % middle if middle else rest) or (middle and rest == 0):
        raise ConfigError(
            f"{num_layers} layers cannot be dealt out to train.megatron.pipeline_parallel={stages} stages with "
            f"{first or 'an even share'} in the first and {last or 'an even share'} in the last; "
            "set first_stage_layers and last_stage_layers so that the stages between them get equal numbers"
        )
    sizes = [rest // middle if middle else 0] * stages
    if first:
        sizes[0] = first
    if last:
        sizes[-1] = last
    return sizes


def check(layout: MegatronConfig, config: PretrainedConfig) -> None:
    """Refuse what would fail, or silently be wrong, once it runs.

    Raises:
        ConfigError: says which numbers do not go together and what to change.
    """
    text, vision = parts(config)
    tensor, stages = layout.tensor_parallel, layout.pipeline_parallel
    deepstack: Sequence[int] = tuple(vision.deepstack_visual_indexes) if vision is not None else ()
    for what, size in (
        ("attention heads", text.num_attention_heads),
        ("key/value heads", text.num_key_value_heads or text.num_attention_heads),
        ("MLP columns", text.intermediate_size),
        # Megatron would pad the vocabulary; the LM head would then hold rows that no checkpoint has
        ("rows of vocabulary", text.vocab_size),
    ):
        if size % tensor:
            raise ConfigError(
                f"train.megatron.tensor_parallel={tensor} does not divide the model's {size} {what}; "
                f"choose one that does, such as {_largest_divisor(size, tensor)}"
            )
    if layout.sequence_parallel and tensor == 1:
        raise ConfigError(
            "train.megatron.sequence_parallel splits over tensor-parallel ranks; set tensor_parallel to 2 or more"
        )
    if (layout.first_stage_layers or layout.last_stage_layers) and stages == 1:
        raise ConfigError(
            "train.megatron.first_stage_layers and last_stage_layers need stages; set pipeline_parallel to 2 or more"
        )
    if layout.virtual_pipeline > 1:
        if stages == 1:
            raise ConfigError("train.megatron.virtual_pipeline interleaves stages; set pipeline_parallel to 2 or more")
        if layout.first_stage_layers or layout.last_stage_layers:
            raise ConfigError(
                "train.megatron.virtual_pipeline deals out equal chunks; set first_stage_layers and last_stage_layers to 0"
            )
        if text.num_hidden_layers % (stages * layout.virtual_pipeline):
            raise ConfigError(
                f"{text.num_hidden_layers} layers do not divide into pipeline_parallel={stages} x "
                f"virtual_pipeline={layout.virtual_pipeline} chunks; change one of them (train.megatron)"
            )
    first = chunks(layout, text.num_hidden_layers)[0][0]
    if len(deepstack) > first.stop:
        # a later stage would need the features of a tower that it does not have; Megatron would go on without them
        raise ConfigError(
            f"the vision tower feeds the first {len(deepstack)} layers (deepstack), but the first chunk of the pipeline has "
            f"{first.stop}; set train.megatron.first_stage_layers to {len(deepstack)} or more, or lower virtual_pipeline "
            "or pipeline_parallel"
        )


def _largest_divisor(size: int, below: int) -> int:
    return next(d for d in range(min(below, size), 0, -1) if size % d == 0)
