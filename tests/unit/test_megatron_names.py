"""Every Hugging Face tensor has its place on the ranks of every layout, and comes back from there as it was."""

from __future__ import annotations

import json
import resource
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pages import ROOT, commands
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from metis_fast import cli
from metis_fast.checkpoint.safetensors_folder import FolderReader
from metis_fast.config import Config, MegatronConfig
from metis_fast.errors import ModelError
from metis_fast.plan.shape import read_model_config
from metis_fast.train.megatron import names
from metis_fast.train.megatron.layout import check, chunks
from metis_fast.train.megatron.names import Param, fuse, hf_shapes, local, params, split, verify, whole

CONFIG_8B = ROOT / "configs" / "qwen3vl_8b.json"
TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 6,
}  # fmt: skip
HEADS, KEYS, SIZE = 8, 4, 6
LAYOUTS = {
    "alone": MegatronConfig(),
    "tp2": MegatronConfig(tensor_parallel=2),
    "tp4": MegatronConfig(tensor_parallel=4, sequence_parallel=True),
    "pp2": MegatronConfig(pipeline_parallel=2, data_parallel=2),
    "pp3 uneven": MegatronConfig(pipeline_parallel=3, first_stage_layers=1, last_stage_layers=1),
    "tp2 pp4": MegatronConfig(tensor_parallel=2, pipeline_parallel=4),
    "tp4 pp2 vpp2": MegatronConfig(tensor_parallel=4, pipeline_parallel=2, virtual_pipeline=2),
}

Model = Qwen3VLForConditionalGeneration | Qwen3ForCausalLM


def build(family: str, tied: bool, **changes: Any) -> Model:
    """A model whose every number is another."""
    text = TEXT | changes
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**text, tie_word_embeddings=tied))
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "mrope_interleaved": True}
        vision = {
            "depth": 2, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "patch_size": 4, "out_hidden_size": 24,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        }  # fmt: skip
        config = Qwen3VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, tie_word_embeddings=tied)
        model = Qwen3VLForConditionalGeneration(config)
    at = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(at, at + parameter.numel()).view_as(parameter))
            at += parameter.numel()
    assert at < 2**24, "float32 counts so far"
    return model


def reader_of(weights: Mapping[str, Tensor]) -> names.Read:
    return lambda name, dim, start, stop: weights[name].narrow(dim, start, stop - start)


def all_params(layout: MegatronConfig, config: PretrainedConfig) -> list[Param]:
    num_layers = getattr(config, "text_config", config).num_hidden_layers
    return [param for stage in chunks(layout, num_layers) for chunk in stage for param in params(layout, config, chunk)]


# -- names and shapes -------------------------------------------------------------------------------------------------


COMMANDS = [
    line.split()[1:]
    for page, line in commands("metis-fast")
    if page == "checkpoints.md" and line.startswith("metis-fast weights ")
]
"""Of the documentation: every layout of the 8B model, and two of them."""


