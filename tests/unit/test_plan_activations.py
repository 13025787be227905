"""`metis-fast plan`: activations against what autograd keeps, and against a count by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from planning import big, config, layout, setting, tiny
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionBlock

from metis_fast.config import build
from metis_fast.plan.duration import step_seconds
from metis_fast.plan.memory import Pass, RankMemory, _Activations, in_flight, memory
from metis_fast.plan.shape import Shape
from metis_fast.train.megatron.layout import parts
from metis_kernels import Segments, prefix_attention


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
