"""Layouts: who holds which layers, and a refusal with what to change for each that cannot work, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3VLConfig

from metis_fast.config import Config, MegatronConfig
from metis_fast.errors import ConfigError
from metis_fast.train.megatron.backend import check_settings
from metis_fast.train.megatron.layout import Chunk, Place, check, chunks, place

EIGHT_B = Qwen3VLConfig(**json.loads((Path(__file__).parents[2] / "configs" / "qwen3vl_8b.json").read_text()))


def layout(**sizes: object) -> MegatronConfig:
    return MegatronConfig.model_validate(sizes)


def model(deepstack: tuple[int, ...] = (0,), **text: object) -> Qwen3VLConfig:
    """8 layers, 8 heads of 4 key/value heads, 480 rows of vocabulary."""
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
        "intermediate_size": 96, "vocab_size": 480,
    }  # fmt: skip
    vision = {"depth": 4, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": deepstack}
    return Qwen3VLConfig(text_config=sizes | text, vision_config=vision)


def spans(one: MegatronConfig, num_layers: int) -> list[list[tuple[int, int]]]:
    return [[(chunk.start, chunk.stop) for chunk in stage] for stage in chunks(one, num_layers)]


# -- who holds what ---------------------------------------------------------------------------------------------------------


def test_ranks_are_numbered_tensor_first_then_data_then_stage():
    one = layout(tensor_parallel=2, data_parallel=3, pipeline_parallel=2)
    places = [place(rank, one) for rank in range(one.num_ranks)]
    assert places[:4] == [Place(0, 0, 0), Place(1, 0, 0), Place(0, 1, 0), Place(1, 1, 0)]
    assert places[6] == Place(0, 0, 1) and places[-1] == Place(1, 2, 1)
    assert len(set(places)) == one.num_ranks == 12


@pytest.mark.parametrize(
    ("sizes", "num_layers", "expected"),
    [
        ({}, 3, [[(0, 3)]]),
        ({"pipeline_parallel": 2}, 8, [[(0, 4)], [(4, 8)]]),
        ({"pipeline_parallel": 2, "first_stage_layers": 3}, 8, [[(0, 3)], [(3, 8)]]),
        ({"pipeline_parallel": 2, "last_stage_layers": 1}, 8, [[(0, 7)], [(7, 8)]]),
        ({"pipeline_parallel": 2, "first_stage_layers": 5, "last_stage_layers": 3}, 8, [[(0, 5)], [(5, 8)]]),
        (
            {"pipeline_parallel": 4, "first_stage_layers": 3, "last_stage_layers": 1},
            8,
            [[(0, 3)], [(3, 5)], [(5, 7)], [(7, 8)]],
        ),
        ({"pipeline_parallel": 2, "virtual_pipeline": 2}, 8, [[(0, 2), (4, 6)], [(2, 4), (6, 8)]]),
        (
            {"pipeline_parallel": 2, "virtual_pipeline": 4},
            8,
            [[(0, 1), (2, 3), (4, 5), (6, 7)], [(1, 2), (3, 4), (5, 6), (7, 8)]],
        ),
    ],
)
def test_layers_are_dealt_out_each_once(sizes, num_layers, expected):
    one = layout(**sizes)
    assert spans(one, num_layers) == expected
    dealt = sorted(layer for stage in expected for start, stop in stage for layer in range(start, stop))
    assert dealt == list(range(num_layers))
    every: list[Chunk] = [chunk for stage in chunks(one, num_layers) for chunk in stage]
    assert [(chunk.start, chunk.stop) for chunk in every if chunk.first] == [min(spans(one, num_layers)[0])]
    assert [chunk.stop for chunk in every if chunk.last] == [num_layers]
    assert chunks(one, num_layers)[-1][-1].last and chunks(one, num_layers)[0][0].first


# -- what cannot work -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "config", "says"),
    [
        (
            {"tensor_parallel": 3},
            model(),
            "tensor_parallel=3 does not divide the model's 8 attention heads; choose .* such as 2$",
        ),
        ({"tensor_parallel": 8}, model(), "=8 does not divide the model's 4 key/value heads; choose one that does, such as 4$"),
        ({"tensor_parallel": 4}, model(intermediate_size=98), "=4 does not divide the model's 98 MLP columns; .* such as 2$"),
        ({"tensor_parallel": 2}, model(vocab_size=481), "=2 does not divide the model's 481 rows of vocabulary; .* such as 1$"),
        ({"sequence_parallel": True}, model(), "sequence_parallel .*; set tensor_parallel to 2 or more$"),
        (
            {"first_stage_layers": 4},
            model(),
            "first_stage_layers and last_stage_layers need stages; set pipeline_parallel to 2",
        ),
        ({"last_stage_layers": 4}, model(), "first_stage_layers and last_stage_layers need stages"),
        (
            {"pipeline_parallel": 3},
            model(),
            "8 layers cannot be dealt out to .*pipeline_parallel=3 stages with an even share in",
        ),
        ({"pipeline_parallel": 9}, model(), "8 layers cannot be dealt out"),
        ({"pipeline_parallel": 3, "first_stage_layers": 3}, model(), "with 3 in the first and an even share in the last; set "),
        ({"pipeline_parallel": 2, "first_stage_layers": 8}, model(), "8 layers cannot be dealt out"),
        (
            {"pipeline_parallel": 2, "first_stage_layers": 4, "last_stage_layers": 3},
            model(),
            "with 4 in the first and 3 in the",
        ),
        ({"pipeline_parallel": 3, "first_stage_layers": 5, "last_stage_layers": 4}, model(), "8 layers cannot be dealt out"),
        ({"virtual_pipeline": 2}, model(), "virtual_pipeline interleaves stages; set pipeline_parallel to 2 or more$"),
        ({"pipeline_parallel": 2, "virtual_pipeline": 3}, model(), "8 layers do not divide into pipeline_parallel=2 x virtual"),
        (
            {"pipeline_parallel": 2, "virtual_pipeline": 2, "first_stage_layers": 3},
            model(),
            "deals out equal chunks; set first_",
        ),
        ({"pipeline_parallel": 4}, model((0, 1, 2)), "the first 3 layers .* has 2; set .*first_stage_layers to 3 or more"),
        (
            {"pipeline_parallel": 2, "virtual_pipeline": 4},
            model((0, 1)),
            "the first 2 layers .* has 1; .* lower virtual_pipeline",
        ),
        ({"pipeline_parallel": 2, "first_stage_layers": 1}, model((0, 1)), "the first 2 layers .* first chunk .* has 1"),
        (
            {"tensor_parallel": 16},
            EIGHT_B,
            "=16 does not divide the model's 8 key/value heads; choose one that does, such as 8$",
        ),
        ({"pipeline_parallel": 18}, EIGHT_B, r"the first 3 layers \(deepstack\), but the first chunk of the pipeline has 2"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_with_what_to_change(sizes, config, says):
    with pytest.raises(ConfigError, match=says):
        check(layout(**sizes), config)


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        ({}, model()),
        ({"tensor_parallel": 4, "pipeline_parallel": 8, "data_parallel": 5, "sequence_parallel": True}, model()),
        ({"pipeline_parallel": 4}, model((0, 1))),
        ({"pipeline_parallel": 4, "first_stage_layers": 4, "last_stage_layers": 2}, model((0, 1, 2))),
        ({"pipeline_parallel": 2, "virtual_pipeline": 4}, model()),
        ({"tensor_parallel": 8, "pipeline_parallel": 12}, EIGHT_B),
        ({"pipeline_parallel": 3}, Qwen3Config(num_hidden_layers=9)),
    ],
)
def test_a_layout_that_works_is_taken(sizes, config):
    check(layout(**sizes), config)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": {"optim": {"muon_lr": 0.01}}}, r"^train\.optim\.muon_lr .*; set it to 0$"),
        (
            {"train": {"activation_checkpointing": True}},
            r"^train\.activation_checkpointing .*train\.megatron\.recompute instead$",
        ),
        ({"loss": {"normalization": "reference"}}, r"^loss\.normalization=reference .*; set it to global$"),
        ({"train": {"megatron": {"listen": "nowhere"}}}, r"^train\.megatron\.listen must be HOST:PORT"),
        ({"train": {"megatron": {"tensor_parallel": 3}}}, r"^train\.megatron\.tensor_parallel=3 does not divide"),
    ],
)
def test_a_setting_of_the_torch_back_end_alone_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        check_settings(Config.model_validate(settings), model())
    check_settings(Config(), model())