def test_every_layout_of_the_8b_model_holds_every_tensor_once(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert COMMANDS[0] == ["weights", "map", str(CONFIG_8B.relative_to(ROOT))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cli.main([*COMMANDS[0], "--json"]) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 << 20  # KiB: names and ranges, no weights of 17 GB
    found = json.loads(capsys.readouterr().out)
    taken = [one for one in found if "refused" not in one]
    sizes = {(one["tensor_parallel"], one["pipeline_parallel"]) for one in taken}
    assert sizes == {(tensor, stages) for tensor in (1, 2, 4, 8) for stages in (1, 2, 4, 8)}
    assert {one["virtual_pipeline"] for one in taken} == {1, 2, 3}
    assert all(len(one["stage_bytes"]) == one["pipeline_parallel"] for one in taken)
    assert taken[0]["stage_bytes"] == [2 * 8_767_123_696]
    refused = [one["refused"] for one in found if "refused" in one]
    assert refused and all(("36 layers" in why and "change" in why) or "set first_stage_layers" in why for why in refused)


def test_shapes_of_the_8b_model_under_tensor_parallel_8_are_these():
    config = read_model_config(Config(), CONFIG_8B)
    layout = MegatronConfig(tensor_parallel=8, pipeline_parallel=4)
    check(layout, config)
    (first,), *_, (last,) = chunks(layout, 36)
    ends = {
        "embedding.word_embeddings.weight": (18992, 4096),
        "output_layer.weight": (18992, 4096),
        "decoder.final_layernorm.weight": (4096,),
    }
    layer = {
        "input_layernorm": (4096,),
        "self_attention.linear_qkv": (768, 4096),
        "self_attention.q_layernorm": (128,),
        "self_attention.k_layernorm": (128,),
        "self_attention.linear_proj": (4096, 512),
        "pre_mlp_layernorm": (4096,),
        "mlp.linear_fc1": (3072, 4096),
        "mlp.linear_fc2": (4096, 1536),
    }
    layers = {f"decoder.layers.{i}.{name}.weight": shape for i in range(9) for name, shape in layer.items()}
    found = {param.name: param.shape for param in params(layout, config, first)}
    visual = {name: shape for name, shape in found.items() if name.startswith("visual.")}
    assert found == layers | visual | {"embedding.word_embeddings.weight": (18992, 4096)}
    assert len(visual) == 351 and visual["visual.blocks.26.attn.qkv.weight"] == (3456, 1152)
    assert visual["visual.patch_embed.proj.weight"] == (1152, 3, 2, 16, 16)
    del ends["embedding.word_embeddings.weight"]
    assert {param.name: param.shape for param in params(layout, config, last)} == layers | ends


@pytest.mark.parametrize("change", ["lost", "twice", "biases"])
def test_a_tensor_that_has_no_place_or_two_is_an_error_that_names_it(change, monkeypatch):
    config = build("qwen3", False).config
    if change == "biases":
        config.attention_bias = True
        says = r"no place for model\.layers\.0\.self_attn\.q_proj\.bias, .*; set train\.backend=torch"
    elif change == "lost":
        monkeypatch.setattr(names, "LAYER", names.LAYER[:-1])
        says = r"no place for model\.layers\.0\.mlp\.down_proj\.weight"
    else:
        monkeypatch.setattr(names, "LAYER", (*names.LAYER, ("again", "columns", ("mlp.down_proj",))))
        says = r"4 tensors would not be read once, such as model\.layers\.0\.mlp\.down_proj\.weight"
    with pytest.raises(ModelError, match=says):
        verify(MegatronConfig(tensor_parallel=2), config)


@pytest.mark.parametrize("bad", ["skips a row", "reads a row twice", "wrong dim"])
def test_a_rank_that_reads_another_part_than_its_own_is_found(bad, monkeypatch):
    right = names.local

    def wrong(param: Param, rank: int, layout: MegatronConfig, config: PretrainedConfig, read: names.Read) -> Tensor:
        def shifted(name: str, dim: int, start: int, stop: int) -> Tensor:
            if name == "lm_head.weight" and rank == 1:
                by = {"skips a row": (dim, start + 1, stop), "reads a row twice": (dim, start - 1, stop - 1)}
                return read(name, *by.get(bad, (1, start, stop)))
            return read(name, dim, start, stop)

        return right(param, rank, layout, config, shifted)

    monkeypatch.setattr(names, "local", wrong)
    with pytest.raises(ModelError, match=r"output_layer\.weight: the ranks read .* of lm_head\.weight"):
        verify(MegatronConfig(tensor_parallel=2), build("qwen3", False).config)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3"])
def test_a_folder_read_by_all_ranks_comes_back_bit_for_bit(family, tied, layout, tmp_path):
    model = build(family, tied)
    model.save_pretrained(tmp_path)
    check(layout, model.config)
    back: dict[str, Tensor] = {}
    reader = FolderReader(tmp_path)
    assert reader.shapes == hf_shapes(model.config)
    for param in all_params(layout, model.config):
        shards = [local(param, r, layout, model.config, reader.read) for r in range(layout.tensor_parallel)]
        assert all(tuple(shard.shape) == param.shape for shard in shards)
        found = whole(param, shards, model.config)
        assert not back.keys() & found.keys()
        back |= found
    expected = dict(model.named_parameters())
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())
    assert verify(layout, model.config) == len(expected)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_tied_head_is_a_copy_only_where_the_last_chunk_is_not_the_first(stages):
    model = build("qwen3_vl", True)
    layout = MegatronConfig(tensor_parallel=2, pipeline_parallel=stages)
    heads = [param for param in all_params(layout, model.config) if param.name == "output_layer.weight"]
    assert len(heads) == stages - 1
    weights = dict(model.named_parameters())
    for head in heads:
        table = weights["model.language_model.embed_tokens.weight"]
        shards = [local(head, rank, layout, model.config, reader_of(weights)) for rank in range(2)]
        assert torch.equal(torch.cat(shards), table) and whole(head, shards, model.config) == {}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_row_lies_where_its_head_or_its_column_is(ranks):
    """Counted out by heads, row by row."""
    model = build("qwen3_vl", False)
    layout, weights = MegatronConfig(tensor_parallel=ranks, pipeline_parallel=2), dict(model.named_parameters())
    second = {param.name: param for param in params(layout, model.config, chunks(layout, 4)[1][0])}
    of = "model.language_model.layers.3."  # the second layer of the second stage

    def rows(name: str, head: int) -> Tensor:
        return weights[f"{of}self_attn.{name}_proj.weight"][head * SIZE : (head + 1) * SIZE]

    for rank in range(ranks):
        held = {
            name.removeprefix("decoder.layers.1."): local(param, rank, layout, model.config, reader_of(weights))
            for name, param in second.items()
        }
        expected = []
        for key in range(rank * KEYS // ranks, (rank + 1) * KEYS // ranks):
            expected += [rows("q", 2 * key), rows("q", 2 * key + 1), rows("k", key), rows("v", key)]
        assert torch.equal(held["self_attention.linear_qkv.weight"], torch.cat(expected))
        columns, width, vocabulary = (slice(rank * n // ranks, (rank + 1) * n // ranks) for n in (48, 20, 40))
        assert torch.equal(held["self_attention.linear_proj.weight"], weights[f"{of}self_attn.o_proj.weight"][:, columns])
        both = torch.cat([weights[f"{of}mlp.{name}_proj.weight"][width] for name in ("gate", "up")])
        assert torch.equal(held["mlp.linear_fc1.weight"], both)
        assert torch.equal(held["mlp.linear_fc2.weight"], weights[f"{of}mlp.down_proj.weight"][:, width])
        for name, theirs in (
            ("input_layernorm", "input_layernorm"), ("pre_mlp_layernorm", "post_attention_layernorm"),
            ("self_attention.q_layernorm", "self_attn.q_norm"), ("self_attention.k_layernorm", "self_attn.k_norm"),
        ):  # fmt: skip
            assert torch.equal(held[f"{name}.weight"], weights[f"{of}{theirs}.weight"])
        assert torch.equal(held["output_layer.weight"], weights["lm_head.weight"][vocabulary])


@pytest.fixture(scope="module")
def megatrons_split() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Megatron-core's own reading of the product with the qkv weight: (linear_qkv, x, ranks) -> q, k, v [1, 1, heads, size]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attention = pytest.importorskip("megatron.core.transformer.attention")

    def run(qkv: Tensor, x: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
        class Product(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, None]:
                return x @ qkv.T, None

        module = SimpleNamespace(
            linear_qkv=Product(),
            num_attention_heads_per_partition=HEADS // ranks,
            num_query_groups_per_partition=KEYS // ranks,
            hidden_size_per_attention_head=SIZE,
            config=SimpleNamespace(num_query_groups=KEYS, test_mode=False),
            world_size=ranks,
            q_layernorm=None,
            k_layernorm=None,
        )
        return attention.SelfAttention.get_query_key_value_tensors(module, x)

    return run


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_megatrons_attention_finds_the_heads_that_transformers_has(ranks, megatrons_split):
    model: Any = build("qwen3", False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    layout, weights = MegatronConfig(tensor_parallel=ranks), {name: p.detach() for name, p in model.named_parameters()}
    held = {param.name: param for param in all_params(layout, model.config)}
    x, attention = torch.randn(1, 1, 24), model.model.layers[2].self_attn
    for rank in range(ranks):
        qkv = local(held["decoder.layers.2.self_attention.linear_qkv.weight"], rank, layout, model.config, reader_of(weights))
        for found, projection in zip(megatrons_split(qkv, x, ranks), ("q_proj", "k_proj", "v_proj"), strict=True):
            heads = getattr(attention, projection)(x).view(1, 1, -1, SIZE)
            torch.testing.assert_close(found, heads.chunk(ranks, dim=2)[rank])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_parts_of_the_mlp_add_up_to_transformers(ranks):
    model: Any = build("qwen3", False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    layout, weights = MegatronConfig(tensor_parallel=ranks), {name: p.detach() for name, p in model.named_parameters()}
    held = {param.name: param for param in all_params(layout, model.config)}
    x, total = torch.randn(3, 24), torch.zeros(3, 24)
    for rank in range(ranks):
        fc1, fc2 = (
            local(held[f"decoder.layers.1.mlp.{name}.weight"], rank, layout, model.config, reader_of(weights))
            for name in ("linear_fc1", "linear_fc2")
        )
        gate, up = (x @ fc1.T).chunk(2, dim=-1)  # as Megatron-core's MLP does
        total += (F.silu(gate) * up) @ fc2.T
    torch.testing.assert_close(total, model.model.layers[1].mlp(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [LAYOUTS["tp4 pp2 vpp2"], LAYOUTS["tp2 pp4"]])
def test_a_rank_reads_what_it_holds_and_no_more(layout):
    model = build("qwen3_vl", True)
    weights, taken = dict(model.named_parameters()), Counter[str]()

    def read(name: str, dim: int, start: int, stop: int) -> Tensor:
        piece = weights[name].narrow(dim, start, stop - start)
        taken[name] += piece.numel()
        return piece

    for param in all_params(layout, model.config):
        taken.clear()
        held = local(param, 1, layout, model.config, read)
        assert taken.keys() == set(param.sources) and taken.total() == held.numel()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_split_undoes_fuse(groups):
    parts = [torch.randn(rows * groups, 3) for rows in (4, 1, 1)]
    fused = fuse(parts, groups)
    assert all(torch.equal(a, b) for a, b in zip(split(fused, (4, 1, 1), groups), parts, strict=True))
    if groups == 1:
        assert torch.equal(fused, torch.cat(parts))


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_map_of_one_layout_lists_what_every_rank_holds(tmp_path, capsys):
    model = build("qwen3_vl", True)
    model.config.dtype = torch.float32
    model.config.save_pretrained(tmp_path)
    layout = MegatronConfig(tensor_parallel=2, pipeline_parallel=2, virtual_pipeline=2)
    command = ["weights", "map", str(tmp_path), "--tp", "2", "--pp", "2", "--vpp", "2"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dtype"], found["tensors"]) == ("float32", len(hf_shapes(model.config)))
    assert [stage["ranks"] for stage in found["stages"]] == [[0, 1], [2, 3]]
    assert [[chunk["layers"] for chunk in stage["chunks"]] for stage in found["stages"]] == [[[0, 1], [2, 3]], [[1, 2], [3, 4]]]
    listed = [param for stage in found["stages"] for chunk in stage["chunks"] for param in chunk["params"]]
    expected = [(param.name, list(param.shape)) for param in all_params(layout, model.config)]
    assert [(param["name"], param["shape"]) for param in listed] == expected
    assert all(param["bytes"] == 4 * torch.Size(param["shape"]).numel() for param in listed)
    assert sum(stage["bytes"] for stage in found["stages"]) == sum(param["bytes"] for param in listed)
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "tp 2 pp 2 vpp 2, float32: each of" in text and "stage 1: ranks 2 to 3, each" in text
    assert "1 x decoder.layers.*.self_attention.linear_qkv.weight" in text and "48x24" in text
    assert "tied: model.language_model.embed_tokens.weight" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tp", "3"], "train.megatron.tensor_parallel=3 does not divide"),
        (["--tp", "0"], "train.megatron.tensor_parallel: input should be greater than 0, got 0"),
        (["--pp", "3"], "4 layers cannot be dealt out to train.megatron.pipeline_parallel=3"),
        (["--vpp", "2"], "set pipeline_parallel to 2 or more"),
    ],
)
def test_a_layout_that_cannot_hold_the_model_is_one_line(arguments, says, tmp_path, capsys):
    build("qwen3_vl", True).config.save_pretrained(tmp_path)
    assert cli.main(["weights", "map", str(tmp_path / "config.json"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_without_sizes_each_layout_gets_a_line(tmp_path, capsys):
    build("qwen3", True).config.save_pretrained(tmp_path)
    assert cli.main(["weights", "map", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith("tp 4 pp 2 vpp 2 ") and line.endswith("GB a rank") for line in lines)
    assert any(line.startswith("tp 8 pp 1 ") and "does not divide the model's 4 key/value heads" in line for line in lines)
    taken = sum(line.endswith("GB a rank") for line in lines)
    assert last == f"{taken} layouts: each of 46 tensors is held once, and comes back"


def test_weights_that_are_there_are_compared_with_the_config(tmp_path, capsys):
    model = build("qwen3", False)
    model.save_pretrained(tmp_path)
    assert cli.main(["weights", "map", str(tmp_path), "--tp", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}: names and shapes of 47 tensors are those of config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 44}))
    assert cli.main(["weights", "map", str(tmp_path), "--tp", "2"]) == 2
    error = capsys.readouterr().err
    assert "has 2 of another shape (model.embed_tokens.weight (40, 24), expected (44, 24))" in error
    (tmp_path / "config.json").unlink()
    assert cli.main(["weights", "map", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)  # the first is the one of every layout, above
def test_the_commands_of_the_documentation_run_as_they_stand(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(command) == 0
    assert "750" in capsys.readouterr().out


def test_the_documentation_has_these_commands():
    assert len(COMMANDS) == 3
