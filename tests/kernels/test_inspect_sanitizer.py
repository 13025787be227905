"""The sanitizer finds planted defects, names them, and lets right kernels pass."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from metis_kernels._launch import launch
from metis_kernels.inspect.sanitizer import DoubleStoreError, OutOfBoundsError, sanitize


@triton.jit
def _add_one(x_ptr, out_ptr, size, BLOCK: tl.constexpr, STRIDE: tl.constexpr, MASK: tl.constexpr):
    i = tl.program_id(0) * STRIDE + tl.arange(0, BLOCK)
    inside = i < size if MASK else i >= 0
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=inside) + 1, mask=inside)


def add_one(size: int, stride: int = 32, mask: bool = True, shorter: int = 0) -> torch.Tensor:
    x, out = torch.arange(size, dtype=torch.float32), torch.full((size - shorter,), torch.nan)
    launch(_add_one, (triton.cdiv(size, stride),), x, out, size, num_warps=1, BLOCK=32, STRIDE=stride, MASK=mask)
    return out


def test_a_right_kernel_passes_and_computes():
    with sanitize():
        assert torch.equal(add_one(100), torch.arange(1, 101, dtype=torch.float32))


def test_a_missing_mask_is_out_of_bounds_in_the_lanes_past_the_end():
    with sanitize(), pytest.raises(OutOfBoundsError) as error:
        add_one(100, mask=False)
    # the fourth program has lanes 96 to 127
    expected = (
        "_add_one, program (3, 0, 0): load of 4 bytes out of bounds in 28 of 32 active lanes, first at byte 400 of a tensor"
    )
    assert str(error.value).startswith(expected)


def test_a_store_past_a_shorter_output_is_out_of_bounds():
    with sanitize(), pytest.raises(OutOfBoundsError, match=r"program \(3, 0, 0\): store of 4 bytes out of bounds in 3 of 4 "):
        add_one(100, shorter=3)


def test_a_view_ends_where_it_ends_and_not_with_its_buffer():
    buffer = torch.zeros(64)
    with sanitize(), pytest.raises(OutOfBoundsError, match="in 16 of 32 active lanes"):
        launch(_add_one, (1,), buffer[:16], torch.zeros(32), 32, num_warps=1, BLOCK=32, STRIDE=32, MASK=True)


def test_overlapping_blocks_of_two_programs_are_a_double_store():
    with sanitize(), pytest.raises(DoubleStoreError) as error:
        add_one(64, stride=16)
    expected = "_add_one, program (1, 0, 0): store to 16 lanes that program (0, 0, 0) has written in the same launch"
    assert str(error.value) == expected


def test_two_launches_may_store_to_one_address():
    x = torch.zeros(32)
    with sanitize():
        for _ in range(2):
            launch(_add_one, (1,), x, x, 32, num_warps=1, BLOCK=32, STRIDE=32, MASK=True)
    assert torch.equal(x, torch.full((32,), 2.0))


@triton.jit
def _count(out_ptr, OFFSET: tl.constexpr, STORE: tl.constexpr):
    tl.atomic_add(out_ptr + OFFSET + tl.arange(0, 4), 1)
    if STORE and tl.program_id(0) == 1:
        tl.store(out_ptr, 7)


def test_atomics_of_programs_may_meet():
    out = torch.zeros(4, dtype=torch.int32)
    with sanitize():
        launch(_count, (3,), out, num_warps=1, OFFSET=0, STORE=False)
    assert out.tolist() == [3, 3, 3, 3]


def test_a_store_must_not_meet_an_atomic():
    with sanitize(), pytest.raises(DoubleStoreError, match=r"program \(1, 0, 0\): store to 1 lanes that an atomic"):
        launch(_count, (2,), torch.zeros(4, dtype=torch.int32), num_warps=1, OFFSET=0, STORE=True)


def test_an_atomic_past_the_end_is_out_of_bounds():
    with sanitize(), pytest.raises(OutOfBoundsError, match="atomic of 4 bytes out of bounds in 3 of 4 "):
        launch(_count, (1,), torch.zeros(4, dtype=torch.int32), num_warps=1, OFFSET=3, STORE=False)


@triton.jit
def _copy_tile(source, target, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    target.store([row, 0], source.load([row, 0]))


def test_a_descriptor_clips_at_its_shape_and_is_checked_against_its_tensor():
    source, target = torch.rand(12, 16), torch.full((12, 16), torch.nan)
    block = [8, 16]
    with sanitize():
        launch(
            _copy_tile,
            (2,),
            TensorDescriptor.from_tensor(source, block),
            TensorDescriptor.from_tensor(target, block),
            num_warps=1,
            ROWS=8,
        )
        assert torch.equal(target, source)
        too_tall = TensorDescriptor(source, [16, 16], [16, 1], block)
        with pytest.raises(OutOfBoundsError, match=r"program \(1, 0, 0\): load of 4 bytes out of bounds in 64 of 128 "):
            launch(_copy_tile, (2,), too_tall, TensorDescriptor.from_tensor(torch.empty(16, 16), block), num_warps=1, ROWS=8)
        with pytest.raises(DoubleStoreError, match="store to 64 lanes"):
            descriptors = TensorDescriptor.from_tensor(source, block), TensorDescriptor.from_tensor(target, block)
            launch(_copy_tile, (2,), *descriptors, num_warps=1, ROWS=4)


def test_outside_of_the_context_nothing_is_checked():
    with sanitize():
        pass
    assert torch.equal(add_one(64, stride=16), torch.arange(1, 65, dtype=torch.float32))
