"""Attention of whole segments, an image each, against dense attention in float64, by autograd."""

from __future__ import annotations

import itertools
from itertools import pairwise
from typing import Any

import pytest
import torch
from contract.cases import CPU
from torch import Tensor

from bench.candidate import Outcome
from bench.measure import peak_bytes
from metis_kernels import FullAttentionImpl, Segments, _impl, full_attention, prefix_attention
from metis_kernels.prefix_attention.api import choose_full

PACKS: dict[str, tuple[int, ...]] = {
    "one image": (0, 48),
    "one token": (0, 1),
    "neighbours of one size": (0, 16, 32, 96, 100, 116),
    "an empty one": (0, 7, 7, 40),
    "blocks and tails": (0, 128, 384, 385, 660),  # blocks of 128
}
HEADS = [(2, 8), (3, 16), (2, 64), (2, 72), (1, 5)]
"""Heads and their size: 72 and 64 are those of Qwen3-VL's towers."""
IMPLS = (CPU, "reference", "sdpa")
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""As in test_prefix_attention.py."""


def inputs(num_tokens: int, heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """query, key, value and the gradient of the output."""
    draw = torch.Generator().manual_seed(num_tokens)
    return [torch.randn(num_tokens, *heads, generator=draw).to(dtype) for _ in range(4)]


def dense(query: Tensor, key: Tensor, value: Tensor, offsets: tuple[int, ...], scale: float) -> Tensor:
    """As written in a textbook, with a mask."""
    number = torch.repeat_interleave(torch.arange(len(offsets) - 1), torch.tensor([b - a for a, b in pairwise(offsets)]))
    scores = scale * torch.einsum("nhd,mhd->hnm", query, key)
    p = scores.masked_fill(number[:, None] != number[None], float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", p, value)


def results(tensors: list[Tensor], offsets: tuple[int, ...], scale: float | None, impl: FullAttentionImpl) -> list[Tensor]:
    """Output and gradients of query, key and value."""
    *leaves, d_out = tensors
    query, key, value = leaves = [x.clone().requires_grad_() for x in leaves]
    out = full_attention(query, key, value, offsets, scale=scale, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients_are_those_of_dense_attention(
    impl: FullAttentionImpl, heads: tuple[int, int], pack: str, dtype: torch.dtype
):
    offsets = PACKS[pack]
    tensors = inputs(offsets[-1], heads, dtype)
    query, key, value = leaves = [x.double().requires_grad_() for x in tensors[:3]]
    truth = dense(query, key, value, offsets, 0.3)
    want = [truth.detach(), *torch.autograd.grad(truth, leaves, tensors[3].double())]
    for name, one, exact in zip(("out", "query", "key", "value"), results(tensors, offsets, 0.3, impl), want, strict=True):
        assert one.dtype == dtype
        # a token alone has p = 1 and no gradient in query and key: only rounding, relative to the gradient of the output
        least = tensors[3].double().norm() * (1.0 if pack == "one token" else 1e-6)
        assert float((one.double() - exact).norm() / exact.norm().clamp(min=least)) < LIMITS[dtype], name


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_float64_is_exact(impl: FullAttentionImpl):
    offsets = PACKS["blocks and tails"]
    tensors = inputs(offsets[-1], (2, 16), torch.float64)
    query, key, value = leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    truth = dense(query, key, value, offsets, 16**-0.5)
    want = [truth.detach(), *torch.autograd.grad(truth, leaves, tensors[3])]
    for one, exact in zip(results(tensors, offsets, None, impl), want, strict=True):
        torch.testing.assert_close(one, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_image_sees_another(impl: FullAttentionImpl):
    offsets = PACKS["neighbours of one size"]
    tensors = inputs(offsets[-1], (2, 16), torch.float32)
    clean = results(tensors, offsets, None, impl)
    tensors[1][20] = torch.nan  # a key of the second image
    for before, after in zip(clean, results(tensors, offsets, None, impl), strict=True):
        assert after[16:32].isnan().any()
        torch.testing.assert_close(after[:16], before[:16], rtol=0, atol=0)
        torch.testing.assert_close(after[32:], before[32:], rtol=0, atol=0)


def test_the_number_of_threads_changes_no_bit():
    offsets, threads, found = PACKS["blocks and tails"], torch.get_num_threads(), []
    tensors = inputs(offsets[-1], (3, 72), torch.bfloat16)
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            found.append(results(tensors, offsets, None, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_heads_of_a_fused_projection_are_read_where_they_are(impl: FullAttentionImpl):
    fused = torch.randn(48, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    parts = fused.unbind(1)
    copies = [x.contiguous() for x in parts]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]  # the head size is not the fastest axis
    found = [full_attention(query, key, value, (0, 40, 48), impl=impl) for query, key, value in (parts, copies, turned)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_traces_and_its_gradients_too(impl: FullAttentionImpl):
    offsets = PACKS["an empty one"]
    *tensors, d_out = inputs(offsets[-1], (2, 8), torch.float32)
    query, key, value = leaves = [x.clone().requires_grad_() for x in tensors]
    compiled = torch.compile(lambda q, k, v: full_attention(q, k, v, offsets, impl=impl), fullgraph=True, backend="aot_eager")
    out = compiled(query, key, value)
    found = [out.detach(), *torch.autograd.grad(out, leaves, d_out)]
    for got, want in zip(found, results([*tensors, d_out], offsets, None, impl), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", [CPU, "reference"])
def test_the_registration_is_sound(impl: str):
    query, key, value, _ = (x.requires_grad_() for x in inputs(12, (2, 8), torch.float32))
    arguments = (query, key, value, [0, 5, 12], [-1, -1], 0.3, impl, False)
    assert set(torch.library.opcheck(torch.ops.metis_kernels.prefix_attention.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_never_held(dtype: torch.dtype):
    num_tokens, heads = 2048, (4, 72)
    tensors = inputs(num_tokens, heads, dtype)

    def step() -> Outcome:
        found = results(tensors, (0, num_tokens), None, "cpu")
        return Outcome(handed_back=sum(x.nbytes for x in found[1:]))

    # 11 float32 copies of a head's rows a thread, padded to 96, and what autograd keeps; all scores are 64 MiB
    rows = num_tokens * 96 * 4
    assert peak_bytes(step, torch.device("cpu")) < rows * (11 * torch.get_num_threads() + 6 * heads[0])


BAD = [
    ({"query_NHD": torch.zeros(13, 16)}, r"query_NHD: expected shape \[N, H, D\] = \[any, any, any\], got \[13, 16\]"),
    ({"query_NHD": torch.zeros(13, 2, 8).int()}, "query_NHD: expected dtype bfloat16 or .*, got int32"),
    ({"key_NHD": torch.zeros(13, 1, 8)}, r"key_NHD: expected shape \[N, H, D\] = \[13, 2, 8\], got \[13, 1, 8\]"),
    ({"value_NHD": torch.zeros(13, 2, 8).double()}, "value_NHD: expected dtype float32, got float64"),
    ({"offsets": (0, 12)}, "offsets: expected the last one to be 13, the tokens of query_NHD, got 12"),
    ({"offsets": (1, 13)}, r"offsets: expected numbers from 0 on, got \(1, 13\)"),
    ({"offsets": ()}, r"offsets: expected numbers from 0 on, got \(\)"),
    ({"offsets": (0, 14, 13)}, "offsets: expected ascending numbers, but segment 1 is 14 to 13"),
    ({"scale": -1.0}, "scale: expected a number > 0, got -1.0"),
    ({"impl": "triton"}, "impl: expected one of auto, sdpa, cpu, reference, got 'triton'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[next(iter(change)) + str(i) for i, (change, _) in enumerate(BAD)])
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str):
    query, key, value, _ = inputs(13, (2, 8), torch.float32)
    good: dict[str, Any] = {"query_NHD": query, "key_NHD": key, "value_NHD": value, "offsets": (0, 5, 13)}
    full_attention(**good)
    with pytest.raises(ValueError, match=f"^{message}$"):
        full_attention(**(good | change))


def test_prefix_attention_sends_such_segments_here():
    query, key, value, _ = inputs(13, (2, 8), torch.float32)
    with pytest.raises(ValueError, match=r"^segments: expected causal ones, got causal=False, which full_attention is for$"):
        prefix_attention(query, key, value, Segments((0, 13), (-1,), causal=False))


@pytest.mark.parametrize("built", [True, False])
def test_auto_takes_what_can_run_and_is_faster(built: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_impl, "cpu_library_status", lambda: "" if built else "not built")
    mixed, even = (Segments(offsets, (-1,) * (len(offsets) - 1), causal=False) for offsets in ((0, 4, 9), (0, 4, 8)))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for device, dtype, size, segments in itertools.product(("cpu", "cuda"), dtypes, (16, 72), (mixed, even)):
        ours = built and device == "cpu" and dtype in (torch.float32, torch.bfloat16)
        small = dtype == torch.float32 and size == 16 and segments is even
        chosen = choose_full("auto", torch.device(device), dtype, size, segments)
        assert chosen == ("cpu" if ours and not small else "sdpa")
