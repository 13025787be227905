"""`metis-fast plan`: each part of its memory against a count by hand or by torch, its order, its refusals."""

from __future__ import annotations

import json
import re
import resource
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionBlock

from metis_fast import cli
from metis_fast.config import Config, MegatronConfig, build
from metis_fast.errors import ConfigError
from metis_fast.plan.candidates import candidates
from metis_fast.plan.duration import Setting, StepSeconds, step_seconds
from metis_fast.plan.gpus import GIB, GPUS
from metis_fast.plan.memory import Pass, RankMemory, _Activations, in_flight, memory
from metis_fast.plan.shape import Shape, read_model_config
from metis_fast.plan.workload import Workload, mini_batch
from metis_fast.train.flops import FlopModel
from metis_fast.train.megatron.layout import check, parts
from metis_kernels import Segments, prefix_attention

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


# -- weights, gradients, optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [tiny(True), tiny(False), big()], ids=["tied", "untied", "8b"])
def test_parameters_are_those_of_the_model(model):
    with torch.device("meta"):
        real = Qwen3VLForConditionalGeneration(model)
    shape = Shape.of(model)
    assert shape.num_parameters == sum(p.numel() for p in real.parameters())
    assert shape.tower is not None
    assert sorted(shape.tower.parameters()) == sorted(p.numel() for p in real.model.visual.parameters())
    layer = real.model.language_model.layers[0]
    assert sum(shape.layer_parameters(1)) == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_stages_hold_the_whole_model_and_a_tied_head_twice_where_there_are_two(tied, stages, dtype):
    model = tiny(tied)
    one = layout(pipeline_parallel=stages, distributed_optimizer=False)
    ranks = [memory(config(dtype=dtype), model, one, stage) for stage in range(stages)]
    shape, element = Shape.of(model), 2 if dtype == "bfloat16" else 4
    copies = 400 * 32 if tied and stages == 2 else 0
    number = shape.num_parameters + copies
    assert sum(rank.weights for rank in ranks) == number * element
    assert sum(rank.gradients for rank in ranks) == number * 4
    assert sum(rank.optimizer for rank in ranks) == number * (12 if dtype == "bfloat16" else 8)


def test_a_tensor_parallel_rank_by_hand():
    """8B, stage 1 of 2 with 17 layers, on 4 tensor-parallel ranks."""
    one = layout(
        tensor_parallel=4, pipeline_parallel=2, first_stage_layers=19, last_stage_layers=17, distributed_optimizer=False
    )
    held = memory(config(), big(), one, 4)
    matrices = (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288) // 4
    number = 17 * (matrices + 2 * 4096 + 2 * 128) + 4096 + 151936 * 4096 // 4
    assert (held.weights, held.gradients, held.optimizer) == (2 * number, 4 * number, 12 * number)
    assert held.vision == 0


def test_the_distributed_optimizer_splits_its_states_alone():
    one, four = (memory(config(), big(), layout(data_parallel=n), 0) for n in (1, 4))
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=1e-6)
    assert (four.weights, four.gradients) == (one.weights, one.gradients)
    whole = memory(config(), big(), layout(data_parallel=4, distributed_optimizer=False), 0)
    assert whole.optimizer == pytest.approx(one.optimizer, rel=1e-6)


