"""`prefix_attention` through flash-attention's varlen calls: how they are split and merged, with an emulated kernel."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import emulated_flash
import pytest
import torch
from test_prefix_attention import PACKS, dense, inputs, results, visible
from torch import Tensor

from metis_kernels import Segments
from metis_kernels.prefix_attention import flash
from metis_kernels.prefix_attention.segments import readers

CUDA = torch.device("cuda")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A flash-attn that can be imported, of the newest version."""
    package = ModuleType("flash_attn")
    package.__version__ = "2.8.3"  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", emulated_flash)
    flash._library.cache_clear()
    emulated_flash.calls.clear()
    yield package
    flash._library.cache_clear()


def attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """The op behind `prefix_attention`, which would ask for a GPU."""
    arguments = query, key, value, list(segments.offsets), list(segments.prefix), 0.3, "flash"
    return torch.ops.metis_kernels.prefix_attention(*arguments)[0]


@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 8)], ids=str)
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.usefixtures("library")
def test_values_and_gradients_are_those_of_dense_attention(pack, heads):
    segments = PACKS[pack]
    *tensors, d_out = inputs(segments.num_tokens, heads, torch.float64)
    query, key, value = leaves = [x.requires_grad_() for x in tensors]
    want = results(leaves, d_out, dense(query, key, value, visible(segments), 0.3))
    got = results(leaves, d_out, attention(query, key, value, segments))
    for one, truth in zip(got, want, strict=True):
        torch.testing.assert_close(one, truth, rtol=0, atol=1e-12)
    assert emulated_flash.calls == ["forward", "backward"] if not readers(segments) else ["forward"] * 2 + ["backward"] * 2


@pytest.mark.usefixtures("library")
def test_bfloat16_is_rounded_once_more_where_parts_are_merged():
    segments = PACKS["blocks and tails"]
    *tensors, d_out = inputs(segments.num_tokens, (4, 2, 16), torch.bfloat16)
    query, key, value = exact = [x.double().requires_grad_() for x in tensors]
    want = results(exact, d_out.double(), dense(query, key, value, visible(segments), 0.3))
    query, key, value = leaves = [x.clone().requires_grad_() for x in tensors]
    for got, truth in zip(results(leaves, d_out, attention(query, key, value, segments)), want, strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.double() - truth).norm() / truth.norm()) < 2**-7


@pytest.mark.usefixtures("library")
def test_deterministic_backward_where_torch_is_asked_for_it():
    segments = PACKS["one group"]
    *tensors, d_out = inputs(segments.num_tokens, (2, 1, 8), torch.float32)
    query, key, value = leaves = [x.requires_grad_() for x in tensors]
    torch.use_deterministic_algorithms(True)
    try:
        results(leaves, d_out, attention(query, key, value, segments))
    finally:
        torch.use_deterministic_algorithms(False)
    assert emulated_flash.calls == ["forward"] * 2 + ["deterministic backward"] * 2


@pytest.mark.usefixtures("library")
def test_a_pack_without_tokens_is_no_call():
    query, key, value = empty = [torch.zeros(0, 2, 8, requires_grad=True) for _ in range(3)]
    out = attention(query, key, value, Segments((0,), ()))
    assert [x.shape for x in results(empty, torch.zeros(0, 2, 8), out)] == [(0, 2, 8)] * 4
    assert not emulated_flash.calls


def test_where_it_runs(library: ModuleType):
    assert flash.why_not(CUDA, torch.bfloat16, 128) == ""
    assert flash.why_not(CUDA, torch.float16, 256) == ""
    assert flash.why_not(CUDA, torch.float32, 128) == "it takes CUDA tensors of bfloat16 or float16, got float32 on cuda"
    assert flash.why_not(torch.device("cpu"), torch.float16, 8) == (
        "it takes CUDA tensors of bfloat16 or float16, got float16 on cpu"
    )
    for size in (20, 264):
        assert (
            flash.why_not(CUDA, torch.bfloat16, size) == f"it takes head sizes that are multiples of 8, up to 256, got {size}"
        )
    library.__version__ = "2.6.3.post1"  # pyright: ignore[reportAttributeAccessIssue]
    flash._library.cache_clear()
    assert flash.why_not(CUDA, torch.bfloat16, 128) == "flash-attn 2.6.3.post1 is too old; install 2.7 or later"


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash._library.cache_clear()
    assert flash.why_not(CUDA, torch.bfloat16, 128).startswith("flash-attn cannot be imported (")
    flash._library.cache_clear()
