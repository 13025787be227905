"""`prefix_attention` through flash-attention's varlen calls: how they are split and merged, with an emulated kernel."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import emulated_flash
import pytest
import torch
from test_prefix_attention import PACKS, dense, inputs, results, visible
from torch import Tensor

from metis_kernels import Segments
from metis_kernels.prefix_attention import flash
from metis_kernels.prefix_attention.segments import readers

CUDA = torch.device("cuda")


LIBRARIES = {"2": None, "3": emulated_flash.FUNCTIONS_3, "3, operators": emulated_flash.OPERATORS_3}


def forget() -> None:
    for found in (flash._library, flash._library_3, flash._build_flags_3):
        found.cache_clear()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A flash-attn that can be imported, of the newest version; no FlashAttention-3, no Hopper."""
    package = ModuleType("flash_attn")
    package.__version__ = "2.8.3"  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", emulated_flash)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_config", None)
    monkeypatch.setattr(flash, "_is_hopper", lambda device: False)
    forget()
    emulated_flash.calls.clear()
    yield package
    forget()


def add_flash_3(monkeypatch: pytest.MonkeyPatch, interface: ModuleType | None, **without: bool) -> None:
    """A GPU of the Hopper kind, and FlashAttention-3 beside flash-attn."""
    monkeypatch.setattr(flash, "_is_hopper", lambda device: True)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    flags = {f"FLASHATTENTION_DISABLE_{name}": value for name, value in without.items()}
    monkeypatch.setitem(sys.modules, "flash_attn_config", SimpleNamespace(CONFIG={"build_flags": flags}))
    forget()


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is called: "2" or "3"."""
    interface = LIBRARIES[request.param]
    if interface is not None:
        add_flash_3(monkeypatch, interface)
    return request.param[0]


def attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """The op behind `prefix_attention`, which would ask for a GPU."""
    arguments = query, key, value, list(segments.offsets), list(segments.prefix), 0.3, "flash"
    return torch.ops.metis_kernels.prefix_attention(*arguments)[0]


@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 8)], ids=str)
@pytest.mark.parametrize("pack", PACKS)
def test_values_and_gradients_are_those_of_dense_attention(pack, heads, library: str):
    segments = PACKS[pack]
    *tensors, d_out = inputs(segments.num_tokens, heads, torch.float64)
    query, key, value = leaves = [x.requires_grad_() for x in tensors]
    want = results(leaves, d_out, dense(query, key, value, visible(segments), 0.3))
    got = results(leaves, d_out, attention(query, key, value, segments))
    for one, truth in zip(got, want, strict=True):
        torch.testing.assert_close(one, truth, rtol=0, atol=1e-12)
    times = 2 if readers(segments) else 1
    assert emulated_flash.calls == [f"{library} forward"] * times + [f"{library} backward"] * times


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
    # FlashAttention-3 is there and left alone
    assert emulated_flash.calls == ["2 forward"] * 2 + ["2 deterministic backward"] * 2


@pytest.mark.usefixtures("library")
def test_a_pack_without_tokens_is_no_call():
    query, key, value = empty = [torch.zeros(0, 2, 8, requires_grad=True) for _ in range(3)]
    out = attention(query, key, value, Segments((0,), ()))
    assert [x.shape for x in results(empty, torch.zeros(0, 2, 8), out)] == [(0, 2, 8)] * 4
    assert not emulated_flash.calls


@pytest.mark.usefixtures("library")
def test_determinism_that_is_asked_for_after_the_forward_call_is_given():
    segments = PACKS["one group"]
    *tensors, d_out = inputs(segments.num_tokens, (2, 1, 8), torch.float64)
    query, key, value = leaves = [x.requires_grad_() for x in tensors]
    want = results(leaves, d_out, dense(query, key, value, visible(segments), 0.3))
    out = attention(query, key, value, segments)
    torch.use_deterministic_algorithms(True)
    try:
        got = results(leaves, d_out, out)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, truth in zip(got, want, strict=True):
        torch.testing.assert_close(one, truth, rtol=0, atol=1e-12)
    assert emulated_flash.calls[2:] == ["2 deterministic backward"] * 2


def test_where_it_runs(package: ModuleType):
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
    package.__version__ = "2.6.3.post1"  # pyright: ignore[reportAttributeAccessIssue]
    forget()
    assert flash.why_not(CUDA, torch.bfloat16, 128) == "flash-attn 2.6.3.post1 is too old; install 2.7 or later"


@pytest.mark.usefixtures("package")
def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    forget()
    missing = flash.why_not(CUDA, torch.bfloat16, 128)
    assert missing.startswith("flash-attn cannot be imported (") and missing.endswith("); pip install flash-attn")
    add_flash_3(monkeypatch, None)
    assert flash.why_not(CUDA, torch.bfloat16, 128).startswith(f"{missing}; FlashAttention-3 cannot be imported (")


@pytest.mark.parametrize("interface", [emulated_flash.FUNCTIONS_3, emulated_flash.OPERATORS_3], ids=["functions", "operators"])
@pytest.mark.usefixtures("package")
def test_flash_3_alone_is_enough_on_hopper_unless_torch_is_to_be_deterministic(
    monkeypatch: pytest.MonkeyPatch, interface: ModuleType
):
    add_flash_3(monkeypatch, interface)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert flash.why_not(CUDA, torch.bfloat16, 128) == "" == flash.why_not(CUDA, torch.float16, 256)
    says = "FlashAttention-3 is not taken where torch.use_deterministic_algorithms is on"
    query = torch.zeros(9, 2, 8)
    torch.use_deterministic_algorithms(True)
    try:
        assert flash.why_not(CUDA, torch.bfloat16, 128).endswith(says)
        with pytest.raises(ValueError, match=says):
            attention(query, query, query, PACKS["one group"])
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(flash, "_is_hopper", lambda device: False)
    assert "FlashAttention-3" not in flash.why_not(CUDA, torch.bfloat16, 128)
    assert flash.why_not(CUDA, torch.bfloat16, 128).startswith("flash-attn cannot be imported (")


@pytest.mark.parametrize(
    ("without", "dtype", "size", "says"),
    [
        ({"FP16": True, "HDIM64": True}, torch.bfloat16, 64, ""),  # larger heads take it
        ({"FP16": True}, torch.float16, 64, "without FP16"),
        ({"VARLEN": True, "BACKWARD": True, "HDIM64": True}, torch.bfloat16, 128, "without BACKWARD, VARLEN"),
        ({"HDIM192": True, "HDIM256": True}, torch.bfloat16, 128, ""),
        ({"HDIM192": True, "HDIM256": True}, torch.bfloat16, 136, "without HDIM192, HDIM256"),
        ({"HDIM192": False, "HDIM256": True}, torch.bfloat16, 136, ""),
    ],
)
@pytest.mark.usefixtures("package")
def test_what_flash_3_was_built_without_is_left_to_flash_2(
    monkeypatch: pytest.MonkeyPatch, without, dtype, size: int, says: str
):
    add_flash_3(monkeypatch, emulated_flash.OPERATORS_3, **without)
    assert flash._kernels(CUDA, dtype, size) is (flash._FLASH_2 if says else flash._FLASH_3)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash._library.cache_clear()
    assert flash.why_not(CUDA, dtype, size).endswith(f"FlashAttention-3 was built {says}" if says else "")
    assert bool(flash.why_not(CUDA, dtype, size)) is bool(says)


def of_2024(q, k, v, softmax_scale, causal, q_descale=None): ...


def of_tomorrow(dout, q, k, v, softmax_lse, out): ...


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"forward": of_2024}, "_flash_attn_forward takes (q, k, v, softmax_scale, causal, q_descale), which"),
        ({"backward": of_tomorrow}, "_flash_attn_backward takes (dout, q, k, v, softmax_lse, out), which"),
        ({"backward": None}, "_flash_attn_backward takes (), which"),
    ],
)
@pytest.mark.usefixtures("package")
def test_a_flash_3_of_other_arguments_is_not_called_and_named(monkeypatch: pytest.MonkeyPatch, changed, says: str):
    add_flash_3(
        monkeypatch,
        emulated_flash.interface_3(**{"forward": emulated_flash._forward_3, "backward": emulated_flash._backward_3, **changed}),
    )
    assert flash._kernels(CUDA, torch.bfloat16, 128) is flash._FLASH_2
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash._library.cache_clear()
    assert f"FlashAttention-3's {says} is not known here; build" in flash.why_not(CUDA, torch.bfloat16, 128)