def test_its_buffers_align_every_parameter():
    """Norms of a model this small stand in 64 elements each."""
    model, shape = tiny(False), Shape.of(tiny(False))
    assert shape.tower is not None
    sizes = [*shape.layer_parameters(1) * 4, 32, 2 * [400 * 32], *shape.tower.parameters()]
    flat = [n for size in sizes for n in (size if isinstance(size, list) else [size])]
    elements = -(-sum(-(-n // 64) * 64 for n in flat) // 384) * 384  # 3 ranks: whole 128 each
    held = memory(config(dtype="float32"), model, layout(data_parallel=3), 0)
    assert (held.weights, held.gradients) == (4 * elements, 4 * elements)
    assert held.optimizer == -(-8 * sum(flat) // 3)  # states are made without the gaps


def test_frozen_parts_have_weights_only():
    def held(*freeze: str) -> RankMemory:
        return memory(config(freeze=freeze), tiny(True), layout(distributed_optimizer=False), 0)

    everything, shape = held(), Shape.of(tiny(True))
    assert shape.tower is not None
    for part, number in (("vision", sum(shape.tower.parameters())), ("embeddings", 400 * 32)):
        rest = held(part)
        assert rest.weights == everything.weights
        assert everything.gradients - rest.gradients == 4 * number
        assert everything.optimizer - rest.optimizer == 12 * number


def test_a_reference_policy_is_a_second_copy_of_the_weights_and_a_pass():
    plain, pulled = (setting(changes={"loss": {"kl_coef": kl}}) for kl in (0.0, 0.1))
    one = layout(tensor_parallel=8, data_parallel=8, distributed_optimizer=False)
    weights = [memory(here.config, big(), one, 0).weights for here in (plain, pulled)]
    assert weights[1] == 2 * weights[0]
    times = [step_seconds(here, one) for here in (plain, pulled)]
    assert times[1].old_logprobs > 2 * times[0].old_logprobs


# -- activations ------------------------------------------------------------------------------------------------------------


class Norm(torch.autograd.Function):
    """As a fused kernel does it: keeps its input and a statistic a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        rstd = x.float().pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        ctx.save_for_backward(x.contiguous(), weight, rstd)
        return (x.float() * rstd).to(x.dtype) * weight


class SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Layer(nn.Module):
    """A decoder layer with Megatron-core's grouped product of q, k and v, on one rank."""

    def __init__(self, shape: Shape, dtype: torch.dtype, fused: bool) -> None:
        super().__init__()
        self.shape = shape
        self.norm: Callable[[Tensor, Tensor], Tensor] = Norm.apply if fused else plain_norm
        self.swiglu: Callable[[Tensor, Tensor], Tensor] = SwiGlu.apply if fused else plain_swiglu
        width, size = shape.hidden, shape.head_size
        shapes = {
            "norm1": (width,), "qkv": ((shape.heads + 2 * shape.kv_heads) * size, width), "q_norm": (size,), "k_norm": (size,),
            "out": (width, shape.heads * size), "norm2": (width,), "fc1": (2 * shape.intermediate, width),
            "fc2": (width, shape.intermediate),
        }  # fmt: skip
        self.weights = nn.ParameterDict({name: torch.ones(*sizes, dtype=dtype) / 100 for name, sizes in shapes.items()})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        w, shape, size = self.weights, self.shape, self.shape.head_size
        group = shape.heads // shape.kv_heads
        mixed = F.linear(self.norm(x, w["norm1"]), w["qkv"]).view(len(x), shape.kv_heads, (group + 2) * size)
        query, key, value = mixed.split([group * size, size, size], dim=-1)
        query = self.norm(query.reshape(len(x), shape.heads, size), w["q_norm"])
        key = self.norm(key, w["k_norm"])

        def rotate(part: Tensor) -> Tensor:
            left, right = part.chunk(2, -1)
            return part * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]

        out = prefix_attention(rotate(query), rotate(key), value, segments)
        x = x + F.linear(out.reshape(len(x), -1), w["out"])
        gate, up = F.linear(self.norm(x, w["norm2"]), w["fc1"]).chunk(2, -1)
        return x + F.linear(self.swiglu(gate, up), w["fc2"])


def kept(module: nn.Module, *inputs: object) -> int:
    """Bytes of distinct storages that autograd keeps of a forward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*inputs)
    return sum(storages.values())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_keeps_what_the_formula_says(dtype, fused):
    shape, tokens = replace(Shape.of(tiny(False)), hidden=64, intermediate=96), 96
    element = dtype.itemsize
    x = torch.randn(tokens, shape.hidden, dtype=dtype, requires_grad=True)
    cos, sin = torch.ones(2, tokens, shape.head_size, dtype=dtype)
    seen = kept(Layer(shape, dtype, fused), x, cos, sin, Segments((0, 40, 70, tokens), (-1, 0, 0)))
    count = _Activations(shape, layout(), Pass(tokens, 0, tokens), element, fused, True)
    rotary = 2 * shape.head_size * element
    assert seen == pytest.approx((count.layer("none") + rotary) * tokens, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_block_of_the_tower_keeps_what_the_formula_says(dtype):
    model = tiny(False)
    _, vision = parts(model)
    assert vision is not None
    vision._attn_implementation = "sdpa"
    block = Qwen3VLVisionBlock(vision).to(dtype)
    patches, h, i = 256, vision.hidden_size, vision.intermediate_size
    hidden = torch.randn(patches, h, dtype=dtype, requires_grad=True)
    angles = torch.ones(2, patches, h // vision.num_heads)
    seen = kept(block, hidden, torch.tensor([0, 128, patches]), tuple(angles))
    # log-sum-exps of the heads, and cos and sin, which all blocks share, are beside the formula
    beside = (4 * vision.num_heads + 2 * 4 * h // vision.num_heads) * patches
    assert seen - beside == pytest.approx(((11 * h + 2 * i) * dtype.itemsize + 16) * patches, rel=0.05)


def test_activations_of_a_rank_by_hand():
    """8B, 4 tensor-parallel ranks with sequence parallelism, full recompute, first of 2 stages: the inputs of 18 layers of 2
    passes, rotary angles, and one layer with its gradients."""
    size = Pass(40960, 0, 40960)
    one = layout(tensor_parallel=4, pipeline_parallel=2, sequence_parallel=True, recompute="full")
    held = memory(config(), big(), one, 0, size)
    inputs = 18 * 4096 // 4 * 2
    norms = 2 * (2 * 4096 // 4 * 2 + 4 / 4)
    attention = (1024 + 2 * 256) * 2 + (1280 * 2 + 4 * 10) + 1280 * 2 + 1024 * 2 + 4 * 8
    layer = norms + attention + 3 * 3072 * 2
    gradients = (3 * 3072 + 3 * 4096) * 2
    assert held.activations == pytest.approx(40960 * (2 * (inputs + 512) + layer - 2048 + gradients), rel=1e-9)


def test_the_heads_working_set_by_hand():
    size = Pass(1000, 0, 600)
    held = memory(build({"loss": {"token_chunk": 256}}), big(), layout(tensor_parallel=2), 0, size)
    logits = 256 * 151936 // 2 * 6
    rows = 2 * 600 * 4096 * 2 + 256 * 4096 * 6
    assert held.head == logits + rows + 1000 * (2 * 4096 * 2 + 4)


@pytest.mark.parametrize(
    ("stages", "chunks", "held"), [(1, 1, [1]), (4, 1, [4, 3, 2, 1]), (2, 2, [5, 3]), (4, 3, [15, 13, 11, 9])]
)
def test_passes_in_flight(stages, chunks, held):
    one = layout(pipeline_parallel=stages, virtual_pipeline=chunks)
    assert [in_flight(one, stage) for stage in range(stages)] == held


def test_recompute_lowers_activations_and_costs_time():
    here = setting()
    ran = {}
    for name in ("none", "selective", "full"):
        one = layout(tensor_parallel=8, data_parallel=8, sequence_parallel=True, recompute=name)
        seconds = step_seconds(here, one)
        ran[name] = (memory(here.config, big(), one, 0).activations, -seconds.dense, -seconds.tensor_parallel)
    assert ran["none"] > ran["selective"] > ran["full"]
    assert all(a >= b >= c for a, b, c in zip(*ran.values(), strict=True))


def test_tensor_parallel_ranks_halve_the_decoder_but_not_the_tower():
    def held(tensor: int, **rest: object) -> RankMemory:
        return memory(config(), big(), layout(tensor_parallel=tensor, sequence_parallel=tensor > 1, **rest), 0)

    two, four = held(2), held(4)
    tower = sum(n for n in (Shape.of(big()).tower or pytest.fail()).parameters())
    assert (two.weights - 2 * tower) == pytest.approx(2 * (four.weights - 2 * tower), rel=1e-3)
    assert two.vision == four.vision
    assert held(4).activations < memory(config(), big(), layout(tensor_parallel=4), 0).activations


def test_a_frozen_tower_keeps_no_activations():
    frozen, trained = (memory(config(freeze=f), big(), layout(recompute="full"), 0).vision for f in (["vision"], []))
    assert 0 < frozen < trained / 2


# -- time -------------------------------------------------------------------------------------------------------------------


def test_a_mini_batch_is_what_packing_makes_of_it():
    """64 groups of 16, an eighth uniform; 3 rollouts of 10 fit behind a prompt of 10 into 40 tokens: 6 parts."""
    settings = build({"train": {"tokens_per_micro_batch": 40}, "rollout": {"max_prompt_tokens": 20, "max_response_tokens": 20}})
    load = Workload(10, 10, sampled=0.5, images=0, uniform=0.125)
    batch = mini_batch(settings, load, FlopModel(1, 1, 1))
    each = 16 / 6
    assert batch.passes == 56 * 6
    assert batch.tokens == pytest.approx(10 + each * 10)
    assert batch.pairs == pytest.approx(50 + each * 150)
    assert batch.rows == pytest.approx(each * 5)


def test_an_update_by_hand():
    """8B on 8 ranks of tensor parallelism: products of all live tokens, forward and twice backward."""
    here = setting(gpus=8)
    seconds = step_seconds(here, layout(tensor_parallel=8, sequence_parallel=True))
    batch = mini_batch(here.config, here.load, here.flops)
    tokens = 2 * batch.passes * batch.tokens
    assert seconds.dense == pytest.approx(3 * here.flops.token * tokens / 8 / (989e12 * 0.6))
    reduced = 5 * 36 * 2 * 7 / 8 * tokens * 4096 * 2  # all-reduces of a layer, bytes
    assert seconds.tensor_parallel == pytest.approx(reduced / (450e9 * 0.7))
    assert seconds.bubble == pytest.approx(0, abs=1e-9) and seconds.data_parallel == 0
    assert seconds.total == pytest.approx(sum(getattr(seconds, part.name) for part in fields(seconds)))


def test_more_stages_wait_longer_and_interleaving_waits_less():
    here = replace(setting(), load=Workload(3072, 2048, uniform=0.0))  # 64 passes: interleaving fills none up
    plain, deep, mixed = (
        step_seconds(here, layout(tensor_parallel=4, pipeline_parallel=p, virtual_pipeline=v, data_parallel=16 // p)).bubble
        for p, v in ((2, 1), (4, 1), (4, 3))
    )
    assert 0 < plain < deep and mixed < deep


def test_what_the_settings_save_is_saved_here_too():
    base = step_seconds(setting(), layout(tensor_parallel=8, data_parallel=8))
    for change, part in (
        ({"train": {"share_prompt": False}}, "dense"),
        ({"train": {"skip_old_logprobs": False}}, "old_logprobs"),
        ({"train": {"skip_head_rows": False}}, "head"),
        ({"train": {"skip_zero_advantage": False}}, "dense"),
    ):
        slower = step_seconds(setting(changes=change), layout(tensor_parallel=8, data_parallel=8))
        assert getattr(slower, part) > getattr(base, part), change
    engine = step_seconds(setting(changes={"loss": {"proximal": "engine"}}), layout(tensor_parallel=8, data_parallel=8))
    assert engine.old_logprobs == 0


def test_faster_gpus_are_faster():
    one = layout(tensor_parallel=8, data_parallel=8)
    times = [step_seconds(replace(setting(), gpu=GPUS[name]), one) for name in ("h100", "h200", "b200")]
    assert times[0].rollout > times[1].rollout > times[2].rollout
    assert times[0].dense == times[1].dense > times[2].dense


# -- layouts ----------------------------------------------------------------------------------------------------------------


def test_layouts_are_valid_whole_and_ordered():
    here = setting()
    own = layout(tensor_parallel=2, pipeline_parallel=4, data_parallel=8)  # one that the search would not propose
    found = candidates(here, big(), own)
    for one in found:
        check(one.layout, big())
        assert one.layout.num_ranks == 64
        assert one.layout.sequence_parallel == (one.layout.tensor_parallel > 1) or one.own
        assert one.fits == (one.memory.total <= GPUS["h100"].memory)
    assert [one.layout for one in found if one.own] == [own]
    fitting = [one.seconds.total for one in found if one.fits]
    rest = [one.memory.total for one in found if not one.fits]
    assert fitting == sorted(fitting) and rest == sorted(rest)
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    assert len({str(one.layout) for one in found}) == len(found)


def test_the_worst_stage_decides():
    here = setting()
    own = layout(tensor_parallel=2, pipeline_parallel=4, data_parallel=8, sequence_parallel=True, recompute="full")
    (one,) = [one for one in candidates(here, big(), own) if one.own]
    engine = int(0.3 * GPUS["h100"].memory)
    each = [memory(here.config, big(), own, stage * 16, engine=engine).total for stage in range(4)]
    assert one.memory.total == max(each) == each[one.stage]


# -- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def described(tmp_path: Path) -> Path:
    path = tmp_path / "eight.json"
    path.write_text(json.dumps(EIGHT_B))
    return path


@pytest.fixture
def plan(tmp_path: Path, described: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `metis-fast plan` on an empty config; exit code, output, errors."""
    empty = tmp_path / "empty.yaml"
    empty.write_text("")

    def run(*words: object, config: Path = empty, model: bool = True) -> tuple[int, str, str]:
        code = cli.main(["plan", str(config), *(["--model", str(described)] if model else []), *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


MEGATRON = ("train.backend=megatron", "train.megatron.tensor_parallel=8", "train.megatron.sequence_parallel=true")


def test_json_has_every_layout_with_what_is_predicted_of_it(plan):
    code, out, _ = plan("--json", *MEGATRON, "train.megatron.recompute=full")
    tree = json.loads(out)
    assert (code, tree["num_gpus"], tree["gpu"]) == (0, 8, "h100")
    assert sum(one["own"] for one in tree["layouts"]) == 1
    for one in tree["layouts"]:
        assert set(one) == {"layout", "own", "predicted"}
        predicted = one["predicted"]
        for name, made in (("memory_bytes", RankMemory), ("seconds", StepSeconds)):
            assert set(predicted[name]) == {part.name for part in fields(made)} | {"total"}
            assert predicted[name]["total"] == pytest.approx(sum(v for k, v in predicted[name].items() if k != "total"))
        MegatronConfig.model_validate(one["layout"])


def test_the_table_says_what_was_assumed_and_marks_the_configs_layout(plan):
    code, out, _ = plan(*MEGATRON, "train.megatron.recompute=full")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("PREDICTED, nothing here was measured")
    assert sum(line.startswith("PREDICTED") for line in lines) == 3
    assert sum("* tp8+sp pp1" in line and "full" in line for line in lines) == 2


def test_a_layout_of_the_config_that_does_not_fit_ends_with_1_and_the_best_that_does(plan):
    code, out, _ = plan(*MEGATRON, "train.megatron.recompute=none")
    assert code == 1 and "does NOT fit; the best that does is tp" in out
    code, out, _ = plan("--gpus", 16, *MEGATRON, "train.megatron.recompute=none")
    assert code == 0 and "The config has no layout for this many GPUs" in out


def test_nothing_that_fits_says_what_to_change(plan):
    code, out, _ = plan("--gpus", 1)
    assert code == 1 and "Take more GPUs (--gpus), lower --engine-share, or lower train.tokens_per_micro_batch" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", 12], "expected at most 8, or a multiple of 8 (whole nodes), got 12"),
        (["--gpus", 0], "got 0; set --gpus"),
        (["--engine-share", 1], "expected a share from 0 to below 1, got 1.0"),
        (["--engine-share", 0.1], "cannot hold the weights and one rollout of 40960 tokens; set --engine-share to 0.28"),
        (["--prompt-tokens", 30000], "expected 1 to rollout.max_prompt_tokens=24576, got 30000"),
        (["--response-tokens", 0], "expected 1 to rollout.max_response_tokens=16384, got 0"),
        (["--uniform", 1], "--uniform: expected a share from 0.0 to 0.99"),
        (["--sampled", "nan"], "--sampled: expected a share"),
        (["--images", 4], "4 images of 1024 tokens are more than the 3072 tokens of a prompt"),
        (["--images", -1], "--images: expected 0 or more"),
        (["train.backend=megatron", "train.megatron.tensor_parallel=3"], "does not divide the model's 32 attention heads"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_to_do(plan, words, says):
    code, out, err = plan(*words)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1


def test_the_model_is_found_in_its_folder_then_in_its_description(plan, tmp_path, described):
    code, _, err = plan(model=False)
    assert code == 2 and "give --model FILE_OR_FOLDER, set model.config" in err
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny(True).to_dict(), default=str))
    for given, path, parameters in (
        (None, folder, Shape.of(tiny(True)).num_parameters),
        (described, folder, Shape.of(big()).num_parameters),
        (folder, tmp_path / "none", Shape.of(tiny(True)).num_parameters),
        (None, tmp_path / "none", Shape.of(big()).num_parameters),
    ):
        settings = build({"model": {"path": str(path), "config": str(described)}})
        assert Shape.of(read_model_config(settings, given)).num_parameters == parameters


@pytest.mark.parametrize(
    ("text", "says"), [("{", "is not JSON"), ("[]", "got None"), ('{"model_type": "llama"}', "got 'llama'")]
)
def test_what_is_no_qwen_is_refused(tmp_path, text, says):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_model_config(Config(), path)
    with pytest.raises(ConfigError, match="No such file"):
        read_model_config(Config(), tmp_path / "none.json")


def test_an_engine_that_sleeps_needs_room_beside_what_the_trainer_keeps_once_it_is_awake(plan, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)

    def own(share):
        setting = f"rollout.vllm.gpu_memory={share}"
        code, out, _ = plan("--json", setting, config=CONFIGS / "qwen3vl_8b_hdpo.yaml", model=False)
        (found,) = [one for one in json.loads(out)["layouts"] if one["own"]]
        return code, found

    (code, small), (too_much, large) = own(0.5), own(0.6)  # 29 GiB of weights, gradients and states, 4 of reserve, of 79
    assert (code, too_much) == (0, 1)
    assert small["predicted"]["fits"] and not large["predicted"]["fits"]
    memory = [one["predicted"]["memory_bytes"] for one in (small, large)]
    assert memory[0] == memory[1] and memory[0]["engine"] == 0  # of the update, during which it sleeps


@pytest.mark.parametrize("name", ["qwen3vl_8b_hdpo", "qwen3vl_8b_hdpo_64gpu", "qwen3vl_8b_hdpo_512gpu"])
def test_a_shipped_config_fits_and_is_near_the_best(plan, name, monkeypatch):
    started = time.monotonic()
    monkeypatch.chdir(CONFIGS.parent)
    code, out, _ = plan("--json", config=CONFIGS / f"{name}.yaml", model=False)
    tree = json.loads(out)
    (own,) = [one for one in tree["layouts"] if one["own"]]
    best = tree["layouts"][0]["predicted"]["seconds"]["total"]
    assert code == 0 and own["predicted"]["seconds"]["total"] < 1.05 * best
    assert own["predicted"]["memory_bytes"]["total"] < 0.95 * tree["gpu_memory_bytes"]
    assert time.monotonic() - started < 120
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < 8 * GIB


# -- the page ---------------------------------------------------------------------------------------------------------------


def _commands() -> list[str]:
    return re.findall(r"^metis-fast .*$", (CONFIGS.parent / "docs" / "plan.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_shows_commands():
    assert len(_commands()) >= 5


@pytest.mark.parametrize("line", _commands())
def test_a_command_of_the_page_runs(line, monkeypatch, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0
    assert "redicted" in capsys.readouterr().out.lower()
