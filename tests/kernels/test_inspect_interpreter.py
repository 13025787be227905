"""bfloat16 in Triton's interpreter: what upstream gets wrong, and that `honest_bf16` computes it as a GPU does.

A test that upstream is wrong fails when it no longer is: then the override that it names is to be deleted.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from metis_kernels._launch import launch
from metis_kernels.inspect.interpreter import HonestBuilder, honest_bf16

BF16 = torch.bfloat16
# halfway between two neighbours (to the even one: down, up), just above halfway, negative, tiny, largest
VALUES = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1.7, 0.1, 3e-39, 3.39e38, -0.0])


def handle(values: Tensor) -> TensorHandle:
    """A block of the interpreter."""
    if values.dtype == BF16:
        return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)
    return TensorHandle(values.numpy(), tl.float32)


def tensor(block: TensorHandle) -> Tensor:
    values = torch.from_numpy(np.array(block.data))
    return values.view(BF16) if block.dtype == tl.bfloat16 and values.dtype == torch.uint16 else values


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def same(block: TensorHandle, expected: Tensor) -> bool:
    return torch.equal(tensor(block).double(), expected.double())


def dot(builder: InterpreterBuilder, a: Tensor, b: Tensor) -> TensorHandle:
    return builder.create_dot(handle(a), handle(b), handle(torch.zeros(len(a), b.shape[1])), None, None)


OPERATIONS = {
    "create_dot": (dot, lambda a, b: a.double() @ b.double()),
    "binary_op": (lambda builder, a, b: builder.create_fadd(handle(a), handle(b)), lambda a, b: a + b),
    "binary_op of a maximum": (lambda builder, a, b: builder.create_maximumf(handle(a), handle(b)), torch.maximum),
    "binary_op of a comparison": (lambda builder, a, b: builder.create_fcmpOLT(handle(a), handle(b)), lambda a, b: a < b),
    "unary_op": (lambda builder, a, _: builder.create_fneg(handle(a)), lambda a, _: -a),
    "ternary_op": (
        lambda builder, a, b: builder.create_clampf(handle(a), handle(-b.abs()), handle(b.abs()), ir.PROPAGATE_NAN.ALL),
        lambda a, b: a.clamp(-b.abs(), b.abs()),
    ),
    "create_fma": (
        lambda builder, a, b: builder.create_fma(handle(a), handle(b), handle(a)),
        lambda a, b: (a.double() * b.double() + a.double()).to(BF16),
    ),
    "cast_impl to an integer": (
        lambda builder, a, _: builder.cast_impl(handle(a), tl.int32),
        lambda a, _: a.int(),
    ),
    "cast_impl": (lambda builder, a, _: builder.cast_impl(handle(VALUES), tl.bfloat16), lambda a, _: VALUES.to(BF16)),
    "create_fp_to_fp": (
        lambda builder, a, _: builder.create_fp_to_fp(handle(VALUES), tl.bfloat16, ir.ROUNDING_MODE.RTNE),
        lambda a, _: VALUES.to(BF16),
    ),
}
"""By the override: the operation, and what it should give, exactly (sums of 16 products of integers are exact too)."""


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow and invalid bit patterns
def test_upstream_is_wrong_and_the_override_is_right(name: str):
    operation, truth = OPERATIONS[name]
    a, b = (8 * bf16(16, 16)).round(), (8 * bf16(16, 16, seed=1)).round()
    expected = truth(a, b)
    assert same(operation(HonestBuilder(), a, b), expected)
    assert not same(operation(InterpreterBuilder(), a, b), expected), f"upstream is right: delete the override {name}"


def test_upstream_reduces_bit_patterns():
    values = torch.tensor([-2.0, 1.0]).to(BF16)
    block = tl.tensor(handle(values), tl.block_type(tl.bfloat16, [2]))
    (biggest,) = ReduceOps(0, tl.standard._elementwise_max, False).apply((block,))
    assert not same(biggest.handle, values.max()), "upstream is right: delete _ReduceOps and _ScanOps"


def test_rounds_nan_to_nan_and_keeps_infinity():
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])
    rounded = tensor(HonestBuilder().cast_impl(handle(special), tl.bfloat16))
    assert rounded[0].isnan()
    assert rounded[1:].tolist() == [torch.inf, -torch.inf]


def test_a_select_moves_bits():
    builder, condition = HonestBuilder(), TensorHandle(np.array([True, False]), tl.int1)
    a, b = bf16(2), bf16(2, seed=1)
    assert same(builder.create_select(condition, handle(a), handle(b)), torch.stack([a[0], b[1]]))


@triton.jit
def _matmul(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b).to(tl.bfloat16))


def test_a_kernel_multiplies_bfloat16_and_rounds_the_result_once():
    a, b, out = bf16(16, 64), bf16(64, 32, seed=1), torch.full((16, 32), torch.nan, dtype=BF16)
    launch(_matmul, (1,), a, b, out, num_warps=1, M=16, N=32, K=64)
    truth = a.double() @ b.double()
    # half a unit in the last of 8 bits, and what float32 sums of 64 products add to that
    assert ((out.double() - truth).abs() <= truth.abs() * 2**-8 * (1 + 1e-3) + 1e-5).all()


@triton.jit
def _sum(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


def test_a_sum_of_bfloat16_is_refused():
    with pytest.raises(InterpreterError, match="convert to float32 first"):
        launch(_sum, (1,), bf16(16), torch.zeros(1, dtype=BF16), num_warps=1, N=16)


def test_a_process_that_compiles_kernels_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET: expected 1"), honest_bf16():
        pass
