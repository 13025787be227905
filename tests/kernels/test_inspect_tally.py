"""Counts of kernels whose counts are known in closed form."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from metis_kernels._launch import launch
from metis_kernels.inspect.tally import Counts, tally


@triton.jit
def _add(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=inside) + tl.load(y_ptr + i, mask=inside), mask=inside)


def add(size: int, dtype: torch.dtype) -> None:
    x = torch.zeros(size, dtype=dtype)
    launch(_add, (triton.cdiv(size, 64),), x, x, x.clone(), size, num_warps=1, BLOCK=64)


@triton.jit
def _matmul(a_ptr, b_ptr, out_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        b = tl.load(b_ptr + k[:, None] * N + n[None, :], mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        out = tl.dot(a, b, out)
    tl.store(out_ptr + m[:, None] * N + n[None, :], out, mask=(m[:, None] < M) & (n[None, :] < N))


def test_vector_add_moves_three_elements_a_result():
    with tally() as counted:
        add(1000, torch.float32)
    assert counted.total == Counts(launches=1, load_bytes=2 * 4 * 1000, store_bytes=4 * 1000)


def test_matmul_loads_each_operand_once_a_tile_and_pays_for_padding():
    m, n, k = 40, 33, 50
    a, b, out = torch.rand(m, k).bfloat16(), torch.rand(k, n).bfloat16(), torch.empty(m, n)
    with tally() as counted:
        launch(_matmul, (2, 3), a, b, out, m, n, k, num_warps=1, BLOCK_M=32, BLOCK_N=16, BLOCK_K=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    # 3 columns of tiles load all of a, 2 rows of tiles all of b; tiles are 64 x 48 x 64 in all
    assert counted.total == Counts(
        launches=1, load_bytes=2 * (3 * m * k + 2 * k * n), store_bytes=4 * m * n, dot_flops=2 * 64 * 48 * 64
    )


@triton.jit
def _softmax_parts(x_ptr, sum_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(sum_ptr, tl.sum(tl.exp(x) + tl.exp2(x)))


def test_exponentials_and_atomics_are_counted():
    x, total = torch.zeros(4, 64), torch.zeros(1)
    with tally() as counted:
        launch(_softmax_parts, (4,), x, total, num_warps=1, BLOCK=64)
    assert total.item() == 2 * 4 * 64
    assert counted.total == Counts(launches=1, load_bytes=4 * 4 * 64, atomic_bytes=4 * 4, exps=2 * 4 * 64)


def test_kernels_are_told_apart_and_nested_tallies_both_count():
    with tally() as outer:
        add(64, torch.float16)
        with tally() as inner:
            add(64, torch.bfloat16)
            launch(_softmax_parts, (1,), torch.zeros(64), torch.zeros(1), num_warps=1, BLOCK=64)
        add(64, torch.bfloat16)
    assert inner.kernels["_add"] == Counts(launches=1, load_bytes=256, store_bytes=128)
    assert inner.kernels["_softmax_parts"].exps == 128
    assert outer.kernels["_add"] == Counts(launches=3, load_bytes=3 * 256, store_bytes=3 * 128)
    assert outer.total.launches == 4
