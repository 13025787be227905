"""What fills Megatron-core's layers, and what stands in for CUDA where there is none."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # megatron-core's import says what is not installed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def modules():
    return importlib.import_module("metis_fast.train.megatron.modules")


def gradients(module, inputs):
    """Outputs, and gradients of inputs and weights under a weighted sum."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    out = module(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    parts = [
        (value.float() * torch.linspace(-1, 1, value.numel(), device=value.device).view(value.shape)).sum() for value in out
    ]
    total = torch.stack(parts).sum()
    weights = list(module.parameters()) if isinstance(module, torch.nn.Module) else []
    return [*(value.detach() for value in out), *torch.autograd.grad(total, [*inputs, *weights])]


def angles(device="cpu"):
    half = torch.randn(7, 16, device=device)
    whole = torch.cat([half, half], -1)
    return whole.cos(), whole.sin()


ROPE_INTERPRETED = """
import torch
from unittest import mock
from metis_fast.train.megatron import modules
from test_megatron_parts import angles, gradients
torch.manual_seed(0)
cos, sin = angles()
inputs = [torch.randn(7, 4, 32), torch.randn(7, 2, 32)]
run = lambda q, k: modules.rotate(q, k, cos, sin)
plain = gradients(run, inputs)
with mock.patch.object(modules, "_use_liger", lambda x: True):
    liger = gradients(run, inputs)
for one, other in zip(plain, liger, strict=True):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
assert not torch.equal(plain[0], inputs[0])
print("equal")
"""


def test_ligers_rotary_kernel_computes_ours_in_the_interpreter():
    """Liger's other two kernels call a method of a scalar that Triton's interpreter has as a plain number."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ROPE_INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.endswith("equal\n"), done.stderr[-2000:]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_kernels_compute_what_plain_torch_does(modules, monkeypatch, dtype):
    torch.manual_seed(0)
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    norm = modules.RMSNorm(config, 64).cuda()
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    cos, sin = (part.to(dtype) for part in angles("cuda"))
    cases = [
        (norm, [torch.randn(9, 1, 64, device="cuda", dtype=dtype)]),
        (modules.SwiGlu(config), [torch.randn(9, 1, 128, device="cuda", dtype=dtype)]),
        (
            lambda query, key: modules.rotate(query, key, cos, sin),
            [torch.randn(7, heads, 32, device="cuda", dtype=dtype) for heads in (4, 2)],
        ),
    ]
    for module, inputs in cases:
        liger = gradients(module, inputs)
        with monkeypatch.context() as patch:
            patch.setattr(modules, "_use_liger", lambda x: False)
            plain = gradients(module, inputs)
        for one, other in zip(liger, plain, strict=True):
            share = 1e-5 if dtype == torch.float32 else 1e-2
            assert float((one - other).float().norm()) <= share * float(other.float().norm())


def test_transformer_engines_layers_take_the_place_of_megatrons_where_they_can_run(modules):
    def linears(with_transformer_engine):
        layer = modules.layer_spec(with_transformer_engine).submodules
        attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
        return [attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2]

    engine = modules.transformer_engine
    assert linears(False) == [modules.ColumnParallelLinear, modules.RowParallelLinear] * 2
    assert linears(True) == [engine.TEColumnParallelLinear, engine.TERowParallelLinear] * 2
    assert engine.TEColumnParallelLinear is not modules.ColumnParallelLinear
    assert modules.has_transformer_engine() == (torch.cuda.is_available() and modules.transformer_engine.HAVE_TE)


NEEDED = """
import re, sys
import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
import megatron.core.tensor_parallel.random as random
import megatron.core.distributed.param_and_grad_buffer as buffers
source = lambda module: open(module.__file__).read()
# each of these is a reason for `cpu`; where one is gone, what it stands in for can go too
assert "torch.cuda.current_device()" in source(buffers)
assert "torch.cuda.get_rng_state()" in source(random)
for module in (clip_grads, distrib_optimizer, optimizer):
    assert "'torch.cuda.FloatTensor" in source(module), module
assert buffers.torch is torch
from metis_fast.train.megatron import cpu
cpu.install()
cpu.install()
assert buffers.torch is not torch and buffers.torch.cuda.current_device() == torch.device("cpu")
assert buffers.torch.empty(2, device="cuda").device.type == "cpu" and buffers.torch.Tensor is torch.Tensor
assert "torch.FloatTensor" in clip_grads.clip_grad_by_total_norm_fp32.__code__.co_consts
assert torch.empty.__name__ == "empty" and not torch.cuda.is_available()  # torch itself is as it was
print("done")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing stands in for CUDA where it is")
def test_the_stand_in_for_cuda_is_needed_and_reaches_megatron_only():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", NEEDED], capture_output=True, text=True, timeout=600)
    assert done.stdout == "done\n", done.stderr[-2000:]


def test_the_stand_in_leaves_everything_alone_where_cuda_is(monkeypatch):
    from metis_fast.train.megatron import cpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = {name: vars(module).get("torch") for name, module in sys.modules.items() if name.startswith("megatron.core")}
    cpu.install()
    assert {name: vars(sys.modules[name]).get("torch") for name in before} == before
